"""The quality yardstick measures what it says: against plain forwards, known errors, and itself.

It has more than 300 lines because each measurement is computed here a second time, in another way.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluate_quality import evaluate, main, open_cache_factory, parse_setting, tokens_before_a_text
from quality_attention import attention_error
from quality_predictions import Continuations, bits_per_value
from quality_reader import FIRST_CHUNK, CacheReader
from quality_recall import DEPTHS, RecallTest, needle_lengths
from recall_prompts import RecallPrompt, encode, list_prompts, planted_prompt
from tokenizers import Tokenizer, models, normalizers, processors
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from turboquant_core import LayerShape, TurboQuantCache, Visibility
from turboquant_server.attention_check import ModelAttention
from turboquant_server.cache_plan import plan_cache
from turboquant_server.config import ServerConfig

CONTEXT = 256
TEXT = "The harbour has a code. Is the code of the harbour 123456? What is it? " * 60


class ExactCache(DynamicCache):
    """Hands out copies: equal to the reference, and not the same objects."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys.clone(), values.clone()


class ScaledCache(DynamicCache):
    """Values are 3% too large: so is every output of an attention over them."""

    bits_per_value = 6.5

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(*args, **kwargs)
        return keys, 1.03 * values


class NoisyCache(DynamicCache):
    """Adds the same error to a key or value whenever it is read."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        keys, values = (x + noise_like(x, seed) for seed, x in enumerate(states))
        return keys, values


def noise_like(states: Tensor, seed: int) -> Tensor:
    """Return noise that is the same for a token however many follow."""
    batch, heads, num_tokens, dim = states.shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_tokens, heads, dim, generator=generator, dtype=torch.float64)
    return 0.1 * noise.transpose(0, 1).expand(batch, -1, -1, -1).to(states)


@pytest.fixture(scope="module")
def caches(tiny_model: PreTrainedModel) -> dict[str, Callable[[], Cache]]:
    kinds = {"noisy": NoisyCache, "bf16": DynamicCache, "exact": ExactCache, "scaled": ScaledCache}
    return {name: lambda kind=kind: kind(config=tiny_model.config) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def results(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caches: dict[str, Callable[[], Cache]],
) -> dict[str, dict[str, Any]]:
    arguments = {"context": CONTEXT, "samples": 2, "batch": 2, "max_windows": 3, "prefix": [1]}
    return evaluate(tiny_model, tiny_tokenizer, TEXT, caches, **arguments)


def reader(model: PreTrainedModel) -> CacheReader:
    return CacheReader(model, tqdm(disable=True))


def windows_of(tokenizer: PreTrainedTokenizerFast, prefix: list[int]) -> Tensor:
    ids, width = encode(tokenizer, TEXT), CONTEXT - len(prefix)
    return torch.tensor([[*prefix, *ids[i * width : (i + 1) * width]] for i in range(3)])


# Predictions


def test_the_reference_comes_first_and_agrees_with_itself(results: dict[str, dict[str, Any]]) -> None:
    assert list(results) == ["bf16", "noisy", "exact", "scaled"]
    reference = results["bf16"]
    assert reference["predictions"] == 3 * (CONTEXT // 2 - 1)
    assert reference["kld_mean"] == reference["kld_p99"] == reference["kld_standard_error"] == 0
    assert reference["perplexity_change"] == 0
    assert reference["top1_agreement"] == 1
    assert reference["attention_error"] == {0: 0.0, 1: 0.0}
    assert reference["continuation"] == {
        "prompts": 3,
        "tokens": 128,
        "mean_agreement": 128.0,
        "share_to_the_end": 1.0,
    }
    assert reference["bits_per_value"] == reference["bits_with_exact_tokens"] == 16


def test_an_exact_cache_equals_the_reference(results: dict[str, dict[str, Any]]) -> None:
    assert results["exact"] == results["bf16"]


def test_predictions_are_those_of_one_plain_forward_in_float64(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, results: dict[str, dict[str, Any]]
) -> None:
    windows, first = windows_of(tiny_tokenizer, [1]), CONTEXT // 2
    model = type(tiny_model)(tiny_model.config).double().eval()
    model.load_state_dict(tiny_model.state_dict())
    log_probs = {}
    for name, kind in {"bf16": DynamicCache, "noisy": NoisyCache}.items():
        with torch.no_grad():
            logits = model(input_ids=windows, past_key_values=kind(config=model.config)).logits[:, first:-1]
        log_probs[name] = logits.log_softmax(-1)
    expected, found = log_probs["bf16"], log_probs["noisy"]
    divergences = (expected.exp() * (expected - found)).sum(-1)
    targets = windows[:, first + 1 :, None]
    noisy = results["noisy"]
    for name in log_probs:
        perplexity = math.exp(-log_probs[name].gather(-1, targets).mean())
        assert results[name]["perplexity"] == pytest.approx(perplexity, rel=1e-5)
    change = noisy["perplexity"] / results["bf16"]["perplexity"] - 1
    assert noisy["perplexity_change"] == pytest.approx(change)
    assert divergences.mean() > 0.01
    assert noisy["kld_mean"] == pytest.approx(divergences.mean().item(), rel=1e-4)
    assert noisy["kld_p99"] == pytest.approx(divergences.flatten().quantile(0.99).item(), rel=1e-3)
    means = divergences.mean(1)
    assert noisy["kld_standard_error"] == pytest.approx((means.var() / 3).sqrt().item(), rel=1e-3)
    agreement = (expected.argmax(-1) == found.argmax(-1)).double().mean().item()
    assert noisy["top1_agreement"] == pytest.approx(agreement, abs=1.5 / noisy["predictions"])
    assert 0.5 < agreement < 1


def test_the_model_gets_its_attention_back(
    tiny_model: PreTrainedModel, results: dict[str, dict[str, Any]]
) -> None:
    assert tiny_model.config._attn_implementation == "sdpa"


# Bits


def test_bits_of_the_cache_are_with_and_without_exact_tokens(tiny_model: PreTrainedModel) -> None:
    cache = TurboQuantCache(4, config=tiny_model.config)
    with torch.no_grad():
        tiny_model(input_ids=torch.zeros(2, 600, dtype=torch.long), past_key_values=cache)
    compressed, total = bits_per_value(cache, torch.float32)
    # 4 sinks, 7 blocks of 64, 148 newest tokens
    assert 4 < compressed < 5
    assert total == pytest.approx((448 * compressed + 152 * 16) / 600)


def test_a_cache_may_tell_its_bits(results: dict[str, dict[str, Any]]) -> None:
    scaled = results["scaled"]
    assert scaled["bits_per_value"] == scaled["bits_with_exact_tokens"] == 6.5


# Attention


def test_an_error_of_the_values_is_the_error_of_the_output(results: dict[str, dict[str, Any]]) -> None:
    assert results["scaled"]["attention_error"] == pytest.approx({0: 0.03, 1: 0.03}, rel=1e-3)


def test_attention_error_is_that_of_an_independent_computation(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast, results: dict[str, dict[str, Any]]
) -> None:
    """From queries, keys and values that an exact run reads, with softmax written out."""
    windows, config = windows_of(tiny_tokenizer, [1])[:1], tiny_model.config
    queries: list[Tensor] = []
    cache = DynamicCache(config=config)
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: queries.append(output))
        for layer in tiny_model.model.layers
    ]
    with torch.no_grad():
        tiny_model(input_ids=windows, past_key_values=cache)
        cos, sin = tiny_model.model.rotary_emb(queries[0], torch.arange(CONTEXT)[None])
    for hook in hooks:
        hook.remove()
    mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril().logical_not()
    for layer_idx, flat in enumerate(queries):
        query = flat.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        half = config.head_dim // 2
        turned = torch.cat([-query[..., half:], query[..., :half]], dim=-1)
        query = (query * cos[:, None] + turned * sin[:, None]).double()
        outputs = []
        keys, values = cache.layers[layer_idx].keys, cache.layers[layer_idx].values
        for noise in (0, 1):
            k, v = (
                (x + noise * noise_like(x, i)).double().repeat_interleave(2, 1)
                for i, x in enumerate((keys, values))
            )
            scores = (query @ k.mT / config.head_dim**0.5).masked_fill(mask, -math.inf)
            outputs.append((scores.softmax(-1) @ v)[:, :, FIRST_CHUNK + CONTEXT // 2 :])
        error = ((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()).sqrt().item()
        assert results["noisy"]["attention_error"][layer_idx] == pytest.approx(error, rel=1e-4)


def test_a_model_without_sdpa_has_no_attention_errors(
    tiny_model: PreTrainedModel, caches: dict[str, Callable[[], Cache]]
) -> None:
    windows = torch.zeros(1, CONTEXT, dtype=torch.long)
    tiny_model.set_attn_implementation("eager")
    try:
        assert attention_error(reader(tiny_model), caches["scaled"], windows) == {}
    finally:
        tiny_model.set_attn_implementation("sdpa")


# Greedy continuation


def test_agreement_is_that_of_two_greedy_continuations(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caches: dict[str, Callable[[], Cache]],
) -> None:
    prompts, num_tokens = windows_of(tiny_tokenizer, [])[:, :64], 32
    continuations = Continuations(prompts, num_tokens, batch=2)
    continuations.measure(reader(tiny_model), caches["bf16"])
    measured = continuations.measure(reader(tiny_model), caches["noisy"])
    lengths = []
    for prompt in prompts[:, None]:
        both = []
        for name in ("bf16", "noisy"):
            tokens, cache, fed = prompt, caches[name](), prompt
            for _ in range(num_tokens):
                with torch.no_grad():
                    fed = tiny_model(input_ids=fed, past_key_values=cache).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, fed], dim=1)
            both.append(tokens[0, 64:])
        differs = (both[0] != both[1]).nonzero()
        lengths.append(differs[0].item() if len(differs) else num_tokens)
    assert min(lengths) < num_tokens
    assert measured["mean_agreement"] == pytest.approx(np.mean(lengths))
    assert measured["share_to_the_end"] == pytest.approx(np.mean([n == num_tokens for n in lengths]))


# Recall


def test_the_grid_has_every_length_and_depth(results: dict[str, dict[str, Any]]) -> None:
    for result in results.values():
        cells = [(cell["length"], cell["depth"], cell["answers"]) for cell in result["needle"]]
        assert cells == [(CONTEXT, depth, 2) for depth in DEPTHS]
    assert needle_lengths(8192) == [1024, 2048, 4096, 8192]
    assert needle_lengths(3000) == [1024, 2048, 3000]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_code_is_planted_at_its_depth(
    tiny_tokenizer: PreTrainedTokenizerFast, depth: float, chat: bool
) -> None:
    text = encode(tiny_tokenizer, TEXT)
    prompt = planted_prompt(np.random.default_rng(0), tiny_tokenizer, text, 800, depth, chat, prefix=[1, 2])
    assert len(prompt.tokens) == 800 and prompt.tokens[:2] == [1, 2]
    [answer] = prompt.answers
    assert (answer.start, answer.stop) == (prompt.start, 800)
    code = tiny_tokenizer.decode(prompt.tokens[answer.start :]).strip()
    before = tiny_tokenizer.decode(prompt.tokens[2 : prompt.start])
    assert len(code) == 6 and code.isdigit()
    place, end = before.index(f" is {code}."), before.rindex("\n\n")
    fact = len(" The access code of Xxxxxx Xxxxxx is 123456.")
    assert place / (end - fact) == pytest.approx(depth, abs=0.12)
    assert before.endswith("<|im_start|>assistant\n" if chat else "\nAnswer:")


def test_lists_fill_the_context_and_ask_for_what_they_hold(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = encode(tiny_tokenizer, TEXT)
    prompts = list_prompts(np.random.default_rng(0), tiny_tokenizer, text, 1000, 4, 3, prefix=[1])
    assert len({prompt.start for prompt in prompts}) == 1
    for prompt in prompts:
        assert 950 < len(prompt.tokens) <= 1000 and prompt.tokens[0] == 1
        listing = tiny_tokenizer.decode(prompt.tokens[1 : prompt.start])
        asked = tiny_tokenizer.decode(prompt.tokens[prompt.start :]).splitlines()
        answers = [tiny_tokenizer.decode([prompt.tokens[i] for i in answer]) for answer in prompt.answers]
        assert [line.partition(":")[2] for line in asked] == answers
        places = sorted(listing.index(f"{line}\n") / len(listing) for line in asked)
        assert len(places) == 4 and places[0] < 0.15 and places[-1] > 0.85


def test_answers_are_scored_as_a_plain_forward_scores_them(
    tiny_model: PreTrainedModel, caches: dict[str, Callable[[], Cache]]
) -> None:
    """Of prompts of different lengths in one batch, one of them greedily decoded and so answered exactly."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 300, (2, 90), generator=generator)
    with torch.no_grad():
        for i in range(80, 90):
            tokens[1, i] = tiny_model(input_ids=tokens[1:, :i]).logits[0, -1].argmax()
        log_probs = [tiny_model(input_ids=row[None]).logits[0].double().log_softmax(-1) for row in tokens]
    prompts = [
        RecallPrompt(tokens[0, :83].tolist(), 80, [range(80, 83)]),
        RecallPrompt(tokens[1].tolist(), 80, [range(80, 84), range(86, 90)]),
    ]
    test = RecallTest({"random": prompts[:1], "greedy": prompts[1:]}, 2, tiny_model.device)
    measured = test.measure(reader(tiny_model), caches["bf16"])
    sums = [
        sum(log_probs[row][i - 1, tokens[row, i]].item() for i in answer)
        for row, prompt in enumerate(prompts)
        for answer in prompt.answers
    ]
    assert measured["random"] == {"answers": 1, "exact": 0.0, "log_prob": pytest.approx(sums[0], rel=1e-4)}
    assert measured["greedy"]["answers"] == 2 and measured["greedy"]["exact"] == 1.0
    assert measured["greedy"]["log_prob"] == pytest.approx((sums[1] + sums[2]) / 2, rel=1e-4)


