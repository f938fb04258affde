"""Grammars are compiled once, say what they cannot do, and allow exactly the tokens that may come next."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import build_tokenizer
from tokenizers import AddedToken

from turboquant_server.engine import grammar as grammar_module
from turboquant_server.engine.grammar import GrammarCompiler, GrammarError, GrammarKind, Matcher
from turboquant_server.engine.token_masks import compute_masks, keep_allowed
from turboquant_server.parsing.layout import Layout
from turboquant_server.parsing.reasoning import Marks

TOKENIZER = build_tokenizer()
VOCAB_SIZE = 310  # more than the tokenizer has, as in many models, and no multiple of a word
EOS = (0, 2)
CPU = torch.device("cpu")
COMPILER = GrammarCompiler(TOKENIZER, VOCAB_SIZE, EOS)
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def tokens_of(text: str, tokenizer: Any = TOKENIZER) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def schema(value: dict[str, Any]) -> Matcher:
    return COMPILER.compile(GrammarKind.JSON_SCHEMA, json.dumps(value)).open()


def choice(*texts: str) -> Matcher:
    return COMPILER.compile(GrammarKind.CHOICE, json.dumps(texts)).open()


def allowed_by(matcher: Matcher) -> set[int]:
    logits = keep_allowed(torch.zeros(1, VOCAB_SIZE), compute_masks([matcher], CPU))
    return {index for index, logit in enumerate(logits[0].tolist()) if logit == 0}


def takes(matcher: Matcher, text: str, tokenizer: Any = TOKENIZER) -> bool:
    """Tell whether a text follows the grammar to a place where it may end."""
    try:
        matcher.advance(tokens_of(text, tokenizer))
    except GrammarError:
        return False
    return set(EOS) <= allowed_by(matcher)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text('ab \n"\\üé東😀', min_size=1, max_size=6), min_size=1, max_size=4), st.data())
def test_the_tokens_allowed_are_those_whose_bytes_go_on_to_a_choice(texts: list[str], data: Any) -> None:
    byte_of = {character: byte for byte, character in _byte_characters().items()}
    spelled = {
        token_id: bytes(byte_of[character] for character in token)
        for token, token_id in TOKENIZER.get_vocab().items()
        if token_id not in TOKENIZER.all_special_ids
    }
    matcher, written = choice(*texts), b""
    while True:
        wanted = {
            token_id
            for token_id, more in spelled.items()
            if any(text.encode().startswith(written + more) for text in texts)
        }
        may_end = written in [text.encode() for text in texts]
        assert allowed_by(matcher) == wanted | (set(EOS) if may_end else set())
        if not wanted:
            break
        token_id = data.draw(st.sampled_from(sorted(wanted)))
        matcher.advance([token_id])
        written += spelled[token_id]


def _byte_characters() -> dict[int, str]:
    """Return how GPT-2's byte-level tokenizers write each byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_an_answer_may_end_only_where_its_grammar_may_and_must_where_it_must() -> None:
    matcher = choice("ab", "abc")
    for token_id, ends in zip(tokens_of("abc"), (False, False, True), strict=True):
        assert (set(EOS) <= allowed_by(matcher)) is ends
        matcher.advance([token_id])
    assert allowed_by(matcher) == set(EOS)
    matcher.advance([EOS[1]])
    assert allowed_by(matcher) == set(EOS)


def test_rows_without_a_grammar_keep_all_their_logits() -> None:
    logits = torch.randn(3, VOCAB_SIZE)
    masks = compute_masks([None, choice("a"), None], CPU)
    kept = keep_allowed(logits, masks)
    assert torch.equal(kept[[0, 2]], logits[[0, 2]])
    [a] = tokens_of("a")
    assert kept[1].isfinite().nonzero().tolist() == [[a]]
    assert kept[1, a] == logits[1, a]


def test_answers_stand_each_in_its_own_place() -> None:
    grammar = COMPILER.compile(GrammarKind.REGEX, "[ab]c")
    first, second = grammar.open(), grammar.open()
    first.advance(tokens_of("a"))
    assert allowed_by(first) == set(tokens_of("c"))
    assert set(tokens_of("a")) | set(tokens_of("b")) <= allowed_by(second)
    assert (first.num_tokens, second.num_tokens) == (1, 0)


