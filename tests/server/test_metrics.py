"""What /metrics counts is what clients got, to the token, and what the cache holds, to the byte."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from held_steps import held_steps
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from scrape import Scrape

from turboquant_server.cache_size import TIMELINE
from turboquant_server.engine.request import FinishReason, RequestFailedError, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.metrics import END_REASONS, OWN_NAMES, PREFIX, Metrics
from turboquant_server.metrics_text import ALIAS_PREFIX, render_metrics

pytestmark = pytest.mark.usefixtures("no_variables")

TIMEOUT = 20
MESSAGES: Any = [{"role": "user", "content": "What is the access code?"}]
BF16_BYTES = 2 * 2 * 2 * 64 * 2  # layers, keys and values, heads, head_dim, bytes
FLOAT32_BYTES = 2 * BF16_BYTES
VLLM_NAMES = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total"),
    *("prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total"),
    *("prompt_tokens_cached_total", "generation_tokens_total", "request_success_total"),
    *("admission_rejections_total", "time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_inference_time_seconds", "request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total", "request_params_n"),
    *("request_params_max_tokens", "cache_config_info"),
}


def scrape(server: Any) -> Scrape:
    response = httpx.get(f"{server.url}/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return Scrape(response.text)


@pytest.fixture
def server(running_server: Any, tiny_model_dir: Path) -> Iterator[Any]:
    with running_server(tiny_model_dir, dtype="float32", served_model_name=("tiny",)) as server:
        yield server


@pytest.fixture
def client(server: Any) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        yield client


def test_counts_of_a_known_load_are_exact(server: Any, client: OpenAI) -> None:
    def chat(index: int) -> Any:
        options: Any = {"n": 1 + index % 3, "max_tokens": 3 + index, "temperature": 1, "seed": index}
        if index % 2:
            return client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options
        )
        return list(stream)[-1]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(chat, range(9)))
    long = "The access code of the harbour. " * 150
    answers += [client.completions.create(model="tiny", prompt=[long, "b"], max_tokens=5) for _ in range(2)]
    server.wait_until_idle()

    num_requests = 9 + 2 * 2
    num_choices = sum(1 + index % 3 for index in range(9)) + 2 * 2
    usages = [answer.usage for answer in answers]
    num_prompt = sum(usage.prompt_tokens for usage in usages)
    num_cached = sum(usage.prompt_tokens_details.cached_tokens for usage in usages)
    num_generated = sum(usage.completion_tokens for usage in usages)
    metrics = scrape(server)
    assert num_cached > 500
    assert metrics["prompt_tokens_total"] == metrics["prefix_cache_queries_total"] == num_prompt
    assert metrics["prompt_tokens_cached_total"] == metrics["prefix_cache_hits_total"] == num_cached
    assert metrics["generation_tokens_total"] == num_generated
    assert metrics["iteration_tokens_total_sum"] == num_prompt + num_generated
    assert metrics["request_prompt_tokens_sum"] == num_prompt
    assert metrics["request_generation_tokens_sum"] == num_generated
    assert metrics["request_success_total"] == num_choices
    ends = metrics["request_success_total{stop}"] + metrics["request_success_total{length}"]
    assert ends == num_choices
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time"):
        assert metrics[f"{name}_seconds_count"] == num_requests
    for name in ("e2e_request_latency", "request_inference_time", "request_decode_time"):
        assert metrics[f"{name}_seconds_count"] == num_choices
    assert metrics["inter_token_latency_seconds_count"] == num_generated - num_choices
    assert metrics["request_params_n_sum"] == num_choices
    assert metrics["request_params_max_tokens_count"] == num_requests
    assert metrics["num_requests_running"] == metrics["num_requests_waiting"] == 0
    assert metrics["kv_bytes_compressed"] == metrics["kv_bytes_bf16_equivalent"] == 0
    assert metrics["kv_cache_usage_perc"] == metrics["num_preemptions_total"] == 0


def test_the_times_of_a_request_add_up(server: Any, client: OpenAI) -> None:
    with held_steps(server.model_manager) as held, ThreadPoolExecutor(1) as pool:
        started = time.monotonic()
        answer = pool.submit(
            client.completions.create, model="tiny", prompt="a", max_tokens=3, extra_body={"ignore_eos": True}
        )
        for _ in range(3):
            held.wait_for_step()
            time.sleep(0.1)
            held.let_go(1)
        answer.result()
        took = time.monotonic() - started
    metrics = scrape(server)
    queue, prefill, decode = (
        metrics[f"request_{name}_time_seconds_sum"] for name in ("queue", "prefill", "decode")
    )
    first, latency = metrics["time_to_first_token_seconds_sum"], metrics["e2e_request_latency_seconds_sum"]
    assert 0 <= queue < 0.1 <= prefill < 0.2 <= decode < latency < took < 5
    assert first == pytest.approx(queue + prefill)
    assert latency == pytest.approx(queue + prefill + decode)
    assert metrics["request_inference_time_seconds_sum"] == pytest.approx(prefill + decode)
    assert metrics["inter_token_latency_seconds_sum"] == pytest.approx(decode)
    assert metrics["request_time_per_output_token_seconds_sum"] == pytest.approx(decode / 2)


def test_waiting_and_running_requests_and_what_they_hold_are_counted(
    running_server: Any, tiny_model_dir: Path
) -> None:
    with (
        running_server(tiny_model_dir, dtype="float32", max_num_seqs=2) as server,
        held_steps(server.model_manager) as held,
        ThreadPoolExecutor(3) as pool,
    ):
        url = f"{server.url}/v1/completions"
        store = server.model_manager.engine._engine._model_runner._store
        slot_bytes = TIMELINE.num_exact * FLOAT32_BYTES
        [num_blocks] = server.model_manager._cache_size.num_blocks
        block_bytes = (store.num_bytes - 2 * slot_bytes) / num_blocks
        futures = []
        for index in range(3):
            prompt = [10 + index] * 900
            body = {"prompt": prompt, "max_tokens": 20, "ignore_eos": True}
            futures.append(pool.submit(httpx.post, url, json=body, timeout=TIMEOUT))
            while server.model_manager.engine.num_waiting + server.model_manager.engine.num_running <= index:
                time.sleep(0.001)
        held.wait_for_step()
        engine = server.model_manager.engine
        while engine.num_running < 2 or min(r.num_computed_tokens for r in engine.running) < 900:
            held.let_go(1)
            held.wait_for_step()
        metrics = scrape(server)
        lengths = [request.num_computed_tokens for request in engine.running]
        num_tokens = sum(lengths)
        num_made = sum(TIMELINE.num_blocks(length, 900) for length in lengths)
        held_bytes = num_made * block_bytes + 2 * slot_bytes
        assert (metrics["num_requests_running"], metrics["num_requests_waiting"]) == (2, 1)
        assert num_tokens >= 1800
        assert metrics["kv_bytes_bf16_equivalent"] == num_tokens * BF16_BYTES
        assert metrics["kv_bytes_compressed"] == held_bytes
        assert metrics["kv_held_tokens"] == num_tokens
        assert metrics["kv_bits_per_value"] == 16 * held_bytes / (num_tokens * BF16_BYTES)
        assert metrics["kv_residual_tokens"] == num_tokens - 64 * num_made
        assert metrics["kv_cache_usage_perc"] == num_made / num_blocks
        assert metrics["kv_capacity_tokens"] == 64 * num_blocks + 2 * TIMELINE.num_exact
        assert metrics["kv_bf16_capacity_tokens"] == store.num_bytes // BF16_BYTES
        held.let_go()
        assert [future.result().status_code for future in futures] == [200] * 3


def test_shared_blocks_count_once_and_few_tokens_cost_a_whole_slot(server: Any, client: OpenAI) -> None:
    with held_steps(server.model_manager) as held, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(
            client.completions.create,
            model="tiny",
            prompt=[7] * 900,
            n=2,
            max_tokens=3,
            temperature=1,
            extra_body={"ignore_eos": True},
        )
        held.wait_for_step()
        while server.model_manager.engine.num_running < 2:
            held.let_go(1)
            held.wait_for_step()
        metrics = scrape(server)
        requests = server.model_manager.engine.running
        num_made = TIMELINE.num_blocks(900, 900)
        num_exact = sum(request.num_computed_tokens - 64 * num_made for request in requests)
        assert metrics["kv_residual_tokens"] == num_exact
        assert metrics["kv_bytes_bf16_equivalent"] == (num_exact + 64 * num_made) * BF16_BYTES
        held.let_go()
        answer.result()
    with held_steps(server.model_manager) as held, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(client.completions.create, model="tiny", prompt=[7, 8], max_tokens=2)
        held.wait_for_step()
        metrics = scrape(server)
        assert metrics["kv_bytes_bf16_equivalent"] == 2 * BF16_BYTES
        assert metrics["kv_bytes_compressed"] == TIMELINE.num_exact * FLOAT32_BYTES
        assert metrics["kv_bits_per_value"] == 32 * TIMELINE.num_exact / 2
        held.let_go()
        answer.result()
    text = scrape(server).text
    assert "kv_bits_per_value{" not in text  # nothing is held
    assert ALIAS_PREFIX not in text


def test_who_leaves_is_counted_as_abort(server: Any, client: OpenAI) -> None:
    with client.completions.create(
        model="tiny", prompt="a", max_tokens=1500, n=2, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        next(stream)
    server.wait_until_idle()
    metrics = scrape(server)
    assert metrics["request_success_total{abort}"] == metrics["request_success_total"] == 2
    assert metrics["generation_tokens_total"] >= 2
    assert not server.model_manager.metrics._records


def test_the_names_are_vllms_and_the_alias_switch_gives_both(
    running_server: Any, tiny_model_dir: Path
) -> None:
    with running_server(tiny_model_dir, vllm_metrics=True, served_model_name=('a"\\n', "b")) as server:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "a", "max_tokens": 2, "ignore_eos": True})
        text = httpx.get(f"{server.url}/metrics").text
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    ours = {name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}
    aliases = {name.removeprefix(ALIAS_PREFIX) for name in names if name.startswith(ALIAS_PREFIX)}
    assert aliases == VLLM_NAMES
    counters = {name for name in OWN_NAMES if name.startswith("swap_") and not name.endswith("_perc")}
    assert ours == VLLM_NAMES | {*OWN_NAMES} - counters | {f"{name}_total" for name in counters}
    families = list(text_string_to_metric_families(text))
    assert not any(name.endswith("_created") for name in names)
    values: dict[str, list[tuple[Any, ...]]] = {PREFIX: [], ALIAS_PREFIX: []}
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels["model_name"] == 'a"\\n' and sample.labels["engine"] == "0"
        prefix = PREFIX if sample.name.startswith(PREFIX) else ALIAS_PREFIX
        name = sample.name.removeprefix(prefix)
        if name.removesuffix("_total") not in OWN_NAMES:
            values[prefix].append((name, sorted(sample.labels.items()), sample.value))
    assert values[PREFIX] == values[ALIAS_PREFIX] and len(values[PREFIX]) > 100


def output(choice: int, finish_reason: FinishReason | None = None) -> RequestOutput:
    return RequestOutput("r", "a", [1], 5, 1, finish_reason, choice_index=choice)


def test_every_choice_ends_once_however_it_ends() -> None:
    for failure, reason in (
        (None, "abort"),
        (RequestFailedError("r", "no luck"), "error"),
        (ValueError("dead"), "error"),
    ):
        metrics = Metrics("m")
        metrics.arrived("r", SamplingParams(max_tokens=3, n=3))
        metrics.started("r", time.monotonic())
        metrics.stepped([output(0, FinishReason.STOP), output(1)])
        if isinstance(failure, RequestFailedError):
            metrics.stepped([failure])
        metrics.left("r", failure)
        metrics.stepped([output(1)])  # too late
        metrics.started("r", 0.0)
        scraped = Scrape(render_metrics(metrics.collect(None), with_aliases=False).decode())
        ends = {name: scraped[f"request_success_total{{{name}}}"] for name in END_REASONS}
        assert ends == {**dict.fromkeys(END_REASONS, 0), "stop": 1, reason: 2}
        assert scraped["generation_tokens_total"] == 2


def test_progress_of_a_prompt_is_no_token() -> None:
    metrics = Metrics("m")
    metrics.arrived("r", SamplingParams(max_tokens=5))
    for num_read in (3, 5):
        metrics.stepped([RequestOutput("r", "", [], 5, 0, None, num_computed_tokens=num_read)])
    assert metrics._records["r"].first_token is None
    metrics.stepped([output(0)])
    scraped = Scrape(render_metrics(metrics.collect(None), with_aliases=False).decode())
    assert (scraped["prompt_tokens_total"], scraped["generation_tokens_total"]) == (5, 1)
    assert scraped["inter_token_latency_seconds_count"] == 0


def test_counting_a_step_of_256_requests_takes_less_than_three_milliseconds() -> None:
    metrics = Metrics("m")
    for index in range(256):
        metrics.arrived(f"r{index}", SamplingParams(max_tokens=3))
    outputs = [RequestOutput(f"r{index}", "a", [1], 5, 1, None) for index in range(256)]
    metrics.stepped(outputs)
    seconds = []
    for _ in range(20):
        started = time.perf_counter()
        metrics.stepped(outputs)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.003
