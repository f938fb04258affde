"""The text that a grammar reads, while it is still being written. Knows no format.

A grammar is a generator: it yields events, and None where it cannot go on without more text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

from turboquant_server.parsing.event import Content, Event, Reasoning
from turboquant_server.partial_match import count_begun

Result = TypeVar("Result")
# Yields None where it waits for more text.
Wait: TypeAlias = Generator[None, None, Result]
Steps: TypeAlias = Generator[Event | None, None, Result]

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[\w.\-]*")
_BRACKET_OR_QUOTE = re.compile(r'[{}\[\]"]')
_QUOTE_OR_ESCAPE = re.compile(r'["\\]')


class MalformedError(Exception):
    """What has been read is not of the form that was expected, or the text has ended before it was."""


class Source:
    """Hold the text that no event stands for yet.

    What take_...() has passed stays until commit(), so that it can be given out as text after all.
    """

    def __init__(self) -> None:
        self._text = ""
        self._position = 0
        self._is_complete = False

    def add(self, text: str) -> None:
        """Append what the model has written."""
        self._text += text

    def complete(self) -> None:
        """Tell that there will be no more text."""
        self._is_complete = True

    def commit(self, length: int | None = None) -> str:
        """Forget and return what has been passed, or only so many characters of it."""
        length = self._position if length is None else length
        passed, self._text = self._text[:length], self._text[length:]
        self._position -= length
        return passed

    def rewind(self) -> None:
        """Go back to where the last commit was."""
        self._position = 0

    @property
    def passed(self) -> str:
        """What has been passed since the last commit."""
        return self._text[: self._position]

    @property
    def rest(self) -> str:
        """What has not been passed."""
        return self._text[self._position :]

    def wait(self) -> Wait[bool]:
        """Wait for more text; False says that there is no more."""
        length = len(self._text)
        while len(self._text) == length:
            if self._is_complete:
                return False
            yield None
        return True

    def malformed(self) -> MalformedError:
        """Return the error for what comes next.

        At the end of the text, all of it is passed: a call that was cut off is one piece of text.
        """
        if self._is_complete:
            self._position = len(self._text)
        return MalformedError()

    def take_space(self) -> Wait[None]:
        """Pass white space, if there is some."""
        yield from self._take_match(_SPACE)

    def take_name(self) -> Wait[str]:
        """Pass letters, digits, underscores, dots and hyphens, and return them.

        Raises:
            MalformedError: There is none.
        """
        if name := (yield from self._take_match(_NAME)):
            return name
        raise self.malformed()

    def peek(self, *texts: str) -> Wait[str | None]:
        """Return which of ``texts`` comes next, if one does. None of them begins with another."""
        while True:
            rest = self._text[self._position : self._position + max(map(len, texts))]
            for text in texts:
                if rest.startswith(text):
                    return text
            if not any(text.startswith(rest) for text in texts) or not (yield from self.wait()):
                return None

    def take_one_of(self, *texts: str) -> Wait[str | None]:
        """Pass and return which of ``texts`` comes next, if one does."""
        text = yield from self.peek(*texts)
        self._position += len(text or "")
        return text

    def take(self, text: str) -> Wait[None]:
        """Pass a text.

        Raises:
            MalformedError: Another comes next.
        """
        if (yield from self.take_one_of(text)) is None:
            raise self.malformed()

    def take_or_end(self, text: str) -> Wait[None]:
        """Pass a text, or what there is of it at the end of all text: models leave out the last mark.

        Raises:
            MalformedError: Another comes next.
        """
        if (yield from self.take_one_of(text)) is None:
            if not text.startswith(self.rest):
                raise self.malformed()
            self._position = len(self._text)

    def take_character(self) -> Wait[str]:
        """Pass and return one character; none at the end of the text."""
        if self._position == len(self._text):
            yield from self.wait()
        character = self._text[self._position : self._position + 1]
        self._position += len(character)
        return character

    def take_until(self, end: str) -> Wait[str]:
        """Return all text before ``end``, and pass both.

        Raises:
            MalformedError: It does not come.
        """
        start = place = self._position
        while (found := self._text.find(end, place)) < 0:
            place = max(start, len(self._text) - len(end))
            if not (yield from self.wait()):
                raise self.malformed()
        self._position = found + len(end)
        return self._text[start:found]

    def take_json(self) -> Wait[str]:
        """Pass and return the text of a JSON object or array, as far as its brackets go.

        Raises:
            MalformedError: Something else comes next, or it does not end.
        """
        if (yield from self.take_one_of("{", "[")) is None:
            raise self.malformed()
        start = self._position - 1
        place, depth, is_text = self._position, 1, False
        while depth:
            match = (_QUOTE_OR_ESCAPE if is_text else _BRACKET_OR_QUOTE).search(self._text, place)
            if match is None:
                place = max(place, len(self._text))
                if not (yield from self.wait()):
                    raise self.malformed()
                continue
            place = match.end()
            if match[0] == "\\":
                place += 1
            elif match[0] == '"':
                is_text = not is_text
            else:
                depth += 1 if match[0] in "{[" else -1
        self._position = place
        return self._text[start:place]

    def stream_until(self, kind: Callable[[str], Content | Reasoning], *ends: str) -> Steps[str | None]:
        """Yield all text from the last commit to the first of ``ends``, as it comes, and commit it.

        Returns:
            The text that comes next; None if none of them comes.
        """
        pattern = _any_of(ends)
        while True:
            match = pattern.search(self._text)
            length = match.start() if match else len(self._text) - count_begun(self._text, ends)
            self._position = length
            if text := self.commit():
                yield kind(text)
            if match:
                return match[0]
            if not (yield from self.wait()):
                self._position = len(self._text)
                if text := self.commit():
                    yield kind(text)
                return None

    def stream(self, kind: Callable[[str], Content | Reasoning]) -> Steps[None]:
        """Yield all text to the end, as it comes."""
        while True:
            self._position = len(self._text)
            if text := self.commit():
                yield kind(text)
            if not (yield from self.wait()):
                return

    def _take_match(self, pattern: re.Pattern[str]) -> Wait[str]:
        start = self._position
        while True:
            match = pattern.match(self._text, self._position)
            assert match is not None
            self._position = match.end()
            if match.end() < len(self._text) or not (yield from self.wait()):
                return self._text[start : self._position]


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)))
