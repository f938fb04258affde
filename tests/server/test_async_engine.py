"""Requests cross threads whole, stopping early aborts, and nobody waits for an engine that is dead.

More than 300 lines: the model that steps in for the real one is part of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from typing import Any, TypeVar, cast

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from turboquant_core import CacheManager, Timeline, Visibility
from turboquant_server.engine.async_engine import AsyncEngine
from turboquant_server.engine.engine import Engine
from turboquant_server.engine.pending_step import PendingStep, StepResult
from turboquant_server.engine.request import (
    EngineDeadError,
    FinishReason,
    Request,
    RequestFailedError,
    RequestOutput,
)
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import ScheduledBatch, ScheduledRequest, Scheduler

T = TypeVar("T")
TIMEOUT = 10
TOKEN = 40


class SteppedRunner:
    """Stand in for the ModelRunner: one token a step and no model; a test may hold the steps back."""

    def __init__(self) -> None:
        self.steps = threading.Semaphore(10**6)
        self.in_step = threading.Event()
        self.num_steps = 0
        self.act: Callable[[Request], None] = lambda request: None

    def hold(self) -> None:
        """Let no step through until the test releases ``steps``."""
        self.steps = threading.Semaphore(0)

    def launch(self, batch: ScheduledBatch) -> PendingStep:
        self.in_step.set()
        assert self.steps.acquire(timeout=TIMEOUT)
        self.num_steps += 1
        results: list[tuple[ScheduledRequest, StepResult]] = []
        for item in (*batch.prefills, *batch.decodes):
            is_complete = item.chunks[-1].end == item.request.num_tokens
            try:
                self.act(item.request)
                results.append((item, range(1 + len(item.request.forks)) if is_complete else []))
            except RequestFailedError as error:
                results.append((item, error))
        return PendingStep(results, torch.full((100,), TOKEN))

    def copy_slot(self, source: int, target: int) -> None:
        """Copy nothing: there is no model."""


class Bench:
    """An AsyncEngine over a SteppedRunner, which runs one request at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.runner = SteppedRunner()
        self.manager = CacheManager(Timeline(), [Visibility()], [8], num_slots=1, caches_prefixes=False)
        self.scheduler = Scheduler(self.manager.open, Timeline(), max_num_batched_tokens=1024)
        engine = Engine(
            self.scheduler, cast(Any, self.runner), tokenizer, (2,), vocab_size=300, max_model_len=500
        )
        self.engine = AsyncEngine(engine)
        self.engine.start()

    def generate(
        self, num_tokens: int, request_id: str, prompt: list[int] | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        params = SamplingParams(max_tokens=num_tokens)
        outputs = self.engine.generate([5] if prompt is None else prompt, params, request_id)
        return cast(AsyncGenerator[RequestOutput, None], outputs)

    async def collect(
        self, num_tokens: int, request_id: str, prompt: list[int] | None = None
    ) -> list[RequestOutput]:
        return [output async for output in self.generate(num_tokens, request_id, prompt)]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def bench(tiny_tokenizer: PreTrainedTokenizerFast) -> Iterator[Bench]:
    bench = Bench(tiny_tokenizer)
    yield bench
    bench.runner.steps.release(10**6)
    bench.engine.shutdown()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        return await asyncio.wait_for(coroutine, TIMEOUT)

    return asyncio.run(limited())


def test_concurrent_requests_get_all_their_outputs_and_only_theirs(bench: Bench) -> None:
    async def main() -> list[list[RequestOutput]]:
        return await asyncio.gather(*(bench.collect(number + 1, f"r{number}") for number in range(12)))

    for number, outputs in enumerate(run(main())):
        assert {output.request_id for output in outputs} == {f"r{number}"}
        assert [output.num_output_tokens for output in outputs] == list(range(1, number + 2))
        assert [output.finish_reason for output in outputs[-1:]] == [FinishReason.LENGTH]
    assert (bench.engine.num_waiting, bench.engine.num_running) == (0, 0)


def test_the_choices_of_a_request_come_from_one_iterator_which_ends_with_the_last(bench: Bench) -> None:
    async def main() -> list[RequestOutput]:
        params = SamplingParams(max_tokens=3, n=3)
        return [output async for output in bench.engine.generate([5], params, "r")]

    outputs = run(main())
    assert sorted(output.choice_index for output in outputs) == [0] * 3 + [1] * 3 + [2] * 3
    ends = [output.choice_index for output in outputs if output.finish_reason is not None]
    assert ends == [0, 1, 2]
    assert (bench.engine.num_waiting, bench.engine.num_running) == (0, 0)


def test_leaving_after_the_first_choices_end_aborts_the_others(bench: Bench) -> None:
    async def main() -> None:
        outputs = bench.engine.generate([5], SamplingParams(max_tokens=3, n=3), "r")
        async for output in outputs:
            if output.finish_reason is not None:
                bench.runner.hold()
                break
        await outputs.aclose()
        bench.runner.steps.release()
        await bench.until(lambda: bench.engine.num_waiting == bench.engine.num_running == 0)

    run(main())
    bench.manager.check_integrity()
    assert bench.manager.num_running == 0


def test_two_event_loops_may_use_one_engine(bench: Bench) -> None:
    assert len(run(bench.collect(3, "a"))) == len(run(bench.collect(3, "a"))) == 3


def test_waiting_and_running_requests_are_counted(bench: Bench) -> None:
    async def main() -> None:
        bench.runner.hold()
        tasks = [asyncio.create_task(bench.collect(2, name)) for name in "abc"]
        await bench.until(lambda: (bench.engine.num_running, bench.engine.num_waiting) == (1, 2))
        bench.runner.steps.release(100)
        await asyncio.gather(*tasks)

    run(main())


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_closing_the_iterator_aborts_the_request(bench: Bench, num_outputs: int) -> None:
    async def main() -> None:
        bench.runner.hold()
        bench.runner.steps.release(num_outputs)
        outputs = bench.generate(400, "r")
        for _ in range(num_outputs):
            await anext(outputs)
        await outputs.aclose()
        bench.runner.steps.release(400)
        await bench.until(lambda: bench.engine.num_running == 0)

    run(main())
    assert bench.runner.num_steps <= num_outputs + 1


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_cancelling_the_consumer_aborts_the_request_in_every_phase(bench: Bench, phase: str) -> None:
    async def main() -> None:
        bench.runner.hold()
        other = asyncio.create_task(bench.collect(2, "first")) if phase == "waiting" else None
        task = asyncio.create_task(bench.collect(400, "r", [5] * 40))
        if phase == "waiting":
            await bench.until(lambda: bench.engine.num_waiting == 1)
        else:
            bench.runner.steps.release(3 if phase == "prefill" else 20)  # ten chunks of the prompt first
            await bench.until(lambda: bench.runner.num_steps == (3 if phase == "prefill" else 20))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        bench.runner.steps.release(2)
        if other:
            assert len(await other) == 2
        await bench.until(lambda: bench.engine.num_running == bench.engine.num_waiting == 0)

    run(main())
    assert bench.runner.num_steps <= 22


def test_two_requests_in_flight_cannot_share_an_id(bench: Bench) -> None:
    async def main() -> None:
        bench.runner.hold()
        first = asyncio.create_task(bench.collect(2, "r"))
        await bench.until(lambda: bench.engine.num_running == 1)
        with pytest.raises(ValueError, match="in use"):
            await bench.collect(2, "r")
        bench.runner.steps.release(100)
        assert len(await first) == 2

    run(main())


def test_a_bad_prompt_is_the_callers_error_and_the_engine_goes_on(bench: Bench) -> None:
    async def main() -> None:
        for prompt in ([], [5] * 500, [300], [-1]):
            with pytest.raises(ValueError, match="token"):
                await bench.collect(2, "r", prompt)
        assert len(await bench.collect(2, "r")) == 2

    run(main())


def test_one_failed_request_leaves_the_others_alone(bench: Bench) -> None:
    def fail(request: Request) -> None:
        if request.request_id == "bad" and request.num_output_tokens == 2:
            raise RequestFailedError("bad", "no luck")

    async def main() -> list[Any]:
        bench.runner.act = fail
        names = ["good", "bad", "better"]
        return await asyncio.gather(*(bench.collect(4, name) for name in names), return_exceptions=True)

    good, bad, better = run(main())
    assert (len(good), len(better)) == (4, 4)
    assert isinstance(bad, RequestFailedError)
    assert str(bad) == "no luck"
    assert bench.engine.is_alive


def test_an_error_outside_a_request_kills_the_engine_loudly(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(request: Request) -> None:
        if request.num_output_tokens == 1:
            raise MemoryError("the engine's own")

    async def main() -> list[Any]:
        bench.runner.act = fail
        with caplog.at_level(logging.CRITICAL):
            answers = await asyncio.gather(
                *(bench.collect(4, name) for name in "abc"), return_exceptions=True
            )
        with pytest.raises(EngineDeadError, match="log has the details"):
            await bench.collect(1, "late")
        return answers

    assert all(isinstance(answer, EngineDeadError) for answer in run(main()))
    assert not bench.engine.is_alive
    assert (bench.engine.num_waiting, bench.engine.num_running) == (0, 0)
    assert "the engine died" in caplog.text
    assert "MemoryError: the engine's own" in caplog.text


def test_shutdown_ends_waiting_and_running_requests_and_the_thread(bench: Bench) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "engine"]

    before = threads()  # there may be servers of other tests

    async def main() -> list[Any]:
        bench.runner.hold()
        tasks = [asyncio.create_task(bench.collect(400, name)) for name in "ab"]
        await bench.until(lambda: bench.engine.num_running == 1)
        ending = asyncio.create_task(asyncio.to_thread(bench.engine.shutdown))
        while not ending.done():
            bench.runner.steps.release()
            await asyncio.sleep(0.01)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(error) for error in run(main())] == ["The engine has been shut down."] * 2
    assert not bench.engine.is_alive
    assert len(threads()) == len(before) - 1
    bench.engine.shutdown()  # a second time is no error


