"""The fields that say what an answer must look like, to a grammar. Knows no engine."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, NamedTuple

from turboquant_server.api.errors import invalid_request
from turboquant_server.api.generation_request import GenerationRequest, ResponseFormat, StructuredOutputs
from turboquant_server.engine.grammar import GrammarError, GrammarKind

if TYPE_CHECKING:
    from turboquant_server.engine.grammar import Grammar
    from turboquant_server.model_manager import ModelManager
    from turboquant_server.parsing.layout import Layout

JSON_SCHEMA = GrammarKind.JSON_SCHEMA
ANY_OBJECT = '{"type": "object"}'
MAX_MESSAGE_LENGTH = 400


class Wish(NamedTuple):
    """A grammar of what an answer says.

    Attributes:
        param: The field that asks for it.
        kind: Its language; None if the answer is to have only calls.
        text: The grammar.
    """

    param: str
    kind: GrammarKind | None
    text: str = ""


async def find_grammar(model_manager: ModelManager, body: GenerationRequest) -> Grammar | None:
    """Return the grammar that a request's answers must follow; None if it asks for none.

    Raises:
        ApiError: The fields ask for several, or for one that is not supported (400).
    """
    wish = find_wish(body)
    return None if wish is None else await compile_grammar(model_manager, body, wish)


def find_wish(body: GenerationRequest) -> Wish | None:
    """Return what a request's fields ask for.

    Raises:
        ApiError: They ask for several (400).
    """
    wishes = _find_wishes(body)
    if len(wishes) > 1:
        first, second = wishes[0].param, wishes[1].param
        message = f"'{first}' and '{second}' cannot be given together."
        raise invalid_request(message, second, "invalid_value")
    return wishes[0] if wishes else None


async def compile_grammar(
    model_manager: ModelManager, body: GenerationRequest, wish: Wish, layout: Layout | None = None
) -> Grammar:
    """Return a grammar, compiled on another thread.

    Args:
        model_manager: Whose model is to follow it.
        body: The request.
        wish: The grammar, and the field that it came from.
        layout: What else the answers have.

    Raises:
        ApiError: The grammar is none, or asks for what is not supported (400).
    """
    if body.min_tokens:
        message = "'min_tokens' cannot be given together with a grammar, which says where the answer ends."
        raise invalid_request(message, "min_tokens", "invalid_value")
    param = wish.param
    try:
        return await asyncio.to_thread(model_manager.grammars.compile, wish.kind, wish.text, layout)
    except GrammarError as error:
        # With an excerpt, which llguidance spreads over several lines, and sometimes very much of it.
        reason = " ".join(re.split("<state>|<backtrace>", str(error))[0].split())
        reason = reason.replace("NoExtensionBias", "no answer can begin as it wants")
        if len(reason) > MAX_MESSAGE_LENGTH:
            reason = f"{reason[:MAX_MESSAGE_LENGTH]}..."
        raise invalid_request(f"Invalid '{param}': {reason}", param, "invalid_value") from error


def _find_wishes(body: GenerationRequest) -> list[Wish]:
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
        Wish(param, kind, value if isinstance(value, str) else json.dumps(value))
        for param, kind, value in fields
        if value is not None
    ]
