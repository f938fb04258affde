"""What the engine thread is told, and how the engines of other ranks hear of it. Knows no thread."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turboquant_server.engine.grammar import Grammar

if TYPE_CHECKING:
    from turboquant_server.engine.engine import Engine
    from turboquant_server.engine.sampling_params import SamplingParams


@dataclass(frozen=True)
class Add:
    """A request has come."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    cache_salt: str

    def apply(self, engine: Engine) -> None:
        """Do to an engine what this says."""
        engine.add_request(self.request_id, self.prompt_token_ids, self.sampling_params, self.cache_salt)


@dataclass(frozen=True)
class Abort:
    """Nobody wants a request's answer any more."""

    request_id: str

    def apply(self, engine: Engine) -> None:
        """Do to an engine what this says."""
        engine.abort_request(self.request_id)


@dataclass(frozen=True)
class Pause:
    """Answers are not to be compared, or they are again: one GPU alone has that, so no other rank is told."""

    is_paused: bool

    def apply(self, engine: Engine) -> None:
        """Do to an engine what this says."""
        if engine.fidelity is not None:
            engine.fidelity.is_paused = self.is_paused


class RanksDisagreeError(RuntimeError):
    """The engines of two ranks have not come to the same state; nothing that they computed can be trusted."""


@dataclass(frozen=True)
class Step:
    """What an engine is told before a step, and the state that it is in then."""

    messages: Sequence[Add | Abort | Pause]
    state: tuple[int, ...]

    def apply(self, engine: Engine) -> None:
        """Bring another engine to this state.

        Raises:
            RanksDisagreeError: It was not in the state in which the first one was.
        """
        for message in self.messages:
            message.apply(engine)
        state = state_of(engine)
        if state != self.state:
            raise RanksDisagreeError(f"this rank's engine is in state {state}, the first one in {self.state}")


def state_of(engine: Engine) -> tuple[int, ...]:
    """Return numbers that tell apart engines that would not take the same steps."""
    scheduler = engine.scheduler
    running = [number for r in scheduler.running for number in (r.num_computed_tokens, r.num_tokens)]
    return scheduler.num_preemptions, len(scheduler.waiting), *running


def dump(step: Step) -> bytes:
    """Return a step for `load`."""
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(step)
    return stream.getvalue()


def load(data: bytes, compile_grammar: Callable[..., Grammar]) -> Step:
    """Return the step of another process, on which this one relies.

    Args:
        data: Of `dump`.
        compile_grammar: `GrammarCompiler.compile`; grammars themselves stay in their process.
    """
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.compile_grammar = compile_grammar
    step = unpickler.load()
    assert isinstance(step, Step)
    return step


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        return item.source if isinstance(item, Grammar) else None


class _Unpickler(pickle.Unpickler):
    compile_grammar: Callable[..., Grammar]

    def persistent_load(self, source: Any) -> Grammar:
        return self.compile_grammar(*source)
