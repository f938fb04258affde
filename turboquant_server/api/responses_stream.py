"""A response as it is written: its output items, and the events that tell of them, in OpenAI's order.

A response that is not streamed is written just so. Knows no HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from turboquant_server.api.responses_calls import ClientCall, read_input
from turboquant_server.api.responses_models import (
    IncompleteDetails,
    InputTokensDetails,
    ItemStatus,
    ModelResponse,
    OutputCustomToolCall,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningText,
    ResponseError,
    ResponseStatus,
    ResponseUsage,
)
from turboquant_server.engine.request import FinishReason

if TYPE_CHECKING:
    from turboquant_server.api.chat_answer import ChatAnswer
    from turboquant_server.api.errors import ApiError
    from turboquant_server.api.response_models import ChoiceDelta, TokenLogprob
    from turboquant_server.api.token_report import ChatTokenReport
    from turboquant_server.engine.request import RequestOutput

# The type of an event and that type's fields.
Event: TypeAlias = dict[str, Any]


class OutputWriter:
    """Make items of an answer's deltas.

    Args:
        calls: What the client calls the functions, by the names that the model knows.

    Attributes:
        items: What has been written, the item in progress included.
    """

    def __init__(self, calls: Mapping[str, ClientCall]) -> None:
        self.items: list[OutputItem] = []
        self._calls = calls
        self._open: OutputItem | None = None

    def add(self, delta: ChoiceDelta, logprobs: list[TokenLogprob]) -> Iterator[Event]:
        """Write what a delta holds.

        Args:
            delta: Of content, of reasoning or of calls.
            logprobs: Of its tokens, if it is of content.
        """
        if "content" in delta:
            if not isinstance(self._open, OutputMessage):
                yield from self._begin(OutputMessage(id=_new_id("msg"), content=[OutputText(text="")]))
            yield from self._extend(delta["content"], logprobs)
        elif "reasoning" in delta:
            if not isinstance(self._open, OutputReasoning):
                yield from self._begin(OutputReasoning(id=_new_id("rs"), content=[ReasoningText(text="")]))
            yield from self._extend(delta["reasoning"])
        for part in delta.get("tool_calls", ()):
            function = part["function"]
            if "id" in part:
                yield from self._begin(self._new_call(function["name"], part["id"]))
            yield from self._extend(function["arguments"])

    def end(self, status: ItemStatus) -> Iterator[Event]:
        """End the item in progress, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        if isinstance(item, OutputFunctionCall):
            item.status = "completed"  # else the parser would not have told of it
            yield self._event(item, "response.function_call_arguments.done", arguments=item.arguments)
        elif isinstance(item, OutputCustomToolCall):
            item.status = "completed"
            yield self._event(item, "response.custom_tool_call_input.done", input=item.input)
        else:
            item.status = status
            [part] = item.content
            if isinstance(part, OutputText):
                kind = "response.output_text.done"
                yield self._part_event(item, kind, text=part.text, logprobs=part.logprobs)
            else:
                yield self._part_event(item, "response.reasoning_text.done", text=part.text)
            yield self._part_event(item, "response.content_part.done", part=part)
        yield self._item_event(item, "response.output_item.done")

    def _new_call(self, name: str, call_id: str) -> OutputFunctionCall | OutputCustomToolCall:
        call = self._calls.get(name, ClientCall(name))
        if call.is_custom:
            return OutputCustomToolCall(
                id=_new_id("ctc"), call_id=call_id, name=call.name, namespace=call.namespace
            )
        return OutputFunctionCall(id=_new_id("fc"), call_id=call_id, name=call.name, namespace=call.namespace)

    def _begin(self, item: OutputItem) -> Iterator[Event]:
        yield from self.end("completed")
        self._open = item
        self.items.append(item)
        if isinstance(item, OutputFunctionCall | OutputCustomToolCall):
            yield self._item_event(item.model_copy(), "response.output_item.added")
            return
        yield self._item_event(item.model_copy(update={"content": []}), "response.output_item.added")
        part = item.content[0].model_copy(deep=True)
        yield self._part_event(item, "response.content_part.added", part=part)

    def _extend(self, text: str, logprobs: list[TokenLogprob] | None = None) -> Iterator[Event]:
        item = self._open
        assert item is not None
        if not text:
            return
        if isinstance(item, OutputFunctionCall):
            item.arguments += text
            yield self._event(item, "response.function_call_arguments.delta", delta=text)
            return
        if isinstance(item, OutputCustomToolCall):
            item.input = read_input(text)  # the arguments come in one piece
            yield self._event(item, "response.custom_tool_call_input.delta", delta=item.input)
            return
        [part] = item.content
        part.text += text
        if isinstance(part, OutputText):
            part.logprobs += logprobs or []
            yield self._part_event(item, "response.output_text.delta", delta=text, logprobs=logprobs or [])
        else:
            yield self._part_event(item, "response.reasoning_text.delta", delta=text)

    def _item_event(self, item: OutputItem, kind: str) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": item}

    def _part_event(self, item: OutputItem, kind: str, **fields: object) -> Event:
        return self._event(item, kind, content_index=0, **fields)

    def _event(self, item: OutputItem, kind: str, **fields: object) -> Event:
        return {"type": kind, "item_id": item.id, "output_index": len(self.items) - 1, **fields}


