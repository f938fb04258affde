"""An engine that answers what a test has written, in place of the one of a running server."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from answers import chat_format

from turboquant_server.engine.request import FinishReason, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams

# ChatML with tools, in Hermes' format.
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with <tool_call></tool_call>.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{{ reasoning_effort or '' }}{% endif %}"
)


class ScriptedEngine:
    """Answer requests from a script.

    Attributes:
        texts: The next answers; each choice of a request takes the first.
        finish_reason: Why they end.
        piece_length: So many characters come in a step.
        prompts: The tokens of the requests that came.
        sampling_params: What else they asked for.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.finish_reason = FinishReason.STOP
        self.piece_length = 3
        self.prompts: list[list[int]] = []
        self.sampling_params: list[SamplingParams] = []

    async def generate(
        self, token_ids: list[int], sampling_params: SamplingParams, request_id: str, cache_salt: str = ""
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the script's next answers."""
        self.prompts.append(token_ids)
        self.sampling_params.append(sampling_params)
        answers = [self.texts.pop(0) for _ in range(sampling_params.n)]
        size = self.piece_length
        cuts = [[text[start : start + size] for start in range(0, len(text), size)] for text in answers]
        for step in range(max(map(len, cuts)) + 1):
            for index, pieces in enumerate(cuts):
                if step <= len(pieces):
                    yield RequestOutput(
                        request_id=request_id,
                        text="".join(pieces[step : step + 1]),
                        token_ids=[0],
                        num_prompt_tokens=len(token_ids),
                        num_output_tokens=step + 1,
                        finish_reason=self.finish_reason if step == len(pieces) else None,
                        choice_index=index,
                    )

    def prompt(self, manager: Any) -> str:
        """Return the text of the newest request's prompt."""
        return str(manager.tokenizer.decode(self.prompts[-1]))


def install(monkeypatch: pytest.MonkeyPatch, manager: Any, template: str = TEMPLATE) -> ScriptedEngine:
    """Let a scripted engine answer a server's requests, as a model with this chat template would."""
    engine = ScriptedEngine()
    monkeypatch.setattr(manager.engine, "generate", engine.generate)
    monkeypatch.setattr(manager, "chat_format", chat_format(manager.tokenizer, template))
    monkeypatch.setattr(manager.tokenizer, "chat_template", template)
    return engine


def hermes_call(name: str, arguments: str) -> str:
    """Return the text of a call."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
