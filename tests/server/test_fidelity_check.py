"""A server that compares its answers says what it found at load, counts, and is refused where it cannot."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from pydantic import ValidationError
from scrape import Scrape
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from turboquant_server import fidelity_check
from turboquant_server.attention_check import ModelAttention, find_attention
from turboquant_server.cache_plan import CachePlan
from turboquant_server.config import ServerConfig
from turboquant_server.engine.fidelity import SKIP_REASONS, Fidelity
from turboquant_server.fidelity_check import size_exact_cache
from turboquant_server.fidelity_metrics import FIDELITY_NAMES
from turboquant_server.load_error import ModelLoadError

pytestmark = pytest.mark.usefixtures("no_variables")

TIMEOUT = 20
TOKEN_BYTES = 2 * 2 * 2 * 64 * 4  # layers, keys and values, heads, head_dim, bytes


@pytest.fixture(scope="module")
def attention(tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> ModelAttention:
    # Of a copy: the model is left attending on the store.
    return find_attention(copy.deepcopy(tiny_model), tiny_tokenizer, 2048)


def scrape(url: str) -> Scrape:
    return Scrape(httpx.get(f"{url}/metrics").text)


def test_a_server_counts_what_it_compares(running_server: Any, tiny_model_dir: Path) -> None:
    options: Any = {"fidelity_sample_rate": 1, "kv_cache_memory": 2**26, "vllm_metrics": True, "bits": 2}
    with running_server(tiny_model_dir, served_model_name=("tiny",), **options) as server:
        manager = server.model_manager
        [line] = [line for line in manager.startup_report().splitlines() if line.startswith("fidelity")]
        assert "top-1 agreement" in line and "at load; alarm above" in line
        before = scrape(server.url)
        assert before["fidelity_requests_total"] == before["fidelity_kld_count"] == 0
        assert before["generation_tokens_total"] == before["request_success_total"] == 0
        assert before["fidelity_kld_limit"] > 0 and 0 <= before["fidelity_top1_agreement_limit"] <= 0.97
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=TIMEOUT) as client:
            extra: Any = {"ignore_eos": True}
            for prompt in ("The access code of the harbour. " * 20, "a"):
                client.completions.create(model="tiny", prompt=prompt, max_tokens=100, extra_body=extra)
        server.wait_until_idle()
        deadline = time.monotonic() + TIMEOUT
        while not (after := scrape(server.url))["fidelity_requests_total"]:
            assert time.monotonic() < deadline
        assert after["fidelity_kld_count"] == after["fidelity_top1_agreement_count"] > 50
        assert after["fidelity_kld_sum"] > 0 and after["fidelity_alarm"] == 0
        assert after["fidelity_skipped_total{too_short}"] == after["fidelity_skipped_total"] == 1
        names = {line.split()[2] for line in after.text.splitlines() if line.startswith("# TYPE")}
        told = {
            name.removeprefix("turboquant:").removesuffix("_total") for name in names if "fidelity" in name
        }
        assert told == set(FIDELITY_NAMES)
        labels = {
            dict(labels).get("reason") for name, labels in after.samples if name == "fidelity_skipped_total"
        }
        assert labels == set(SKIP_REASONS)
        server.wait_until_idle()


def test_without_the_flag_nothing_is_kept_or_told(running_server: Any, tiny_model_dir: Path) -> None:
    with running_server(tiny_model_dir) as server:
        assert "fidelity" not in httpx.get(f"{server.url}/metrics").text
        assert "fidelity" not in server.model_manager.startup_report()
        assert server.model_manager.engine._engine.fidelity is None


def test_unloading_in_the_middle_of_a_comparison_takes_a_slice(loaded: Any, tiny_model_dir: Path) -> None:
    with loaded(tiny_model_dir, fidelity_sample_rate=1, kv_cache_memory=2**26) as manager:
        fidelity = manager._fidelity
        predictions = fidelity.begin(1000)
        predictions.append(1001, [0.0, 1.0, 0.0, 5.0])
        fidelity.end(predictions, [5] * 1001)
        manager.check_integrity()
    assert fidelity.state.num_answers == 0 or not fidelity.has_work


@pytest.mark.parametrize("rate", [-0.1, 1.1, "nan", "much"])
def test_a_rate_is_a_share(rate: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        ServerConfig(fidelity_sample_rate=rate)
    assert caught.value.errors()[0]["loc"] == ("fidelity_sample_rate",)


def test_without_compression_there_is_nothing_to_compare() -> None:
    with pytest.raises(
        ValidationError, match="choose one of --fidelity-sample-rate and --kv-cache-dtype bf16"
    ):
        ServerConfig(fidelity_sample_rate=0.1, kv_cache_dtype="bf16")
    assert ServerConfig(fidelity_sample_rate=0, kv_cache_dtype="bf16").fidelity_sample_rate == 0


def test_a_context_in_which_nothing_is_compressed_is_refused(loaded: Any, tiny_model_dir: Path) -> None:
    sentence = "--fidelity-sample-rate has nothing to compare: nothing is compressed in the 190 tokens"
    with pytest.raises(ModelLoadError, match=sentence):
        loaded(tiny_model_dir, fidelity_sample_rate=1, max_model_len=190).__enter__()


def test_a_model_that_cannot_be_read_is_refused(
    loaded: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError

    monkeypatch.setattr(Fidelity, "_compare", fail)
    with pytest.raises(ModelLoadError, match="cannot be read without compression; the log above"):
        loaded(tiny_model_dir, fidelity_sample_rate=1).__enter__()


def test_it_takes_a_sixteenth_of_the_memory_or_what_eight_thousand_tokens_need(
    tiny_model: PreTrainedModel, attention: ModelAttention
) -> None:
    def size(num_bytes: int, max_model_len: int) -> int:
        config = ServerConfig(kv_cache_memory=num_bytes, fidelity_sample_rate=0.5)
        found = size_exact_cache(config, tiny_model, attention, max_model_len)
        assert found is not None and found.num_slots == 1
        layers = CachePlan(16, 16, exact_dtype=tiny_model.dtype).store_layers(attention)
        store, _ = fidelity_check.build_store(attention, layers, found, tiny_model.dtype, tiny_model.device)
        assert store.num_bytes == found.num_bytes
        return found.num_bytes

    share = 2**24 // 16
    assert share - 64 * TOKEN_BYTES < size(2**24, 10**6) <= share
    most = size(2**34, 10**6)
    assert 8192 * TOKEN_BYTES <= most < (8192 + 512) * TOKEN_BYTES
    assert size(2**34, 500) < 1000 * TOKEN_BYTES
    assert size_exact_cache(ServerConfig(), tiny_model, attention, 2048) is None
    with pytest.raises(ModelLoadError, match=r"too little memory, 6\.2% of the cache's: 64"):
        size(2**20, 2048)


def test_what_it_takes_is_not_the_caches(
    loaded: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboquant_server.memory.available_bytes", lambda: 2**26)
    with loaded(tiny_model_dir, kv_cache_memory=None, max_num_seqs=64) as manager:
        without = manager.cache_bytes
    with loaded(tiny_model_dir, kv_cache_memory=None, max_num_seqs=64, fidelity_sample_rate=1) as manager:
        store = manager._fidelity._reader._store
        assert store.num_bytes > 2**20
        assert manager.cache_bytes + store.num_bytes <= without + 2**16
