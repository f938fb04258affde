"""A request through a KV cache: its tokens, times and bytes. Knows how caches are run, not which there are.

A short run comes before those that count, so that kernels are compiled and memory is at hand. Short requests
are run several times, as a machine is busy with other things now and then.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from turboquant_core import cache_argument, use_plain_attention
from turboquant_server.config import ServerConfig
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_loader import LoadedModel
from turboquant_server.model_manager import ModelManager

NUM_WARMUP_PROMPT_TOKENS, NUM_WARMUP_TOKENS = 4096, 2
# A request is run again until it has taken so many seconds, at most so many times; medians count.
REPEAT_SECONDS, MAX_RUNS = 4, 5


@dataclass(frozen=True)
class Lap:
    """A part of a request.

    Attributes:
        seconds: How long it took.
        peak_bytes: The most that tensors took of the GPU, the model included, but what the cache has room for
            beyond this request; None on a CPU.
    """

    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Run:
    """What a request gave.

    Attributes:
        token_ids: The likeliest token each time.
        prefill: From the prompt to the first token; the median of all runs.
        decode: From there to the last token; likewise.
        kv_bytes: What the request holds of the cache when the last token comes.
    """

    token_ids: list[int]
    prefill: Lap
    decode: Lap
    kv_bytes: int


_run_numbers = itertools.count()

# Runs a model on a prompt until there are so many tokens.
RunCache: TypeAlias = Callable[[LoadedModel, Sequence[int], int], Run]


class _Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._restart()

    def _restart(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._started = time.perf_counter()

    def lap(self) -> Lap:
        """Return what was since the last lap; the caller has waited for the GPU."""
        seconds = time.perf_counter() - self._started
        on_gpu = self._device.type == "cuda"
        lap = Lap(seconds, torch.cuda.max_memory_allocated(self._device) if on_gpu else None)
        self._restart()
        return lap


def run_plain(loaded: LoadedModel, prompt: Sequence[int], num_tokens: int) -> Run:
    """Run transformers' own cache; the prompt goes through the model at once, as in `generate`."""
    use_plain_attention(loaded.model)
    _generate_plain(loaded.model, prompt[:NUM_WARMUP_PROMPT_TOKENS], NUM_WARMUP_TOKENS)
    return _repeat(lambda: _generate_plain(loaded.model, prompt, num_tokens))


def _repeat(run: Callable[[], Run]) -> Run:
    runs: list[Run] = []
    started = time.perf_counter()
    while not runs or (len(runs) < MAX_RUNS and time.perf_counter() - started < REPEAT_SECONDS):
        runs.append(run())
    return replace(
        runs[0], prefill=_median([run.prefill for run in runs]), decode=_median([run.decode for run in runs])
    )


def _median(laps: Sequence[Lap]) -> Lap:
    return sorted(laps, key=lambda lap: lap.seconds)[(len(laps) - 1) // 2]


@torch.inference_mode()
def _generate_plain(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Run:
    cache = DynamicCache(config=model.config)
    options = {cache_argument(model): cache, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    token_ids: list[int] = []
    laps = []
    input_ids = torch.tensor([prompt], device=model.device)
    watch = _Stopwatch(model.device)
    for count in (1, num_tokens):
        while len(token_ids) < count:
            token = model(input_ids=input_ids, **options).logits[0, -1].argmax()
            token_ids.append(int(token))
            input_ids = token.view(1, 1)
        laps.append(watch.lap())
    tensors = [part for layer in cache.layers for part in vars(layer).values() if isinstance(part, Tensor)]
    prefill, decode = laps
    return Run(token_ids, prefill, decode, sum(tensor.nbytes for tensor in tensors))


class ServedCache:
    """Runs a server's engine, which is kept for requests that are no longer than one before.

    Args:
        config: Of the server.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._manager: ModelManager | None = None

    def __call__(self, loaded: LoadedModel, prompt: Sequence[int], num_tokens: int) -> Run:
        """Run a request.

        Raises:
            ModelLoadError: The model cannot be served so, or the memory is too small.
            RequestFailedError: The memory was too small after all.
        """
        length = len(prompt) + num_tokens
        if self._manager is None or self._manager.max_model_len < length:
            self.close()
            use_plain_attention(loaded.model)
            update = {"max_model_len": length, "max_num_seqs": 1, "enable_prefix_caching": False}
            manager = ModelManager(self._config.model_copy(update=update))
            manager.load(loaded._replace(max_model_len=length))
            self._manager = manager
        manager, warmup, device = self._manager, list(prompt[:NUM_WARMUP_PROMPT_TOKENS]), loaded.model.device
        asyncio.run(_answer(manager, warmup, NUM_WARMUP_TOKENS, None))
        return _repeat(lambda: asyncio.run(_generate_served(manager, device, list(prompt), num_tokens)))

    def close(self) -> None:
        """Stop the engine."""
        if self._manager is not None:
            self._manager.unload()
            self._manager = None


async def _generate_served(
    manager: ModelManager, device: torch.device, prompt: list[int], num_tokens: int
) -> Run:
    watch = _Stopwatch(device)
    token_ids, laps, held_bytes = await _answer(manager, prompt, num_tokens, watch)
    unused = manager.cache_bytes - held_bytes
    prefill, decode = (
        replace(lap, peak_bytes=None if lap.peak_bytes is None else lap.peak_bytes - unused) for lap in laps
    )
    return Run(token_ids, prefill, decode, held_bytes)


async def _answer(
    manager: ModelManager, prompt: list[int], num_tokens: int, watch: _Stopwatch | None
) -> tuple[list[int], list[Lap], int]:
    """Return an answer, its laps, and the most bytes of the cache that the request was seen to hold."""
    token_ids: list[int] = []
    laps: list[Lap] = []
    held_bytes = 0
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    request_id = f"run {next(_run_numbers)}"
    async for output in manager.engine.generate(prompt, params, request_id):
        token_ids += output.token_ids
        if watch and len(token_ids) in (1, num_tokens):
            laps.append(watch.lap())
        # The engine is ahead of what is read here, and holds nothing once it has ended.
        state = manager.engine_state()
        held_bytes = max(held_bytes, 0 if state is None else state.usage.held_bytes)
    return token_ids, laps, held_bytes
