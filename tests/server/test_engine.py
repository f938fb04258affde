"""The engine gives transformers' tokens, ends every request for the right reason and keeps no cache."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import TurboQuantCache
from turboquant_server.engine import model_runner
from turboquant_server.engine.engine import Engine
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import FinishReason, RequestFailedError, RequestOutput, RequestStatus
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import Scheduler

PROMPT = "<|im_start|>user\nWhat is the access code?<|im_end|>\n<|im_start|>assistant\n"
MAX_MODEL_LEN = 2048


class RecordingModel:
    """Wrap a model: write down how many tokens each forward gets, and raise where a test asks for it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        self.forward = self
        self.chunks: list[int] = []
        self.fail: Callable[[torch.Tensor], None] = lambda input_ids: None

    def __call__(self, *, input_ids: torch.Tensor, logits_to_keep: int = 0, **options: Any) -> Any:
        self.chunks.append(input_ids.shape[1])
        self.fail(input_ids)
        return self.model(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)


class Bench:
    """An engine on the tiny model, with weak references to every cache that it opened."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any) -> None:
        self.model = RecordingModel(model)
        self.caches: list[weakref.ref[TurboQuantCache]] = []
        chunk_size = options.pop("prefill_chunk_size", 512)
        self.scheduler = Scheduler(self.open_cache, chunk_size)
        self.engine = Engine(
            self.scheduler,
            ModelRunner(self.model),  # type: ignore[arg-type]
            tokenizer,
            eos_token_ids=options.pop("eos_token_ids", (0, 2)),
            vocab_size=300,
            max_model_len=options.pop("max_model_len", MAX_MODEL_LEN),
        )

    def open_cache(self) -> TurboQuantCache:
        cache = TurboQuantCache(bits=4, config=self.model.model.config)
        self.caches.append(weakref.ref(cache))
        return cache

    def run(self) -> dict[str, list[RequestOutput | RequestFailedError]]:
        outputs: dict[str, list[RequestOutput | RequestFailedError]] = {}
        while self.engine.has_unfinished_requests:
            for output in self.engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        return outputs

    def generate(self, prompt_token_ids: list[int], params: SamplingParams) -> list[RequestOutput]:
        self.engine.add_request("r", prompt_token_ids, params)
        outputs = self.run()["r"]
        assert all(isinstance(output, RequestOutput) for output in outputs)
        return [output for output in outputs if isinstance(output, RequestOutput)]

    def living_caches(self) -> int:
        gc.collect()
        return sum(cache() is not None for cache in self.caches)


@pytest.fixture
def bench(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Bench:
    return Bench(tiny_model, tiny_tokenizer)


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, **options)


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


def transformers_greedy(
    model: PreTrainedModel, prompt_token_ids: list[int], max_new_tokens: int
) -> list[int]:
    output = model.generate(
        torch.tensor([prompt_token_ids]),
        past_key_values=DynamicCache(config=model.config),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return list(output[0, len(prompt_token_ids) :].tolist())


@pytest.mark.parametrize("chunk_size", [512, 7, 1])
def test_greedy_tokens_are_those_of_transformers_generate(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, chunk_size: int
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, prefill_chunk_size=chunk_size)
    prompt = tiny_tokenizer.encode(PROMPT)
    expected = transformers_greedy(tiny_model, prompt, 60)  # all within the uncompressed window
    outputs = bench.generate(prompt, greedy(60))
    assert tokens_of(outputs) == expected
    assert text_of(outputs) == tiny_tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")


def test_a_long_prompt_is_computed_in_chunks_and_then_one_token_a_step(bench: Bench) -> None:
    outputs = bench.generate([5] * 1200, greedy(4, ignore_eos=True))
    assert bench.model.chunks == [512, 512, 176, 1, 1, 1]
    assert len(outputs) == 4


def test_the_counts_add_up(bench: Bench) -> None:
    outputs = bench.generate([5, 6, 7], greedy(6, ignore_eos=True))
    assert [output.num_output_tokens for output in outputs] == [1, 2, 3, 4, 5, 6]
    assert {output.num_prompt_tokens for output in outputs} == {3}
    assert [output.finish_reason for output in outputs] == [None] * 5 + [FinishReason.LENGTH]


def test_max_model_len_ends_a_request_with_length(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, max_model_len=20)
    outputs = bench.generate([5] * 15, greedy(100, ignore_eos=True))
    assert (len(outputs), outputs[-1].finish_reason) == (5, FinishReason.LENGTH)


def test_an_eos_token_stops_and_is_counted_but_has_no_text(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = tokens_of(Bench(tiny_model, tiny_tokenizer).generate([5, 6, 7], greedy(10, ignore_eos=True)))
    position = next(index for index in range(1, 10) if plain[index] not in plain[:index])
    bench = Bench(tiny_model, tiny_tokenizer, eos_token_ids=(1, plain[position]))
    outputs = bench.generate([5, 6, 7], greedy(10))
    assert tokens_of(outputs) == plain[: position + 1]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert text_of(outputs) == tiny_tokenizer.decode(plain[:position]).rstrip("\ufffd")
    assert tokens_of(bench.generate([5, 6, 7], greedy(10, ignore_eos=True))) == plain


def test_a_stop_string_stops_and_is_not_in_the_text(
    bench: Bench, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tiny_tokenizer.encode(PROMPT)
    text = text_of(bench.generate(prompt, greedy(40, ignore_eos=True)))
    stop = text[6:9]
    outputs = bench.generate(prompt, greedy(40, ignore_eos=True, stop=(stop, "never")))
    assert text_of(outputs) == text[: text.index(stop)]
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].num_output_tokens < 40


def test_a_seed_gives_the_same_tokens_and_no_seed_gives_others(bench: Bench) -> None:
    seeded = SamplingParams(max_tokens=20, temperature=1.5, seed=11, ignore_eos=True)
    unseeded = SamplingParams(max_tokens=20, temperature=1.5, ignore_eos=True)
    assert tokens_of(bench.generate([5], seeded)) == tokens_of(bench.generate([5], seeded))
    assert tokens_of(bench.generate([5], unseeded)) != tokens_of(bench.generate([5], unseeded))


def test_requests_run_in_the_order_in_which_they_came(bench: Bench) -> None:
    for request_id in ("a", "b", "c"):
        bench.engine.add_request(request_id, [5, 6], greedy(3, ignore_eos=True))
    finished = []
    while bench.engine.has_unfinished_requests:
        assert len(bench.scheduler.running) <= 1
        finished += [output.request_id for output in bench.engine.step()]
    assert finished == ["a"] * 3 + ["b"] * 3 + ["c"] * 3


def test_a_finished_request_leaves_no_cache(bench: Bench) -> None:
    bench.generate([5] * 300, greedy(3))
    assert (len(bench.caches), bench.living_caches()) == (1, 0)


@pytest.mark.parametrize(
    ("num_steps", "num_caches"),
    [pytest.param(0, 0, id="waiting"), pytest.param(1, 1, id="prefill"), pytest.param(5, 1, id="decode")],
)
def test_an_abort_releases_the_cache_in_every_phase(bench: Bench, num_steps: int, num_caches: int) -> None:
    bench.engine.add_request("r", [5] * 1200, greedy(100, ignore_eos=True))
    for _ in range(num_steps):
        bench.engine.step()
    assert bench.living_caches() == num_caches
    request = bench.scheduler.find("r")
    assert request is not None
    bench.engine.abort_request("r")
    assert not bench.engine.has_unfinished_requests
    assert bench.living_caches() == 0
    assert (request.status, request.finish_reason) == (RequestStatus.FINISHED, FinishReason.ABORT)
    assert bench.engine.step() == []


def test_aborting_one_request_lets_the_next_one_run(bench: Bench) -> None:
    for request_id in ("a", "b", "c"):
        bench.engine.add_request(request_id, [5, 6], greedy(3, ignore_eos=True))
    bench.engine.step()
    bench.engine.abort_request("b")
    bench.engine.abort_request("a")
    bench.engine.abort_request("unknown")
    assert list(bench.run()) == ["c"]


@pytest.mark.parametrize("num_good_forwards", [0, 1, 4])
@pytest.mark.parametrize(
    ("error_type", "words"), [(RuntimeError, "RuntimeError"), (torch.OutOfMemoryError, "ran out of memory")]
)
def test_a_failing_forward_ends_only_its_request(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    error_type: type[Exception],
    words: str,
    num_good_forwards: int,
) -> None:
    expected = tokens_of(bench.generate([7, 8], greedy(5)))

    def fail_in_the_second_request(input_ids: torch.Tensor) -> None:
        if len(bench.model.chunks) > num_good_forwards and len(bench.caches) == 2:
            raise error_type("bad kernel at 0x1")

    bench.model.chunks.clear()
    bench.model.fail = fail_in_the_second_request
    # pytest would keep the log's record, it the traceback, and it the cache.
    monkeypatch.setattr(model_runner.logger, "disabled", True)
    bench.engine.add_request("bad", [6] * 600, greedy(50, ignore_eos=True))
    bench.engine.add_request("good", [7, 8], greedy(5))
    outputs = bench.run()
    failure = outputs["bad"][-1]
    assert isinstance(failure, RequestFailedError)
    assert words in str(failure)
    assert "0x1" not in str(failure)  # internals stay in the log
    assert tokens_of([output for output in outputs["good"] if isinstance(output, RequestOutput)]) == expected
    assert bench.living_caches() == 0


def test_a_token_without_text_fails_only_its_request(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    class PartialTokenizer:
        def decode(self, token_ids: list[int], **options: bool) -> str:
            if 9 in token_ids:
                raise TypeError("sequence item 3: expected str instance, NoneType found")
            return str(tiny_tokenizer.decode(token_ids, **options))

    bench = Bench(tiny_model, PartialTokenizer())  # type: ignore[arg-type]
    bench.engine.add_request("bad", [5, 6, 9], greedy(3))  # not even the prompt's end has a text
    bench.engine.add_request("good", [5], greedy(1))
    outputs = bench.run()
    assert isinstance(outputs["bad"][-1], RequestFailedError)
    assert isinstance(outputs["good"][-1], RequestOutput)


@pytest.mark.parametrize("prompt", [[], [5] * MAX_MODEL_LEN, [300], [-1], [5, 10**30]])
def test_a_prompt_that_cannot_be_computed_is_refused_at_the_door(bench: Bench, prompt: list[int]) -> None:
    with pytest.raises(ValueError, match=r"a prompt must have 1 to 2047 tokens|token ids are 0 to 299"):
        bench.engine.add_request("r", prompt, greedy(1))
    assert not bench.engine.has_unfinished_requests


def test_the_longest_prompt_gets_one_token(bench: Bench) -> None:
    outputs = bench.generate([5] * (MAX_MODEL_LEN - 1), greedy(10, ignore_eos=True))
    assert [output.finish_reason for output in outputs] == [FinishReason.LENGTH]
