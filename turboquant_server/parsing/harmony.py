"""The messages of gpt-oss: ``<|channel|>analysis<|message|>...<|end|><|start|>assistant...``.

The prompt ends with ``<|start|>assistant``. The tokens ``<|return|>`` and ``<|call|>`` end an answer and are
not in its text.
"""

from __future__ import annotations

import re

from turboquant_server.parsing.event import Content, Reasoning
from turboquant_server.parsing.layout import CallForm
from turboquant_server.parsing.reasoning import Marks
from turboquant_server.parsing.source import MalformedError, Source, Steps
from turboquant_server.parsing.tool_call import take_arguments

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
MAX_HEADER_LENGTH = 200
PROMPT_END = f"{START}assistant"
ANALYSIS = Marks(f"{CHANNEL}analysis{MESSAGE}", f"{ENDS[0]}{PROMPT_END}")
FINAL = f"{CHANNEL}final{MESSAGE}"
# The token after a call ends the answer.
FORM = CallForm(
    start=f"{CHANNEL}commentary to=functions.{{name}} {CONSTRAIN}json{MESSAGE}", end="", is_single=True
)

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_FUNCTION = re.compile(r"\bto=functions\.([\w.\-]+)")
_HEADER = re.compile(
    r"(<\|start\|>\w*)?(\s*to=[\w.\-]*)?(<\|channel\|>\s*\w*)?(\s*to=[\w.\-]*)?\s*(<\|constrain\|>)?\s*\w*"
)


def read_answer(source: Source, *, has_calls: bool, has_reasoning: bool) -> Steps[None]:
    """Read messages.

    Args:
        source: At the start of the answer.
        has_calls: What is written to a function is a call; else it is content.
        has_reasoning: The channel analysis is reasoning; else it is content.
    """
    kinds: set[type[Content | Reasoning]] = set()
    while True:
        begins = yield from source.peek(START, CHANNEL, " to=")
        # Text outside of messages is none that a model should write.
        if begins is None and (yield from source.stream_until(Content, START, CHANNEL)) is None:
            return
        try:
            header = yield from source.take_until(MESSAGE)
        except MalformedError:
            text = source.commit()
            if len(text) > MAX_HEADER_LENGTH or not _HEADER.fullmatch(text):
                yield Content(text)
            return
        function = _FUNCTION.search(header)
        if function and has_calls:
            yield from _read_call(source, function[1])
            continue
        source.commit()
        channel = _CHANNEL.search(header)
        is_reasoning = has_reasoning and channel is not None and channel[1] == "analysis"
        kind = Reasoning if is_reasoning else Content
        if kind in kinds:
            yield kind("\n\n")
        kinds.add(kind)
        yield from source.stream_until(kind, *ENDS, START)
        yield from source.take_one_of(*ENDS)
        source.commit()


def _read_call(source: Source, name: str) -> Steps[None]:
    """Read the body of a message to a function, which may end with the text."""
    try:
        yield from source.take_space()
        call = yield from take_arguments(source, name)
    except MalformedError:
        yield Content(source.commit())
        return
    yield from source.take_space()
    yield from source.take_one_of(*ENDS)
    source.commit()
    yield call
