"""SplitForward: a model's forward as two functions, one to hidden states and one from them to logits.

Logits of many tokens take far more memory than their hidden states; split, they can be had in slices. What is
called is the model's own forward, with something in place of its body; so whatever else the model does to
logits, scaling or capping them, is done. Knows no requests and no store.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from turboquant_server.engine.model_forward import ModelForward

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class SplitForward:
    """Run a model, and its last part again for other tokens.

    Args:
        model: A causal language model of transformers. It is left as it is, so that what was compiled of it
            still fits.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        embeddings: Any = model.get_input_embeddings()
        [name, *_] = [name for name, module in model.named_modules() if module is embeddings]
        path = name.split(".")
        self._exchange = _Exchange()
        modules: dict[str, Any] = dict(model._modules)
        modules[path[0]] = _Body(modules[path[0]], path[1:-1], self._exchange)
        model = copy.copy(model)
        model._modules = modules
        self._forward = ModelForward(model)

    def __call__(
        self, input_ids: Tensor, position_ids: Tensor, wanted: Tensor, cache: Cache
    ) -> tuple[Tensor, Tensor]:
        """Run the model.

        Args:
            input_ids: ``[num_rows, num_tokens]``.
            position_ids: The same of their positions.
            wanted: ``[num_wanted]``, places in each row whose logits are needed.
            cache: What the model gets for one.

        Returns:
            Logits ``[num_rows, num_wanted, vocab_size]``, and of all tokens what `logits` makes logits of,
            ``[num_rows, num_tokens, hidden_size]``.
        """
        try:
            logits = self._forward(input_ids, position_ids, wanted, cache)
            assert self._exchange.states is not None, "the body is what the model calls"
            return logits, self._exchange.states
        finally:
            self._exchange.states = None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of tokens, ``[num_tokens, vocab_size]``.

        Args:
            states: ``[num_tokens, hidden_size]``, of a call.
        """
        places = torch.arange(len(states), device=states.device)
        self._exchange.given = states[None]
        try:
            return self._forward(places[None], places[None], places, None)[0]
        finally:
            self._exchange.given = None


class _Exchange:
    """What a body has returned, and what it is to return in its place."""

    output_type: Any = None
    states: Tensor | None = None
    given: Tensor | None = None


class _Body(nn.Module):
    """Stand for a model's body.

    Args:
        body: The model's own.
        path: Names of the modules in it that lead to the embeddings; some models call one of them instead.
        exchange: Gets what the body returns, or has what is returned in its place.
    """

    def __init__(self, body: nn.Module, path: Sequence[str], exchange: _Exchange) -> None:
        super().__init__()
        self._body = body
        self._exchange = exchange
        if path:
            self._modules[path[0]] = _Body(getattr(body, path[0]), path[1:], exchange)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_body"), name)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        exchange = self._exchange
        if exchange.given is not None:
            return exchange.output_type(last_hidden_state=exchange.given)
        outputs = self._body(*arguments, **options)
        exchange.output_type, exchange.states = type(outputs), outputs.last_hidden_state
        return outputs
