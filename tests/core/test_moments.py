"""What a model's transforms are measured from, and that measuring leaves the model as it was."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, build
from torch import Tensor
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from turboquant_core import LayerTransforms, Transform, TurboQuantCache, cache_argument, measure_transforms
from turboquant_core import moments as moments_module

GROUP = 64  # tokens that share a mean
FLOOR = 0.01  # of the mean eigenvalue, added to each


def token_ids(num_windows: int, num_tokens: int) -> Tensor:
    return torch.randint(64, (num_windows, num_tokens), generator=torch.Generator().manual_seed(3))


def small_llama(**options: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=64, num_key_value_heads=2, **{**sizes, **options})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def implementations(model: Any) -> list[str]:
    """Return what attention every part of a model would use."""
    return [
        module.config._attn_implementation
        for module in model.modules()
        if hasattr(getattr(module, "config", None), "_attn_implementation")
    ]


@torch.inference_mode()
def last_logits(model: Any, cache: Any) -> Tensor:
    """Return the logits of a long prompt's last 40 tokens, after the other 200 went through the cache."""
    pieces = token_ids(1, 240).split([200, 1, 39], dim=1)
    name = cache_argument(model)
    logits = [model(input_ids=piece, use_cache=True, **{name: cache}).logits for piece in pieces]
    return torch.cat(logits[1:], dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_compressed_layer_of_every_architecture_gets_transforms_that_fit(architecture: str) -> None:
    model = build(architecture)
    before = implementations(model)
    transforms = measure_transforms(model, token_ids(2, 96))
    assert implementations(model) == before

    options: dict[str, Any] = {"config": model.config, "residual_length": 0, "num_sinks": 0}
    cache = TurboQuantCache(8, transforms=transforms, **options)
    logits = last_logits(model, cache)
    layers = {index: getattr(layer, "attention", layer) for index, layer in enumerate(cache.layers)}
    compressed = {index: layer.states for index, layer in layers.items() if getattr(layer, "states", ())}
    assert set(transforms) == set(compressed) != set()
    for index, states in compressed.items():
        for transform, held in zip(transforms[index], states, strict=True):
            assert isinstance(transform, Transform)
            assert transform.num_heads == held.residual.shape[1]
            assert transform.dim == held.residual.shape[3]

    expected = last_logits(model, DynamicCache(config=model.config))
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert error < 0.01  # 0.005 at most, as with rotations


def a_t_a(transform: Transform | None) -> Tensor:
    """Return ``A^T A`` in float64, ``[num_heads, dim, dim]``: what no rotation of A changes."""
    assert transform is not None
    columns = transform.apply(torch.eye(transform.dim).expand(transform.num_heads, -1, -1)).double()
    return columns @ columns.mT


def moment(windows: list[Tensor], is_centred: bool) -> Tensor:
    """Return the mean of ``x x^T`` over windows ``[num_heads, num_tokens, dim]``, plus the floor."""
    total = torch.zeros(1, dtype=torch.float64)
    for window in windows:
        x = window.double()
        if is_centred:
            groups = [x[:, i : i + GROUP] for i in range(0, x.shape[1] - GROUP + 1, GROUP)]
            x = torch.cat([group - group.mean(1, keepdim=True) for group in groups], dim=1)
        total = total + torch.einsum("htd,hte->hde", x, x) / x.shape[1]
    dim = total.shape[-1]
    means = torch.einsum("hdd->h", total) / dim
    return total / means[:, None, None] + FLOOR * torch.eye(dim, dtype=torch.float64)


def solution(keys: Tensor, queries: Tensor | None) -> Tensor:
    """Return P with ``P M P = Q``, scaled to ``tr(P M) = dim``: ``M^-1 (M Q)^(1/2)``."""
    identity = torch.eye(keys.shape[-1], dtype=torch.float64)
    eigenvalues, vectors = torch.linalg.eig(keys @ (identity if queries is None else queries))
    root = (vectors @ torch.diag_embed(eigenvalues.sqrt()) @ torch.linalg.inv(vectors)).real
    p = torch.linalg.solve(keys, root)
    return p * keys.shape[-1] / (p @ keys).diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> None:
    assert found.shape == expected.shape
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert error.max() < tolerance


@torch.inference_mode()
def projections(model: Any, input_ids: Tensor, layer_idx: int) -> dict[str, list[Tensor]]:
    """Return what a layer projects in each window, ``[num_heads, num_tokens, dim]``, rotated by position."""
    attention = model.model.layers[layer_idx].self_attn
    outputs: dict[str, Tensor] = {}
    hooks = [
        getattr(attention, f"{name}_proj").register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output[0]})
        )
        for name in "qkv"
    ]
    found: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for window in input_ids.split(1):
        model(input_ids=window, use_cache=False)
        q, k, v = (
            outputs[name].unflatten(1, (-1, attention.head_dim)).transpose(0, 1)[None] for name in "qkv"
        )
        cos, sin = model.model.rotary_emb(v, torch.arange(window.shape[1])[None])
        q, k = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"](q, k, cos, sin)
        for name, states in (("q", q), ("k", k), ("v", v)):
            found[name].append(states[0])
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt_oss"])
def test_the_transforms_solve_their_equation_for_what_the_projections_gave(architecture: str) -> None:
    model = build(architecture)
    input_ids = token_ids(3, 100)  # the last 4 of each window are no whole group
    transforms = measure_transforms(model, input_ids)
    for layer_idx in (0, 1):
        found = projections(model, input_ids, layer_idx)
        # Query heads 0 and 1 read kv head 0, 2 and 3 read kv head 1.
        queries = [q.unflatten(0, (2, 2)).flatten(1, 2) for q in found["q"]]
        keys = solution(moment(found["k"], True), moment(queries, False))
        assert_same(a_t_a(transforms[layer_idx].keys), keys)
        assert_same(a_t_a(transforms[layer_idx].values), solution(moment(found["v"], True), None))