def test_a_token_that_is_not_allowed_is_an_error() -> None:
    matcher = choice("ab")
    with pytest.raises(GrammarError, match="The answer cannot go on as its grammar wants"):
        matcher.advance(tokens_of("b"))
    with pytest.raises(GrammarError, match="The answer cannot go on as its grammar wants"):
        compute_masks([choice("ab"), matcher], CPU)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ('{"a":1}', True),
        ('{"a": 1}', True),
        ('{\n  "a": 1\n}', True),
        ('{"a":  1}', False),
        ('{\n\n"a": 1}', False),
        ("{\n" + 24 * " " + '"a": 1}', True),
        ("{\n" + 25 * " " + '"a": 1}', False),
        (' {"a":1}', False),
        ('{"a":1} ', False),
        ('{"a":1}\n', False),
        ('{"a":1,"a":2}', False),
        ('{"a":1,"\\u0061":"x"}', False),
    ],
)
def test_white_space_has_a_bound_and_names_come_once(text: str, fits: bool) -> None:
    assert takes(schema(OBJECT), text) is fits


def test_a_schema_cannot_widen_the_white_space() -> None:
    wide = {**OBJECT, "x-guidance": {"whitespace_pattern": " *", "lenient": True}}
    assert not takes(schema(wide), '{"a":  1}')
    with pytest.raises(GrammarError, match="uniqueItems"):
        schema({**wide, "uniqueItems": True})


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
        ({"if": {}, "then": {}}, '"if", "then"'),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "array", "contains": {}}, "contains"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "string", "format": "nonsense"}, "format: nonsense"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"type": "text"}, "type: text"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
        ({"$ref": "#/$defs/gone"}, "/\\$defs/gone"),
        ({"$ref": "https://example.com/schema"}, "https://example.com/schema"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"items": {"type": "object", "minProperties": 2, "patternProperties": {"a": {}}}}, "minProperties"),
    ],
    ids=str,
)
def test_what_a_schema_cannot_have_is_named(value: dict[str, Any], named: str) -> None:
    with pytest.raises(GrammarError, match=named):
        schema(value)


def test_counts_that_cannot_go_wrong_are_taken() -> None:
    assert takes(schema({"type": "object", "minProperties": 1}), '{"b":1}')
    counted = {"required": ["a", "b"], "minProperties": 2}
    assert takes(schema({"type": "object", **counted}), '{"a":1,"b":2}')
    assert takes(schema({"enum": [{"minProperties": 5}]}), '{"minProperties":5}')


def test_characters_with_escapes_of_their_own_are_taken() -> None:
    text = json.dumps('tab\t, line\n, "quoted", \\u0001, \b\f\r/', ensure_ascii=False)
    assert takes(schema({"const": json.loads(text)}), text)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (GrammarKind.REGEX, "(a"),
        (GrammarKind.REGEX, "a(?!b)"),
        (GrammarKind.REGEX, r"(a)\1"),
        (GrammarKind.GRAMMAR, "start: missing"),
        (GrammarKind.GRAMMAR, "root ::= ("),
        (GrammarKind.GRAMMAR, "nonsense"),
        (GrammarKind.GRAMMAR, 'start: %json {"not": {}}'),
        (GrammarKind.JSON_SCHEMA, "{"),
        (GrammarKind.JSON_SCHEMA, "[]"),
        (GrammarKind.JSON_SCHEMA, "3"),
        (GrammarKind.JSON_SCHEMA, '{"properties": {"a": ' * 2000),
        (GrammarKind.JSON_SCHEMA, '{"items": ' * 300 + "{}" + "}" * 300),
        (GrammarKind.JSON_SCHEMA, '{"minimum": NaN}'),
        (GrammarKind.JSON_SCHEMA, '{"const": "\ud800"}'),
        (GrammarKind.JSON_SCHEMA, '{"const": "\\u0001"}'),
        (GrammarKind.JSON_SCHEMA, '{"const": "\x7f"}'),
        (GrammarKind.JSON_SCHEMA, '{"properties": {"\\\\\\u001f": {}}}'),
    ],
    ids=lambda value: str(value)[:20].encode(errors="replace").decode(),
)
def test_what_is_no_grammar_is_refused(kind: GrammarKind, text: str) -> None:
    with pytest.raises(GrammarError, match=r"\w"):
        COMPILER.compile(kind, text)


