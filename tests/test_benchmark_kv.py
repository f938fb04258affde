"""The benchmark of caches counts bytes, times and tokens as they are, and a cache that fails is one row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import benchmark_kv
import kv_runs
import pytest
import torch
from benchmark_kv import LEGEND, caches, count_same, format_report, main, make_prompt, measure
from kv_runs import Lap, Run, ServedCache, run_plain
from tqdm import tqdm

from turboquant_server.config import ServerConfig
from turboquant_server.load_error import ModelLoadError
from turboquant_server.model_loader import DEMO_DIRECTORY, LoadedModel, load_model

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> LoadedModel:
    """Load the tiny model for this file alone: runs change how it attends."""
    return load_model(ServerConfig(model=str(tiny_model_dir), device="cpu", dtype="float32"))


def test_medians_of_several_runs_count() -> None:
    seconds = iter([3.0, 10.0, 1.0, 12.0, 2.0, 11.0, 5.0, 9.0, 4.0, 13.0])
    run = kv_runs._repeat(lambda: Run([1], Lap(next(seconds), 7), Lap(next(seconds), 8), 9))
    assert run == Run([1], Lap(3.0, 7), Lap(11.0, 8), 9)


def test_a_long_run_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_runs, "REPEAT_SECONDS", 0)
    runs = iter([Run([1], Lap(1, None), Lap(2, None), 3)])
    assert kv_runs._repeat(lambda: next(runs)).decode == Lap(2, None)


def silent_bar() -> tqdm[Any]:
    return tqdm(disable=True)


def test_a_plain_run_gives_the_tokens_of_generate_and_counts_its_cache(tiny: LoadedModel) -> None:
    prompt = make_prompt(tiny, 100)
    run = run_plain(tiny, prompt, NUM_TOKENS)
    expected = tiny.model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 100),
        do_sample=False,
        max_new_tokens=NUM_TOKENS,
        min_new_tokens=NUM_TOKENS,
        eos_token_id=None,
    )
    assert run.token_ids == expected[0, 100:].tolist()
    # 2 layers of keys and values of 2 heads; the last token has not gone in.
    assert run.kv_bytes == (100 + NUM_TOKENS - 1) * 2 * 2 * 2 * 64 * 4
    assert run.prefill.seconds > 0 < run.decode.seconds
    assert run.prefill.peak_bytes is None


def test_a_served_run_gives_the_same_tokens_and_holds_no_more_than_one_request(tiny: LoadedModel) -> None:
    prompt = make_prompt(tiny, 400)
    plain = run_plain(tiny, prompt, NUM_TOKENS)
    cache = ServedCache(ServerConfig(kv_bits=(8, 8)))
    served = cache(tiny, prompt, NUM_TOKENS)
    shorter = cache(tiny, prompt[:300], NUM_TOKENS)  # by the same engine
    cache.close()
    assert served.token_ids == plain.token_ids
    token_bytes = 2 * 2 * 2 * 64 * 4
    # There is room for 196 exact tokens and 4 blocks of 64, whose codes take a quarter, and norms and means.
    codes = 4 * 64 * token_bytes // 4
    assert 196 * token_bytes + codes < served.kv_bytes < 196 * token_bytes + 1.1 * codes
    assert served.kv_bytes - shorter.kv_bytes == (served.kv_bytes - 196 * token_bytes) // 2
    assert run_plain(tiny, prompt, NUM_TOKENS).token_ids == plain.token_ids


def test_a_server_without_compression_gives_the_same_tokens_and_takes_16_bits(tiny: LoadedModel) -> None:
    prompt = make_prompt(tiny, 400)
    cache = ServedCache(ServerConfig(kv_cache_dtype="bf16"))
    served = cache(tiny, prompt, NUM_TOKENS)
    cache.close()
    assert served.token_ids == run_plain(tiny, prompt, NUM_TOKENS).token_ids
    # The model is in float32; so are the 196 exact tokens, but not the 4 blocks.
    assert served.kv_bytes == (196 * 4 + 4 * 64 * 2) * 2 * 2 * 2 * 64


def test_a_prompt_starts_again_where_the_text_ends(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("The harbour<|endoftext|>is here. ")
    monkeypatch.setattr(benchmark_kv, "TEXT", tmp_path / "text")
    assert tiny.tokenizer.decode(make_prompt(tiny, 99)).startswith("The harbour\nis here. The harbour\nis h")
    assert [len(make_prompt(tiny, length)) for length in (3, 30, 99)] == [3, 30, 99]


@pytest.mark.parametrize(
    ("tokens", "count"), [([1, 2, 3], 3), ([1, 2, 4], 2), ([1, 0, 3], 1), ([0, 2, 3], 0)]
)
def test_tokens_are_the_same_up_to_the_first_that_differs(tokens: list[int], count: int) -> None:
    assert count_same(tokens, [1, 2, 3]) == count


def test_rows_compare_each_cache_with_bf16_and_tell_what_failed(tiny: LoadedModel) -> None:
    def run(token_ids: list[int], kv_bytes: int) -> Any:
        def run_cache(loaded: LoadedModel, prompt: Sequence[int], num_tokens: int) -> Run:
            assert (len(prompt), num_tokens) == (90, 10)
            return Run(token_ids, Lap(3.0, 2**31), Lap(0.5, 2**30), kv_bytes)

        return run_cache

    def fail(*_: object) -> Run:
        raise ModelLoadError("there is no room")

    runs = {"bf16": run(list(range(10)), 2**22), "good": run([*range(9), 0], 2**20), "bad": fail}
    rows = measure(tiny, runs, [100], 10, silent_bar())
    assert rows[1] == {
        "context": 100,
        "cache": "good",
        "kv_bytes": 2**20,
        "kv_bytes_of_reference": 2**22,
        "prefill_peak_bytes": 2**31,
        "decode_peak_bytes": 2**30,
        "prefill_tokens_per_s": 30.0,
        "decode_tokens_per_s": 18.0,
        "same_tokens": 9,
    }
    assert rows[2] == {"context": 100, "cache": "bad", "error": "there is no room"}
    report = {
        "model": "tiny",
        "parameters": 471_000,
        "weight_bytes": 2**29,
        "load_format": "dummy",
        "device": "machine",
        "torch": "2",
        "transformers": "5",
        "new_tokens": 10,
        "rows": rows,
    }
    lines = format_report(report).splitlines()
    assert "0.50 GiB of random bfloat16 weights; machine, " in lines[0]
    assert len({len(line) for line in lines[1:6]}) == 1
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells == ["100", "good", "1.00", "4.00", "2.00", "1.00", "30", "18.0", "9"]
    assert [cell.strip() for cell in lines[5].strip("|").split("|")][2:] == ["-"] * 7
    assert lines[6] == "bad, 100 tokens: there is no room"
    alone = measure(tiny, {"bf16": fail, "good": runs["good"]}, [100], 10, silent_bar())
    assert alone[1]["same_tokens"] is None
    assert format_report({**report, "rows": alone}).count(" good |") == 1


def test_each_cache_has_a_name_and_the_server_gets_its_type_and_bits() -> None:
    runs: dict[str, Any] = {**caches(ServerConfig(max_model_len=99), [4, 2], with_transformers=False)}
    assert list(runs) == ["bf16", "4 bits", "2 bits"]
    configs = [run._config for run in runs.values()]
    settings = [(config.kv_cache_dtype, config.kv_bits, config.max_model_len) for config in configs]
    assert settings == [("bf16", None, 99), ("turboquant", (4, 4), 99), ("turboquant", (2, 2), 99)]


def test_transformers_own_cache_is_run_on_demand_and_compared_with_the_servers() -> None:
    runs = caches(ServerConfig(), [3], with_transformers=True)
    assert list(runs) == ["bf16", "3 bits", "transformers"]
    assert runs["transformers"] is run_plain


def test_a_quick_run_of_the_demo_model_ends_with_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_kv, "QUICK_CONTEXTS", (512, 10_000))  # of which the model has the first
    main(["--quick", "--bits", "4", "--output", str(tmp_path / "results")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("turboquant-demo: 0.0134B parameters, 0.02 GiB of bfloat16 weights; ")
    assert "\n".join(lines[-7:-1]) == LEGEND
    result = json.loads(lines[-1])
    [report] = result["models"]
    assert [(row["context"], row["cache"]) for row in report["rows"]] == [(512, "bf16"), (512, "4 bits")]
    bf16, compressed = report["rows"]
    # 196 tokens in a slot and 5 blocks, in 6 layers of 2 heads of 128.
    assert bf16["kv_bytes"] == (196 + 5 * 64) * 6 * 2 * 2 * 128 * 2
    assert compressed["kv_bytes"] < bf16["kv_bytes"] / 1.7
    assert compressed["kv_bytes_of_reference"] == bf16["kv_bytes"]
    assert bf16["same_tokens"] == report["new_tokens"] == 16
    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert files == {"kv.json": result, "kv_turboquant-demo.json": report}


def test_random_models_are_named_by_their_directories(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((DEMO_DIRECTORY / "config.json").read_text())
    config |= {"num_hidden_layers": 1, "layer_types": ["full_attention"], "hidden_size": 64}
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    models = [str(tmp_path / name) for name in ("first", "second")]
    options = ["--load-format", "dummy", "--quick", "--context", "300", "--bits", "8", "--transformers"]
    main(["--model", *models, *options])
    lines = capsys.readouterr().out.splitlines()
    reports = json.loads(lines[-1])["models"]
    assert [row["cache"] for row in reports[0]["rows"]] == ["bf16", "8 bits", "transformers"]
    assert [report["model"] for report in reports] == ["first", "second"]
    assert {report["load_format"] for report in reports} == {"dummy"}
    assert not any("error" in row for report in reports for row in report["rows"])
    assert lines[-2].startswith("The weights are random")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bits 5", "argument --bits: each must be 2, 3, 4 or 8"),
        ("--context 64,512", "argument --context: each must be more than 64"),
        ("--context many", "argument --context: invalid"),
        ("--model /no/such", "benchmark_kv.py: there is no directory /no/such;"),
        ("--context 9000", "benchmark_kv.py: --max-model-len 9000 is more than the 8192 tokens that"),
    ],
)
def test_a_wrong_argument_is_told(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert message in f"{capsys.readouterr().err}{caught.value.code}"
