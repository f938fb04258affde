"""Other schemes of KV-cache quantization, to measure the quality of ours against.

They hold keys and values dequantized: attention sees what it would see in the original; memory and speed are
nothing like it. The first token of a chunk sees exactly what decoding sees; those after it see the chunk's
tokens before them as exact tokens in addition, to the advantage of schemes that have any. It has more than
300 lines because the schemes are short and read best side by side. Read from:

    seed     turboquant 0.2.0 (PyPI; back2matching/turboquant: core.py, cache.py)
    q8_0 ..  llama.cpp, and Ollama with it: ggml-quants.c, quantize_row_*_ref
    fp8      vLLM, --kv-cache-dtype fp8 without calibrated scales
    KIVI     jy-yuan/KIVI: models/llama_kivi.py, quant/new_pack.py
    vLLM     vLLM, --kv-cache-dtype turboquant_*: turboquant/config.py, triton_turboquant_{store,decode}.py
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from turboquant_core.codebook import lloyd_max_codebook
from turboquant_core.rotation import rotation_matrix

EXACT_BITS = 16
BLOCK = 32  # numbers of q8_0, q4_0 and KIVI that share a scale
KIVI_RESIDUAL = 128


@dataclass(frozen=True)
class Part:
    """How a scheme holds keys, or values.

    Attributes:
        quantize: Turns float32 ``[batch, num_kv_heads, num_tokens, head_dim]`` into what is read back.
        bits: Stored bits per number, with what numbers of a group share.
        vector_bits: Further bits per vector of a token and head.
        num_exact: Newest tokens that decoding reads as they came, the current one included; 0: none.
        step: Tokens stop being exact this many at a time.
    """

    quantize: Callable[[Tensor], Tensor]
    bits: float
    vector_bits: int = 0
    num_exact: int = 0
    step: int = 1


@dataclass(frozen=True)
class Scheme:
    """A scheme of KV-cache quantization.

    Attributes:
        name: What its users call it.
        keys: How it holds keys.
        values: How it holds values.
        exact_layers: Layers at each end of the model whose keys and values stay as they came.
    """

    name: str
    keys: Part
    values: Part
    exact_layers: int = 0

    def is_exact(self, layer_idx: int, num_layers: int) -> bool:
        """Return whether a layer stays as it came."""
        return min(layer_idx, num_layers - 1 - layer_idx) < self.exact_layers

    def bits_per_value(self, head_dim: int, num_layers: int) -> float:
        """Return the stored bits per number over all layers: 16 in exact ones; exact tokens do not count."""
        parts = (self.keys, self.values)
        quantized = sum(part.bits + part.vector_bits / head_dim for part in parts) / len(parts)
        num_exact = sum(self.is_exact(i, num_layers) for i in range(num_layers))
        return (num_exact * EXACT_BITS + (num_layers - num_exact) * quantized) / num_layers


class SchemeCache(Cache):
    """The cache of a model whose layers all have full attention, as a scheme would give it back.

    Args:
        config: The model's configuration.
        scheme: How keys and values are held.

    Attributes:
        bits_per_value: Stored bits per number of a key or value, see `Scheme.bits_per_value`.
    """

    def __init__(self, config: PreTrainedConfig, scheme: Scheme) -> None:
        config = config.get_text_config(decoder=True)
        num_layers = config.num_hidden_layers
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.bits_per_value = scheme.bits_per_value(head_dim, num_layers)
        super().__init__(
            layers=[
                DynamicLayer() if scheme.is_exact(i, num_layers) else SchemeLayer(scheme)
                for i in range(num_layers)
            ]
        )


class SchemeLayer(CacheLayerMixin):
    """One layer of the cache.

    Args:
        scheme: How keys and values are held.
    """

    is_sliding = False

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        self._parts = (scheme.keys, scheme.values)
        self._states: list[_States] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shapes, dtype and device from the first tokens."""
        both = zip(self._parts, (key_states, value_states), strict=True)
        self._states = [_States(part, states) for part, states in both]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens and return past and new ones, ``[batch, num_kv_heads, num_tokens, head_dim]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values = self._states
        return keys.append(key_states), values.append(value_states)

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self._states[0].num_tokens if self._states else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (number of tokens that `update` will return, position of the first of them)."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything, shapes included."""
        self._states = []
        self.is_initialized = False