def test_lark_and_gbnf_are_taken() -> None:
    lark = 'start: greeting " " NAME\ngreeting: "hi" | "yo"\nNAME: /[A-Z][a-z]+/'
    gbnf = 'root ::= greeting " " [A-Z] [a-z]+\ngreeting ::= "hi" | "yo"'
    for text in (lark, gbnf):
        assert takes(COMPILER.compile(GrammarKind.GRAMMAR, text).open(), "yo Bob")
        assert not takes(COMPILER.compile(GrammarKind.GRAMMAR, text).open(), "yo bob")


def test_a_grammar_is_compiled_once_and_the_tokenizer_read_when_the_first_one_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    real = grammar_module.LLTokenizer
    monkeypatch.setattr(
        grammar_module, "LLTokenizer", lambda *args, **options: made.append(1) or real(*args, **options)
    )
    compiler = GrammarCompiler(TOKENIZER, VOCAB_SIZE, EOS)
    assert not made
    with ThreadPoolExecutor(4) as threads:
        regexes = [f"a{{{index % 3}}}" for index in range(12)]
        grammars = list(threads.map(lambda regex: compiler.compile(GrammarKind.REGEX, regex), regexes))
    assert len(made) == 1
    assert compiler.compile(GrammarKind.REGEX, "a{0}") in grammars
    assert compiler.compile(GrammarKind.CHOICE, '["a{0}"]') not in grammars


def test_a_tokenizer_that_is_not_fast_is_told() -> None:
    class SlowTokenizer:
        def __len__(self) -> int:
            return 300

    compiler = GrammarCompiler(SlowTokenizer(), VOCAB_SIZE, EOS)  # type: ignore[arg-type]
    with pytest.raises(GrammarError, match="the model's tokenizer is not a fast one"):
        compiler.compile(GrammarKind.REGEX, "a")


def test_a_model_whose_answers_have_no_end_is_told() -> None:
    with pytest.raises(GrammarError, match="the model has no token that ends an answer"):
        GrammarCompiler(TOKENIZER, VOCAB_SIZE, ()).compile(GrammarKind.REGEX, "a")
    with pytest.raises(GrammarError, match="the model has no token that ends an answer"):
        GrammarCompiler(TOKENIZER, 128_256, [128_001]).compile(GrammarKind.REGEX, "a")


def test_logits_may_be_fewer_than_the_tokenizers_tokens() -> None:
    masks = compute_masks([choice("a")], CPU)
    kept = keep_allowed(torch.zeros(1, 290), masks)
    assert kept.isfinite().nonzero()[:, 1].tolist() == tokens_of("a")


@pytest.mark.parametrize("special", [None, False, True], ids=["text", "added", "special"])
@pytest.mark.parametrize(
    ("text", "fits_open", "fits_closed"),
    [
        ('Hm {"a":"x"}.\n</think>\n\n{"a":1}', True, False),
        ('</think>{"a":1}', True, False),
        ('<think>Hm 東京</think>\n{"a":1}', True, True),
        ('{"a":1}', False, True),
        ("<think>Hm", False, False),
        ("<think>Hm</think>", False, False),
        ("<think>Hm</think>Hm", False, False),
        ('<think>Hm</think>\n\n\n{"a":1}', False, False),
    ],
)
def test_reasoning_comes_before_what_follows_the_grammar(
    special: bool | None, text: str, fits_open: bool, fits_closed: bool
) -> None:
    tokenizer = build_tokenizer()
    if special is not None:
        marks = [AddedToken(mark, normalized=False, special=special) for mark in ("<think>", "</think>")]
        tokenizer.add_tokens(marks, special_tokens=special)
    compiler = GrammarCompiler(tokenizer, VOCAB_SIZE, EOS)
    for is_open, fits in ((True, fits_open), (False, fits_closed)):
        layout = Layout(reasoning=Marks("<think>", "</think>", is_open))
        matcher = compiler.compile(GrammarKind.JSON_SCHEMA, json.dumps(OBJECT), layout).open()
        assert takes(matcher, text, tokenizer) is fits
