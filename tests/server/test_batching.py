"""What a request gets does not depend on what runs beside it, nor on preemption, nor on cached prefixes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from engine_bench import Bench, greedy, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from turboquant_core import Timeline
from turboquant_server.attention_check import find_attention
from turboquant_server.engine.request import RequestOutput
from turboquant_server.engine.sampler import SamplingRow, gumbel_noise
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import ScheduledRequest

DEMO = Path(__file__).parents[2] / "turboquant_server" / "demo"
# Of the two best scores where a crowd's token differs from that of the request alone: rounding decides.
MAX_TIE = 2e-3


@pytest.fixture(scope="module")
def demo() -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]]:
    """Load the bundled model in float32, its tokenizer, and a text of some hundred thousand tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    token_ids = tokenizer.backend_tokenizer.encode((DEMO / "held_out.txt").read_text("utf-8")).ids
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval(), tokenizer, token_ids


def mixed_requests(
    text: list[int], num_requests: int, longest: int
) -> Iterator[tuple[str, list[int], SamplingParams]]:
    """Yield requests of all kinds: short and long, greedy and drawn, with stops, choices, shared starts."""
    rng = random.Random(0)
    for index in range(num_requests):
        length = round(10 * (longest / 10) ** rng.random())
        start = rng.choice([0, 0, rng.randrange(50_000)])
        drawn = index % 2 == 1
        yield (
            str(index),
            text[start : start + length],
            SamplingParams(
                max_tokens=rng.randint(1, 40),
                temperature=1.0 if drawn else 0.0,
                seed=index,
                top_p=0.9 if index % 4 == 3 else 1.0,
                n=3 if index % 8 == 5 else 1,
                stop=(" the",) if index % 3 == 0 else (),
                ignore_eos=index % 5 == 0,
            ),
        )


def check_equal_or_tie(name: str, crowd: list[int], alone: list[int], gaps: list[float]) -> bool:
    """Return whether two answers differ; where they do first, the two best scores must have been a tie."""
    for position, (a, b) in enumerate(zip(crowd, alone, strict=False)):
        if a != b:
            assert gaps[position] < MAX_TIE, f"request {name}, token {position}: gap {gaps[position]:.2g}"
            return True
    assert len(crowd) == len(alone), name
    return False


