"""How can a model attend to a paged cache? Tries the ways on the model, and takes the first that is right.

A way is right if prompts that are computed in pieces, beside each other, through a store that loses nothing,
give the logits of plain transformers.
"""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from turboquant_core import (
    CacheManager,
    ExactCodec,
    LayerShape,
    PagedStore,
    StatePool,
    StoreLayer,
    Timeline,
    UnsupportedAttentionError,
    Visibility,
    layer_visibilities,
    probe_dense_layers,
    probe_paged_layers,
    use_paged_attention,
    use_plain_attention,
)
from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.engine.request import FinishReason, Request
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import Scheduler
from turboquant_server.tensor_parallel import undivided

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Short enough for a second, long enough for blocks, for several chunks, and for two prompts in one forward.
TIMELINE = Timeline(residual_length=64, segment_size=64)
PROMPT_LENGTHS = (150, 40)
NUM_DECODED = 3
MAX_BATCHED_TOKENS = 128
# Root mean square of the logits' error over the logits' standard deviation. Where a way is right it is below
# 1e-5 in float32; in 16 bits, experts chosen differently can make it large for good reasons.
MAX_ERROR_FLOAT32 = 1e-4
MAX_ERROR_16_BIT = 0.2

logger = logging.getLogger(__name__)


class UnsupportedModelError(RuntimeError):
    """The model does not work with a paged cache; the message says why."""


@dataclass(frozen=True)
class ModelAttention:
    """How a model attends to what it has seen.

    Attributes:
        is_paged: On the store, many requests at once; otherwise each request gets its past as one tensor.
        one_shot: A request's tokens cannot be computed in several steps.
        shapes: What each layer stores, by the index of the cache layer.
        visibilities: What its queries see.
        state_bytes: What recurrent layers remember of a request.
    """

    is_paged: bool
    one_shot: bool
    shapes: Mapping[int, LayerShape]
    visibilities: Mapping[int, Visibility]
    state_bytes: int = 0

    @property
    def groups(self) -> list[Visibility]:
        """The different visibilities; layers of one have their block ids in common."""
        return list(dict.fromkeys(self.visibilities[index] for index in self.shapes))

    def group_of(self, layer_idx: int) -> int:
        """Return the index of a layer's group."""
        return self.groups.index(self.visibilities[layer_idx])


def find_attention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_model_len: int,
    ranks: Ranks = ALONE,
) -> ModelAttention:
    """Return how a model attends, and leave it attending that way.

    Of a model that ranks have in parts, what is compared with is computed by each of them as a whole.

    Raises:
        UnsupportedModelError: No way gives the logits of plain transformers.
    """
    prompts = _prompts(model, max_model_len)
    try:
        with undivided(model):
            expected = [_plain_logits(model, tokens) for tokens in prompts]
    except (torch.OutOfMemoryError, UnsupportedModelError):
        raise
    except Exception as failure:
        raise UnsupportedModelError(f"it fails even without one ({_first_line(failure)})") from failure
    reasons = []
    for is_paged, one_shot in _ways(model) if ranks.size == 1 else [(True, False)]:
        try:
            attention = _prepare(model, is_paged, one_shot)
            attention, logits = _paged_logits(model, tokenizer, attention, prompts, expected[0].shape[-1])
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:
            logger.debug("a way to attend failed", exc_info=True)
            is_told = isinstance(failure, UnsupportedModelError | UnsupportedAttentionError)
            reasons.append(str(failure) if is_told else f"it fails with one ({_first_line(failure)})")
            continue
        error = ranks.largest(max(_relative_error(*pair) for pair in zip(logits, expected, strict=True)))
        if error <= (MAX_ERROR_FLOAT32 if model.dtype == torch.float32 else MAX_ERROR_16_BIT):
            return attention
        reasons.append(f"its logits are off by {error:.1g} of their standard deviation")
    raise UnsupportedModelError(reasons[0])


def _prompts(model: PreTrainedModel, max_model_len: int) -> list[list[int]]:
    """Return tokens from all over the vocabulary, the ones to be decoded included."""
    embeddings: Any = model.get_input_embeddings()
    lengths = [min(length + NUM_DECODED, max_model_len) for length in PROMPT_LENGTHS]
    return [
        torch.linspace(0, embeddings.num_embeddings - 1, length).long().roll(index).tolist()
        for index, length in enumerate(lengths)
    ]


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    input_ids = torch.tensor([tokens], device=model.device)
    logits: Tensor = model(input_ids=input_ids, use_cache=False).logits[0].double()
    if not logits.isfinite().all():
        raise UnsupportedModelError("its logits are not finite")
    return logits


