"""Whoever follows a grammar of calls, however blindly, makes calls that are read and that validate."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import torch
from answers import FORMATS, chat_format, parse
from tiny_tokenizer import build_tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from turboquant_server.engine.detokenizer import Detokenizer
from turboquant_server.engine.grammar import Grammar, GrammarCompiler, GrammarError, GrammarKind
from turboquant_server.engine.token_masks import compute_masks, keep_allowed
from turboquant_server.parsing import deepseek, harmony, llama, mistral, qwen_coder
from turboquant_server.parsing.chat_format import ChatFormat
from turboquant_server.parsing.layout import CallForm, Calls, describe_function

EOS = {0, 2}
VOCAB_SIZE = 340
NUM_TEXT_TOKENS = len(build_tokenizer())
MARKS = [
    *("<think>", "</think>", "[THINK]", "[/THINK]", "<tool_call>", "</tool_call>"),
    *(*deepseek.MARKS, *harmony.MARKS[:-2], *llama.MARKS, *mistral.MARKS, *qwen_coder.MARKS[2:]),
]


def _object(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": _object(
        {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer", "minimum": 0, "maximum": 14},
            "unit": {"enum": ["C", "°F", 'the "other"\n</parameter']},
            "at": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]},
        },
        required=["city", "unit", "at"],
        **{"$defs": {"Place": _object({"indoors": {"type": "boolean"}}, required=["indoors"])}},
    ),
    "add-note_2": _object(
        {
            "text": {"type": ["string", "null"], "pattern": "^[a-z/]{2,4}$"},
            "kind": {"oneOf": [{"const": "a"}, {"const": "b"}]},
            "weights": {
                "type": "array",
                "items": {"type": "number", "minimum": -1, "maximum": 1},
                "maxItems": 1,
            },
        },
        required=["text"],
    ),
    "now": {},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()
]
TEMPLATES = {
    name: known.template + ("[ARGS]" if name == "mistral" else "")
    for name, known in FORMATS.items()
    if name != "mistral short"
}
every_format = pytest.mark.parametrize("name", TEMPLATES)


def tokenizer_with(special: bool | None) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has the marks as tokens, special ones or not, or has none of them."""
    tokenizer = build_tokenizer()
    if special is not None:
        marks = [AddedToken(mark, normalized=False, special=special) for mark in MARKS]
        tokenizer.add_tokens(marks, special_tokens=special)
    return tokenizer


TOKENIZERS = {special: tokenizer_with(special) for special in (None, False, True)}
COMPILERS = {
    special: GrammarCompiler(tokenizer, VOCAB_SIZE, EOS) for special, tokenizer in TOKENIZERS.items()
}


def plan(chat: ChatFormat, *names: str, is_single: bool = False) -> Calls:
    assert chat.call_form is not None
    functions = (describe_function(chat.call_form, name, SCHEMAS[name]) for name in names or SCHEMAS)
    return Calls(chat.call_form, tuple(functions), is_single)


def walk(grammar: Grammar, seed: int) -> Iterator[int]:
    """Yield any tokens that a grammar allows, with a liking for marks and for the end."""
    choose, matcher = random.Random(seed), grammar.open()
    while True:
        logits = keep_allowed(torch.zeros(1, VOCAB_SIZE), compute_masks([matcher], torch.device("cpu")))
        allowed = {token_id for token_id, logit in enumerate(logits[0].tolist()) if logit == 0}
        others = sorted(allowed - EOS)
        if EOS & allowed and (not others or choose.random() < 0.4):
            return
        marks = [token_id for token_id in others if token_id >= NUM_TEXT_TOKENS]
        token_id = choose.choice(marks if marks and choose.random() < 0.2 else others)
        matcher.advance([token_id])
        yield token_id