def test_keys_that_attention_never_sees_as_stored_are_treated_as_values() -> None:
    class Recorder(DynamicCache):
        def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            stored[layer_idx] = keys[0], values[0]
            return super().update(keys, values, layer_idx, *args, **kwargs)

    stored: dict[int, tuple[Tensor, Tensor]] = {}
    model = build("deepseek_v3")
    input_ids = token_ids(1, 96)
    transforms = measure_transforms(model, input_ids)
    with torch.inference_mode():
        model(input_ids=input_ids, use_cache=True, **{cache_argument(model): Recorder(config=model.config)})
    for layer_idx, pair in stored.items():
        assert pair[0].shape[-1] == 48  # the latent vector of all heads
        for transform, states in zip(transforms[layer_idx], pair, strict=True):
            assert_same(a_t_a(transform), solution(moment([states], True), None))


def test_layers_that_borrow_keys_and_values_have_no_transforms_and_change_no_others() -> None:
    transforms = measure_transforms(build("gemma3n_text"), token_ids(1, 96))
    assert list(transforms) == [0, 1]


def test_heads_below_sixteen_get_none() -> None:
    model = small_llama(head_dim=8)
    assert measure_transforms(model, token_ids(1, 96)) == {}
    assert implementations(model) == implementations(small_llama(head_dim=8))


def test_attention_of_a_models_own_leaves_keys_treated_as_values() -> None:
    config = BloomConfig(vocab_size=64, hidden_size=64, n_head=4, n_layer=1)
    model = BloomForCausalLM(config).eval()
    cache = DynamicCache()
    input_ids = token_ids(1, 96)
    with torch.inference_mode():
        model(input_ids=input_ids, use_cache=True, **{cache_argument(model): cache})
    (transforms,) = measure_transforms(model, input_ids).values()
    assert_same(a_t_a(transforms.keys), solution(moment([cache.layers[0].keys[0]], True), None))


