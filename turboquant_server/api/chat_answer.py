"""One answer of a chat on its way to the client: what the parser tells, as deltas and as a message."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from turboquant_server.api.generation import Answer
from turboquant_server.api.response_models import (
    ChatCompletionMessage,
    ChatFinishReason,
    ChoiceDelta,
    FunctionCall,
    ToolCall,
)
from turboquant_server.engine.request import FinishReason
from turboquant_server.parsing.event import Content, Event, Reasoning

if TYPE_CHECKING:
    from turboquant_server.engine.request import RequestOutput
    from turboquant_server.parsing.answer_parser import AnswerParser


class ChatAnswer(Answer):
    """Collect the deltas of one answer; a message is made of nothing else.

    Args:
        parser: Of this answer.
        num_prompt_tokens: Of what it continues.
        has_reasoning: Reasoning is told; otherwise it only counts.
    """

    def __init__(self, parser: AnswerParser, num_prompt_tokens: int, *, has_reasoning: bool = True) -> None:
        super().__init__(num_prompt_tokens=num_prompt_tokens)
        self._parser = parser
        self._has_reasoning = has_reasoning
        self._deltas: list[ChoiceDelta] = []
        self._num_calls = 0

    def add(self, output: RequestOutput) -> None:
        """Append what one step has added."""
        super().add(output)
        events = self._parser.feed(output.text)
        if output.finish_reason is not None:
            events += self._parser.finish()
        self._deltas += [delta for event in events for delta in self._to_deltas(event)]

    def take_deltas(self) -> list[ChoiceDelta]:
        """Return the deltas that have come since this was called before."""
        deltas, self._deltas = self._deltas, []
        return deltas

    @property
    def chat_finish_reason(self) -> ChatFinishReason | None:
        """Why the answer ended; calls count only if it ended by itself."""
        if self._num_calls and self.finish_reason is FinishReason.STOP:
            return "tool_calls"
        return self.finish_reason

    def _to_deltas(self, event: Event) -> Iterator[ChoiceDelta]:
        if isinstance(event, Content):
            yield {"content": event.text}
        elif isinstance(event, Reasoning):
            if self._has_reasoning:
                yield {"reasoning": event.text, "reasoning_content": event.text}
        else:
            index, self._num_calls = self._num_calls, self._num_calls + 1
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            yield {
                "tool_calls": [
                    {
                        "index": index,
                        "id": call_id,
                        "type": "function",
                        "function": {"name": event.name, "arguments": ""},
                    }
                ]
            }
            yield {"tool_calls": [{"index": index, "function": {"arguments": event.arguments}}]}


def join_deltas(deltas: Iterable[ChoiceDelta]) -> ChatCompletionMessage:
    """Return the message that deltas make together."""
    content = reasoning = ""
    calls: list[ToolCall] = []
    for delta in deltas:
        content += delta.get("content", "")
        reasoning += delta.get("reasoning", "")
        for part in delta.get("tool_calls", ()):
            function = part["function"]
            if "id" in part:
                calls.append(
                    ToolCall(id=part["id"], function=FunctionCall(name=function["name"], arguments=""))
                )
            calls[part["index"]].function.arguments += function["arguments"]
    return ChatCompletionMessage(
        content=content or (None if calls else ""),
        reasoning=reasoning or None,
        reasoning_content=reasoning or None,
        tool_calls=calls or None,
    )
