"""Reasoning that comes first, between two marks."""

from __future__ import annotations

from typing import NamedTuple

from turboquant_server.parsing.event import Reasoning
from turboquant_server.parsing.source import Source, Steps


class Marks(NamedTuple):
    """The texts around reasoning.

    Attributes:
        opening: Stands before it.
        closing: Stands after it.
        is_open: The prompt ends with the opening mark; otherwise an answer may go without reasoning.
    """

    opening: str
    closing: str
    is_open: bool = False


THINK = Marks("<think>", "</think>")
MISTRAL_THINK = Marks("[THINK]", "[/THINK]")


def read_reasoning(source: Source, marks: Marks) -> Steps[None]:
    """Read reasoning, if the answer starts with some. Where it is open, some models write the mark once more.

    Args:
        source: At the start of the answer.
        marks: What stands around the reasoning.
    """
    yield from source.take_space()
    if (yield from source.take_one_of(marks.opening)) is None:
        source.rewind()
        if not marks.is_open:
            return
    source.commit()
    if (yield from source.stream_until(Reasoning, marks.closing)):
        yield from source.take(marks.closing)
        source.commit()
