"""Reasoning that comes first, between two marks."""

from __future__ import annotations

from typing import NamedTuple

from turboquant_server.parsing.event import Reasoning
from turboquant_server.parsing.source import Source, Steps


class Marks(NamedTuple):
    """The texts around reasoning."""

    opening: str
    closing: str


THINK = Marks("<think>", "</think>")
MISTRAL_THINK = Marks("[THINK]", "[/THINK]")


def read_reasoning(source: Source, marks: Marks, is_open: bool) -> Steps[None]:
    """Read reasoning, if the answer starts with some.

    Args:
        source: At the start of the answer.
        marks: What stands around the reasoning.
        is_open: The prompt ends with the opening mark; some models write it once more.
    """
    yield from source.take_space()
    if (yield from source.take_one_of(marks.opening)) is None:
        source.rewind()
        if not is_open:
            return
    source.commit()
    if (yield from source.stream_until(Reasoning, marks.closing)):
        yield from source.take(marks.closing)
        source.commit()
