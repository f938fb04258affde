"""The pages in Chromium: a chat is streamed, stopped and refused, numbers move, and nobody else is asked.

More than 300 lines: what a person does with them, from the first question to the theme.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chromium
import httpx
import pytest
from chromium import SHIFT, Page
from held_steps import held_steps
from scripted_engine import hermes_call, install

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("no_variables"),
    pytest.mark.skipif(chromium.EXECUTABLE is None, reason="needs chromium, such as Debian's package"),
]

MARKDOWN = """<think>Let me see.</think>## Steps

1. **Open** the `gate`
2. Go *in*

```python
print("<b>no HTML</b>")
```

2 * 3 * 4 <img src=x onerror="document.title='bad'">"""
QUESTION = "Where is the harbour?"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium.open_browser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser: Page, server: Any) -> Iterator[Page]:
    """Show the chat; at the end nothing was wrong, and nobody but the server was asked."""
    browser.resize(1200, 800)
    browser.errors.clear()
    browser.urls.clear()
    browser.open(f"{server.url}/")
    browser.wait_for("document.querySelector('#state').className === 'ready'")
    yield browser
    assert browser.errors == []
    assert all(url.startswith((server.url, "data:")) for url in browser.urls)
    browser.open("about:blank")


def ask(page: Page, text: str) -> None:
    page.evaluate("document.querySelector('#question').focus()")
    page.type(text)
    page.press("Enter")


def find_seed(server: Any) -> int:
    """Return a seed whose answer does not end by itself within 60 tokens."""
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 60}
    for seed in range(50):
        answer = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "seed": seed}).json()
        if answer["choices"][0]["finish_reason"] == "length":
            return seed
    raise AssertionError("all answers are short")


def count_aborts(server: Any) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    [count] = re.findall(r'request_success_total\{.*"abort".*\} (\S+)', text)
    return float(count)


def wait_for_answer(page: Page, number: int) -> None:
    page.wait_for(f"document.querySelectorAll('article:not(.busy)').length === {number}")


def test_an_answer_is_shown_as_what_it_is(page: Page, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = install(monkeypatch, server.model_manager)
    engine.texts = [MARKDOWN, "Second."]
    page.evaluate("document.querySelector('#system').value = 'Be brief.'")
    ask(page, "a")
    wait_for_answer(page, 1)
    answer = page.text("article .text")
    assert "Steps\n" in answer and "1.\nOpen the gate" in answer and 'print("<b>no HTML</b>")' in answer
    assert "2 * 3 * 4 <img src=x onerror=\"document.title='bad'\">" in answer
    for selector, text in (("strong", "Open"), ("em", "in"), ("h3", "Steps"), (".code span", "python")):
        assert page.text(f"article .text {selector}") == text
    assert page.evaluate("document.querySelectorAll('article :is(img, b, script)').length") == 0
    assert page.text(".reasoning summary").startswith("Thought for")
    assert page.evaluate("document.querySelector('.reasoning').open") is False
    assert page.evaluate("document.querySelector('.reasoning div').textContent") == "Let me see."
    page.evaluate("document.querySelector('#question').focus()")
    page.type("b")
    page.press("Enter", SHIFT)
    ask(page, "c")
    wait_for_answer(page, 2)
    prompt = engine.prompt(server.model_manager)
    for text in ("system\nBe brief.", "user\na", "assistant\n## Steps", "user\nb\nc"):
        assert text in prompt
    page.click("#new-chat")
    assert page.evaluate("document.querySelectorAll('article, .question').length") == 0


def test_settings_are_sent_and_repeat_an_answer(page: Page, server: Any) -> None:
    for name, value in (("temperature", 1.5), ("top_p", 0.9), ("max_tokens", 7), ("seed", 3)):
        page.evaluate(f"document.querySelector('#{name}').value = {value}")
    ask(page, QUESTION)
    wait_for_answer(page, 1)
    body = {
        "messages": [{"role": "user", "content": QUESTION}],
        **{"temperature": 1.5, "top_p": 0.9, "max_tokens": 7, "seed": 3},
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]
    text = page.evaluate("turns[0].content")
    assert text == answer["message"]["content"]
    assert "7 tokens" in page.text(".foot") and "cut at the most tokens" in page.text(".foot")
    page.click(".again")
    wait_for_answer(page, 1)
    assert page.evaluate("turns.length") == 1 and page.evaluate("turns[0].content") == text


@pytest.mark.parametrize("way", ["Escape", "#send", "#new-chat"])
def test_stopping_ends_the_request_on_the_server(page: Page, server: Any, way: str) -> None:
    page.evaluate(f"document.querySelector('#seed').value = {find_seed(server)}")
    before = count_aborts(server)
    with held_steps(server.model_manager) as held:
        ask(page, QUESTION)
        for _ in range(8):
            held.wait_for_step()
            held.let_go(1)
        page.wait_for("turns[0].content")
        assert page.text("#send") == "Stop"
        if way == "Escape":
            page.press("Escape")
        else:
            page.click(way)
        page.wait_for("document.querySelector('#send').textContent === 'Send'")
        num_steps = 0
        while server.model_manager.engine.num_running:
            held.let_go(1)
            time.sleep(0.05)
            num_steps += 1
            assert num_steps < 40
    server.wait_until_idle()
    if way != "#new-chat":
        assert "Stopped" in page.text(".foot")
    assert count_aborts(server) == before + 1


def test_a_refusal_is_told_in_words_and_the_question_comes_back(page: Page) -> None:
    page.evaluate(f"document.querySelector('#tools').value = {json.dumps(json.dumps(TOOLS))}")
    ask(page, "Look!")
    page.wait_for("document.querySelector('[role=alert]')")
    assert "Invalid 'tools': this model's chat template takes no tools." in page.text(".failure")
    assert page.evaluate("document.querySelector('#question').value") == "Look!"
    [error] = page.errors
    assert "400" in error
    page.errors.clear()
    page.evaluate("document.querySelector('#tools').value = '['")
    page.press("Enter")
    page.wait_for("document.querySelector('.failure').innerText.includes('The tools are no JSON')")
    page.evaluate("document.querySelector('#tools').value = ''")
    page.evaluate("document.querySelector('#max_tokens').value = 2")
    page.press("Enter")
    wait_for_answer(page, 1)
    assert page.evaluate("document.querySelectorAll('.failure').length") == 0


def test_a_failure_on_the_way_keeps_what_has_come(
    page: Page, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = install(monkeypatch, server.model_manager)
    generate = engine.generate

    async def fail(*arguments: Any, **options: Any) -> Any:
        async for output in generate(*arguments, **options):
            if output.finish_reason is not None:
                raise ZeroDivisionError
            yield output

    monkeypatch.setattr(server.model_manager.engine, "generate", fail)
    engine.texts = ["The harbour"]
    ask(page, "Where?")
    page.wait_for("document.querySelector('.failure')")
    assert page.text(".failure").startswith("The answer broke off. ")
    assert page.text("article .text") == "The harbour"


def test_a_call_is_shown_and_what_follows_is_its_result(
    page: Page, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = install(monkeypatch, server.model_manager)
    engine.texts = ["I look." + hermes_call("look", '{"at": "sea"}'), "Calm."]
    page.evaluate(f"document.querySelector('#tools').value = {json.dumps(json.dumps(TOOLS))}")
    ask(page, "Look!")
    wait_for_answer(page, 1)
    assert "Call of look" in page.text("article") and '{"at": "sea"}' in page.text("article pre")
    assert page.evaluate("document.querySelector('#question').placeholder") == "What look returns"
    ask(page, "waves: 0")
    wait_for_answer(page, 2)
    assert "tool\nwaves: 0" in engine.prompt(server.model_manager)


def test_the_numbers_are_those_of_metrics_and_move(page: Page, server: Any) -> None:
    assert page.text("#running") == "0" and page.text("#held") == "0"
    url = f"{server.url}/v1/completions"
    body = {"prompt": [7] * 900, "max_tokens": 30, "ignore_eos": True}
    with held_steps(server.model_manager) as held, ThreadPoolExecutor(1) as pool:
        future = pool.submit(httpx.post, url, json=body, timeout=60)
        for _ in range(5):
            held.wait_for_step()
            held.let_go(1)
        held.wait_for_step()
        page.wait_for("document.querySelector('#running').textContent === '1'")
        page.wait_for("samples.at(-1).kv_held_tokens > 900")
        held_tokens, capacity, bf16 = page.evaluate(
            "(({kv_held_tokens: a, kv_capacity_tokens: b, kv_bf16_capacity_tokens: c}) => [a, b, c])"
            "(samples.at(-1))"
        )
        assert page.text("#held") == f"{held_tokens:,}" and page.text("#capacity") == f"of {capacity:,}"
        assert f"{bf16:,}" in page.text("#bf16") and f"{capacity / bf16:.1f}" in page.text("#gain")
        assert page.text("#bits") == f"{16 * bf16 / capacity:.2f}"
        bits = page.evaluate(
            "16 * samples.at(-1).kv_bytes_compressed / samples.at(-1).kv_bytes_bf16_equivalent"
        )
        assert page.text("#bits-now") == f"when full, now {bits:.2f}"
        held.let_go()
        assert future.result().status_code == 200
    page.wait_for("document.querySelector('#held').textContent === '0'")
    assert page.text("#bits-now") == "when full"
    page.wait_for("samples.some((sample) => sample.generated > 0)")
    assert page.evaluate("document.querySelectorAll('svg .line').length") == 4


def test_requests_that_are_too_short_to_be_compressed_have_no_bits(page: Page, server: Any) -> None:
    url = f"{server.url}/v1/completions"
    body = {"prompt": [7] * 20, "max_tokens": 30, "ignore_eos": True}
    with held_steps(server.model_manager) as held, ThreadPoolExecutor(1) as pool:
        future = pool.submit(httpx.post, url, json=body, timeout=60)
        held.wait_for_step()
        page.wait_for("samples.at(-1).kv_held_tokens >= 20")
        assert page.text("#bits-now") == "when full"
        held.let_go()
        assert future.result().status_code == 200


def test_a_locked_server_asks_for_its_key(browser: Page, running_server: Any, tiny_model_dir: Path) -> None:
    key = "schlüssel-ключ"
    with running_server(tiny_model_dir, dtype="float32", api_key=(key,)) as locked:
        for path in ("/docs", "/"):
            browser.open(f"{locked.url}{path}")
            browser.evaluate("sessionStorage.clear()")
            browser.open(f"{locked.url}{path}")
            for tried in ("wrong", key):
                browser.wait_for("!document.querySelector('#key-form').hidden")
                browser.evaluate(f"document.querySelector('#key').value = {json.dumps(tried)}")
                browser.click("#key-form button")
            browser.wait_for("document.querySelector('#state.ready, details')")
        browser.evaluate("document.querySelector('#max_tokens').value = 2")
        ask(browser, "Hi")
        wait_for_answer(browser, 1)
        assert browser.evaluate("JSON.stringify(localStorage) + document.cookie") == "{}"
        browser.evaluate("sessionStorage.clear()")


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_fits_a_narrow_screen(page: Page, server: Any, path: str) -> None:
    page.resize(360, 640)
    page.open(f"{server.url}{path}")
    page.wait_for("document.querySelector('#state.ready, details')")
    if path == "/":
        page.click("#show-settings")
        page.click("#show-live")
        page.wait_for("document.querySelector('#live').clientWidth > 0")
    else:
        page.evaluate("document.querySelectorAll('details').forEach((element) => (element.open = true))")
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_the_document_of_the_api_lists_every_path(page: Page, server: Any) -> None:
    page.open(f"{server.url}/docs#ChatMessage")
    page.wait_for("document.querySelector('#ChatMessage')?.open")
    seen = page.text("main")
    for path, operations in httpx.get(f"{server.url}/openapi.json").json()["paths"].items():
        for method in operations:
            assert f"{method.upper()}\n{path}" in seen
    page.evaluate("document.querySelector('details').open = true")
    assert "temperature\nnumber ≥ 0 ≤ 2" in page.text("details").replace("\t", "\n")


def test_the_theme_is_the_systems_until_one_is_chosen(page: Page) -> None:
    def ground(scheme: str) -> str:
        page.command(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
        )
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    light, dark = ground("light"), ground("dark")
    assert light != dark
    page.click("#theme")
    assert ground("dark") == ground("light") == light
    page.evaluate("localStorage.clear()")