def test_eager_and_sdpa_attention_give_the_same_transforms() -> None:
    model = build("llama")
    input_ids = token_ids(1, 96)
    sdpa = measure_transforms(model, input_ids)
    model.set_attn_implementation("eager")
    eager = measure_transforms(model, input_ids)
    model.set_attn_implementation("sdpa")
    for layer_idx in (0, 1):
        assert_same(a_t_a(eager[layer_idx].keys), a_t_a(sdpa[layer_idx].keys))


def test_eager_attention_is_found_where_a_base_class_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(LlamaAttention):
        pass

    model = small_llama(attn_implementation="eager")
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "__class__", Own)
    assert set(measure_transforms(model, token_ids(1, 96))) == {0, 1}


def test_a_seed_turns_the_transforms_and_changes_nothing_else() -> None:
    model = build("llama")
    zero, again, one = (measure_transforms(model, token_ids(1, 96), seed=seed) for seed in (0, 0, 1))
    x = torch.randn(2, 8, 16)
    for layer_idx in (0, 1):
        for first, same, other in zip(zero[layer_idx], again[layer_idx], one[layer_idx], strict=True):
            assert torch.equal(first.apply(x), same.apply(x))
            assert (first.apply(x) - other.apply(x)).norm() > 0.3 * x.norm()
            assert_same(a_t_a(other), a_t_a(first), 1e-4)
            assert torch.allclose(first.undo(first.apply(x)), x, atol=1e-3)


def test_sixteen_bit_models_are_measured_in_float32() -> None:
    model = build("llama")
    exact = measure_transforms(model, token_ids(2, 96))
    model.to(torch.bfloat16)
    try:
        rounded = measure_transforms(model, token_ids(2, 96))
        error = last_logits(model, TurboQuantCache(8, transforms=rounded, config=model.config, num_sinks=0))
    finally:
        build.cache_clear()
    assert error.dtype == torch.bfloat16 and error.isfinite().all()
    for layer_idx in (0, 1):
        for before, after in zip(exact[layer_idx], rounded[layer_idx], strict=True):
            assert after.apply(torch.randn(2, 8, 16)).dtype == torch.float32
            assert_same(a_t_a(after), a_t_a(before), 0.1)


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33])
def test_a_text_shorter_than_a_group_gives_transforms_that_can_be_undone(num_tokens: int) -> None:
    transforms = measure_transforms(build("llama"), token_ids(1, num_tokens))
    x = torch.randn(2, 8, 16)
    for transform in (*transforms[0], *transforms[1]):
        assert torch.allclose(transform.undo(transform.apply(x)), x, atol=1e-3)


def test_a_model_that_fails_gets_its_attention_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = implementations(model)
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: x.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        measure_transforms(model, token_ids(1, 96))
    assert implementations(model) == before


def test_the_model_answers_afterwards_as_before() -> None:
    model = build("llama")
    before = last_logits(model, DynamicCache(config=model.config))
    measure_transforms(model, token_ids(2, 96))
    assert torch.equal(last_logits(model, DynamicCache(config=model.config)), before)


def test_no_tensor_of_the_pass_stays_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    class Watched(moments_module._WatchedCache):
        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            joined = super().update(keys, values, *args, **kwargs)
            alive.extend(map(weakref.ref, (self, keys, values, *joined)))
            return joined

    class Moments(moments_module._Moments):
        def __init__(self) -> None:
            super().__init__()
            alive.append(weakref.ref(self))

    monkeypatch.setattr(moments_module, "_WatchedCache", Watched)
    monkeypatch.setattr(moments_module, "_Moments", Moments)
    transforms: dict[int, LayerTransforms] = measure_transforms(build("llama"), token_ids(2, 96))
    gc.collect()
    assert len(alive) >= 2 * 2 * 5 + 2  # of two windows and two layers
    assert [ref() for ref in alive if ref() is not None] == []
    assert len(transforms) == 2
    assert not [name for name in ALL_ATTENTION_FUNCTIONS if "watched" in name]
