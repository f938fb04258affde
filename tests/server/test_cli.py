"""The command: what it takes, what it prints, and how it ends.

More than 300 lines, many of them rows of wrong flags.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from turboquant_server import __version__, cli
from turboquant_server.cli import main, parse_config
from turboquant_server.config import ServerConfig
from turboquant_server.model_manager import ModelManager

START_SECONDS = 60
REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("no_variables")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command; it is killed when the test ends, if it still runs."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "turboquant_server", "--device", "cpu", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Return the one line with which ``argv`` is refused."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.startswith("turboquant-server: error: ")
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    return output.err


def test_no_flag_leaves_the_defaults() -> None:
    assert parse_config([]) == ServerConfig()


def test_every_setting_has_a_flag_that_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for name, field in ServerConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in text
        assert str(field.description).split()[0] in text


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"turboquant-server {__version__}\n"


def test_no_flag_waits_for_torch() -> None:
    code = "import sys, turboquant_server.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_flags_are_read_as_their_field_says() -> None:
    argv = (
        "--model some/model --bits 3 --quantize int4 --device cuda:1 --dtype bfloat16 --revision main "
        "--max-model-len 4k --trust-remote-code --served-model-name a b --host :: --port 9000"
    )
    assert parse_config(argv.split()) == ServerConfig(
        model="some/model",
        bits=3,
        quantize="int4",
        device="cuda:1",
        dtype="bfloat16",
        revision="main",
        max_model_len=4096,
        trust_remote_code=True,
        served_model_name=("a", "b"),
        host="::",
        port=9000,
    )


def test_underscores_are_accepted_in_flags_and_kept_in_values() -> None:
    config = parse_config(["--max_model_len=100", "--served_model_name", "a_b", "--model=c_d=e_f"])
    assert (config.max_model_len, config.served_model_name, config.model) == (100, ("a_b",), "c_d=e_f")


@pytest.mark.parametrize("rest", ["", "--bits 3", "--served-model-name a b", "--enable-auto-tool-choice"])
def test_a_model_may_come_first_without_its_flag(rest: str) -> None:
    assert parse_config(["a/model", *rest.split()]) == parse_config(["--model", "a/model", *rest.split()])


def test_vllms_flag_for_tools_changes_nothing() -> None:
    for flag in ("--enable-auto-tool-choice", "--enable_auto_tool_choice"):
        assert parse_config([flag]) == ServerConfig()


def test_a_flag_beats_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOQUANT_BITS", "5")
    monkeypatch.setenv("TURBOQUANT_SERVED_MODEL_NAME", "a b")
    config = parse_config(["--bits", "2"])
    assert (config.bits, config.served_model_name) == (2, ("a", "b"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--bits 5", ("--bits", "2, 3, 4 or 8", "'5'")),
        ("--bits four", ("--bits", "integer", "'four'")),
        ("--bits", ("--bits", "expected one argument")),
        ("--port 70000", ("--port", "65535", "'70000'")),
        ("--quantize int3", ("--quantize", "'none', 'int8' or 'int4'", "'int3'")),
        ("--dtype fp8", ("--dtype", "'bfloat16'", "'fp8'")),
        ("--max-model-len 1", ("--max-model-len", "greater than or equal to 2")),
        ("--max_model_len x", ("--max-model-len: input should be a number of tokens such as", "'x'")),
        ("--vram-limit 10G", ("--vram-limit: input should be a number of bytes, or", "'10G'")),
        ("--kv-bits 4", ("--kv-bits: input should be two of 2, 3, 4 and 8 with a comma", "'4'")),
        ("--kv-budget-bits 0", ("--kv-budget-bits", "greater than 0", "'0'")),
        ("--bits 4 --kv-bits 4,3", ("choose one of --bits and --kv-bits (",)),
        ("--kv_bits 4,3 --kv_budget_bits 3.5", ("choose one of --kv-bits and --kv-budget-bits (",)),
        ("--served-model-name", ("--served-model-name", "at least one argument")),
        ("--frobnicate 1", ("unrecognized arguments: --frobnicate (",)),
        ("--max-model 1", ("unrecognized arguments: --max-model; did you mean --max-model-len?",)),
        ("--no-prefix-caching", ("unrecognized arguments: --no-prefix-caching; did you mean",)),
        ("--config nothing.yaml", ("--config nothing.yaml: cannot be read (No such file",)),
        ("--ssl-keyfile a.pem", ("give both --ssl-certfile and --ssl-keyfile, or none",)),
        ("--bits 4 a/model", ("unrecognized arguments: a value without a flag; the model is given by",)),
        ("a/model --model b", ("unrecognized arguments: a value without a flag",)),
        ("a/model --bits 5", ("--bits", "2, 3, 4 or 8", "'5'")),
        ("--no-enable-auto-tool-choice", ("unrecognized arguments: --no-enable-auto-tool-choice",)),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: str, words: tuple[str, ...]
) -> None:
    message = refusal(capsys, *argv.split())
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BITS", "5"),
        ("PORT", "http"),
        ("QUANTIZE", "int3"),
        ("TRUST_REMOTE_CODE", "maybe"),
        ("MAX_MODEL_LEN", "-1"),
        ("KV_BITS", "4:3"),
        ("KV_BUDGET_BITS", "few"),
    ],
)
def test_a_wrong_variable_ends_with_one_sentence_that_names_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"TURBOQUANT_{name}", value)
    message = refusal(capsys)
    assert f"TURBOQUANT_{name}" in message and repr(value) in message


def test_a_flag_and_a_variable_that_both_choose_bits_end_with_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOQUANT_BITS", "4")
    message = refusal(capsys, "--kv-budget-bits", "3.5")
    assert "choose one of --bits and --kv-budget-bits (" in message


@pytest.mark.usefixtures("kept_signal_handler")
def test_a_busy_port_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--port", str(port)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in error and "--port" in error


@pytest.mark.usefixtures("kept_signal_handler")
def test_a_model_that_is_not_there_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "0", "--model", "./nothing-here"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("turboquant-server: error: ")
    assert output.err.count("\n") == 1 and "./nothing-here" in output.err


@pytest.mark.usefixtures("kept_signal_handler")
def test_a_failure_that_nobody_foresaw_ends_the_process_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ModelManager, "load", lambda model_manager: 1 // 0)
    assert main(["--port", "0"]) == 1
    assert "failed with ZeroDivisionError; the log above has the details" in capsys.readouterr().err
    assert caplog.records[-1].exc_info is not None


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a..b"])
def test_an_address_that_cannot_be_used_ends_with_one_sentence(host: str) -> None:
    with pytest.raises(cli.StartError, match=r"cannot listen on .*; choose another --host or --port"):
        cli.serve(ServerConfig(host=host, port=0))


@pytest.mark.parametrize(("error", "is_logged"), [(asyncio.CancelledError(), False), (ValueError(), True)])
def test_a_request_that_a_stop_cuts_off_leaves_no_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: BaseException, is_logged: bool
) -> None:
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "filters", [])
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    cli.configure_logging()
    logging.getLogger("uvicorn.error").error("Exception in ASGI application", exc_info=error)
    assert bool(caplog.records) is is_logged


@pytest.mark.parametrize(
    ("host", "settings", "is_warned"),
    [
        ("127.0.0.1", {}, False),
        ("0.0.0.0", {}, True),
        ("0.0.0.0", {"api_key": "k"}, False),
    ],
)
def test_an_open_door_is_warned_of(
    host: str,
    settings: dict[str, Any],
    is_warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    manager = ModelManager(ServerConfig(host=host, **settings))
    monkeypatch.setattr(manager, "startup_report", lambda: "report")
    with socket.create_server((host, 0)) as listener:
        cli._print_start([manager], listener)
    assert ["without --api-key" in message for message in caplog.messages] == [True] * is_warned
    assert "Serving on http://127.0.0.1:" in capsys.readouterr().out


def test_a_start_says_where_and_how_to_ask_and_a_stop_waits_for_streams(
    start: Callable[..., Any], tiny_model_dir: Path
) -> None:
    process = start("--port", "0", "--model", str(tiny_model_dir), "--served-model-name", "tiny")
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if line.startswith("curl "):
            break
    text = "\n".join(lines)
    found = re.search(r"^Serving on (http://127\.0\.0\.1:\d+)$", text, re.MULTILINE)
    assert found, text + process.stderr.read()
    url = found[1]
    assert "bits per value" in text

    curl, *arguments = shlex.split(lines[-1])
    assert (curl, arguments[0]) == ("curl", f"{url}/v1/chat/completions")
    body = json.loads(arguments[arguments.index("-d") + 1])
    answer = httpx.post(arguments[0], json={**body, "max_tokens": 2}, timeout=START_SECONDS)
    assert answer.json()["object"] == "chat.completion"

    long = {
        **body,
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    with httpx.stream("POST", arguments[0], json=long, timeout=START_SECONDS) as response:
        events = (line for line in response.iter_lines() if line)
        next(events)
        process.send_signal(signal.SIGTERM)
        *_, usage, done = events
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == 300
    assert done == "data: [DONE]"
    assert process.wait(START_SECONDS) == 0
    assert "Traceback" not in process.stderr.read()


def test_a_stop_while_loading_ends_the_process_quietly(start: Callable[..., Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    process = start("--port", str(port))
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=START_SECONDS).status_code == 503
            break
        except httpx.ConnectError:
            time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 0, error
    assert error == ""
