"""The deltas of a chat answer to the content blocks of a message, and each change of them as an event."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from turboquant_server.api.messages_models import Content, TextContent, ThinkingContent, ToolUseContent

if TYPE_CHECKING:
    from turboquant_server.api.response_models import ChoiceDelta, ToolCallDelta

# An event of a stream, with its name as "type".
Event: TypeAlias = dict[str, Any]


class MessageBlocks:
    """Grow the content of one message.

    Attributes:
        content: The blocks so far.
    """

    def __init__(self) -> None:
        self.content: list[Content] = []
        self._open: Content | None = None
        self._arguments = ""

    @property
    def has_calls(self) -> bool:
        """Tell whether a tool is called."""
        return any(isinstance(block, ToolUseContent) for block in self.content)

    def add(self, deltas: Iterable[ChoiceDelta]) -> list[Event]:
        """Take deltas and return what they change."""
        events: list[Event] = []
        for delta in deltas:
            if text := delta.get("reasoning"):
                events += self._add_reasoning(text)
            if text := delta.get("content"):
                events += self._add_text(text)
            for call in delta.get("tool_calls", ()):
                events += self._add_call(call)
        return events

    def close(self) -> list[Event]:
        """End the block that is open, and return what that changes."""
        block, self._open = self._open, None
        if block is None:
            return []
        events = []
        if isinstance(block, ThinkingContent):
            events.append(self._delta("signature_delta", signature=block.signature))
        elif isinstance(block, ToolUseContent):
            block.input = json.loads(self._arguments)
        return [*events, {"type": "content_block_stop", "index": self._index}]

    @property
    def _index(self) -> int:
        return len(self.content) - 1

    def _start(self, block: Content) -> list[Event]:
        events = self.close()
        self.content.append(block)
        self._open = block
        start = {"type": "content_block_start", "index": self._index, "content_block": block.model_dump()}
        return [*events, start]

    def _delta(self, kind: str, **fields: str) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": {"type": kind, **fields}}

    def _add_reasoning(self, text: str) -> list[Event]:
        events = [] if isinstance(self._open, ThinkingContent) else self._start(ThinkingContent())
        assert isinstance(self._open, ThinkingContent)
        self._open.thinking += text
        return [*events, self._delta("thinking_delta", thinking=text)]

    def _add_text(self, text: str) -> list[Event]:
        events = [] if isinstance(self._open, TextContent) else self._start(TextContent())
        assert isinstance(self._open, TextContent)
        self._open.text += text
        return [*events, self._delta("text_delta", text=text)]

    def _add_call(self, call: ToolCallDelta) -> list[Event]:
        function = call["function"]
        events = []
        if "id" in call:
            call_id = call["id"].replace("call_", "toolu_", 1)
            events = self._start(ToolUseContent(id=call_id, name=function["name"]))
            self._arguments = ""
        if arguments := function["arguments"]:
            self._arguments += arguments
            events.append(self._delta("input_json_delta", partial_json=arguments))
        return events
