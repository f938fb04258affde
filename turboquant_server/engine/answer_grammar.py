"""The parts of an answer as one grammar, in Lark's language as llguidance has it. Compiles nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from turboquant_server.parsing.layout import CallForm, Calls, Function, Layout
    from turboquant_server.parsing.parameter import Parameter
    from turboquant_server.parsing.reasoning import Marks

# One grammar, as llguidance takes it.
Grammar: TypeAlias = dict[str, Any]

_TERMINALS = ("TEXT: /(?s:.*)/", r"SPACE: /\n{0,2}/", r"KEY: /[^<>\n]+/")


class AnswerGrammar:
    """Write one grammar.

    Args:
        tokenizer: Knows which marks are special tokens.
        marks: The texts that may be special tokens.
        read_schema: Makes a grammar of a JSON schema.
    """

    def __init__(
        self, tokenizer: LLTokenizer, marks: Collection[str], read_schema: Callable[[str], Grammar]
    ) -> None:
        self._tokenizer = tokenizer
        longest_first = sorted(map(re.escape, marks), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(longest_first)})") if marks else None
        self._read_schema = read_schema
        self._lines: list[str] = []
        self._others: list[Grammar] = []

    def write(self, layout: Layout, content: Grammar | None) -> list[Grammar]:
        """Return the grammar, and others that it refers to.

        Args:
            layout: The parts of the answer.
            content: The grammar of its content; None if there may be only calls.
        """
        choices = []
        if layout.calls is not None:
            choices.append(self._calls(layout.calls))
        if content is not None:
            choices.append(f"{self._text(layout.content)} {self._refer(content)}")
        reasoning = "" if layout.reasoning is None else self._reasoning(layout.reasoning)
        lines = (f"start: {reasoning} ({' | '.join(choices)})", *self._lines, *_TERMINALS)
        return [{"lark_grammar": "\n".join(lines)}, *self._others]

    def _reasoning(self, marks: Marks) -> str:
        first, *others = self._split(marks.closing)
        token = self._name_token(first)
        self._lines.append(
            f"thinking: TEXT {token}" if token else f"thinking[suffix={json.dumps(first)}]: TEXT"
        )
        thinking = f"thinking {self._text(''.join(others))} SPACE"
        # Some models write the mark once more.
        opening = self._text(marks.opening)
        return f"({opening})? {thinking}" if marks.is_open else f"({opening} {thinking})?"

    def _calls(self, calls: Calls) -> str:
        form = calls.form
        names = [self._call(form, function, f"call{index}") for index, function in enumerate(calls.functions)]
        self._lines.append(f"call: {' | '.join(names)}")
        others = "" if calls.is_single or form.is_single else f"({self._text(form.between)} call)*"
        return f"{self._text(form.before)} call {others} {self._text(form.after)}"

    def _call(self, form: CallForm, function: Function, rule: str) -> str:
        """Write a rule for the calls of one function; return its name."""
        arguments = function.arguments
        if isinstance(arguments, str):
            inner = self._refer(self._read_schema(arguments))
        else:
            assert form.parameter is not None
            inner = " ".join(self._parameters(form.parameter, arguments, f"{rule}_"))
        start = self._text(form.start.replace("{name}", function.name))
        self._lines.append(f"{rule}: {start} {inner} {self._text(form.end)}")
        return rule

    def _parameters(
        self, marks: tuple[str, str], parameters: tuple[Parameter, ...] | None, prefix: str
    ) -> Iterator[str]:
        start, end = marks
        if parameters is None:
            before, after = map(self._text, start.split("{key}"))
            yield f"({before} KEY {after} {self._value(((),), end, f'{prefix}any')})*"
        for index, parameter in enumerate(parameters or ()):
            value = self._value(parameter.value, end, f"{prefix}{index}")
            written = f"{self._text(start.replace('{key}', parameter.key))} {value}"
            yield written if parameter.is_required else f"({written})?"

    def _value(self, value: str | tuple[tuple[str, ...], ...], end: str, name: str) -> str:
        """Return what stands for a value and what comes after it."""
        if isinstance(value, str):
            return f"{self._refer(self._read_schema(value))} {self._text(end)}"
        # Up to the next token or rule a text is one terminal, as it is read to its longest.
        first, *others = self._split(end)
        if self._name_token(first):
            first, others = "", [first, *others]
        mark = re.escape(end.strip()).replace("/", r"\/")
        # Without TEXT it could be special tokens, too.
        always = ("TEXT", f"~/(?s:.*){mark}(?s:.*)/")
        choices = (" & ".join((*always, *(f"/{regex}/" for regex in one))) for one in value)
        self._lines.append(f"{name.upper()}: ({' | '.join(f'({one})' for one in choices)}) {_quote(first)}")
        return f"{name.upper()} {self._text(''.join(others))}"

    def _refer(self, grammar: Grammar) -> str:
        """Add a grammar and return how to refer to it."""
        name = f"other{len(self._others)}"
        self._others.append({**grammar, "name": name})
        return f"@{name}"

    def _text(self, text: str) -> str:
        """Return what stands for a text with marks."""
        return " ".join(self._name_token(part) or _quote(part) for part in self._split(text))

    def _split(self, text: str) -> list[str]:
        """Cut a text before and after each special token."""
        parts: list[str] = []
        for part in self._marks.split(text) if self._marks else [text]:
            if parts and not self._name_token(part) and not self._name_token(parts[-1]):
                parts[-1] += part
            elif part:
                parts.append(part)
        return parts

    def _name_token(self, mark: str) -> str | None:
        token_ids = self._tokenizer.tokenize_str(mark, parse_special=True)
        is_special = list(map(self._tokenizer.is_special_token, token_ids)) == [True]
        return f"<[{token_ids[0]}]>" if is_special else None


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
