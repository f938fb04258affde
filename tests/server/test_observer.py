"""An observer hears each request's story whole; what waits is counted; what takes too long is aborted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from held_steps import HeldSteps, held_steps

from turboquant_server.engine.observer import Observer
from turboquant_server.engine.request import (
    EngineDeadError,
    RequestFailedError,
    RequestOutput,
    RequestTimeoutError,
)
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.model_manager import ModelManager

pytestmark = pytest.mark.usefixtures("no_variables")

TIMEOUT = 20


class Listener(Observer):
    """Write down what is heard."""

    def __init__(self) -> None:
        self.heard: list[tuple[Any, ...]] = []

    def arrived(self, request_id: str, sampling_params: SamplingParams) -> None:
        self.heard.append(("arrived", request_id, sampling_params.max_tokens))

    def started(self, request_id: str, time: float) -> None:
        self.heard.append(("started", request_id))

    def stepped(self, outputs: Sequence[RequestOutput | RequestFailedError]) -> None:
        self.heard.extend(("stepped", output.request_id) for output in outputs)

    def left(self, request_id: str, failure: Exception | None) -> None:
        self.heard.append(("left", request_id, failure))

    def story_of(self, request_id: str) -> list[str]:
        return [event[0] for event in self.heard if event[1] == request_id]


class Bench:
    """The engine of a model that runs one request at a time."""

    def __init__(self, manager: ModelManager) -> None:
        self.manager = manager
        self.engine = manager.engine
        self.listener = Listener()
        self.engine._observer = self.listener
        self.engine._request_timeout = None

    def generate(self, num_tokens: int, request_id: str) -> AsyncGenerator[RequestOutput, None]:
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        return self.engine.generate([5] * 9, params, request_id)

    async def collect(self, num_tokens: int, request_id: str) -> list[RequestOutput]:
        return [output async for output in self.generate(num_tokens, request_id)]

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def manager(loaded: Any, tiny_model_dir: Path) -> Iterator[ModelManager]:
    with loaded(tiny_model_dir, max_num_seqs=1) as manager:
        yield manager


@pytest.fixture
def bench(manager: ModelManager) -> Iterator[Bench]:
    yield Bench(manager)
    manager.check_integrity()


@pytest.fixture
def held(bench: Bench) -> Iterator[HeldSteps]:
    with held_steps(bench.manager) as held:
        yield held


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(coroutine, TIMEOUT)

    asyncio.run(limited())


def test_a_request_counts_from_its_making_on_and_is_forgotten_with_its_iterator(bench: Bench) -> None:
    async def main() -> None:
        outputs = bench.generate(2, "r")
        assert (bench.engine.num_waiting, bench.engine.count_queued(1)) == (1, 0)
        others = [bench.generate(2, f"r{number}") for number in range(3)]
        assert (bench.engine.num_waiting, bench.engine.count_queued(1)) == (4, 3)
        assert bench.engine.count_queued(9) == 0
        del outputs, others
        assert bench.engine.num_waiting == 0
        assert len(await bench.collect(2, "r")) == 2

    run(main())
    assert bench.listener.story_of("r") == ["arrived", "started", "stepped", "stepped", "left"]
    assert bench.listener.story_of("r0") == []


def test_those_that_run_leave_no_room_for_those_that_come(bench: Bench, held: HeldSteps) -> None:
    async def main() -> None:
        running = asyncio.create_task(bench.collect(2, "running"))
        await bench.until(lambda: bench.engine.num_running == 1)
        assert bench.engine.count_queued(1) == 0
        waiting = bench.generate(2, "waiting")
        assert (bench.engine.count_queued(1), bench.engine.count_queued(2)) == (1, 0)
        await waiting.aclose()
        held.let_go()
        await running

    run(main())


def test_each_request_has_one_story(bench: Bench, held: HeldSteps) -> None:
    async def main() -> None:
        running = asyncio.create_task(bench.collect(9, "running"))
        await bench.until(lambda: bench.engine.num_running == 1)
        given_up = asyncio.create_task(bench.collect(1, "given up"))
        last = asyncio.create_task(bench.collect(1, "last"))
        await bench.until(lambda: bench.engine.num_waiting == 2)
        given_up.cancel()
        await asyncio.wait([given_up])
        held.let_go()
        assert (len(await running), len(await last)) == (9, 1)
        await bench.until(lambda: not bench.engine.num_running)

    run(main())
    assert bench.listener.story_of("running") == ["arrived", "started", *["stepped"] * 9, "left"]
    assert bench.listener.story_of("given up") == ["arrived", "left"]
    assert bench.listener.story_of("last") == ["arrived", "started", "stepped", "left"]
    assert ("left", "given up", None) in bench.listener.heard


def test_a_failure_is_heard(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = RequestFailedError("bad", "no luck")
    engine: Any = bench.engine._engine
    step = engine.step

    def fail() -> Any:
        outputs = step()
        engine.abort_request("bad")
        return [failure if output.request_id == "bad" else output for output in outputs]

    async def main() -> None:
        monkeypatch.setattr(engine, "step", fail)
        with pytest.raises(RequestFailedError, match="no luck"):
            await bench.collect(5, "bad")

    run(main())
    assert bench.listener.story_of("bad") == ["arrived", "started", "stepped", "left"]
    assert ("left", "bad", failure) in bench.listener.heard


def test_a_dead_engine_is_heard(loaded: Any, tiny_model_dir: Path) -> None:
    async def main(bench: Bench) -> None:
        bench.engine.shutdown()
        with pytest.raises(EngineDeadError):
            await bench.collect(5, "late")

    with loaded(tiny_model_dir) as manager:
        bench = Bench(manager)
        run(main(bench))
        assert bench.listener.story_of("late") == ["arrived", "left"]
        assert isinstance(bench.listener.heard[-1][2], EngineDeadError)


@pytest.mark.parametrize("phase", ["waiting", "running", "not read"])
def test_a_request_whose_time_is_over_is_aborted(bench: Bench, held: HeldSteps, phase: str) -> None:
    async def main() -> None:
        if phase == "waiting":
            first = asyncio.create_task(bench.collect(400, "first"))
            await bench.until(lambda: bench.engine.num_running == 1)
        bench.engine._request_timeout = 0.1
        outputs = bench.generate(400, "r")
        if phase == "not read":
            held.let_go(1)
            await anext(outputs)
            await asyncio.sleep(0.2)
        else:
            with pytest.raises(RequestTimeoutError, match=r"within the 0\.1 seconds"):
                await anext(outputs)
        if phase == "waiting":
            first.cancel()
        held.let_go(3)
        await bench.until(lambda: bench.engine.num_running == bench.engine.num_waiting == 0)
        await outputs.aclose()

    run(main())
    assert bench.listener.story_of("r").count("stepped") <= 3


def test_an_answer_in_time_leaves_no_timer(bench: Bench) -> None:
    async def main() -> None:
        bench.engine._request_timeout = 0.2
        assert len(await bench.collect(3, "r")) == 3
        await asyncio.sleep(0.25)
        assert len(await bench.collect(3, "s")) == 3

    run(main())