class ResponseWriter:
    """Make a response of what the engine generates.

    Args:
        response: As it begins, without output.
        answer: What the output is made of.
        report: Tells of the answer's tokens.
        calls: What the client calls the functions, by the names that the model knows.

    Attributes:
        response: As it is; it has its output when it has ended.
    """

    def __init__(
        self,
        response: ModelResponse,
        answer: ChatAnswer,
        report: ChatTokenReport,
        calls: Mapping[str, ClientCall],
    ) -> None:
        self.response = response
        self._answer = answer
        self._report = report
        self._output = OutputWriter(calls)
        self._num_events = 0
        # Of tokens that no delta has come with, yet.
        self._logprobs: list[TokenLogprob] = []
        self._num_told_tokens = 0
        self._num_reasoning_tokens = 0

    def begin(self) -> list[Event]:
        """Tell that the response has begun."""
        kinds = ("response.created", "response.in_progress")
        return self._number({"type": kind, "response": self.response} for kind in kinds)

    async def add(self, output: RequestOutput) -> list[Event]:
        """Write what one step has added."""
        answer = self._answer
        answer.add(output)
        told = (await self._report.take(answer)).get("logprobs")
        self._logprobs += told.content if told else []
        deltas = answer.take_deltas()
        if not deltas:
            return []
        # Tokens belong to the text that comes with them or next, so that marks count with what follows them.
        if "reasoning" in deltas[0]:
            self._num_reasoning_tokens += answer.num_output_tokens - self._num_told_tokens
        self._num_told_tokens = answer.num_output_tokens
        events: list[Event] = []
        for delta in deltas:
            events += self._output.add(delta, self._logprobs)
            if "content" in delta:
                self._logprobs = []
        self._logprobs = []
        return self._number(events)

    def end(self) -> list[Event]:
        """Complete the response."""
        status: Literal["completed", "incomplete"] = "completed"
        changes: dict[str, Any] = {"completed_at": int(time.time())}
        if self._answer.finish_reason is FinishReason.LENGTH:
            status, changes = "incomplete", {"incomplete_details": IncompleteDetails()}
        # An answer that says nothing is still a message, and can be passed back.
        events = [] if self._output.items else [*self._output.add({"content": ""}, [])]
        return self._end(status, [*events, *self._output.end(status)], **changes)

    def fail(self, error: ApiError) -> list[Event]:
        """End the response with an error."""
        reason = ResponseError(code="server_error", message=error.message)
        return self._end("failed", [*self._output.end("incomplete")], error=reason)

    def _end(self, status: ResponseStatus, events: list[Event], **changes: object) -> list[Event]:
        changes |= {"status": status, "output": self._output.items, "usage": self._usage}
        self.response = self.response.model_copy(update=changes)
        return self._number([*events, {"type": f"response.{status}", "response": self.response}])

    @property
    def _usage(self) -> ResponseUsage:
        answer = self._answer
        return ResponseUsage(
            input_tokens=answer.num_prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=answer.num_cached_tokens),
            output_tokens=answer.num_output_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=self._num_reasoning_tokens),
            total_tokens=answer.num_prompt_tokens + answer.num_output_tokens,
        )

    def _number(self, events: Iterable[Event]) -> list[Event]:
        numbered = [
            {"type": event["type"], "sequence_number": number, **event}
            for number, event in enumerate(events, self._num_events)
        ]
        self._num_events += len(numbered)
        return numbered


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
