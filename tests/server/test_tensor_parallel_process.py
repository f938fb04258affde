"""The command with --tensor-parallel-size: one process to start and to end, whatever happens."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch
from scrape import Scrape
from served_ranks import END_SECONDS, served

from turboquant_server.config import ServerConfig
from turboquant_server.engine import followers
from turboquant_server.model_manager import ModelLoadError, ModelManager

pytestmark = [
    pytest.mark.usefixtures("no_variables"),
    pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers asks for it"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="ranks take the GPUs"),
]


def test_a_signal_lets_answers_finish_and_ends_all_ranks(tmp_path: Path, tiny_model_dir: Path) -> None:
    variables = {"TURBOQUANT_TENSOR_PARALLEL_SIZE": "2", "TURBOQUANT_MODEL": str(tiny_model_dir)}
    with served(tmp_path, [], **variables) as server:
        stream = server.client.completions.create(
            model=str(tiny_model_dir),
            prompt="Hello",
            max_tokens=60,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(stream)
        # To all processes, as a terminal or a service does.
        for pid in (server.process.pid, server.follower):
            os.kill(pid, signal.SIGTERM)
        *_, last = stream
        assert last.usage is not None and last.usage.completion_tokens == 60
        assert server.wait() == 0
        assert "2 tensor-parallel ranks, cpu" in server.log.read_text()
        assert "rror" not in server.log.read_text()


def test_a_rank_that_is_lost_ends_the_server_with_one_line(tmp_path: Path, tiny_model_dir: Path) -> None:
    arguments = ["--model", str(tiny_model_dir), "--load-format", "dummy", "--tensor-parallel-size", "2"]
    with served(tmp_path, arguments) as server:
        failures: list[openai.APIError] = []

        def ask() -> None:
            try:
                server.client.completions.create(
                    model=str(tiny_model_dir),
                    prompt="Hello",
                    max_tokens=1500,
                    extra_body={"ignore_eos": True},
                )
            except openai.APIError as error:
                failures.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        while not Scrape(httpx.get(f"{server.url}/metrics").text)["num_requests_running"]:
            time.sleep(0.02)
        os.kill(server.follower, signal.SIGKILL)
        assert server.wait() == 1
        asking.join()
        [failure] = failures
        assert isinstance(failure, openai.InternalServerError) and failure.status_code == 503
        last_line = server.log.read_text().splitlines()[-1]
        assert last_line.endswith("rank 1 of 2 has ended by SIGKILL, and the server with it")


def test_the_other_ranks_end_when_the_first_one_is_no_more() -> None:
    process, pipe = followers._start(1, 2, 0, ServerConfig(tensor_parallel_size=2))
    pipe.close()
    assert process.wait(END_SECONDS) == 1


@pytest.mark.parametrize("size", [3, 10**11])
def test_a_model_that_cannot_be_divided_is_refused_before_there_are_processes(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> None:
        raise AssertionError("a process is started")

    monkeypatch.setattr(followers, "_start", start)
    manager = ModelManager(ServerConfig(tensor_parallel_size=size, device="cpu"))
    with pytest.raises(ModelLoadError, match=f"has 2 key/value heads, which {size} GPUs cannot share evenly"):
        manager.load()
