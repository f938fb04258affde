"""What the answers of a chat must look like, to a grammar: calls of tools, content, or one of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turboquant_server.api.errors import ApiError, invalid_request
from turboquant_server.api.structured_output import Wish, compile_grammar, find_wish
from turboquant_server.parsing.layout import Calls, Function, describe_function

if TYPE_CHECKING:
    from turboquant_server.api.chat_request import ChatCompletionRequest
    from turboquant_server.engine.grammar import Grammar
    from turboquant_server.model_manager import ModelManager
    from turboquant_server.parsing.layout import CallForm


async def find_chat_grammar(
    model_manager: ModelManager, body: ChatCompletionRequest, prompt: str
) -> tuple[Grammar | None, Calls | None]:
    """Return the grammar that a chat's answers must follow, and the calls that it has room for.

    Args:
        model_manager: Whose model answers.
        body: The request; its choice of tools is checked.
        prompt: The text that the answers continue.

    Returns:
        No grammar if the model may write as it likes.

    Raises:
        ApiError: The fields contradict each other, or ask for what is not supported (400).
    """
    wish, must_call = find_wish(body), body.must_call
    if must_call and wish and wish.param.partition(".")[0] != "response_format":
        message = f"'{wish.param}' cannot be given together with a tool_choice that asks for a call."
        raise invalid_request(message, wish.param, "invalid_value")
    if must_call:
        wish = Wish("tool_choice", None)  # a response_format has no content that it could be about
    elif wish is None:
        return None, None
    form = model_manager.chat_format.call_form
    if must_call and form is None:
        message = (
            "Invalid 'tool_choice': how this model writes tool calls is not known, so nothing can make it "
            "call one; give auto, or none for an answer without calls."
        )
        raise invalid_request(message, "tool_choice", "unsupported_parameter")
    functions = _describe_functions(body, form) if form else {}
    is_single = body.parallel_tool_calls is False or body.named_tool is not None
    calls = Calls(form, tuple(functions.values()), is_single) if form and functions else None

    async def compile_with(calls: Calls | None, wish: Wish) -> Grammar:
        layout = model_manager.chat_format.plan_answer(prompt, calls)
        return await compile_grammar(model_manager, body, wish, layout)

    try:
        return await compile_with(calls, wish), calls
    except ApiError:
        for index, function in functions.items():
            # What is wrong with one of them has its name.
            param = f"tools[{index}].function.parameters"
            await compile_with(calls and calls._replace(functions=(function,)), Wish(param, None))
        raise


def _describe_functions(body: ChatCompletionRequest, form: CallForm) -> dict[int, Function]:
    """Return the functions that may be called, by their places in the request."""
    functions, names = {}, body.callable_names
    for index, tool in enumerate(body.tools or ()):
        function = tool.function
        if function.name not in names:
            continue
        parameters = function.parameters
        if parameters is None:
            parameters = {"type": "object", "additionalProperties": False}
        try:
            functions[index] = describe_function(
                form, function.name, parameters if body.must_call or function.strict else None
            )
        except (ValueError, RecursionError) as error:
            param = f"tools[{index}].function.parameters"
            raise invalid_request(f"Invalid '{param}': {error}.", param, "invalid_value") from error
    return functions