class _States:
    """The keys, or the values, of one layer, in a buffer that doubles when it is full."""

    def __init__(self, part: Part, like: Tensor) -> None:
        self._part = part
        self._buffer = like[:, :, :0].detach()
        self._num_quantized = 0
        self.num_tokens = 0

    @torch.no_grad()
    def append(self, new: Tensor) -> Tensor:
        """Take new tokens in and return all, as the first of the new ones sees them."""
        part, start, end = self._part, self.num_tokens, self.num_tokens + new.shape[2]
        if end > self._buffer.shape[2]:
            buffer = new.new_empty(*new.shape[:2], max(end, 2 * self._buffer.shape[2]), new.shape[3])
            buffer[:, :, :start] = self._buffer[:, :, :start]
            self._buffer = buffer
        self._buffer[:, :, start:end] = new
        self.num_tokens = end
        num_old = max(0, start + 1 - part.num_exact) if part.num_exact else end
        num_old -= num_old % part.step
        if num_old > self._num_quantized:
            due = self._buffer[:, :, self._num_quantized : num_old]
            due.copy_(part.quantize(due.float()))
            self._num_quantized = num_old
        return self._buffer[:, :, :end]


def _half(x: Tensor) -> Tensor:
    """Return numbers as they come back from float16."""
    return x.half().float()


def _nearest(x: Tensor, levels: Sequence[float]) -> Tensor:
    table = x.new_tensor(levels)
    return table[torch.bucketize(x, (table[1:] + table[:-1]) / 2)]


# The seed's scheme


@functools.lru_cache(maxsize=16)
def equal_probability_levels(dim: int, bits: int) -> tuple[float, ...]:
    """Return the means of equally probable cells of a coordinate of a uniform unit vector in R^dim.

    With t = sin(a) the density is cos(a)^(dim - 2), see `turboquant_core.codebook`; the integral of
    sin(a) cos(a)^(dim - 2), which gives the means, is -cos(a)^(dim - 1) / (dim - 1).
    """
    angles = np.linspace(-math.pi / 2, math.pi / 2, 2**16 + 1)
    density = np.cos(angles) ** (dim - 2)
    masses = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1]) / 2 * (angles[1] - angles[0])])
    edges = np.interp(np.linspace(0, masses[-1], 2**bits + 1), masses, angles)
    edges[0], edges[-1] = angles[0], angles[-1]  # the masses are flat there
    moments = -np.diff(np.cos(edges) ** (dim - 1)) / (dim - 1)
    return tuple((moments / masses[-1] * 2**bits).tolist())


def quantize_seed(x: Tensor, bits: int) -> Tensor:
    """Rotate unit vectors and take the nearest level of each coordinate; the norm is kept in float32."""
    head_dim = x.shape[-1]
    rotation = rotation_matrix(head_dim, 42).to(x.device)
    norms = x.norm(dim=-1, keepdim=True)
    rotated = x / (norms + 1e-10) @ rotation.T
    return _nearest(rotated, equal_probability_levels(head_dim, bits)) @ rotation * norms


def seed_scheme(bits: int) -> Scheme:
    """Return the scheme of turboquant 0.2.0: the newest 128 tokens exact, no mean taken off.

    ``bits + 32 / head_dim`` bits per number if its codes were packed: 4.25 at 4 bits and head_dim 128. The
    package stores each code in a byte: ``8 + 32 / head_dim`` whatever the number of bits. Its rotation is of
    the Haar measure; for a power of two ours is a Hadamard matrix with random signs.
    """
    part = Part(functools.partial(quantize_seed, bits=bits), bits, vector_bits=32, num_exact=128)
    return Scheme(f"seed {bits} bits", part, part)


# llama.cpp's schemes


def _round_half_away(x: Tensor) -> Tensor:
    """Round as C's roundf does."""
    whole = x.trunc()
    return whole + (2 * (x - whole)).trunc()


def _inverse(x: Tensor) -> Tensor:
    """Return 1 / x, and 0 for 0."""
    return torch.where(x == 0, 0, 1 / x)


def quantize_q8_0(x: Tensor) -> Tensor:
    """Per 32 channels, integers from -127 to 127 and a float16 scale."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return (_round_half_away(blocks * _inverse(scale)) * _half(scale)).flatten(-2)


def quantize_q4_0(x: Tensor) -> Tensor:
    """Per 32 channels, integers from -8 to 7 and a float16 scale that makes the largest number -8."""
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    codes = (blocks * _inverse(scale) + 8.5).trunc().clamp(max=15)
    return ((codes - 8) * _half(scale)).flatten(-2)


def ggml_scheme(name: str, quantize: Callable[[Tensor], Tensor], bits: int) -> Scheme:
    """Return a cache type of llama.cpp, without the rotation of its newest versions; no token is exact.

    ``bits + 16 / 32`` bits per number: 8.5 for q8_0, 4.5 for q4_0.
    """
    part = Part(quantize, bits + 16 / BLOCK)
    return Scheme(name, part, part)


# vLLM's float8 scheme


def quantize_fp8(x: Tensor) -> Tensor:
    """Round to float8 e4m3; what is beyond its largest number becomes that."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).float()


def fp8_scheme() -> Scheme:
    """Return vLLM's fp8 with a scale of 1: 8 bits per number; no token is exact."""
    part = Part(quantize_fp8, 8)
    return Scheme("fp8 e4m3", part, part)