class ScoredBench(Bench):
    """A bench that notes how far apart the two best scores of each drawn token were."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.gaps: dict[tuple[str, int], list[float]] = {}
        runner = self.engine._model_runner
        plain_sample = runner._sample

        def sample(scheduled: Sequence[ScheduledRequest], logits: torch.Tensor) -> object:
            for item, row in zip(scheduled, logits, strict=True):
                for each in item.choices:
                    params = each.sampling_params
                    scores = row.double()
                    if params.temperature:
                        noise_key = _noise_key(each.seed, each.choice_index, item.chunks[-1].end)
                        scores = scores / params.temperature + gumbel_noise(noise_key, row.shape[-1])[0]
                    best = scores.topk(2).values
                    gaps = self.gaps.setdefault((each.request_id, each.choice_index), [])
                    del gaps[each.num_output_tokens :]  # a fork that had to wait draws its first token again
                    gaps.append(float(best[0] - best[1]))
            return plain_sample(scheduled, logits)

        runner._sample = sample  # type: ignore[method-assign, assignment]


def _noise_key(seed: int, choice_index: int, position: int) -> torch.Tensor:
    row = SamplingRow(SamplingParams(max_tokens=1), seed, choice_index, position)
    return torch.tensor([row.noise_key])


def run_crowd(bench: Bench, requests: list[tuple[str, list[int], SamplingParams]], aborted: set[str]) -> dict:
    rng = random.Random(1)
    outputs: dict[str, list] = {}
    waiting = list(requests)
    while waiting or bench.engine.has_unfinished_requests:
        for _ in range(rng.randint(0, 6)):
            if waiting:
                bench.engine.add_request(*waiting.pop(0))
        for output in bench.engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        if rng.random() < 0.1 and aborted:
            bench.engine.abort_request(aborted.pop())
        bench.manager.check_integrity()
    bench.check_empty()
    return outputs


@pytest.mark.parametrize(
    ("num_requests", "longest"),
    [pytest.param(16, 1500, id="16"), pytest.param(64, 6000, id="64", marks=pytest.mark.long)],
)
def test_a_crowd_gets_what_each_of_it_gets_alone(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]], num_requests: int, longest: int
) -> None:
    model, tokenizer, text = demo
    requests = list(mixed_requests(text, num_requests, longest))
    options = {"max_model_len": 8192, "num_slots": 24, "eos_token_ids": {tokenizer.eos_token_id}}
    aborted = {str(index) for index in range(2, num_requests, 7)}
    crowd = ScoredBench(model, tokenizer, num_blocks=2 * longest // 64 + 30, **options)
    together = run_crowd(crowd, requests, set(aborted))
    num_different = num_answers = 0
    for request_id, prompt, params in requests:
        alone = Bench(model, tokenizer, num_blocks=longest // 64 + 30, **options)  # type: ignore[arg-type]
        outputs = alone.generate(prompt, params)
        for choice in range(params.n):
            got, expected = tokens_of(together.get(request_id, []), choice), tokens_of(outputs, choice)
            if request_id in aborted and len(got) < len(expected):
                expected = expected[: len(got)]
            num_answers += 1
            gaps = crowd.gaps.get((request_id, choice), [])
            num_different += check_equal_or_tie(request_id, got, expected, gaps)
    print(f"{num_different} of {num_answers} answers differ by a tie")
    assert num_different <= num_answers // 8


def test_a_pool_that_is_far_too_small_finishes_everything_by_preemption(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]],
) -> None:
    model, tokenizer, text = demo
    prompts = [text[900 * i : 900 * i + 250] for i in range(6)]
    drawn = SamplingParams(max_tokens=90, temperature=1.0, seed=5, ignore_eos=True)
    params = [greedy(90, ignore_eos=True)] * 4 + [drawn, replace(drawn, n=2)]
    roomy = Bench(model, tokenizer)
    # A choice ends with 3 blocks.
    tight = ScoredBench(model, tokenizer, num_blocks=8, overlaps_steps=True)
    check_preempted(roomy, tight, dict(zip("abcdef", zip(prompts, params, strict=True), strict=True)))


@pytest.mark.parametrize("overlaps_steps", [False, True])
@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text", "jamba", "falcon"])
def test_a_preempted_request_goes_on_with_its_windows_states_and_past(
    name: str, overlaps_steps: bool, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = architectures.build(name)
    options: dict[str, Any] = {
        "attention": find_attention(model, tiny_tokenizer, architectures.NUM_POSITIONS),
        "timeline": Timeline(residual_length=64, segment_size=64),
        "max_model_len": architectures.NUM_POSITIONS,
        "max_num_batched_tokens": 150,
        "caches_prefixes": False,
        "bits": None,
    }
    prompt = torch.randint(3, 120, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    params = greedy(75, ignore_eos=True)
    requests = {
        "a": (prompt[:150], params),
        "b": (prompt[50:], replace(params, n=2)),
        "c": (prompt[:180], params),
    }
    check_preempted(
        Bench(model, tiny_tokenizer, **options),
        ScoredBench(model, tiny_tokenizer, num_blocks=4, overlaps_steps=overlaps_steps, **options),
        requests,
    )


def check_preempted(
    roomy: Bench, tight: ScoredBench, requests: dict[str, tuple[list[int], SamplingParams]]
) -> None:
    """Fail unless requests get the same answers where there is room and where they are preempted."""
    for bench in (roomy, tight):
        for request_id, (prompt, params) in requests.items():
            bench.engine.add_request(request_id, prompt, params)
    expected, got = roomy.run(), tight.run()
    for request_id, (_, params) in requests.items():
        answers = [tokens_of(expected[request_id], choice) for choice in range(params.n)]
        assert all((answer == answers[0]) == (params.temperature == 0) for answer in answers[1:])
    assert roomy.scheduler.num_preemptions == 0 < tight.scheduler.num_preemptions
    for request_id, (_, params) in requests.items():
        for choice in range(params.n):
            tokens = tokens_of(got[request_id], choice)
            assert len(tokens) == params.max_tokens
            gaps = tight.gaps[request_id, choice]
            check_equal_or_tie(request_id, tokens, tokens_of(expected[request_id], choice), gaps)


def test_a_hit_gives_the_tokens_of_a_miss_and_is_counted(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]],
) -> None:
    model, tokenizer, text = demo
    bench = Bench(model, tokenizer)
    params = greedy(12, ignore_eos=True)
    miss = bench.generate(text[:1300], params)
    hit = bench.generate(text[:1300], params)
    longer = bench.generate(text[:1500], params)
    shorter = bench.generate(text[:700], params)
    salted = bench.generate(text[:700], params, cache_salt="another")
    other = bench.generate(text[1:701], params)
    outputs = (miss, hit, longer, shorter, salted, other)
    assert [answer[0].num_cached_tokens for answer in outputs] == [0, 4 + 1024, 4 + 1024, 4 + 512, 0, 0]
    assert tokens_of(hit) == tokens_of(miss)
    assert tokens_of(shorter) == tokens_of(salted)
    without = Bench(model, tokenizer, caches_prefixes=False)
    assert tokens_of(longer) == tokens_of(without.generate(text[:1500], params))
    assert without.generate(text[:1500], params)[0].num_cached_tokens == 0


@pytest.mark.parametrize("num_slots", [8, 2])
def test_choices_differ_and_repeat_with_their_seed_however_few_run_at_once(
    demo: tuple[PreTrainedModel, PreTrainedTokenizerBase, list[int]], num_slots: int
) -> None:
    model, tokenizer, text = demo
    params = SamplingParams(max_tokens=10, temperature=2.0, seed=3, n=4, ignore_eos=True)
    bench = Bench(model, tokenizer, num_slots=num_slots)
    outputs = bench.generate(text[:690], params)
    choices = [tokens_of(outputs, index) for index in range(4)]
    assert len(set(map(tuple, choices))) == 4
    assert len({choice[0] for choice in choices}) > 1
    again = Bench(model, tokenizer).generate(text[:690], params)
    assert [tokens_of(again, index) for index in range(4)] == choices
    single = Bench(model, tokenizer).generate(text[:690], replace(params, n=1))
    assert tokens_of(single) == choices[0]
    assert all(isinstance(output, RequestOutput) for output in outputs)