def _ways(model: PreTrainedModel) -> list[tuple[bool, bool]]:
    """Return (on the store, all tokens in one step), the best first."""
    # Latent attention is stored as it is, not as the many heads that are made of it.
    first = _count_numbers(model, is_paged=True) <= _count_numbers(model, is_paged=False)
    return [(first, False), (not first, False), (True, True)]


def _count_numbers(model: PreTrainedModel, is_paged: bool) -> float:
    """Return how many numbers of a token the cache holds, without bound if it cannot be told."""
    try:
        shapes = _prepare(model, is_paged, False).shapes.values()
    except Exception:
        return math.inf
    return sum(shape.num_kv_heads * (shape.key_dim + shape.value_dim) for shape in shapes)


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}"


def _prepare(model: PreTrainedModel, is_paged: bool, one_shot: bool) -> ModelAttention:
    if is_paged:
        if not use_paged_attention(model):
            raise UnsupportedModelError("its attention is its own")
        shapes = probe_paged_layers(model)
        visibilities = layer_visibilities(model.config)
    else:
        use_plain_attention(model)
        shapes = probe_dense_layers(model)
        visibilities = dict.fromkeys(shapes, Visibility())  # the model applies its windows itself
    return ModelAttention(is_paged, one_shot, shapes, visibilities)


def _paged_logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attention: ModelAttention,
    prompts: list[list[int]],
    vocab_size: int,
) -> tuple[ModelAttention, list[Tensor]]:
    """Return logits ``[num_tokens, vocab_size]`` of each prompt, NaN where a step gave none."""
    groups = attention.groups
    manager = CacheManager(TIMELINE, groups, [8] * len(groups), len(prompts), caches_prefixes=False)
    store = PagedStore(
        {
            index: StoreLayer(
                ExactCodec(shape.key_dim, shape.value_dim, model.dtype),
                shape.num_kv_heads,
                shape.key_dim,
                shape.value_dim,
                attention.group_of(index),
            )
            for index, shape in attention.shapes.items()
        },
        groups,
        TIMELINE,
        num_blocks=[8] * len(groups),
        num_slots=len(prompts),
        dtype=model.dtype,
        device=model.device,
    )
    layers = DynamicCache(config=model.config).layers
    has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    if not attention.shapes and not has_states:
        raise UnsupportedModelError("it gives nothing to its cache")
    states = StatePool(len(prompts)) if has_states else None
    runner = ModelRunner(model, store, states, is_paged=attention.is_paged)
    scheduler = Scheduler(manager.open, TIMELINE, MAX_BATCHED_TOKENS, one_shot=attention.one_shot)
    logits = [torch.full((len(tokens), vocab_size), torch.nan, dtype=torch.float64) for tokens in prompts]
    for index, tokens in enumerate(prompts):
        prompt = tokens[: max(1, len(tokens) - NUM_DECODED)]
        scheduler.add(
            Request(
                str(index), prompt, SamplingParams(max_tokens=len(tokens)), Detokenizer(tokenizer, prompt)
            )
        )
    while scheduler.running or scheduler.waiting:
        batch = scheduler.schedule()
        for scheduled, is_decode in ((batch.prefills, False), (batch.decodes, True)):
            if not scheduled:
                continue
            for item, row in zip(scheduled, runner.forward(scheduled, is_decode=is_decode), strict=True):
                scheduler.advance(item)
                request, position = item.request, item.chunks[-1].end
                tokens = prompts[int(request.request_id)]
                logits[int(request.request_id)][position - 1] = row.double()
                if position == len(tokens):
                    scheduler.finish(request, FinishReason.LENGTH)
                elif position == request.num_tokens:
                    request.token_ids.append(tokens[position])
    manager.check_integrity()
    state_bytes = states.slot_bytes if states else 0
    return dataclasses.replace(attention, state_bytes=state_bytes), logits


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    """Return the root mean square of the error over the standard deviation, where there are logits."""
    computed = ~logits.isnan().any(-1)
    error = logits[computed] - expected.to(logits.device)[computed]
    return float(error.square().mean().sqrt() / expected.std())
