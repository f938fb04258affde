"""The cache takes what the flags and the device leave for it, and its tensors take what was planned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import CacheManager, StoreLayer
from turboquant_server import cache_memory
from turboquant_server.attention_check import ModelAttention, find_attention
from turboquant_server.cache_memory import build_store, open_manager, size_cache
from turboquant_server.cache_plan import CachePlan
from turboquant_server.cache_size import TIMELINE, CacheSize, divide_memory
from turboquant_server.config import ServerConfig
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.scheduler import ScheduledRequest
from turboquant_server.load_error import ModelLoadError

pytestmark = pytest.mark.usefixtures("no_variables")

MIB = 2**20
GIB = 2**30
MAX_MODEL_LEN = 256
PLAN = CachePlan(4, 4)
EXACT_PLAN = CachePlan(16, 16, exact_dtype=torch.bfloat16)


def prepared(
    name: str, tokenizer: PreTrainedTokenizerFast, plan: CachePlan = PLAN
) -> tuple[PreTrainedModel, ModelAttention, dict[int, StoreLayer]]:
    model = architectures.build(name)
    attention = find_attention(model, tokenizer, MAX_MODEL_LEN)
    return model, attention, plan.store_layers(attention)


def tensor_bytes(size: CacheSize, model: PreTrainedModel, attention: ModelAttention, layers: Any) -> int:
    """Build a cache, compute a token in it, and add up its tensors."""
    store, states = build_store(attention, layers, size, model.dtype, model.device)
    runner = ModelRunner(model, store, states, is_paged=attention.is_paged)
    cache = open_manager(attention, size, caches_prefixes=False).open([1], 1)
    request = SimpleNamespace(token_ids=[1], num_tokens=1, scores_prompt=False)
    chunk = SimpleNamespace(cache=cache, start=0, end=1, num_prompt_tokens=1, num_tokens=1)
    runner.forward([ScheduledRequest(request, [chunk])], is_decode=False)  # type: ignore[arg-type, list-item]
    kept = [*store.records.values(), *(tensor for pair in store.exact.values() for tensor in pair)]
    if states is not None:
        kept += states._states.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral", "gemma3_text", "gemma3n_text", "qwen3_next", "mamba2", "deepseek_v3", "jamba"],
)
@pytest.mark.parametrize("plan", [PLAN, EXACT_PLAN], ids=["codes", "exact"])
def test_the_tensors_take_what_was_planned(
    name: str, plan: CachePlan, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, attention, layers = prepared(name, tiny_tokenizer, plan)
    for num_bytes in (MIB, 3 * MIB):
        size = divide_memory(num_bytes, attention, layers, model.dtype, 2**20, ServerConfig())
        assert tensor_bytes(size, model, attention, layers) == size.num_bytes <= num_bytes


@pytest.mark.parametrize(("name", "shared"), [("llama", True), ("gemma3_text", True), ("qwen3_next", False)])
def test_prefixes_are_shared_unless_the_flag_or_states_forbid_it(
    name: str, shared: bool, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    _, attention, layers = prepared(name, tiny_tokenizer)
    size = divide_memory(MIB, attention, layers, torch.float32, MAX_MODEL_LEN, ServerConfig())
    assert open_manager(attention, size, caches_prefixes=True).caches_prefixes == shared
    assert not open_manager(attention, size, caches_prefixes=False).caches_prefixes


class Device:
    """A GPU that is not there: memory by the flags, and a model of which only type and device are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, budget: int, in_use: int, scratch: int) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.measured: list[CacheSize] = []
        model: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
        self.model: PreTrainedModel = model

        def memory_budget(*arguments: Any) -> int:
            self.asked.append(arguments[1:])
            return budget

        def measure(*arguments: Any) -> int:
            self.measured += [argument for argument in arguments if isinstance(argument, CacheSize)]
            return scratch

        monkeypatch.setattr(cache_memory, "memory_budget", memory_budget)
        monkeypatch.setattr(cache_memory, "memory_in_use", lambda device: in_use)
        monkeypatch.setattr(cache_memory, "_measure_scratch", measure)


def size_on(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, max_model_len: int = 2**20, **options: Any
) -> CacheSize:
    _, attention, layers = prepared("llama", tokenizer)
    return size_cache(ServerConfig(**options), model, tokenizer, attention, layers, max_model_len)


def test_a_gpus_cache_gets_what_weights_scratch_and_reserve_leave(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, budget=2 * GIB, in_use=GIB, scratch=300 * MIB)
    left = 2 * GIB - GIB - 512 * MIB - 300 * MIB
    size = size_on(device.model, tiny_tokenizer, gpu_memory_utilization=0.7, vram_limit="30GiB")
    assert 0.95 * left < size.num_bytes <= left
    assert device.asked == [(0.7, 30 * GIB)]
    # Copies to and from the host take a piece of it.
    swapping = size_on(device.model, tiny_tokenizer, swap_space="1GiB")
    assert abs(size.num_bytes - swapping.num_bytes - 64 * MIB) < size.block_bytes[0]
    device.measured.pop()
    assert [measured.num_slots for measured in device.measured] == [size.num_slots]


