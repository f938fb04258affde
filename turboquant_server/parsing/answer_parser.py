"""Pieces of text to events: runs a grammar, and leaves out the white space around what is no content."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

from turboquant_server.parsing.event import Content, Event, Reasoning, ToolCall
from turboquant_server.parsing.source import Source, Steps

Grammar: TypeAlias = Callable[[Source], Steps[None]]


class AnswerParser:
    """Turn one answer's text into events, as it comes.

    The events of all pieces together do not depend on where the text is cut. Whatever a grammar cannot read
    is content, so no text raises an error.

    Args:
        grammar: How the model writes.
        max_calls: Leave out the tool calls after so many; None keeps all.
    """

    def __init__(self, grammar: Grammar, max_calls: int | None = None) -> None:
        self._source = Source()
        self._steps = grammar(self._source)
        self._num_calls_left = max_calls
        self._kind: type[Event] = Content
        self._space = ""  # before it is known whether more of the same kind follows
        self._is_start = False  # of a text that leading white space is left out of

    def feed(self, text: str) -> list[Event]:
        """Take more of the text and return the events that are certain now."""
        self._source.add(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """Return the events that were held back, now that there is no more text."""
        self._source.complete()
        events = self._advance()
        if self._space and self._kind is Content:
            events.append(Content(self._space))
            self._space = ""
        return events

    def _advance(self) -> list[Event]:
        return _join(piece for event in self._read() for piece in self._tidy(event))

    def _read(self) -> Iterable[Event]:
        for event in self._steps:
            if event is None:
                return
            yield event

    def _tidy(self, event: Event) -> Iterable[Event]:
        kind = type(event)
        if kind is not self._kind or isinstance(event, ToolCall):
            self._kind, self._space, self._is_start = kind, "", True
        if isinstance(event, ToolCall):
            if self._num_calls_left is not None:
                if not self._num_calls_left:
                    return
                self._num_calls_left -= 1
            yield event
            return
        text = self._space + event.text
        if self._is_start:
            text = text.lstrip()
        words = text.rstrip()
        self._space = text[len(words) :]
        if words:
            self._is_start = False
            yield type(event)(words)


def _join(pieces: Iterable[Event]) -> list[Event]:
    """Make one event of neighbours of the same kind."""
    events: list[Event] = []
    for piece in pieces:
        last = events[-1] if events else None
        if isinstance(piece, Content) and isinstance(last, Content):
            events[-1] = Content(last.text + piece.text)
        elif isinstance(piece, Reasoning) and isinstance(last, Reasoning):
            events[-1] = Reasoning(last.text + piece.text)
        else:
            events.append(piece)
    return events