def write(tokenizer: PreTrainedTokenizerFast, chat: ChatFormat, token_ids: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"), (), chat.skipped_token_ids(with_tools=True))
    return "".join(map(detokenizer.append, token_ids)) + detokenizer.flush()


@every_format
@pytest.mark.parametrize("special", [False, True], ids=["added", "special"])
def test_any_walk_makes_calls_that_validate(name: str, special: bool) -> None:
    tokenizer = TOKENIZERS[special]
    chat = chat_format(tokenizer, TEMPLATES[name])
    called: list[str] = []
    most = 0
    for is_single, prompt in (
        (True, harmony.PROMPT_END),
        (False, harmony.PROMPT_END + FORMATS[name].marks[0]),
    ):
        calls = plan(chat, is_single=is_single)
        grammar = COMPILERS[special].compile(None, layout=chat.plan_answer(prompt, calls))
        for seed in range(5):
            token_ids = list(walk(grammar, seed))
            text = write(tokenizer, chat, token_ids)
            events = parse(chat.open(prompt, TOOLS, calls=calls), [text])
            made = [value for kind, value in events if kind == "call"]
            assert made and {kind for kind, _ in events} <= {"call", "reasoning"}
            assert len(made) == 1 or not is_single
            for function, arguments in made:
                jsonschema.validate(arguments, SCHEMAS[function])
            called += [function for function, _ in made]
            if special and name != "llama3_json":
                assert max(token_ids) >= NUM_TEXT_TOKENS
            most = max(most, len(made))
    assert len(set(called)) > 1
    assert (most > 1) is (name != "openai")


@every_format
def test_marks_may_be_spelled_where_the_tokenizer_lacks_them(name: str) -> None:
    chat = chat_format(TOKENIZERS[None], TEMPLATES[name])
    calls = plan(chat, "now", is_single=True)
    grammar = COMPILERS[None].compile(None, layout=chat.plan_answer("", calls)._replace(reasoning=None))
    text = write(TOKENIZERS[None], chat, list(walk(grammar, 1)))
    assert [kind for kind, _ in parse(chat.open("", TOOLS, calls=calls), [text])] == ["call"]


@every_format
def test_calls_or_content(name: str) -> None:
    chat = chat_format(TOKENIZERS[None], TEMPLATES[name])
    calls = plan(chat, "now")
    layout = chat.plan_answer(harmony.PROMPT_END, calls)._replace(reasoning=None)
    # What looks like a call is none where the answer does not begin with it.
    content = json.dumps({"a": calls.openings[0] + "{}"})
    grammar = COMPILERS[None].compile(GrammarKind.CHOICE, json.dumps([content]), layout)
    kinds = set()
    for seed in range(5):
        text = write(TOKENIZERS[None], chat, list(walk(grammar, seed)))
        events = parse(chat.open(harmony.PROMPT_END, TOOLS, calls=calls), list(text))
        kinds.add(events[0][0])
        assert events == [("content", content)] or {value[0] for _, value in events} == {"now"}
    assert kinds == {"call", "content"}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("hermes", '{"name": "now", "arguments": {"x y": [{}], "z": "<"}}\n'),
        (
            "qwen3_coder",
            "<function=now>\n<parameter=x y>\n[{}]\n</parameter>\n"
            "<parameter=z>\n<\n</parameter>\n</function>\n",
        ),
    ],
)
def test_arguments_may_be_any_where_no_schema_is_to_be_kept(name: str, call: str) -> None:
    tokenizer = TOKENIZERS[False]
    chat = chat_format(tokenizer, TEMPLATES[name])
    assert chat.call_form is not None
    calls = Calls(chat.call_form, (describe_function(chat.call_form, "now", None),), True)
    matcher = COMPILERS[False].compile(None, layout=chat.plan_answer("", calls)).open()
    text = f"<tool_call>\n{call}</tool_call>"
    matcher.advance(tokenizer.encode(text, add_special_tokens=False))
    assert matcher.state.is_accepting()
    [(kind, (function, arguments))] = parse(chat.open("", TOOLS, calls=calls), [text])
    assert (kind, function, set(arguments)) == ("call", "now", {"x y", "z"})


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array"}, "an object"),
        ({"type": "object", "minProperties": 1}, "minProperties"),
        ({"properties": {"a": {"allOf": [{"type": "string"}]}}}, "allOf"),
        ({"properties": {"a": {"type": "string", "not": {"const": ""}}}}, "not"),
        ({"properties": {"a>b": {}}}, "a>b"),
        ({"properties": []}, "properties"),
        ({"required": [[]]}, "required"),
    ],
    ids=str,
)
def test_what_a_form_has_no_place_for_is_told(schema: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        describe_function(qwen_coder.FORM, "f", schema)


@pytest.mark.parametrize("form", [llama.FORM, qwen_coder.FORM], ids=["JSON", "parameters"])
@pytest.mark.parametrize(
    "value", [{"type": "array", "uniqueItems": True}, {"type": "string", "pattern": "a^b"}], ids=str
)
def test_what_llguidance_cannot_keep_is_told(form: CallForm, value: dict[str, Any]) -> None:
    calls = Calls(form, (describe_function(form, "f", {"properties": {"a": value}}),), True)
    chat = chat_format(TOKENIZERS[None], TEMPLATES["hermes"])
    with pytest.raises(GrammarError, match=r"uniqueItems|lookarounds|a\^b"):
        COMPILERS[None].compile(None, layout=chat.plan_answer("", calls))


def test_what_gpt_oss_says_by_a_grammar_stands_in_a_message_after_its_reasoning() -> None:
    tokenizer, chat = TOKENIZERS[True], chat_format(TOKENIZERS[True], TEMPLATES["openai"])
    layout = chat.plan_answer(harmony.PROMPT_END)
    matcher = COMPILERS[True].compile(GrammarKind.CHOICE, '["yes"]', layout).open()
    text = FORMATS["openai"].write("Why", after="yes")
    matcher.advance(tokenizer.encode(text, add_special_tokens=False))
    assert matcher.state.is_accepting()
    assert parse(chat.open(harmony.PROMPT_END), [text]) == [("reasoning", "Why"), ("content", "yes")]
