"""The engine gives transformers' tokens, ends every request for the right reason and keeps no cache."""

from __future__ import annotations

import pytest
import torch
from engine_bench import Bench, greedy, text_of, tokens_of
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from turboquant_server.engine.request import FinishReason, RequestFailedError, RequestOutput, RequestStatus
from turboquant_server.engine.sampling_params import SamplingParams

PROMPT = "<|im_start|>user\nWhat is the access code?<|im_end|>\n<|im_start|>assistant\n"
MAX_MODEL_LEN = 2048


@pytest.fixture(params=[False, True], ids=["one by one", "overlapped"])
def bench(
    request: pytest.FixtureRequest, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> Bench:
    return Bench(tiny_model, tiny_tokenizer, overlaps_steps=request.param)


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


def test_greedy_tokens_are_those_of_transformers_generate(
    bench: Bench, tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = tiny_tokenizer.encode(PROMPT)
    expected = transformers_greedy(tiny_model, prompt, 60)  # all within the uncompressed window
    outputs = bench.generate(prompt, greedy(60))
    assert tokens_of(outputs) == expected
    assert text_of(outputs) == tiny_tokenizer.decode(expected, skip_special_tokens=True).rstrip("\ufffd")


def test_with_blocks_that_lose_nothing_requests_of_all_lengths_get_transformers_tokens(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, bits=None, max_num_batched_tokens=600)
    prompts = {
        length: [3 + (7 * i * i + length) % 290 for i in range(length)] for length in (1, 63, 260, 800)
    }
    for length, prompt in prompts.items():
        bench.engine.add_request(str(length), prompt, greedy(80))
    outputs = bench.run()
    for length, prompt in prompts.items():
        assert tokens_of(outputs[str(length)]) == transformers_greedy(tiny_model, prompt, 80)


def test_a_long_prompt_is_computed_in_chunks_and_then_one_token_a_step(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, max_num_batched_tokens=1030)
    outputs = bench.generate([5] * 1200, greedy(4, ignore_eos=True))
    assert bench.model.shapes == [(1, 1028), (1, 172), (1, 1), (1, 1), (1, 1)]
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


def test_requests_run_beside_each_other(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer)
    for request_id, length in (("a", 3), ("b", 1), ("c", 2)):
        bench.engine.add_request(request_id, [5, 6], greedy(length, ignore_eos=True))
    steps = []
    while bench.engine.has_unfinished_requests:
        steps.append([output.request_id for output in bench.engine.step()])
    assert steps == [["a", "b", "c"], ["a", "c"], ["a"]]
    assert bench.model.shapes == [(1, 6), (2, 1), (1, 1)]
    bench.check_empty()


def test_a_long_prompt_does_not_hold_up_running_answers(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, max_num_batched_tokens=700)
    bench.engine.add_request("short", [5, 6], greedy(6, ignore_eos=True))
    bench.engine.step()
    bench.engine.add_request("long", [5] * 2000, greedy(2, ignore_eos=True))
    steps = [[output.request_id for output in bench.engine.step()] for _ in range(4)]
    assert steps == [["short"], ["short"], ["short"], ["long", "short"]]
    assert bench.model.shapes[1:6] == [(1, 516), (1, 1), (1, 512), (1, 1), (1, 512)]
    bench.run()


@pytest.mark.parametrize("overlaps_steps", [False, True])
@pytest.mark.parametrize("num_steps", [pytest.param(0, id="waiting"), 1, 2, 5])
def test_an_abort_releases_the_cache_in_every_phase(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    num_steps: int,
    overlaps_steps: bool,
) -> None:
    bench = Bench(tiny_model, tiny_tokenizer, max_num_batched_tokens=700, overlaps_steps=overlaps_steps)
    bench.engine.add_request("r", [5] * 1200, greedy(100, ignore_eos=True, n=3))
    for _ in range(num_steps):
        bench.engine.step()
    choices = bench.scheduler.find("r")
    assert len(choices) == 3
    assert bench.manager.num_running == (0, 1, 3)[min(num_steps, 2)]
    bench.engine.abort_request("r")
    assert not bench.engine.has_unfinished_requests
    bench.check_empty()
    assert {(choice.status, choice.finish_reason) for choice in choices} == {
        (RequestStatus.FINISHED, FinishReason.ABORT)
    }
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
    error_type: type[Exception],
    words: str,
    num_good_forwards: int,
) -> None:
    expected = tokens_of(bench.generate([7, 8], greedy(5)))
    num_before = len(bench.model.shapes)

    def fail_on_the_bad_request(position_ids: torch.Tensor) -> None:
        if len(bench.model.shapes) - num_before > num_good_forwards and position_ids.max() >= 10:
            raise error_type("bad kernel at 0x1")

    bench.model.fail = fail_on_the_bad_request
    bench.engine.add_request("bad", [6] * 600, greedy(50, ignore_eos=True, n=2))
    bench.engine.add_request("good", [7, 8], greedy(5))
    outputs = bench.run()
    [failure] = [output for output in outputs["bad"] if isinstance(output, RequestFailedError)]
    assert failure is outputs["bad"][-1]
    assert words in str(failure)
    assert "0x1" not in str(failure)  # internals stay in the log
    assert failure.__traceback__ is failure.__cause__ is failure.__context__ is None  # they hold activations
    assert tokens_of(outputs["good"]) == expected


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
