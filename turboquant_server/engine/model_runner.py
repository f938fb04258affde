"""Runs the model on a scheduled batch; all that happens on the device happens here. Knows no text."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING

import torch

from turboquant_core import cache_argument
from turboquant_server.engine.request import Request, RequestFailedError
from turboquant_server.engine.sampler import INVALID_TOKEN_ID, sample
from turboquant_server.engine.scheduler import ScheduledBatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class ModelRunner:
    """Compute scheduled tokens into the requests' caches and choose the tokens that follow.

    Args:
        model: A causal language model of transformers, in evaluation mode, on its device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        # Only the last position's logits are needed; a long chunk's would take more memory than its cache.
        takes_logits_to_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._forward_options = {"logits_to_keep": 1} if takes_logits_to_keep else {}
        self._cache_argument = cache_argument(model)

    def run(self, batch: ScheduledBatch) -> list[int | RequestFailedError | None]:
        """Compute one step.

        Returns:
            For each request its new token, None while its prompt is incomplete, or why it failed. The
            failure of one request leaves the others alone.
        """
        return [
            self._run_request(request, num_tokens)
            for request, num_tokens in zip(batch.requests, batch.num_scheduled_tokens, strict=True)
        ]

    def _run_request(self, request: Request, num_tokens: int) -> int | RequestFailedError | None:
        try:
            token_id = self._compute(request, num_tokens)
        except torch.OutOfMemoryError:
            logger.exception("request %s ran out of memory", request.request_id)
            return RequestFailedError(request.request_id, "The device ran out of memory on this request.")
        except Exception as error:
            logger.exception("request %s failed", request.request_id)
            # The error itself stays here: its traceback holds the cache and the activations.
            message = f"The model failed on this request ({type(error).__name__}); the log has the details."
            return RequestFailedError(request.request_id, message)
        if token_id == INVALID_TOKEN_ID:
            logger.error("request %s got logits that are not finite", request.request_id)
            message = (
                "The model's output is not a number; a wider dtype, such as bfloat16 or float32, may help."
            )
            return RequestFailedError(request.request_id, message)
        return token_id

    @torch.inference_mode()
    def _compute(self, request: Request, num_tokens: int) -> int | None:
        start = request.num_computed_tokens
        end = start + num_tokens
        input_ids = torch.tensor([request.token_ids[start:end]], device=self._model.device)
        outputs = self._model(
            input_ids=input_ids,
            use_cache=True,
            return_dict=True,
            **self._forward_options,
            **{self._cache_argument: request.cache},
        )
        request.num_computed_tokens = end
        if end < request.num_tokens:
            return None
        return int(sample(outputs.logits[0, -1], request.sampling_params, request.seed, position=end))
