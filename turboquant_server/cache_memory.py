"""The memory of the cache on the device: how much there is for it, and its tensors.

It gets what may be taken, less the weights and the scratch of a step. The scratch is measured: the largest
step that can come up is run on a small cache.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import torch

from turboquant_core import CacheManager, Chunk, HostStore, PagedStore, RequestCache, StatePool, StoreLayer
from turboquant_server.cache_size import TIMELINE, CacheSize, divide_memory, format_bytes
from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.engine.request import Request
from turboquant_server.engine.sampler import SamplingRow, sample
from turboquant_server.engine.sampling_params import MAX_LOGPROBS, SamplingParams
from turboquant_server.engine.scheduler import ScheduledRequest
from turboquant_server.load_error import ModelLoadError
from turboquant_server.memory import memory_budget, memory_in_use

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from turboquant_server.attention_check import ModelAttention
    from turboquant_server.config import ServerConfig
    from turboquant_server.engine.compiled_forward import CompiledForward

logger = logging.getLogger(__name__)

# Attention on the store reads the past in pieces: a past of more tokens takes no more scratch.
MEASURED_PAST = 4096
# What fragmentation and libraries take on top.
CUDA_RESERVE = 512 * 2**20


def size_cache(
    config: ServerConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attention: ModelAttention,
    layers: dict[int, StoreLayer],
    max_model_len: int,
    compiled: CompiledForward | None = None,
    reserved_bytes: int = 0,
    ranks: Ranks = ALONE,
) -> CacheSize:
    """Return the cache that the device, and that of each other rank, has room for, as the flags say.

    Args:
        config: The flags.
        model: Which is on its device.
        tokenizer: Of the model.
        attention: How it attends.
        layers: What the store needs.
        max_model_len: Most tokens of a request.
        compiled: Takes the place of the model's forward.
        reserved_bytes: What others will take of the device.
        ranks: Those that share the model.

    Raises:
        ModelLoadError: There is not enough memory.
    """

    def divide(num_bytes: int) -> CacheSize:
        return divide_memory(num_bytes, attention, layers, model.dtype, max_model_len, config)

    if config.swap_space:
        reserved_bytes += HostStore.device_bytes(layers)
    device = model.device
    in_use = memory_in_use(device)
    if config.kv_cache_memory is not None:
        size = divide(config.kv_cache_memory)
        available = ranks.smallest(memory_budget(device, 1.0) - in_use - reserved_bytes)
        if size.num_bytes > available:
            raise ModelLoadError(
                f"--kv-cache-memory asks for {format_bytes(size.num_bytes)} and {device} has "
                f"{format_bytes(available)} left; give less"
            )
        return size
    budget = memory_budget(device, config.gpu_memory_utilization, config.vram_limit) - reserved_bytes
    if device.type != "cuda":
        # What is left of the machine's memory is enough for the steps.
        return divide(ranks.smallest(budget // ranks.size))
    left = ranks.smallest(budget - in_use - CUDA_RESERVE)
    if left > 0:
        left -= _measure_scratch(
            config, model, tokenizer, attention, layers, divide(left), max_model_len, compiled
        )
        left = ranks.smallest(left)
    if left <= 0:
        raise ModelLoadError(
            f"the weights take {format_bytes(in_use)} of {format_bytes(budget)} and leave no memory for a "
            "cache; try --quantize int8 or int4, or a smaller model"
        )
    return divide(left)


def build_store(
    attention: ModelAttention,
    layers: dict[int, StoreLayer],
    size: CacheSize,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[PagedStore, StatePool | None]:
    """Allocate a cache."""
    store = PagedStore(
        layers,
        attention.groups,
        TIMELINE,
        num_blocks=size.num_blocks,
        num_slots=size.num_slots,
        dtype=dtype,
        device=device,
    )
    return store, StatePool(size.num_slots) if attention.state_bytes else None


def open_manager(
    attention: ModelAttention, size: CacheSize, *, caches_prefixes: bool, num_host_blocks: int = 0
) -> CacheManager:
    """Return the manager of a cache; prefixes are shared if a prompt can go on from what another left.

    States of recurrent layers are of one prompt, and a model of one step has no prompt that goes on.
    """
    caches_prefixes = caches_prefixes and not attention.state_bytes and not attention.one_shot
    return CacheManager(
        TIMELINE, attention.groups, size.num_blocks, size.num_slots, caches_prefixes, num_host_blocks
    )


def fit_context(config: ServerConfig, size: CacheSize, longest: int, max_model_len: int) -> int:
    """Return how many tokens a request may have: those of the model, or fewer if the cache holds no more.

    Args:
        config: The flags.
        size: Of the cache.
        longest: Tokens of a request that it holds.
        max_model_len: Those that the model was made for, or that --max-model-len asks for.

    Raises:
        ModelLoadError: It holds fewer than --max-model-len.
    """
    if longest >= max_model_len:
        return max_model_len
    room = format_bytes(size.num_bytes)
    if config.max_model_len is not None:
        smaller = "--kv-cache-dtype turboquant" if config.kv_cache_dtype == "bf16" else "fewer --bits"
        raise ModelLoadError(
            f"--max-model-len {max_model_len} does not fit: the cache of {room} holds {longest} tokens "
            f"of a request; give {longest} or less, more memory, {smaller} or a smaller --max-num-seqs"
        )
    logger.warning(
        "a request may have %s tokens, as many as the cache of %s holds; the model was made for %s",
        f"{longest:,}",
        room,
        f"{max_model_len:,}",
    )
    return longest


@torch.inference_mode()
def _measure_scratch(
    config: ServerConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    attention: ModelAttention,
    layers: dict[int, StoreLayer],
    size: CacheSize,
    max_model_len: int,
    compiled: CompiledForward | None,
) -> int:
    """Return the most bytes that a step takes beside the weights and a cache of this size."""
    length = min(max_model_len, open_manager(attention, size, caches_prefixes=False).max_tokens) - 1
    if attention.is_paged and not attention.one_shot:
        length = min(length, MEASURED_PAST + config.max_num_batched_tokens)
    num_blocks = TIMELINE.num_blocks(length + 1, length)
    small = dataclasses.replace(size, num_slots=1, num_blocks=(num_blocks,) * len(size.groups))
    store, states = build_store(attention, layers, small, model.dtype, model.device)
    cache = open_manager(attention, small, caches_prefixes=False).open([0] * length, length)
    assert cache is not None and cache.extend(0, length + 1), "the cache has room for this request"
    runner = ModelRunner(model, store, states, is_paged=attention.is_paged, compiled=compiled)
    # Sorting for top_p takes most, beside what penalties make of the logits.
    params = SamplingParams(max_tokens=1, top_p=0.9, presence_penalty=1, repetition_penalty=2)
    asking = SamplingParams(max_tokens=1, prompt_logprobs=MAX_LOGPROBS)
    tokens = [0] * (length + 1)
    request, asking_request = (
        Request("largest step", tokens[:length], wanted, Detokenizer(tokenizer, tokens[:length]))
        for wanted in (params, asking)
    )
    request.token_ids = tokens
    step = _last_step(cache, length, length if attention.one_shot else config.max_num_batched_tokens)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    runner.forward([ScheduledRequest(request, step)], is_decode=False)
    try:
        runner.forward([ScheduledRequest(asking_request, step)], is_decode=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does that cannot be taken apart
        logger.warning("requests for prompt_logprobs will fail: %s (%s)", error, type(error).__name__)
    prefill = torch.cuda.max_memory_allocated(model.device) - before
    torch.cuda.reset_peak_memory_stats(model.device)
    decode = ScheduledRequest(request, [Chunk(cache, length, length + 1, length)])
    logits = runner.forward([decode] * size.num_slots, is_decode=True)
    # The table of `TokenCounts` stays once it has been made.
    counts = torch.zeros(size.num_slots, logits.shape[-1], dtype=torch.int32, device=logits.device)
    sample(logits, [SamplingRow(params, 0, 0, length)] * size.num_slots, counts)
    decode_bytes = torch.cuda.max_memory_allocated(model.device) - before - counts.nbytes
    # So do graphs.
    has_graphs = runner.can_capture and not config.enforce_eager
    return counts.nbytes + (prefill + decode_bytes if has_graphs else max(prefill, decode_bytes))


def _last_step(cache: RequestCache, num_prompt_tokens: int, max_num_batched_tokens: int) -> list[Chunk]:
    """Return the last chunks of a prompt, as many as a step computes."""
    cuts = TIMELINE.cut(num_prompt_tokens, num_prompt_tokens)
    chunks = [Chunk(cache, start, end, num_prompt_tokens) for start, end in cuts]
    first = len(chunks) - 1
    while first and num_prompt_tokens - chunks[first - 1].start <= max_num_batched_tokens:
        first -= 1
    return chunks[first:]
