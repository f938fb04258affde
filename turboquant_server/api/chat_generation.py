"""From a conversation to what the engine is asked: what all endpoints that answer conversations share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from turboquant_server.api.chat_answer import ChatAnswer
from turboquant_server.api.chat_grammar import find_chat_grammar
from turboquant_server.api.conversation import check_conversation
from turboquant_server.api.errors import invalid_request
from turboquant_server.api.generation import Prompt, check_vocabulary, make_prompt

if TYPE_CHECKING:
    from turboquant_server.api.chat_request import ChatCompletionRequest
    from turboquant_server.api.prompts import ChatPrompt, PromptTokenizer
    from turboquant_server.model_manager import ModelManager


@dataclass(frozen=True)
class ChatGeneration:
    """What a conversation asks of the engine, and the answers that it fills."""

    model: str
    prompt: Prompt
    answers: list[ChatAnswer]


async def write_chat(
    model_manager: ModelManager, prompt_tokenizer: PromptTokenizer, body: ChatCompletionRequest
) -> ChatPrompt:
    """Check a conversation and write it with the model's template.

    Raises:
        ApiError: It does not fit together, or the template does not take it (400).
    """
    tools = body.offered_tools
    check_conversation(body.messages)
    _check_tool_choice(body)
    if tools and not model_manager.chat_format.has_tools:
        message = "Invalid 'tools': this model's chat template takes no tools."
        raise invalid_request(message, "tools", "unsupported_parameter")
    return await prompt_tokenizer.tokenize_chat(
        body.messages,
        tools=tools,
        template_kwargs=body.template_kwargs,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
    )


async def prepare_chat(
    model_manager: ModelManager, prompt_tokenizer: PromptTokenizer, body: ChatCompletionRequest
) -> ChatGeneration:
    """Check a conversation, write it with the model's template, and compile what its answer must follow.

    Args:
        model_manager: Whose model answers.
        prompt_tokenizer: Of that model.
        body: The conversation and how it is to be answered.

    Raises:
        ApiError: The request cannot be served as it is (400).
    """
    model = body.model or model_manager.model_names[0]
    chat_format, tools = model_manager.chat_format, body.offered_tools
    check_vocabulary(body, model_manager.engine.vocab_size)
    chat = await write_chat(model_manager, prompt_tokenizer, body)
    grammar, calls = await find_chat_grammar(model_manager, body, chat.text)
    prompt = make_prompt(
        body,
        chat.token_ids,
        body.max_completion_tokens or body.max_tokens,
        model_manager.max_model_len,
        param="messages",
        skipped_token_ids=chat_format.skipped_token_ids(with_tools=tools is not None),
        grammar=grammar,
    )
    max_calls = 1 if body.parallel_tool_calls is False else None
    if grammar is not None and calls is None:
        tools = None  # what looks like a call is part of the answer that was asked for
    answers = [
        ChatAnswer(
            chat_format.open(chat.text, tools, max_calls, calls),
            len(chat.token_ids),
            has_reasoning=body.include_reasoning is not False,
        )
        for _ in range(body.n or 1)
    ]
    return ChatGeneration(model, prompt, answers)


def _check_tool_choice(body: ChatCompletionRequest) -> None:
    """Check that there are the tools of which the request wants a call.

    Raises:
        ApiError: They are not (400).
    """
    if body.must_call and not body.tools:
        raise invalid_request("Invalid 'tool_choice': there are no tools.", "tool_choice", "invalid_value")
    if unknown := body.callable_names - {tool.function.name for tool in body.tools or ()}:
        message = f"Invalid 'tool_choice': none of the tools has the name {min(unknown)!r}."
        raise invalid_request(message, "tool_choice", "invalid_value")