# KIVI


def _codes(x: Tensor, low: Tensor, scale: Tensor, bits: int) -> Tensor:
    return ((x - low) * _inverse(scale)).round().clamp(0, 2**bits - 1)


def _quantize_kivi(groups: Tensor, bits: int, dim: int) -> Tensor:
    low, high = _half(groups.amin(dim, keepdim=True)), _half(groups.amax(dim, keepdim=True))
    scale = _half((high - low) / (2**bits - 1))
    return _codes(groups, low, scale, bits) * scale + low


def quantize_kivi_keys(x: Tensor, bits: int) -> Tensor:
    """Per channel and 32 tokens, evenly spaced levels from the least to the largest number."""
    return _quantize_kivi(x.unflatten(2, (-1, BLOCK)), bits, dim=3).flatten(2, 3)


def quantize_kivi_values(x: Tensor, bits: int) -> Tensor:
    """Per token and 32 channels, evenly spaced levels from the least to the largest number."""
    return _quantize_kivi(x.unflatten(3, (-1, BLOCK)), bits, dim=4).flatten(3, 4)


def kivi_scheme(bits: int) -> Scheme:
    """Return KIVI with groups of 32 and a residual of 128.

    ``bits + (16 + 16) / 32`` bits per number, for scale and zero: 5 at 4 bits, 3 at 2. The residual of keys
    fills up to 128 tokens, which are then quantized all at once: between 1 and 128 are exact, 64.5 on
    average. Values leave one by one and after attention: 128 and the current one are exact.
    """
    num_bits = bits + 32 / BLOCK
    return Scheme(
        f"KIVI {bits}",
        Part(functools.partial(quantize_kivi_keys, bits=bits), num_bits, num_exact=1, step=KIVI_RESIDUAL),
        Part(functools.partial(quantize_kivi_values, bits=bits), num_bits, num_exact=KIVI_RESIDUAL + 1),
    )


# vLLM's TurboQuant


@functools.lru_cache(maxsize=4)
def _hadamard(dim: int) -> Tensor:
    """Return Sylvester's matrix, normalised: symmetric and its own inverse."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix / math.sqrt(dim)


def quantize_vllm_keys(x: Tensor, bits: int) -> Tensor:
    """Rotate unit vectors, take the nearest Lloyd-Max levels, make unit vectors of them; norms are float16.

    vLLM's levels are those of N(0, 1 / head_dim), these those of a unit vector's coordinate: near enough.
    """
    head_dim = x.shape[-1]
    hadamard = _hadamard(head_dim).to(x.device)
    norms = x.norm(dim=-1, keepdim=True)
    rotated = x / (norms + 1e-8) @ hadamard
    levels = _nearest(rotated, lloyd_max_codebook(head_dim, bits).centroids)
    return levels / levels.norm(dim=-1, keepdim=True) @ hadamard * _half(norms)


def quantize_vllm_values(x: Tensor, bits: int) -> Tensor:
    """Per token and head, evenly spaced levels from the least to the largest number, not rotated."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return _codes(x, low, scale, bits) * _half(scale) + _half(low)


def vllm_scheme(bits: int) -> Scheme:
    """Return vLLM's turboquant_4bit_nc or turboquant_3bit_nc in all layers; no token is exact.

    Keys take ``bits + 16 / head_dim`` bits per number, for the norm, values ``bits + (16 + 16) / head_dim``,
    for scale and zero: at head_dim 128, 66 + 68 bytes per token and head, 4.1875 bits, or 50 + 52, 3.1875.
    """
    return Scheme(
        f"vLLM {bits}bit_nc",
        Part(functools.partial(quantize_vllm_keys, bits=bits), bits, vector_bits=16),
        Part(functools.partial(quantize_vllm_values, bits=bits), bits, vector_bits=32),
    )


def with_exact_ends(scheme: Scheme) -> Scheme:
    """Return a scheme that leaves the first and last layer as they are, with 16 bits per number.

    With 6 layers, 4.1875 bits become (2 * 16 + 4 * 4.1875) / 6 = 8.125. vLLM leaves two at each end.
    """
    return replace(scheme, name=f"{scheme.name}, one bf16 layer at each end", exact_layers=1)


ALTERNATIVES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        seed_scheme(4),
        seed_scheme(3),
        seed_scheme(2),
        ggml_scheme("q8_0", quantize_q8_0, 8),
        ggml_scheme("q4_0", quantize_q4_0, 4),
        fp8_scheme(),
        kivi_scheme(4),
        kivi_scheme(2),
        vllm_scheme(4),
        with_exact_ends(vllm_scheme(4)),
        vllm_scheme(3),
        with_exact_ends(vllm_scheme(3)),
    )
}
