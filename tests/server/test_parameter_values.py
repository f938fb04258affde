"""A parameter that is out of its range, or contradicts another, is refused with a 400 that names it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SUBJECTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi"}]},
    COMPLETIONS: {"prompt": "Hi"},
}
WRONG: list[tuple[str, dict[str, Any], str]] = [
    *(
        (path, {"frequency_penalty": value}, "frequency_penalty")
        for path in (CHAT, COMPLETIONS)
        for value in (2.1, "1")
    ),
    (CHAT, {"presence_penalty": -3}, "presence_penalty"),
    (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"min_p": 1.1}, "min_p"),
    (CHAT, {"logit_bias": {"5": 101}}, "logit_bias.5"),
    (CHAT, {"logit_bias": {"k": 1}}, "logit_bias.k"),
    (CHAT, {"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    (CHAT, {"logit_bias": {"300": 1}}, "logit_bias"),
    (CHAT, {"logit_bias": {str(index): 1 for index in range(1025)}}, "logit_bias"),
    (COMPLETIONS, {"stop_token_ids": [300]}, "stop_token_ids"),
    (COMPLETIONS, {"stop_token_ids": [-1]}, "stop_token_ids"),
    (COMPLETIONS, {"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
    (CHAT, {"min_tokens": -1}, "min_tokens"),
    (CHAT, {"min_tokens": 3}, "min_tokens"),
    (COMPLETIONS, {"max_tokens": None, "min_tokens": 17}, "min_tokens"),
    (CHAT, {"logprobs": 3}, "logprobs"),
    (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"top_logprobs": 3}, "top_logprobs"),
    (COMPLETIONS, {"logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"logprobs": True}, "logprobs"),
    (COMPLETIONS, {"best_of": 2}, "best_of"),
    (COMPLETIONS, {"prompt_logprobs": 21}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": -1}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": True}, "prompt_logprobs"),
    (COMPLETIONS, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
    (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
    (COMPLETIONS, {"max_tokens": -1, "echo": True}, "max_tokens"),
    (CHAT, {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
]


@pytest.mark.parametrize(("path", "fields", "param"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_value_is_refused_by_the_name_of_its_field(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    response = http.post(path, json={"max_tokens": 2, **SUBJECTS[path], **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert f"'{param}'" in response.json()["error"]["message"]
