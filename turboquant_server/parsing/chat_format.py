"""How a model writes reasoning and tool calls: told by name, or found in its chat template."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from turboquant_server.parsing import deepseek, harmony, hermes, llama, mistral, qwen_coder
from turboquant_server.parsing.answer_parser import AnswerParser, Grammar
from turboquant_server.parsing.calls import Tools
from turboquant_server.parsing.earlier_calls import wants_text
from turboquant_server.parsing.event import Content
from turboquant_server.parsing.layout import CallForm, Calls, Layout
from turboquant_server.parsing.reasoning import MISTRAL_THINK, THINK, Marks, read_reasoning
from turboquant_server.parsing.response_template import ResponseTemplate
from turboquant_server.parsing.source import Source, Steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, NONE = "auto", "none"
RESPONSE_TEMPLATE = "response_template"
HARMONY_CALLS, HARMONY_REASONING = "openai", "openai_gptoss"

logger = logging.getLogger(__name__)


class CallParser(NamedTuple):
    """What reads text and calls, the marks that may be special tokens of a model, and how to write calls."""

    marks: tuple[str, ...]
    read_answer: Callable[[Source, Tools], Steps[None]]
    form: CallForm


# The names are vLLM's.
CALL_PARSERS: Mapping[str, CallParser] = {
    "hermes": CallParser(hermes.MARKS, hermes.read_answer, hermes.FORM),
    "qwen3_coder": CallParser(qwen_coder.MARKS, qwen_coder.read_answer, qwen_coder.FORM),
    "llama3_json": CallParser(llama.MARKS, llama.read_answer, llama.FORM),
    "mistral": CallParser(mistral.MARKS, mistral.read_answer, mistral.FORM),
    "deepseek_v3": CallParser(deepseek.MARKS, deepseek.read_answer, deepseek.V3_FORM),
    "deepseek_v31": CallParser(deepseek.MARKS, deepseek.read_answer, deepseek.V31_FORM),
}
REASONING_MARKS: Mapping[str, Marks] = {
    "qwen3": THINK,
    "deepseek_r1": THINK,
    "mistral": MISTRAL_THINK,
    HARMONY_REASONING: harmony.ANALYSIS,
}

# What stands in the chat template of a model that writes so; the first that fits counts.
CALL_SIGNS = (
    (HARMONY_CALLS, ("<|start|>", "<|channel|>")),
    ("deepseek_v3", (deepseek.SEPARATOR, "```json")),
    ("deepseek_v31", (deepseek.SEPARATOR,)),
    ("qwen3_coder", ("<tool_call>", "<function=")),
    (NONE, ("<tool_call>", "<arg_key>")),  # GLM's
    ("hermes", ("<tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("llama3_json", ("<|python_tag|>",)),
    ("llama3_json", ('"name": function name, "parameters"',)),
)
REASONING_SIGNS = (
    (HARMONY_REASONING, ("<|start|>", "<|channel|>")),
    ("mistral", MISTRAL_THINK[:2]),
    ("deepseek_r1", ("</think>", "<｜Assistant｜>")),  # noqa: RUF001
    ("qwen3", ("</think>",)),
)


class ChatFormat:
    """Open a parser for each answer of a model.

    A tokenizer's own ``response_template`` counts, unless a parser is told.

    Args:
        tokenizer: The model's.
        tool_call_parser: A name, auto or none.
        reasoning_parser: A name, auto or none.

    Attributes:
        tool_call_parser: The name of the parser of tool calls, or none.
        reasoning_parser: The name of the parser of reasoning, or none.
        has_tools: The model's chat template tells it which tools there are.
        has_text_arguments: The template expects the arguments of earlier calls as JSON, not as objects.
        call_form: How the model writes calls; None if that is not known.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tool_call_parser: str = AUTO, reasoning_parser: str = AUTO
    ) -> None:
        templates = tokenizer.chat_template or ""
        text = "\n".join(templates.values()) if isinstance(templates, dict) else str(templates)
        self.has_tools = "tools" in text
        self.has_text_arguments = self.has_tools and wants_text(tokenizer)
        self.tool_call_parser = _choose(tool_call_parser, CALL_SIGNS, text)
        self.reasoning_parser = _choose(reasoning_parser, REASONING_SIGNS, text)
        self.call_form = _find_form(self.tool_call_parser, text)
        self._response_template: ResponseTemplate | None = None
        template = getattr(tokenizer, "response_template", None)
        if template and tool_call_parser == reasoning_parser == AUTO:
            try:
                self._response_template = ResponseTemplate(template)
            except ValueError as error:
                logger.warning("the tokenizer's response_template is not used: %s", error)
            else:
                self.tool_call_parser = self.reasoning_parser = RESPONSE_TEMPLATE
                self.call_form = None
        special = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self._skipped = [_skip(special, self._marks(with_tools)) for with_tools in (False, True)]
        if self._response_template is not None:
            # In patterns, some characters stand behind a backslash.
            marks = json.dumps(template, ensure_ascii=False).replace("\\", "")
            self._skipped = [_skip(special, [text for text in special if text in marks])] * 2

    def open(
        self,
        prompt: str,
        tools: Tools | None = None,
        max_calls: int | None = None,
        calls: Calls | None = None,
    ) -> AnswerParser:
        """Return the parser of one answer.

        Args:
            prompt: The text that the answer continues.
            tools: Those that the model may call, as OpenAI describes them; None leaves calls in the text.
            max_calls: Leave out the calls after so many; None keeps all.
            calls: What the answer begins with if it has calls; None if they may be anywhere.
        """
        return AnswerParser(self._grammar(prompt, tools, calls), max_calls)

    def plan_answer(self, prompt: str, calls: Calls | None = None) -> Layout:
        """Return what an answer may consist of.

        Args:
            prompt: The text that the answer continues.
            calls: Those that it may have.
        """
        is_harmony_start = self._is_harmony and prompt.endswith(harmony.PROMPT_END)
        return Layout(self._find_reasoning(prompt), calls, harmony.FINAL if is_harmony_start else "")

    def skipped_token_ids(self, with_tools: bool) -> frozenset[int] | None:
        """Return the special tokens that are no marks; None if none of them is, so that all have no text."""
        return self._skipped[with_tools]

    def __str__(self) -> str:
        """Say what is read how."""
        parsers = {"tool calls": self.tool_call_parser, "reasoning": self.reasoning_parser}
        return ", ".join(
            f"{what} {'left in the text' if name == NONE else f'as {name}'}" for what, name in parsers.items()
        )

    @property
    def _is_harmony(self) -> bool:
        return self.tool_call_parser == HARMONY_CALLS or self.reasoning_parser == HARMONY_REASONING

    def _find_reasoning(self, prompt: str) -> Marks | None:
        marks = REASONING_MARKS.get(self.reasoning_parser)
        return marks and marks._replace(is_open=prompt.rstrip().endswith(marks.opening))

    def _grammar(self, prompt: str, tools: Tools | None, calls: Calls | None) -> Grammar:
        if self._response_template is not None:
            return partial(self._response_template.read_answer, prompt=prompt, tools=tools)
        if self._is_harmony:
            return partial(
                harmony.read_answer,
                has_calls=tools is not None and self.tool_call_parser == HARMONY_CALLS,
                has_reasoning=self.reasoning_parser == HARMONY_REASONING,
            )
        return partial(self._read_answer, prompt=prompt, tools=tools, calls=calls)

    def _read_answer(
        self, source: Source, prompt: str, tools: Tools | None, calls: Calls | None
    ) -> Steps[None]:
        reasoning = self._find_reasoning(prompt)
        if reasoning is not None:
            yield from read_reasoning(source, reasoning)
        parser = CALL_PARSERS.get(self.tool_call_parser)
        if calls is not None:
            yield from source.take_space()
            if (yield from source.peek(*calls.openings)) is None:
                parser = None
            source.rewind()
        if parser is None or tools is None:
            yield from source.stream(Content)
        else:
            yield from parser.read_answer(source, tools)

    def _marks(self, with_tools: bool) -> tuple[str, ...]:
        if self._is_harmony:
            return harmony.MARKS
        calls = CALL_PARSERS.get(self.tool_call_parser) if with_tools else None
        reasoning = REASONING_MARKS.get(self.reasoning_parser)
        return (*(reasoning[:2] if reasoning else ()), *(calls.marks if calls else ()))


def _choose(name: str, signs: Collection[tuple[str, tuple[str, ...]]], template: str) -> str:
    if name != AUTO:
        return name
    fits = (found for found, texts in signs if all(text in template for text in texts))
    return next(fits, NONE)


def _find_form(tool_call_parser: str, template: str) -> CallForm | None:
    if tool_call_parser == HARMONY_CALLS:
        return harmony.FORM
    if tool_call_parser == "mistral" and mistral.ARGUMENTS not in template:
        return mistral.LIST_FORM
    parser = CALL_PARSERS.get(tool_call_parser)
    return parser and parser.form


def _skip(special: Mapping[str, int], marks: Collection[str]) -> frozenset[int] | None:
    kept = {token_id for text, token_id in special.items() if text in marks}
    return frozenset(special.values()) - kept if kept else None
