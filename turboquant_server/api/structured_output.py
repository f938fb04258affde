"""The fields that say what an answer must look like, to a grammar. Knows no engine."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, NamedTuple

from turboquant_server.api.errors import invalid_request
from turboquant_server.api.generation_request import GenerationRequest, ResponseFormat, StructuredOutputs
from turboquant_server.engine.grammar import GrammarError, GrammarKind, Reasoning

if TYPE_CHECKING:
    from turboquant_server.engine.grammar import Grammar
    from turboquant_server.model_manager import ModelManager
    from turboquant_server.parsing.reasoning import Marks

JSON_SCHEMA = GrammarKind.JSON_SCHEMA
ANY_OBJECT = '{"type": "object"}'
MAX_MESSAGE_LENGTH = 400


class _Wish(NamedTuple):
    """A grammar and the field that asks for it."""

    param: str
    kind: GrammarKind
    text: str


async def find_grammar(
    model_manager: ModelManager, body: GenerationRequest, reasoning: tuple[Marks, bool] | None = None
) -> Grammar | None:
    """Return the grammar that a request's answers must follow; None if it asks for none.

    Args:
        model_manager: Whose model answers.
        body: The request.
        reasoning: What answers may begin with, as `ChatFormat.find_reasoning` tells.

    Raises:
        ApiError: The fields ask for several, or for one that is not supported (400).
    """
    wishes = _find_wishes(body)
    if not wishes:
        return None
    if len(wishes) > 1:
        first, second = wishes[0].param, wishes[1].param
        message = f"'{first}' and '{second}' cannot be given together."
        raise invalid_request(message, second, "invalid_value")
    if body.min_tokens:
        message = "'min_tokens' cannot be given together with a grammar, which says where the answer ends."
        raise invalid_request(message, "min_tokens", "invalid_value")
    before = None if reasoning is None else Reasoning(*reasoning[0], is_open=reasoning[1])
    return await compile_grammar(model_manager, *wishes[0], before)


async def compile_grammar(
    model_manager: ModelManager,
    param: str,
    kind: GrammarKind,
    text: str,
    reasoning: Reasoning | None = None,
) -> Grammar:
    """Return a grammar, compiled on another thread.

    Args:
        model_manager: Whose model is to follow it.
        param: The field that the grammar came from.
        kind: The language of the grammar.
        text: The grammar.
        reasoning: What comes before.

    Raises:
        ApiError: The text is not what it must be, or asks for what is not supported (400).
    """
    try:
        return await asyncio.to_thread(model_manager.grammars.compile, kind, text, reasoning)
    except GrammarError as error:
        # With an excerpt, which llguidance spreads over several lines, and sometimes very much of it.
        reason = " ".join(str(error).split())
        if len(reason) > MAX_MESSAGE_LENGTH:
            reason = f"{reason[:MAX_MESSAGE_LENGTH]}..."
        raise invalid_request(f"Invalid '{param}': {reason}", param, "invalid_value") from error


def _find_wishes(body: GenerationRequest) -> list[_Wish]:
    response_format = body.response_format or ResponseFormat(type="text")
    outputs = body.structured_outputs or StructuredOutputs()
    schema = response_format.json_schema if response_format.type == "json_schema" else None
    fields: tuple[tuple[str, GrammarKind, object], ...] = (
        ("response_format", JSON_SCHEMA, ANY_OBJECT if response_format.type == "json_object" else None),
        ("response_format.json_schema.schema", JSON_SCHEMA, schema and schema.json_schema),
        ("structured_outputs.json_object", JSON_SCHEMA, ANY_OBJECT if outputs.json_object else None),
        ("structured_outputs.json", JSON_SCHEMA, outputs.json_value),
        ("structured_outputs.regex", GrammarKind.REGEX, outputs.regex),
        ("structured_outputs.choice", GrammarKind.CHOICE, outputs.choice),
        ("structured_outputs.grammar", GrammarKind.GRAMMAR, outputs.grammar),
        ("guided_json", JSON_SCHEMA, body.guided_json),
        ("guided_regex", GrammarKind.REGEX, body.guided_regex),
        ("guided_choice", GrammarKind.CHOICE, body.guided_choice),
        ("guided_grammar", GrammarKind.GRAMMAR, body.guided_grammar),
    )
    return [
        _Wish(param, kind, value if isinstance(value, str) else json.dumps(value))
        for param, kind, value in fields
        if value is not None
    ]
