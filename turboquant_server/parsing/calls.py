"""Tool calls in a text: the reading that formats share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from turboquant_server.parsing.event import Content
from turboquant_server.parsing.source import MalformedError, Source, Steps

# As OpenAI describes them, and as chat templates take them.
Tools: TypeAlias = Sequence[Mapping[str, Any]]
# Reads from a mark on; commits with each call; raises MalformedError.
ReadCalls: TypeAlias = Callable[[Source], Steps[None]]


def read_text_and_calls(source: Source, openings: tuple[str, ...], read_calls: ReadCalls) -> Steps[None]:
    """Read text in which calls begin with one of these marks; what turns out to be no call is text."""
    while (yield from source.stream_until(Content, *openings)) is not None:
        yield from read_or_keep(source, read_calls)


def read_or_keep(source: Source, read_calls: ReadCalls) -> Steps[None]:
    """Read calls; on an error, what has been passed since the last of them is text."""
    try:
        yield from read_calls(source)
    except MalformedError:
        yield Content(source.commit())
    else:
        source.commit()