# Other tokenizers


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return one that marks word starts with "▁", also at the start of a text, and puts <s> in front."""
    characters = sorted({*map(chr, range(33, 127)), "\n", "▁"})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_a_tokenizer_without_chats_gets_plain_prompts_behind_its_own_start(
    tiny_model: PreTrainedModel, caches: dict[str, Callable[[], Cache]]
) -> None:
    tokenizer = sentencepiece_tokenizer()
    assert tokens_before_a_text(tokenizer) == [1]
    result = evaluate(
        tiny_model, tokenizer, TEXT, {"bf16": caches["bf16"]}, context=CONTEXT, samples=1, max_windows=1
    )["bf16"]
    assert len(result["needle"]) == len(DEPTHS) and result["list"]["answers"] == 2
    assert result["kld_standard_error"] is None
    prompt = planted_prompt(np.random.default_rng(0), tokenizer, encode(tokenizer, TEXT), 256, 0.5, False)
    [answer] = prompt.answers
    # One word mark, not two, stands between question and answer.
    assert len(answer) == 7 and prompt.tokens[prompt.start] == tokenizer.convert_tokens_to_ids("▁")


# Command line


def test_settings_are_understood(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert parse_setting("bf16") is None
    assert (parse_setting("3"), parse_setting("4:3")) == (
        ServerConfig(kv_bits="3,3"),
        ServerConfig(kv_bits="4,3"),
    )
    assert parse_setting("budget3.5") == ServerConfig(kv_budget_bits=3.5)
    assert type(open_cache_factory("bf16", tiny_model, tiny_tokenizer, 512)()) is DynamicCache
    open_cache = open_cache_factory("4:3", tiny_model, tiny_tokenizer, 512)
    assert isinstance(open_cache(), TurboQuantCache) and open_cache() is not open_cache()


def test_a_settings_cache_gives_back_what_the_servers_blocks_do(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    plan = plan_cache(ServerConfig(kv_budget_bits=4.0), tiny_model, tiny_tokenizer, 512)
    shapes = dict.fromkeys((0, 1), LayerShape(num_kv_heads=2, key_dim=64, value_dim=64))
    layers = plan.store_layers(ModelAttention(True, False, shapes, dict.fromkeys((0, 1), Visibility())))
    cache = open_cache_factory("budget4", tiny_model, tiny_tokenizer, 512)()
    states = torch.randn(2, 1, 2, 400, 64)
    for layer_idx in (0, 1):
        cache.update(*states, layer_idx)
        held = cache.update(*states[:, :, :, :1], layer_idx)
        codec = layers[layer_idx].codec
        blocks = codec.decode(codec.encode(*(part[0, :, 4:260].unflatten(1, (4, 64)) for part in states)))
        for part, expected in zip(held, blocks, strict=True):
            torch.testing.assert_close(part[0, :, 4:260], expected.flatten(1, 2))


@pytest.mark.parametrize("setting", ["5", "fp8", "4:", ":4", "4:5", "", "4:3:2", "budget", "budget-1"])
def test_a_wrong_setting_is_named(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--kv", f"bf16,{setting}"])
    assert f"argument --kv: '{setting}' is not a setting: use bf16" in capsys.readouterr().err


def test_a_text_that_is_too_short_is_refused(
    tiny_model: PreTrainedModel,
    tiny_tokenizer: PreTrainedTokenizerFast,
    caches: dict[str, Callable[[], Cache]],
) -> None:
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, less than one window of 256"):
        evaluate(tiny_model, tiny_tokenizer, "short", caches, context=CONTEXT)


def test_a_run_prints_a_table_and_json_and_writes_plots(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder"
    arguments = ["--model", str(tiny_model_dir), "--kv", "2,bf16,4:3", "--context", "512", "--samples", "1"]
    main([*arguments, "--max-windows", "2", "--out", str(out)])
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert list(report["results"]) == ["bf16", "2", "4:3"]
    assert report == json.loads((out / "results.json").read_text())
    assert len({len(line) for line in lines[:5]}) == 1 and lines[1].startswith("|---")
    assert "context 512, 510 predictions" in lines[-1]
    assert f"torch {torch.__version__}" in lines[-1] and "model in float32" in lines[-1]
    two = report["results"]["2"]
    assert two["kld_mean"] > report["results"]["4:3"]["kld_mean"] > 0
    assert 2 < two["bits_per_value"] < 3.2 < two["bits_with_exact_tokens"] < 16
    for name in ("kld_by_bits.png", "needles.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