def test_a_consumer_that_does_not_read_does_not_hold_up_the_engine(bench: Bench) -> None:
    async def main() -> None:
        slow = bench.generate(300, "slow")
        await anext(slow)
        assert len(await bench.collect(5, "quick")) == 5  # runs after all of slow's steps
        assert len([output async for output in slow]) == 299

    run(main())


def test_a_step_wakes_the_event_loop_once(bench: Bench) -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        wake_ups = 0
        call_soon_threadsafe = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> asyncio.Handle:
            nonlocal wake_ups
            wake_ups += 1
            return call_soon_threadsafe(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        await bench.collect(7, "r", [5] * 9)  # three chunks of the prompt, which have no output
        return wake_ups

    assert run(main()) == 7


def test_a_closed_event_loop_does_not_kill_the_engine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def closed(*args: Any, **kwargs: Any) -> asyncio.Handle:
        raise RuntimeError("Event loop is closed")

    async def main() -> None:
        lost = asyncio.create_task(bench.collect(3, "lost"))
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.get_running_loop(), "call_soon_threadsafe", closed)
            await bench.until(lambda: bench.runner.num_steps == 3)
            await bench.until(lambda: bench.engine.num_running == 0)
            await bench.until(lambda: caplog.text.count("event loop was closed") == 3)
        assert len(await bench.collect(3, "next")) == 3
        lost.cancel()

    run(main())
