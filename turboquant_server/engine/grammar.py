"""What answers must look like: grammars, and where an answer stands in its own. Knows no tensor.

llguidance reads the grammars and says which tokens may follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

from llguidance import LLExecutor, LLMatcher, LLTokenizer, grammar_from

from turboquant_server.engine.answer_grammar import AnswerGrammar
from turboquant_server.parsing.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedTokenizerBase

MAX_COMPILED = 256

# White space between the parts of JSON: none, a space, or a line and its indentation. Without a bound, weak
# models go on with it until the end.
_SPACE = r"( |\n {0,24})?"
_JSON_OPTIONS: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _SPACE,
    # An escaped letter would make the name of a property one that llguidance takes for another.
    "json_allowed_escapes": 'bfnrt\\"',
    "json_allow_general_unicode_escapes": False,
    "coerce_one_of": False,
    "lenient": False,
}


# In JSON, where others than those with an escape of their own look so.
_CONTROL_CHARACTER = re.compile(r"(?<!\\)(\\\\)*\\u00|\x7f")


class GrammarKind(str, Enum):
    """In which language a grammar is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICE = "choice"  # a JSON list of texts
    GRAMMAR = "grammar"  # Lark's as llguidance has it, or llama.cpp's GBNF


class GrammarError(ValueError):
    """A grammar cannot be used, or an answer cannot go on by it; says why."""


class GrammarCompiler:
    """Compile grammars for the tokens of one model; safe on any thread.

    Args:
        tokenizer: Read here only, not kept.
        vocab_size: Of the model.
        eos_token_ids: Tokens that end an answer; allowed where the grammar may end, and nowhere else.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Collection[int]
    ) -> None:
        self._serialized = _serialize(tokenizer)
        is_fast = self._serialized is not None
        self._marks = [token.content for token in tokenizer.added_tokens_decoder.values()] if is_fast else []
        self._num_tokens = max(vocab_size, len(tokenizer))
        # A model of random weights may have a tokenizer that lacks them.
        self._eos_token_ids = sorted(token_id for token_id in eos_token_ids if token_id < len(tokenizer))
        self._tokenizer: LLTokenizer | None = None
        self._lock = Lock()
        self._executor = LLExecutor()
        self._compile = lru_cache(MAX_COMPILED)(self._compile_anew)

    def compile(self, kind: GrammarKind | None, text: str = "", layout: Layout | None = None) -> Grammar:
        """Return a grammar; the first one takes a second or so, and one that is complicated as long.

        Args:
            kind: The language of the text; None if there may be only calls.
            text: The grammar of the answer's content.
            layout: What else an answer has; None for nothing.

        Raises:
            GrammarError: The text is not what it must be, or asks for what is not supported.
        """
        return self._compile(kind, text, layout or Layout())

    def _compile_anew(self, kind: GrammarKind | None, text: str, layout: Layout) -> Grammar:
        tokenizer = self._open_tokenizer()
        try:
            content = None if kind is None else _read(kind, text)
            if content is None or layout != Layout():
                grammars = AnswerGrammar(tokenizer, self._marks, _read_schema).write(layout, content)
            else:
                grammars = [content]
        except (ValueError, RecursionError) as error:
            raise GrammarError(str(error)) from error
        matcher = LLMatcher(tokenizer, json.dumps({"grammars": grammars}), log_level=0)
        # Some of what may fail, or take long, does so when tokens are first asked for.
        matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(matcher.get_error().replace("Unimplemented keys", "unsupported keywords"))
        return Grammar((kind, text, layout), matcher, self._executor, self._num_tokens)

    def _open_tokenizer(self) -> LLTokenizer:
        if self._serialized is None:
            raise GrammarError("the model's tokenizer is not a fast one, and only those can be constrained")
        if not self._eos_token_ids:
            raise GrammarError("the model has no token that ends an answer")
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = LLTokenizer(
                    self._serialized, n_vocab=self._num_tokens, eos_token=self._eos_token_ids
                )
                self._serialized = ""
        return self._tokenizer


class Grammar:
    """Hold a compiled grammar, which any number of answers may follow.

    Args:
        source: The arguments of `GrammarCompiler.compile`.
        matcher: At the start, where it stays.
        executor: Computes masks.
        num_tokens: Tokens of the vocabulary.
    """

    def __init__(
        self,
        source: tuple[GrammarKind | None, str, Layout],
        matcher: LLMatcher,
        executor: LLExecutor,
        num_tokens: int,
    ) -> None:
        self.source = source
        self.executor = executor
        self.num_tokens = num_tokens
        self._matcher = matcher

    def open(self) -> Matcher:
        """Return what follows one answer, from its start."""
        return Matcher(self, self._matcher.deep_copy())


class Matcher:
    """Follow one answer through its grammar.

    Args:
        grammar: What the answer must look like.
        state: At the grammar's start.

    Attributes:
        num_tokens: How many of the answer's tokens have been taken in.
    """

    def __init__(self, grammar: Grammar, state: LLMatcher) -> None:
        self.grammar = grammar
        self.state = state
        self.num_tokens = 0

    def advance(self, token_ids: Sequence[int]) -> None:
        """Take in the tokens that follow.

        Raises:
            GrammarError: The grammar does not allow one of them.
        """
        for token_id in token_ids:
            if not self.state.consume_token(token_id):
                raise self.error
            self.num_tokens += 1

    @property
    def error(self) -> GrammarError:
        """Why the answer cannot go on."""
        reason = self.state.get_error().partition("\n")[0] or "no reason was given"
        return GrammarError(f"The answer cannot go on as its grammar wants: {reason}")


def _serialize(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return a fast tokenizer as llguidance takes it; None for any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else str(backend.to_str())


def _read(kind: GrammarKind, text: str) -> dict[str, Any]:
    """Return a grammar as llguidance takes it.

    Raises:
        ValueError: It is none.
    """
    if kind is GrammarKind.JSON_SCHEMA:
        return _read_schema(text)
    if kind is GrammarKind.CHOICE:
        choices = (json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
        return {"lark_grammar": f"start: {' | '.join(choices)}"}
    if kind is GrammarKind.GRAMMAR:
        return {"lark_grammar": grammar_from("grammar", text)}
    return _only_one(LLMatcher.grammar_from_regex(text))


def _read_schema(text: str) -> dict[str, Any]:
    _check_schema(json.loads(text))
    return _only_one(LLMatcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS))


def _only_one(source: str) -> dict[str, Any]:
    [grammar] = json.loads(source)["grammars"]
    return dict(grammar)


def _check_schema(schema: object) -> None:
    """Refuse what llguidance takes and does not keep.

    Raises:
        GrammarError: There are such keywords, or such characters.
    """
    if _CONTROL_CHARACTER.search(json.dumps(schema, ensure_ascii=False)):
        raise GrammarError("control characters are not supported")
    _check_counts(schema)


def _check_counts(schema: Any) -> None:
    """Refuse to count properties: of two that have the same name, JSON keeps one."""
    if isinstance(schema, list):
        for item in schema:
            _check_counts(item)
    elif isinstance(schema, dict):
        wanted, required = schema.get("minProperties"), schema.get("required", [])
        num_sure = len(required) if isinstance(required, list) else 0
        if isinstance(wanted, int) and wanted > max(1, num_sure):
            raise GrammarError("minProperties above the number of required properties is not supported")
        for key, item in schema.items():
            if key not in ("const", "enum", "default", "examples"):
                _check_counts(item)
