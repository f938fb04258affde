"""The bundled model behind the real command, asked through the OpenAI SDK: what a new user does first."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI
from transformers import AutoTokenizer

DEMO = Path(__file__).resolve().parents[1] / "turboquant_server" / "demo"
START_SECONDS = 120


@pytest.fixture(scope="module")
def server_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def client(server_log: Path) -> Iterator[OpenAI]:
    """Start `turboquant-server` with the bundled model at its default of 4 bits; end it with SIGTERM."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TURBOQUANT_")}
    with server_log.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "turboquant_server", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment | {"OMP_NUM_THREADS": "1"},
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _is_healthy(port):
                assert process.poll() is None and time.monotonic() < deadline, server_log.read_text()
                time.sleep(0.1)
            with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused", max_retries=0) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, server_log.read_text()


def _is_healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


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
    usage = answer.usage
    assert usage is not None and usage == chunks[-1].usage
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


def test_start_up_tells_what_a_user_wants_to_know(client: OpenAI, server_log: Path) -> None:
    log = server_log.read_text()
    assert str(client.base_url.port) in log
    assert re.search(r"bits per value", log)
    command = next(line for line in log.splitlines() if line.lstrip().startswith("curl "))
    output = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert '"chat.completion"' in output
