"""Models come when they are asked for and go when they are told or idle, and no request is lost by it."""

from __future__ import annotations

import ctypes
import re
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from held_steps import held_steps
from life_server import TIMEOUT, LifeServer, error_of, held_loads, life_server, text_of, wait_for
from openai.types import Model
from scrape import Scrape

pytestmark = pytest.mark.usefixtures("no_variables")


def test_two_models_answer_beside_each_other(
    two_models: list[dict[str, Any]], pool: ThreadPoolExecutor
) -> None:
    with life_server(models=two_models, max_loaded_models=2) as server:
        assert server.states() == {"a": "loaded", "b": "loaded"}
        alone = {name: text_of(server.ask(name, max_tokens=40)) for name in "ab"}
        assert alone["a"] != alone["b"]

        def stream(name: str) -> str:
            chunks = server.openai.completions.create(
                model=name,
                prompt="The harbour",
                temperature=0,
                max_tokens=40,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            answer = ""
            for chunk in chunks:
                assert chunk.model == name
                answer += chunk.choices[0].text
            return answer

        assert list(pool.map(stream, "abab")) == [alone[name] for name in "abab"]
        assert text_of(server.ask(None, max_tokens=40)) == alone["a"]
        with pytest.raises(
            openai.NotFoundError, match=r"'c' does not exist. This server has 'a', 'b'"
        ) as caught:
            server.openai.completions.create(model="c", prompt="Hi")
        assert caught.value.code == "model_not_found"
        metrics = Scrape(server.http.get("/metrics").text)
        assert metrics["generation_tokens_total{a}"] == 40 * 4
        assert metrics["generation_tokens_total{b}"] == 40 * 3
        assert metrics["kv_capacity_tokens{a}"] > 0 and metrics["kv_capacity_tokens{b}"] > 0
        assert server.http.get("/health").json() == {"status": "ok"}


def test_a_request_brings_its_model_and_the_other_goes(switching: LifeServer) -> None:
    assert switching.states() == {"a": "loaded", "b": "unloaded"}
    first = text_of(switching.ask("a"))
    text_of(switching.ask("b"))
    assert switching.states() == {"a": "unloaded", "b": "loaded"}
    for card in switching.http.get("/v1/models").json()["data"]:
        assert Model.model_validate(card, strict=True).object == "model"
    cards = {card["id"]: card for card in switching.http.get("/v1/models").json()["data"]}
    assert (cards["a"]["max_model_len"], cards["b"]["max_model_len"]) == (2048, 4096)
    body = {"model": "a", "prompt": "The harbour"}
    assert switching.http.post("/tokenize", json=body).json()["max_model_len"] == 2048
    assert text_of(switching.ask("a")) == first
    assert switching.states() == {"a": "loaded", "b": "unloaded"}


def test_many_that_want_different_models_are_all_answered(
    switching: LifeServer, pool: ThreadPoolExecutor
) -> None:
    expected = {name: text_of(switching.ask(name)) for name in "ba"}
    answers = list(pool.map(switching.ask, "abbaabab"))
    assert [text_of(answer) for answer in answers] == [expected[name] for name in "abbaabab"]


def test_an_unload_waits_for_streams_and_the_next_request_for_the_unload(
    switching: LifeServer, pool: ThreadPoolExecutor
) -> None:
    manager = switching.models.find("a").manager
    with held_steps(manager) as held:
        answers = [pool.submit(switching.ask, "a", max_tokens=20) for _ in range(3)]
        held.wait_for_step()
        wait_for(lambda: manager.engine.num_running + manager.engine.num_waiting == 3)
        unload = pool.submit(switching.change, "unload", "a")
        wait_for(lambda: switching.models.find("a").is_leaving)
        late = pool.submit(switching.ask, "a")
        wait_for(lambda: switching.num_waiting("a"))
        assert not unload.done()
        assert switching.states()["a"] == "loaded"
        held.let_go()
        for answer in answers:
            assert answer.result(TIMEOUT).json()["usage"]["completion_tokens"] == 20
    assert unload.result(TIMEOUT).json()["id"] == "a"
    text_of(late.result(TIMEOUT))
    assert switching.states()["a"] == "loaded"
    assert switching.change("unload", "a").json()["state"] == "unloaded"
    assert switching.change("unload", "a").json()["state"] == "unloaded"
    assert switching.http.get("/health").json() == {"status": "unloaded"}


def test_a_client_that_does_not_read_keeps_no_model(switching: LifeServer) -> None:
    body = {"model": "a", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    body |= {"logprobs": 20, "return_token_ids": True}
    with switching.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert switching.change("unload", "a").json()["state"] == "unloaded"
        assert [line for line in lines if line.startswith("data")][-1] == "data: [DONE]"


def test_a_load_waits_for_a_slice_of_a_comparison_and_the_others_go_on_later(
    two_models: list[dict[str, Any]], pool: ThreadPoolExecutor
) -> None:
    options = {"max_loaded_models": 2, "fidelity_sample_rate": 1, "kv_cache_memory": 2**26}
    with life_server(models=two_models, **options) as server, held_loads() as loads:
        loads.let_go()
        assert server.change("unload", "b").json()["state"] == "unloaded"
        manager = server.models.find("a").manager
        fidelity = manager._fidelity
        assert fidelity is not None
        manager.engine.pause_comparisons(True)
        for _ in range(3):
            text_of(server.ask("a", prompt="The harbour. " * 100, max_tokens=40))
        slices, begun, work = threading.Semaphore(0), threading.Event(), fidelity.work

        def work_when_let() -> None:
            begun.set()
            if slices.acquire(timeout=TIMEOUT):
                work()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fidelity, "work", work_when_let)
            manager.engine.pause_comparisons(False)
            assert begun.wait(TIMEOUT)
            load = pool.submit(server.change, "load", "b")
            wait_for(lambda: server.states()["b"] == "loading")
            time.sleep(0.1)  # five looks
            assert loads.names == []
            slices.release()
            assert load.result(TIMEOUT).json()["state"] == "loaded"
            assert fidelity.state.num_answers == 0
            slices.release(1000)
            wait_for(lambda: fidelity.state.num_answers == 3)
            assert not any(fidelity.state.num_skipped.values())


def test_an_idle_model_goes_and_comes_back_when_it_is_asked_for(two_models: list[dict[str, Any]]) -> None:
    with life_server(models=two_models[:1], idle_unload="10m") as server:
        model = server.models.find("a")
        with held_steps(model.manager) as held, ThreadPoolExecutor(1) as pool:
            answer = pool.submit(server.ask, "a")
            held.wait_for_step()
            model.last_used -= 601
            time.sleep(0.3)  # two ticks
            assert server.states() == {"a": "loaded"}
            held.let_go()
            expected = text_of(answer.result(TIMEOUT))
        model.last_used -= 590
        time.sleep(0.3)
        assert server.states() == {"a": "loaded"}
        model.last_used -= 10
        wait_for(lambda: server.states() == {"a": "unloaded"})
        response = server.http.get("/health")
        assert (response.status_code, response.json()) == (200, {"status": "unloaded"})
        tokens = Scrape(server.http.get("/metrics").text)["generation_tokens_total"]
        assert text_of(server.ask("a")) == expected
        assert Scrape(server.http.get("/metrics").text)["generation_tokens_total"] == tokens + 4


def test_a_load_that_fails_is_told_once_in_a_while_and_can_be_tried_again(
    tiny_model_dir: Path, tmp_path: Path, two_models: list[dict[str, Any]]
) -> None:
    missing = tmp_path / "missing"
    with life_server(models=[two_models[0], {"name": "c", "model": str(missing)}]) as server:
        expected = text_of(server.ask("a"))
        with held_loads() as held:
            held.let_go(1000)
            response = server.ask("c")
            error = error_of(response, 503)
            assert re.search(rf"could not be loaded: .*{missing}", error["message"])
            assert error["code"] == "model_load_failed"
            assert response.headers["x-should-retry"] == "false"
            assert error_of(server.ask("c", stream=True), 503) == error
            assert held.names == ["c"]  # the second request did not cost the other model its place
            error_of(server.change("load", "c"), 503)
            assert held.names == ["c", "c"]
        [card] = [card for card in server.http.get("/v1/models").json()["data"] if card["id"] == "c"]
        assert card["state"] == "failed" and str(missing) in card["error"]
        assert text_of(server.ask("a")) == expected
        shutil.copytree(tiny_model_dir, missing)
        assert server.change("load", "c").json()["state"] == "loaded"
        assert text_of(server.ask("c")) == expected


def test_who_comes_while_a_failed_load_is_tried_again_waits_for_it(
    switching: LifeServer, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(switching.models.find("b").manager, "load", lambda: 1 / 0)
        error_of(switching.ask("b"), 503)
    with held_loads() as held:
        load = pool.submit(switching.change, "load", "b")
        wait_for(lambda: held.names == ["b"])
        answer = pool.submit(switching.ask, "b")
        wait_for(lambda: switching.num_waiting("b") or answer.done())
        held.let_go()
        text_of(answer.result(TIMEOUT))
        assert load.result(TIMEOUT).json()["state"] == "loaded"


def test_an_unforeseen_error_of_a_load_is_one_too(
    switching: LifeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(switching.models.find("b").manager, "load", lambda: 1 / 0)
        assert "ZeroDivisionError" in error_of(switching.ask("b"), 503)["message"]
    assert switching.change("load", "b").json()["state"] == "loaded"


def test_ten_lives_leave_nothing_behind(two_models: list[dict[str, Any]]) -> None:
    def resident() -> int:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what malloc keeps for later is no loss
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with life_server(models=two_models[:1]) as server:
        expected = text_of(server.ask("a"))
        sizes, threads, counts, tasks = [], [], [], []
        for _ in range(10):
            assert server.change("unload", "a").json()["state"] == "unloaded"
            wait_for(lambda: "model life" not in [thread.name for thread in threading.enumerate()])
            threads.append(sorted(thread.name for thread in threading.enumerate()))
            assert server.change("load", "a").json()["state"] == "loaded"
            assert text_of(server.ask("a")) == expected
            counts.append(Scrape(server.http.get("/metrics").text)["generation_tokens_total"])
            sizes.append(resident())
            tasks.append(server.num_tasks())
        assert len(threads[-1]) <= len(threads[1]) and tasks == [tasks[0]] * 10
        assert counts == [8 + 4 * index for index in range(10)]
        assert sizes[-1] - sizes[2] < 16 * 2**20  # the cache alone takes half of that each time
