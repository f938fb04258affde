"""Whoever waits for a model may leave, is told that it goes on, and is refused or sent away in time."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from held_steps import held_steps
from life_server import TIMEOUT, LifeServer, error_of, held_loads, life_server, text_of, wait_for

from turboquant_server import draining_server

pytestmark = pytest.mark.usefixtures("no_variables")

STREAMS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
}


def test_who_leaves_while_waiting_is_forgotten(switching: LifeServer, pool: ThreadPoolExecutor) -> None:
    with held_loads() as loads, held_steps(switching.models.find("a").manager) as steps:
        answer = pool.submit(switching.ask, "a")
        steps.wait_for_step()
        for fields in ({}, {"stream": True}):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(
                    f"{switching.http.base_url}/v1/completions",
                    json={"model": "b", "prompt": "Hi", **fields},
                    timeout=0.03,
                )
        body = {"model": "b", "prompt": "Hi", "stream": True}
        with switching.http.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()  # whose end closes the connection
            assert next(lines) == ": keep-alive"
            assert switching.num_waiting("b") == 1
        wait_for(lambda: switching.num_waiting("b") == 0)
        steps.let_go()
        text_of(answer.result(TIMEOUT))
        text_of(switching.ask("a"))
        assert loads.names == []  # nobody was left who wanted b
    assert switching.states() == {"a": "loaded", "b": "unloaded"}


def test_who_leaves_while_the_model_is_loaded_costs_nobody_else_anything(
    switching: LifeServer, pool: ThreadPoolExecutor
) -> None:
    with held_loads() as held:
        stays = pool.submit(switching.ask, "b")
        wait_for(lambda: held.names == ["b"])
        assert switching.states() == {"a": "unloaded", "b": "loading"}
        assert switching.http.get("/health").json() == {"status": "loading"}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{switching.http.base_url}/v1/completions", json={"model": "b", "prompt": "Hi"}, timeout=0.2
            )
        wait_for(lambda: switching.num_waiting("b") == 1)
        held.let_go(1)
        text_of(stays.result(TIMEOUT))
    assert switching.models.find("b").num_users == 0


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("fails", [False, True])
def test_a_stream_that_waits_for_its_model_is_kept_open(
    switching: LifeServer, monkeypatch: pytest.MonkeyPatch, path: str, fails: bool
) -> None:
    body = {"model": "b", "stream": True, **STREAMS[path]}
    with monkeypatch.context() as patch, held_loads() as held:
        if fails:
            patch.setattr(switching.models.find("b").manager, "load", lambda: 1 / 0)
        with switching.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200
            pieces = response.iter_text()
            text = next(pieces)
            while max(text.count(": keep-alive"), text.count("event: ping")) < 3:
                text += next(pieces)
            assert "data: {" not in text.replace('data: {"type":"ping"}', "")
            held.let_go()
            text += "".join(pieces)
    # On a busy machine another ping or comment may come before the end.
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    events = [event for event in events if event.get("type") != "ping"]
    assert any("ZeroDivisionError" in str(event) for event in events) is fails
    ends = {
        "/v1/responses": "error" if fails else "response.",
        "/v1/messages": "error" if fails else "message_stop",
    }
    if path in ends:
        assert events[-1]["type"].startswith(ends[path])
        if fails and path == "/v1/responses":  # OpenAI's client raises what it finds here
            assert events[-1]["error"]["code"] == events[-1]["code"] == "model_load_failed"
    else:
        assert [line for line in text.splitlines() if line.startswith("data")][-1] == "data: [DONE]"
    switching.models.find("b").failure = None


def test_what_is_wrong_with_a_late_stream_is_an_event(switching: LifeServer) -> None:
    with held_loads() as held, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(switching.ask, "b", stream=True, prompt=[10**6])
        wait_for(lambda: held.names == ["b"])
        time.sleep(0.2)
        held.let_go()
        response = asked.result(TIMEOUT)
    assert response.status_code == 200
    *_, error, done = [line for line in response.text.splitlines() if line]
    assert json.loads(error[6:])["error"]["param"] == "prompt"
    assert done == "data: [DONE]"


def test_too_many_that_wait_are_refused(two_models: list[dict[str, Any]], pool: ThreadPoolExecutor) -> None:
    with life_server(models=two_models, max_num_queued_requests=2) as server, held_loads() as held:
        waiting: list[Future[httpx.Response]] = [pool.submit(server.ask, "b") for _ in range(2)]
        wait_for(lambda: server.num_waiting("b") == 2)
        error_of(server.ask("b"), 429)
        held.let_go()
        for answer in waiting:
            text_of(answer.result(TIMEOUT))


def test_who_waits_is_told_when_the_server_ends(
    two_models: list[dict[str, Any]], pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining_server, "_kill", lambda: None)  # which would end the tests
    with life_server(models=two_models) as server, held_loads() as held:
        waiting = pool.submit(server.ask, "b")
        wait_for(lambda: held.names == ["b"])
        server.server.handle_exit(15, None)
        assert error_of(server.ask("a"), 503)["code"] == "shutting_down"
        assert server.models.is_changing
        server.server.handle_exit(15, None)
        assert error_of(waiting.result(TIMEOUT), 503)["code"] == "shutting_down"
        held.let_go()
        wait_for(lambda: server.models.find("b").manager.is_ready)


def test_no_other_load_begins_when_the_server_ends(
    two_models: list[dict[str, Any]], pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining_server, "_kill", lambda: None)  # which would end the tests
    with life_server(models=two_models) as server, held_loads() as held:
        loads = [pool.submit(server.change, "load", "b")]
        wait_for(lambda: held.names == ["b"])
        loads += [pool.submit(server.change, "load", "a"), pool.submit(server.change, "unload", "b")]
        wait_for(lambda: len(server.models._changes) == 3)
        for _ in range(2):
            server.server.handle_exit(15, None)
        for load in loads:
            assert error_of(load.result(TIMEOUT), 503)["code"] == "shutting_down"
        held.let_go()
        wait_for(lambda: server.models.find("b").manager.is_ready)
        time.sleep(0.1)  # five looks
        assert held.names == ["b"] and server.models.find("b").manager.is_ready
