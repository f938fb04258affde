"""The load generator measures what a server does, seen on one with known delays."""

from __future__ import annotations

import json
import random
import signal
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from benchmark_serving import main
from fake_openai_server import TOKENS_PER_WORD, FakeServer, fake_openai_server
from serving_prompts import WORDS, PromptMaker
from serving_table import COLUMNS

PRECISION = 0.02  # seconds, on a machine that does other things, too
NUM_QUESTIONS = 2  # how long a prompt is

Run = Callable[..., tuple[Any, list[str], dict[str, Any]]]


@pytest.fixture(scope="module")
def running_fake() -> Iterator[FakeServer]:
    with fake_openai_server() as fake:
        yield fake


@pytest.fixture
def server(running_fake: FakeServer) -> FakeServer:
    running_fake.prepare()
    return running_fake


@pytest.fixture
def run(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the script; return its exit status, what it prints before the last line, and that one's JSON."""

    def call(*arguments: str) -> tuple[Any, list[str], dict[str, Any]]:
        with pytest.raises(SystemExit) as exit:
            main(["--base-url", server.url, *arguments])
        *lines, last = capsys.readouterr().out.splitlines() or ["{}"]
        return exit.value.code, lines, json.loads(last)

    return call


def load(num_requests: int, concurrency: str, output_tokens: str = "1") -> list[str]:
    load = {"num-requests": num_requests, "concurrency": concurrency, "output-tokens": output_tokens}
    return [f"--{name}={value}" for name, value in load.items()]


# What a run measures


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_row_has_the_servers_delays_and_counts(server: FakeServer, run: Run, endpoint: str) -> None:
    server.prepare(first_delay=0.08, delay=0.03, cached_tokens=10)
    options = ["--endpoint", endpoint, "--api-key", "secret", "--input-tokens", "50"]
    # So many that a machine that stops for a moment does not move the medians.
    status, lines, report = run(*load(12, "2", "4"), *options)
    assert status == 0 and server.keys == {"Bearer secret"} and "secret" not in json.dumps(report)
    assert report["model"] == "first" and report["interrupted"] is False
    [row] = report["rows"]
    assert (row["requests"], row["failed"], row["short"], row["counted_by_chunks"]) == (12, 0, 0, 0)
    for name, seconds in {"ttft": 0.08, "tpot": 0.03, "itl": 0.03, "latency": 0.17}.items():
        assert row[f"{name}_ms"]["p50"] == pytest.approx(1000 * seconds, abs=1000 * PRECISION), name
    assert row["duration_s"] == pytest.approx(6 * 0.17, rel=0.3)
    assert row["requests_per_s"] == pytest.approx(12 / row["duration_s"])
    assert row["output_tokens_mean"] == 4
    assert row["output_tokens_per_s"] == pytest.approx(48 / row["duration_s"])
    assert row["input_tokens_mean"] == pytest.approx(50, abs=TOKENS_PER_WORD / 2)
    assert row["input_tokens_per_s"] == pytest.approx(12 * row["input_tokens_mean"] / row["duration_s"])
    assert row["prefix_hit_rate"] == pytest.approx(10 / row["input_tokens_mean"])
    body = server.bodies[-1]
    assert body["ignore_eos"] is True and body["temperature"] == 0 and body["max_tokens"] == 4
    header, rule, line = lines[:3]
    assert len(header) == len(rule) == len(line) and rule.startswith("|---")
    assert [cell.strip() for cell in header.strip("|").split("|")] == list(COLUMNS)


def test_so_many_requests_are_under_way_and_a_warm_up_is_not_counted(server: FakeServer, run: Run) -> None:
    server.prepare(first_delay=0.04)
    _, _, report = run(*load(6, "1,3,3", "2"))
    rows = report["rows"]
    assert [(row["concurrency"], row["requests"]) for row in rows] == [(1, 6), (3, 6), (3, 6)]
    assert server.most_at_once == 3
    assert 2 < rows[0]["duration_s"] / rows[1]["duration_s"] < 4
    prompts = [body["prompt"] for body in server.bodies[NUM_QUESTIONS:]]
    assert len(prompts) == 3 * (1 + 6) == len(set(prompts)), "a row's prompts are in no other row"


def test_warm_ups_run_as_many_at_once_as_the_row(server: FakeServer, run: Run) -> None:
    server.prepare(first_delay=0.05, faults=dict.fromkeys((NUM_QUESTIONS + 5, NUM_QUESTIONS + 6), "refused"))
    _, _, report = run(*load(2, "2", "2"), "--num-warmups", "5")
    assert server.most_at_once == 2, "of the warm-ups, as nothing else is answered"
    assert len(server.bodies) == NUM_QUESTIONS + 5 + 2
    assert (report["rows"][0]["completed"], report["rows"][0]["failed"]) == (0, 2)


def test_requests_start_at_the_rate_however_many_are_under_way(server: FakeServer, run: Run) -> None:
    server.prepare(first_delay=0.4)
    names = ["--num-prompts=24", "--request-rate=100", "--output-len=2"]
    status, lines, report = run(*names)
    [row] = report["rows"]
    assert status == 0 and (row["completed"], row["request_rate"], row["concurrency"]) == (24, 100, None)
    assert server.most_at_once == 24, "none waits for another's end"
    assert 0.4 < row["duration_s"] < 1.2
    assert row["ttft_ms"]["p50"] == pytest.approx(400, abs=2000 * PRECISION)
    assert "request rate 100" in lines[2]


def test_the_report_tells_what_was_run_with_what(server: FakeServer, run: Run, tmp_path: Path) -> None:
    server.prepare(model="served", version="1.2.3")
    file = tmp_path / "report.json"
    _, _, report = run(*load(1, "1"), "--api-key=secret", "--model", "mine", "--output-file", str(file))
    assert json.loads(file.read_text()) == report
    assert report["command"].startswith(
        f"scripts/benchmark_serving.py --base-url {server.url} --num-requests=1"
    )
    assert "--api-key=KEY" in report["command"] and "secret" not in file.read_text()
    assert report["server"] == {"model": "served", "version": "1.2.3", "ignore_eos": True}
    assert report["model"] == "mine" and {"python", "httpx"} <= report["versions"].keys()
    assert datetime.fromisoformat(report["date"]).tzinfo is not None


def test_a_server_that_does_not_take_ignore_eos_is_asked_without(server: FakeServer, run: Run) -> None:
    server.prepare(refuses_ignore_eos=True)
    status, lines, report = run(*load(2, "1"))
    assert status == 0 and report["rows"][0]["failed"] == 0 and report["server"]["ignore_eos"] is False
    assert ["ignore_eos" in body for body in server.bodies] == [True, *(NUM_QUESTIONS + 1 + 2) * [False]]
    assert "does not take ignore_eos" in lines[0]


def test_the_same_seed_asks_the_same_and_another_does_not(server: FakeServer, run: Run) -> None:
    asked = []
    for seed in "112":
        server.prepare()
        run(*load(9, "1", "1:9"), "--seed", seed, "--input-tokens", "40:80")
        asked.append([(body["prompt"], body["max_tokens"]) for body in server.bodies[NUM_QUESTIONS:]])
    assert asked[0] == asked[1]
    assert not set(asked[0]) & set(asked[2])
    assert len({num_tokens for _, num_tokens in asked[0]}) > 3


def test_prompts_share_their_first_part_and_no_more(server: FakeServer, run: Run) -> None:
    run(*load(4, "2"), "--shared-prefix-tokens", "30", "--input-tokens", "60")
    words = [body["prompt"].split() for body in server.bodies[NUM_QUESTIONS:]]
    shared = 30 // TOKENS_PER_WORD
    assert len({tuple(prompt[:shared]) for prompt in words}) == 1
    assert len({tuple(prompt[shared : shared + 4]) for prompt in words}) == len(words) == 5


def test_prompts_have_the_wished_lengths() -> None:
    maker = PromptMaker(tokens_per_word=2.0, extra_tokens=10.0)
    lengths = list(range(20, 220))
    prompts = [prompt.split() for prompt in maker.prompts(random.Random(0), lengths, 0)]
    assert all(abs(2 * len(p) + 10 - n) <= 1 for p, n in zip(prompts, lengths, strict=True))
    assert {word for prompt in prompts for word in prompt} == set(WORDS)


# What goes wrong


def test_failures_are_counted_with_their_reasons_and_not_timed(server: FakeServer, run: Run) -> None:
    faults = ["refused", "refused", "no json", "error event", "cut"]
    server.prepare(first_delay=0.05, faults=dict(enumerate(faults, start=NUM_QUESTIONS + 2)))
    status, lines, report = run(*load(8, "2", "2"))
    assert status == 0
    [row] = report["rows"]
    url = f"{server.url}/completions"
    assert row["failures"] == {
        f"HTTP 400 from {url}: too long, says the server": 2,
        f"HTTP 502 from {url}: <b>bad gateway</b>": 1,
        "error in the stream: out of memory": 1,
        "the stream ended before the answer did": 1,
    }
    assert (row["requests"], row["failed"]) == (8, 5)
    assert row["requests_per_s"] == pytest.approx(3 / row["duration_s"])
    assert row["output_tokens_per_s"] == pytest.approx(6 / row["duration_s"])
    assert row["ttft_ms"]["p50"] == pytest.approx(50, abs=1000 * PRECISION)
    assert f"concurrency 2: 2 failed: HTTP 400 from {url}: too long, says the server" in lines


def test_a_run_of_failures_only_shows_them_and_fails(server: FakeServer, run: Run) -> None:
    server.prepare(faults=dict.fromkeys(range(NUM_QUESTIONS, NUM_QUESTIONS + 3), "refused"))
    status, lines, report = run(*load(3, "1"), "--warmup", "0")
    assert status == "benchmark_serving.py: every request failed"
    assert report["rows"][0]["failed"] == 3 and report["rows"][0]["ttft_ms"] is None
    assert "-" in [cell.strip() for cell in lines[2].split("|")]


def test_without_usage_chunks_are_counted_and_that_is_said(server: FakeServer, run: Run) -> None:
    server.prepare(tells_usage=False)
    status, lines, report = run(*load(2, "1", "3"), "--input-tokens", "50")
    [row] = report["rows"]
    assert (status, row["counted_by_chunks"], row["short"]) == (0, 2, 0)
    assert row["output_tokens_mean"] == 3
    assert row["input_tokens_mean"] is row["input_tokens_per_s"] is row["prefix_hit_rate"] is None
    assert any("did not tell the tokens of 2 answers" in line for line in lines)
    assert "one per word is assumed" in lines[0]
    assert len(server.bodies[-1]["prompt"].split()) == 50


@pytest.mark.parametrize("tells_usage", [True, False])
def test_answers_shorter_than_asked_are_counted(server: FakeServer, run: Run, tells_usage: bool) -> None:
    server.prepare(tells_usage=tells_usage, most_tokens=2)
    _, _, report = run(*load(2, "2", "3"))
    assert report["rows"][0]["short"] == 2 and report["rows"][0]["output_tokens_mean"] == 2


def test_text_that_python_takes_for_line_ends_is_read(server: FakeServer, run: Run) -> None:
    server.prepare(word="\u2028\x85")
    _, _, report = run(*load(1, "1", "3"))
    assert report["rows"][0]["failed"] == 0 and report["rows"][0]["itl_ms"]


def test_an_interrupt_prints_what_was_measured(server: FakeServer, run: Run) -> None:
    handler = signal.getsignal(signal.SIGINT)
    # The third of the second row: questions, 1 + 3 of the first, a warm-up and two come before it.
    server.prepare(first_delay=0.05, faults={NUM_QUESTIONS + 4 + 3: "interrupt"})
    status, _, report = run(*load(3, "1,1", "2"))
    assert status == 130 and report["interrupted"] is True
    assert [row["requests"] for row in report["rows"]] == [3, 2]
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_wrong_url_gets_one_sentence(server: FakeServer, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        unused = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    elsewhere = server.url.replace("v1", "v2")
    for url, message in {
        elsewhere: f"HTTP 404 from {elsewhere}/models: Not Found; does the URL end in /v1?",
        unused: f"{unused}/models does not answer: ",
        "example": "example/models does not answer: Request URL is missing",
    }.items():
        status, lines, report = run("--base-url", url)
        assert status.startswith(f"benchmark_serving.py: {message}") and "\n" not in status
        assert not lines and not report


def test_a_refused_first_question_gets_one_sentence(server: FakeServer, run: Run) -> None:
    server.prepare(faults={0: "refused"})
    status, lines, _ = run("--model", "mine")
    assert (
        status == f"benchmark_serving.py: HTTP 400 from {server.url}/completions: too long, says the server"
    )
    assert not lines and server.bodies[0]["model"] == "mine"


def test_a_refused_warm_up_leaves_the_rows_before_it(server: FakeServer, run: Run) -> None:
    server.prepare(faults={NUM_QUESTIONS + 3: "refused"})
    status, _, report = run(*load(2, "1,2"))
    assert "HTTP 400" in status and [row["requests"] for row in report["rows"]] == [2]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--concurrency", "1,65", "more than the 64 of --num-requests"),
        ("--concurrency/--max-concurrency", "0", "0 is less than 1"),
        ("--input-len/--input-tokens", "9:8", "9 is more than 8"),
        ("--output-len/--output-tokens", "0", "0 is less than 1"),
        ("--shared-prefix-len", "256", "not less than --input-len"),
        ("--num-warmups/--warmup", "-1", "-1 is less than 0"),
        ("--request-rate", "1,0", "1,0 is not above 0 and finite"),
        ("--request-rate", "inf", "inf is not above 0 and finite"),
        ("--output-file", ".", ". is a folder or in one that does not exist"),
        ("--output-file", "nowhere/file", "nowhere/file is a folder or in one that does not exist"),
    ],
)
def test_options_that_make_no_sense_are_named(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([f"{option.partition('/')[0]}={value}"])
    assert f"argument {option}: {message}" in capsys.readouterr().err


def test_a_load_is_a_closed_loop_or_an_open_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--concurrency=2", "--request-rate=2"])
    assert "argument --request-rate: not allowed with argument --concurrency" in capsys.readouterr().err