@pytest.mark.parametrize(("in_use", "scratch"), [(2 * GIB, 0), (GIB, 512 * MIB), (3 * GIB // 2, 0)])
def test_a_gpu_without_memory_for_a_cache_is_told(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, in_use: int, scratch: int
) -> None:
    device = Device(monkeypatch, budget=2 * GIB, in_use=in_use, scratch=scratch)
    with pytest.raises(ModelLoadError) as caught:
        size_on(device.model, tiny_tokenizer)
    assert str(caught.value) == (
        f"the weights take {in_use / GIB:.2f} GiB of 2.00 GiB and leave no memory for a cache; "
        "try --quantize int8 or int4, or a smaller model"
    )


def test_a_cpus_cache_gets_the_budget(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, budget=50 * MIB, in_use=0, scratch=GIB)
    size = size_on(tiny_model, tiny_tokenizer, gpu_memory_utilization=0.3)
    assert 0.95 * 50 * MIB < size.num_bytes <= 50 * MIB
    assert (device.asked, device.measured) == ([(0.3, None)], [])


def test_a_given_size_is_taken_unless_the_device_has_less(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch, budget=2 * GIB, in_use=GIB, scratch=GIB)
    size = size_on(device.model, tiny_tokenizer, kv_cache_memory="1000MiB")
    assert 950 * MIB < size.num_bytes <= 1000 * MIB
    assert device.measured == []
    with pytest.raises(ModelLoadError) as caught:
        size_on(device.model, tiny_tokenizer, kv_cache_memory="4GiB", max_num_seqs=100)
    message = "--kv-cache-memory asks for 4.00 GiB and cuda has 1.00 GiB left; give less"
    assert str(caught.value) == message
    # What no request could use is not taken, and need not be there.
    size = size_on(device.model, tiny_tokenizer, 2048, kv_cache_memory="4GiB", max_num_seqs=1)
    assert size.num_bytes < MIB


@pytest.mark.parametrize(
    ("name", "is_one_shot", "max_model_len", "chunks"),
    [
        # Boundaries are at 4 + 512 * n; a prompt's last chunk has 128 to 639 tokens.
        ("llama", False, 100_000, [(4100, 4612), (4612, 5124), (5124, 5636), (5636, 6148)]),
        ("llama", False, 1500, [(0, 516), (516, 1028), (1028, 1499)]),
        ("llama", False, 2, [(0, 1)]),
        ("falcon", False, 20_001, [(18_436, 18_948), (18_948, 19_460), (19_460, 20_000)]),
        (
            "jamba",
            True,
            3001,
            [(0, 516), (516, 1028), (1028, 1540), (1540, 2052), (2052, 2564), (2564, 3000)],
        ),
    ],
)
def test_the_scratch_is_that_of_the_largest_step_and_of_all_slots(
    name: str,
    is_one_shot: bool,
    max_model_len: int,
    chunks: list[tuple[int, int]],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, attention, layers = prepared(name, tiny_tokenizer)
    assert attention.one_shot == is_one_shot
    config = ServerConfig(max_num_seqs=3)
    size = divide_memory(GIB, attention, layers, model.dtype, max_model_len, config)
    steps: list[tuple[bool, list[list[tuple[int, int]]]]] = []
    asked: list[int | None] = []
    rows: list[int] = []

    def forward(self: ModelRunner, scheduled: list[ScheduledRequest], *, is_decode: bool) -> torch.Tensor:
        steps.append((is_decode, [[(chunk.start, chunk.end) for chunk in item.chunks] for item in scheduled]))
        assert all(item.request.num_tokens > item.chunks[-1].start for item in scheduled)
        asked.append(scheduled[0].request.sampling_params.prompt_logprobs)
        assert scheduled[0].request.scores_prompt == (asked[-1] is not None)
        return torch.zeros(len(scheduled), 128)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    monkeypatch.setattr(cache_memory, "sample", lambda logits, some, counts: rows.append(len(some)))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1234)
    measured = cache_memory._measure_scratch(
        config, model, tiny_tokenizer, attention, layers, size, max_model_len, None
    )
    end = chunks[-1][1]
    # The counts of all slots' tokens, four bytes each, stay beside whatever is in use.
    counts = 3 * 128 * 4
    assert measured == max(234, 234 - counts) + counts
    assert steps == [(False, [chunks])] * 2 + [(True, [[(end, end + 1)]] * 3)]
    assert (asked, rows) == ([None, 20, None], [3])


def test_a_model_that_cannot_tell_of_prompts_is_served_all_the_same(
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, attention, layers = prepared("llama", tiny_tokenizer)
    size = divide_memory(MIB, attention, layers, model.dtype, MAX_MODEL_LEN, ServerConfig())
    monkeypatch.setattr(model, "get_input_embeddings", lambda: None)
    for function in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, function, lambda device: 0)
    cache_memory._measure_scratch(
        ServerConfig(), model, tiny_tokenizer, attention, layers, size, MAX_MODEL_LEN, None
    )
    assert "requests for prompt_logprobs will fail" in caplog.text


def test_the_largest_step_really_runs(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gemma3_text", "qwen3_next", "falcon", "jamba"):
        model, attention, layers = prepared(name, tiny_tokenizer)
        size = divide_memory(MIB, attention, layers, model.dtype, MAX_MODEL_LEN, ServerConfig())
        for function in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, function, lambda device: 0)
        cache_memory._measure_scratch(
            ServerConfig(), model, tiny_tokenizer, attention, layers, size, MAX_MODEL_LEN, None
        )


def test_what_does_not_fit_into_the_cache_is_not_measured(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, attention, layers = prepared("llama", tiny_tokenizer)
    size = divide_memory(MIB, attention, layers, model.dtype, 2**20, ServerConfig(max_num_seqs=2))
    longest = CacheManager(TIMELINE, size.groups, size.num_blocks, 2, False).max_tokens
    assert longest < 6144
    ends = []

    def forward(self: ModelRunner, scheduled: list[ScheduledRequest], *, is_decode: bool) -> torch.Tensor:
        ends.append(scheduled[0].chunks[-1].end)
        return torch.zeros(len(scheduled), 128)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    for function in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, function, lambda device: 0)
    cache_memory._measure_scratch(ServerConfig(), model, tiny_tokenizer, attention, layers, size, 2**20, None)
    assert ends == [longest - 1, longest - 1, longest]
