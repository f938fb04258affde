"""Answers read by transformers' ResponseParser, as a tokenizer's own ``response_template`` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from turboquant_server.parsing.calls import Tools
from turboquant_server.parsing.event import Content, Event, Reasoning
from turboquant_server.parsing.source import Source, Steps
from turboquant_server.parsing.tool_call import read_call

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
CALLS_FIELD = "tool_calls"
# Of these, no part is complete; of other structures, what has been written may look complete.
WHOLE_CONTENTS = ("json", "python-call-list")
# No model writes it; it makes the parser tell whether a region has ended.
END = "\0"


class ResponseTemplate:
    """Check and hold a tokenizer's template.

    Args:
        template: As in a tokenizer's configuration.

    Raises:
        ValueError: transformers does not take it.
    """

    def __init__(self, template: Mapping[str, Any]) -> None:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        try:
            fields = {name: {**field, "optional": True} for name, field in template["fields"].items()}
            self._with_calls = load_response_template({**template, "fields": fields})
            calls = fields.pop(CALLS_FIELD, {})
            self._without_calls = load_response_template({**template, "fields": fields})
        except Exception as error:
            raise ValueError(f"transformers does not take it: {error}") from error
        ends = {"close", "close_pattern"} & calls.keys()
        self._has_whole_calls = not ends or calls.get("content") in WHOLE_CONTENTS

    def read_answer(self, source: Source, prompt: str, tools: Tools | None) -> Steps[None]:
        """Read an answer.

        Args:
            source: At its start.
            prompt: What it continues; part of the message may stand there.
            tools: As OpenAI describes them, for the types of arguments; None leaves calls in the text.
        """
        reader = self._open(prompt, tools)
        is_call = False
        while True:
            # One by one, so that what it has told before it fails is not lost.
            character = yield from source.take_character()
            try:
                pieces = reader.feed(character) if character else self._finish(reader, is_call)
                events = [event for piece in pieces for event in _to_events(piece)]
            except Exception:  # it raises several kinds
                yield Content(source.commit())
                reader, is_call = self._open("", tools), False
            else:
                yield from events
                is_call = _is_in_call(pieces, is_call)
                if pieces and not is_call:
                    text = pieces[-1].get("text", "")
                    source.commit(len(text) if text and source.passed.startswith(text) else None)
            if not character:
                return

    def _open(self, prompt: str, tools: Tools | None) -> Any:
        from transformers.utils.chat_parsing import ResponseParser

        template = self._without_calls if tools is None else self._with_calls
        return ResponseParser(template, prefix=prompt, tools=[dict(tool) for tool in tools or ()])

    def _finish(self, reader: Any, is_call: bool) -> list[dict[str, Any]]:
        """Return the last pieces.

        Raises:
            ValueError: The text ends in a call of which a part may look complete.
        """
        pieces: list[dict[str, Any]] = []
        if not self._has_whole_calls:
            pieces = reader.feed(END)
            if _is_in_call(pieces, is_call):
                raise ValueError("the call was cut off")
        return pieces + list(reader.finalize()[1])


def _is_in_call(pieces: Sequence[Mapping[str, Any]], is_call: bool) -> bool:
    """Tell whether the text is in a call after these pieces."""
    if not pieces:
        return is_call
    return bool(pieces[-1]["field"] == CALLS_FIELD and pieces[-1]["type"] != "region_close")


def _to_events(piece: Mapping[str, Any]) -> list[Event]:
    if piece["field"] == CALLS_FIELD:
        if piece["type"] != "region_close":
            return []
        values = piece["value"] if isinstance(piece["value"], list) else [piece["value"]]
        return [read_call(value["function"]) for value in values]
    text = piece["text"].replace(END, "") if piece["type"] == "region_chunk" else ""
    return [Reasoning(text) if piece["field"] in REASONING_FIELDS else Content(text)]
