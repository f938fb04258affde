"""A compiled forward gives a model's logits, for steps of any size, or the log says why there is none."""

from __future__ import annotations

import asyncio
import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from engine_bench import Parts
from torch import Tensor, fx, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import Timeline
from turboquant_server.attention_check import ModelAttention, find_attention
from turboquant_server.engine import compiled_forward
from turboquant_server.engine.compiled_forward import CompiledForward, compile_forward
from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import FinishReason, Request
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager

pytestmark = pytest.mark.usefixtures("no_variables")

Told = Callable[[], list[str]]
Loaded = Callable[..., AbstractContextManager[ModelManager]]

SHARED = {"gemma3n_text"}  # its last two layers attend to what the first two wrote
TIMELINE = Timeline(residual_length=64, segment_size=64)
MAX_BATCHED_TOKENS = 90
# Prompts of several steps and of one token, whose answers end at different times: batches of 5 to 1.
PROMPT_LENGTHS = (150, 40, 65, 1, 90)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Forget what was compiled before, and what it counted."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace models on a CPU, too, and run what was traced as it is."""
    monkeypatch.setitem(compiled_forward.BACKENDS, "cpu", "eager")


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return what the server has warned of by then."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("turboquant") and record.levelno >= logging.WARNING
    ]


def num_graphs() -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count


def attending(name: str, tokenizer: Any) -> tuple[PreTrainedModel, ModelAttention]:
    original = architectures.ARCHITECTURES[name]
    fewer = {"num_hidden_layers": 2, "layer_types": original.options.get("layer_types", [])[:2] or None}
    with pytest.MonkeyPatch.context() as patch:
        if name not in SHARED:
            changed = architectures.Architecture({**original.options, **fewer}, original.serving)
            patch.setitem(architectures.ARCHITECTURES, name, changed)
        model = architectures.build(name)
    attention = find_attention(model, tokenizer, architectures.NUM_POSITIONS)
    assert attention.is_paged
    return model, attention


