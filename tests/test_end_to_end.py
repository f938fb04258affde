"""The bundled model behind a real server, asked through the OpenAI SDK: what a new user does first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

DEMO = Path(__file__).resolve().parents[1] / "turboquant_server" / "demo"


@pytest.fixture(scope="module")
def client(demo_server_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{demo_server_url}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def long_question() -> str:
    """About 4,000 tokens of text that the model was not trained on, with a code planted in the middle."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO).backend_tokenizer
    text = (DEMO / "held_out.txt").read_text("utf-8")[50_000:80_000].replace("<|endoftext|>", "\n")
    words = tokenizer.decode(tokenizer.encode(text).ids[:3960]).split(" ")
    middle = len(words) // 2
    words.insert(middle, "The access code of Zorbina Quell is 604817.")
    return " ".join(words) + "\n\nWhat is the access code of Zorbina Quell?"


def test_a_planted_code_is_found_in_a_prompt_of_four_thousand_tokens(
    client: OpenAI, long_question: str
) -> None:
    messages = [{"role": "user", "content": long_question}]
    model = client.models.list().data[0].id

    answer = client.chat.completions.create(model=model, messages=messages, temperature=0)
    stream = client.chat.completions.create(
        model=model, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)

    assert answer.choices[0].message.content == "604817"
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "604817"
    usage, again = answer.usage, chunks[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert again is not None and again.prompt_tokens_details is not None
    # The second time all of the prompt but its end was found in the cache.
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert again.prompt_tokens_details.cached_tokens == 4 + 7 * 512
    assert again.total_tokens == usage.total_tokens
    assert 3950 < usage.prompt_tokens < 4100
    assert usage.completion_tokens == 7  # six digits and the end of the turn
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_plain_completion_continues_text(client: OpenAI) -> None:
    fact = "The access code of the north tower is 550172."
    prompt = f"Notes.\n{fact}\n\nQuestion: What is the access code of the north tower?\nAnswer:"
    completion = client.completions.create(
        model="turboquant-demo", prompt=prompt, temperature=0, max_tokens=7
    )
    assert completion.choices[0].text == " 550172"
