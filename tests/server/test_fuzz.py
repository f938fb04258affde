"""Whatever the OpenAPI document lets a client send, and what it does not: no failure, and answers as before.

schemathesis makes the requests from /openapi.json, in a process of its own: bodies that keep to the document,
bodies that break it in one place, wrong methods and content types. It checks that no status is 500 or more,
and that statuses, content types and bodies of responses are those of the document.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from scripted_engine import TEMPLATE

import turboquant_server

if TYPE_CHECKING:
    from conftest import RunningServer
    from transformers import PreTrainedTokenizerFast

pytest.importorskip("schemathesis")  # which Python 3.10 does not have

DEMO = Path(turboquant_server.__file__).parent / "demo"
# More than the document can say decides whether a body is accepted, such as a prompt that is too long.
EXCLUDED_CHECKS = "positive_data_acceptance"
# How long 2,048 prompts take depends on what else the machine does.
MAX_SECONDS = 120
MAX_MODEL_LEN = 64  # so that answers take little time
QUESTION = {"messages": [{"role": "user", "content": "Where is it?"}], "temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def model_dir(save_model: Callable[..., Path], tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Save a tiny model whose chat template takes tools."""
    path = save_model("llama")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def fuzz(url: str, folder: Path, phases: str, num_examples: int, seed: int) -> int:
    """Send so many random requests to each path, and others; return how many it were.

    Args:
        url: Of the server.
        folder: For schemathesis' files.
        phases: "coverage" sends systematic requests, thousands, beside the random ones of "fuzzing".
        num_examples: Of random ones.
        seed: Of those.

    Raises:
        AssertionError: A response was not what it must be.
    """
    report = folder / "report.json"
    options = {
        "--checks": "all",
        "--exclude-checks": EXCLUDED_CHECKS,
        "--phases": phases,
        "--max-examples": num_examples,
        "--seed": seed,
        "--generation-database": "none",
        "--request-timeout": MAX_SECONDS,
        "--max-response-time": MAX_SECONDS,
        "--report-json-path": report,
    }
    run = subprocess.run(
        [
            *(Path(sys.executable).with_name("st"), "run", f"{url}/openapi.json"),
            *(str(item) for option in options.items() for item in option),
            *("--continue-on-failure", "--no-shrink", "--no-color"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    cases = json.loads(report.read_text())["test_cases"]
    assert cases["with_failures"] == cases["errored"] == 0
    return int(cases["generated"])


def check_fuzzed(server: RunningServer, *arguments: Any) -> int:
    """Fuzz a server and check that it answers as before; return the number of requests."""
    with httpx.Client(base_url=server.url, timeout=20) as http:
        before = http.post("/v1/chat/completions", json=QUESTION).json()["choices"]
        num_requests = fuzz(server.url, *arguments)
        server.wait_until_idle()
        assert http.get("/health").status_code == 200
        assert http.post("/v1/chat/completions", json=QUESTION).json()["choices"] == before
    return num_requests


def test_hundreds_of_random_requests_do_no_harm(
    model_dir: Path,
    running_server: Callable[..., AbstractContextManager[RunningServer]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with running_server(model_dir, max_model_len=MAX_MODEL_LEN) as server:
        assert check_fuzzed(server, tmp_path, "examples,fuzzing", 30, 1) >= 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3])
def test_thousands_of_requests_do_no_harm(
    model_dir: Path,
    running_server: Callable[..., AbstractContextManager[RunningServer]],
    tmp_path: Path,
    seed: int,
) -> None:
    with running_server(model_dir, max_model_len=MAX_MODEL_LEN) as server:
        assert check_fuzzed(server, tmp_path, "examples,coverage,fuzzing", 150, seed) >= 3000


@pytest.mark.long
def test_thousands_of_requests_to_the_bundled_model_do_no_harm(
    running_server: Callable[..., AbstractContextManager[RunningServer]], tmp_path: Path
) -> None:
    with running_server(DEMO, max_model_len=MAX_MODEL_LEN, kv_cache_memory=64 * 2**20) as server:
        assert check_fuzzed(server, tmp_path, "examples,coverage", 1, 4) >= 2000