def logits_of_steps(
    model: PreTrainedModel, attention: ModelAttention, tokenizer: Any, compiled: CompiledForward | None
) -> list[Tensor]:
    """Compute prompts in pieces beside each other and then generated tokens, all given beforehand."""
    parts = Parts(
        model,
        attention,
        TIMELINE,
        num_blocks=20,
        num_slots=len(PROMPT_LENGTHS),
        bits=4,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        caches_prefixes=False,
    )
    runner = ModelRunner(model, parts.store, None, is_paged=True, compiled=compiled)
    for index, length in enumerate(PROMPT_LENGTHS):
        prompt = [(7 * place + index) % 100 + 3 for place in range(length)]
        request = Request(str(index), prompt, SamplingParams(max_tokens=20), Detokenizer(tokenizer, prompt))
        parts.scheduler.add(request)
    logits = []
    while parts.scheduler.running or parts.scheduler.waiting:
        batch = parts.scheduler.schedule()
        for scheduled, is_decode in ((batch.prefills, False), (batch.decodes, True)):
            if not scheduled:
                continue
            logits.append(runner.forward(scheduled, is_decode=is_decode))
            for item in scheduled:
                parts.scheduler.advance(item)
                request, end = item.request, item.chunks[-1].end
                if end == request.num_prompt_tokens + 12 - 2 * int(request.request_id):
                    parts.scheduler.finish(request, FinishReason.LENGTH)
                elif end == request.num_tokens:
                    request.token_ids.append(end % 100 + 3)
    return logits


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("llama", "aot_eager"),
        ("qwen2", "eager"),
        ("gemma2", "eager"),
        ("gemma3n_text", "eager"),
        ("gpt_oss", "eager"),  # experts, sinks
        ("phi3", "eager"),
        ("stablelm", "eager"),
        ("mixtral", "eager"),
        ("llama4_text", "eager"),  # code of its own for one token
    ],
)
def test_logits_are_those_of_the_model_and_nothing_is_compiled_while_serving(
    name: str,
    backend: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    told: Told,
) -> None:
    model, attention = attending(name, tiny_tokenizer)
    expected = logits_of_steps(model, attention, tiny_tokenizer, None)
    monkeypatch.setitem(compiled_forward.BACKENDS, "cpu", backend)
    compiled = compile_forward(model, MAX_BATCHED_TOKENS)
    assert compiled is not None
    graphs = num_graphs()
    assert graphs == (2 if name == "llama4_text" else 1)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "_uncompiled", None)
        computed = logits_of_steps(model, attention, tiny_tokenizer, compiled)
    assert {len(logits) for logits in expected} == {1, 2, 3, 4, 5}
    for one, other in zip(computed, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert num_graphs() == graphs
    assert not told()


def test_all_layers_read_angles_that_are_computed_once(
    compiling: None, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[fx.Graph] = []
    hold = compiled_forward._hold_angles
    monkeypatch.setattr(compiled_forward, "_hold_angles", lambda graph: (graphs.append(graph), hold(graph)))
    model, _ = attending("llama", tiny_tokenizer)
    assert compile_forward(model, MAX_BATCHED_TOKENS)
    held = graphs[0].find_nodes(op="call_function", target=torch.ops.turboquant.held.default)
    assert [len(angles.users) for angles in held] == [model.config.num_hidden_layers] * 2


def test_a_cpu_compiles_nothing(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, _ = attending("llama", tiny_tokenizer)
    assert compile_forward(model, MAX_BATCHED_TOKENS) is None
    assert num_graphs() == 0


def test_what_nothing_was_compiled_for_runs_as_it_is_and_is_told_once(
    compiling: None, tiny_tokenizer: PreTrainedTokenizerFast, told: Told
) -> None:
    model, attention = attending("llama", tiny_tokenizer)
    expected = logits_of_steps(model, attention, tiny_tokenizer, None)
    compiled = compile_forward(model, MAX_BATCHED_TOKENS)
    model.model.layers[1].self_attn.scaling = model.model.layers[1].self_attn.scaling * 1.5
    changed = logits_of_steps(model, attention, tiny_tokenizer, None)
    assert not torch.allclose(changed[0], expected[0], atol=1e-3)
    assert not told()
    computed = logits_of_steps(model, attention, tiny_tokenizer, compiled)
    for one, other in zip(computed, changed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    [message] = told()
    assert message.startswith("a step runs uncompiled: ")


class Branching(nn.Module):
    """Do what another module does in another order, if its input is large."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: Tensor) -> Tensor:
        output: Tensor = self.inner(states)
        return output + 0 if float(states.abs().max()) > 1 else output


def branching(name: str) -> PreTrainedModel:
    model = architectures.build(name)
    model.model.layers[1].mlp = Branching(model.model.layers[1].mlp)
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: branching("llama"), "data-dependent"),
        (lambda: architectures.build("hrm_text"), "a module attends for several layers"),
    ],
)
def test_a_model_that_cannot_be_traced_is_told_with_one_line(
    compiling: None,
    model: Callable[[], PreTrainedModel],
    reason: str,
    tiny_tokenizer: PreTrainedTokenizerFast,
    told: Told,
) -> None:
    built = model()
    find_attention(built, tiny_tokenizer, architectures.NUM_POSITIONS)
    assert compile_forward(built, MAX_BATCHED_TOKENS) is None
    [message] = told()
    assert message.startswith("the model runs uncompiled: ") and reason in message
    assert "\n" not in message


def test_code_whose_logits_are_wrong_is_not_used(
    compiling: None,
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    told: Told,
) -> None:
    def spoil(self: object, module: Any, inputs: object) -> Any:
        return lambda *arguments: [logits.roll(1, -1) for logits in module.forward(*arguments)]

    monkeypatch.setattr(compiled_forward._Backend, "__call__", spoil)
    model, _ = attending("llama", tiny_tokenizer)
    assert compile_forward(model, MAX_BATCHED_TOKENS) is None
    [message] = told()
    assert "its logits are off by" in message


def answers(manager: ModelManager) -> list[list[int]]:
    """Serve requests of different lengths at once."""

    async def answer(index: int) -> list[int]:
        params = SamplingParams(max_tokens=3 + 4 * index, temperature=0.0, ignore_eos=True)
        outputs = manager.engine.generate([index + 5] * (1 + 70 * index), params, str(index))
        return [token async for output in outputs for token in output.token_ids]

    async def answer_all() -> list[list[int]]:
        return await asyncio.gather(*map(answer, range(4)))

    return asyncio.run(answer_all())


def test_a_server_gives_the_same_tokens_and_leaves_nothing_behind(
    compiling: None, loaded: Loaded, tiny_model_dir: Path, told: Told
) -> None:
    with loaded(tiny_model_dir, enforce_eager=True) as manager:
        assert num_graphs() == 0
        expected = answers(manager)
    with loaded(tiny_model_dir) as manager:
        graphs = num_graphs()
        assert graphs == 1
        model = weakref.ref(manager._model)
        assert answers(manager) == expected
        assert num_graphs() == graphs
    gc.collect()
    assert model() is None
    assert not [message for message in told() if "uncompiled" in message]


def test_a_server_whose_model_cannot_be_compiled_answers(
    compiling: None,
    loaded: Loaded,
    tiny_model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    told: Told,
) -> None:
    with loaded(tiny_model_dir, enforce_eager=True) as manager:
        expected = answers(manager)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\nand more of that")

    monkeypatch.setattr(torch, "compile", fail)
    with loaded(tiny_model_dir) as manager:
        assert answers(manager) == expected
    assert [message for message in told() if "compile" in message] == [
        "the model runs uncompiled: no compiler (RuntimeError)"
    ]
