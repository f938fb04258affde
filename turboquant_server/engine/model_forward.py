"""ModelForward: a language model of transformers as a function of tensors. Knows no requests and no store."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor

from turboquant_core import cache_argument

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class ModelForward:
    """Call a model, however it names what it takes.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache_argument = cache_argument(model)
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        # Only some positions' logits are needed; a long chunk's would take more memory than its cache.
        self._takes_logits_to_keep = "logits_to_keep" in parameters

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, wanted: Tensor, cache: Cache | None
    ) -> Tensor:
        """Run the model.

        Args:
            input_ids: ``[num_rows, num_tokens]``.
            position_ids: The same of their positions.
            wanted: ``[num_wanted]``, places in each row whose logits are needed.
            cache: What the model gets for one.

        Returns:
            Logits ``[num_rows, num_wanted, vocab_size]``.
        """
        options: dict[str, Any] = {self._cache_argument: cache}
        if self._takes_positions:
            options["position_ids"] = position_ids
        if self._takes_logits_to_keep:
            options["logits_to_keep"] = wanted
        outputs = self._model(input_ids=input_ids, use_cache=True, return_dict=True, **options)
        logits: Tensor = outputs.logits
        return logits if self._takes_logits_to_keep else logits[:, wanted]
