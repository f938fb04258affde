"""DecodeShape: what `decode.cu` is compiled for, and how it fits into a multiprocessor. Knows no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from turboquant_core.codebook import e4m3_magnitudes
from turboquant_core.record import RecordLayout
from turboquant_core.record_codes import HALF_SIZE

_NUM_WARPS = (20, 16, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1)  # the first for which there is room
PLAIN_BITS = 16
_MAX_GROUP = 16
_MAX_DIM = 256
_SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # of the others 99 KiB


@dataclass(frozen=True)
class DecodeShape:
    """What a compiled kernel is for.

    Attributes:
        key_dim: A multiple of 16, at most 256.
        value_dim: Likewise.
        key_bits: Of a key's code; 16 stands for numbers of `dtype`, of an :class:`ExactCodec`.
        value_bits: Of a value's code; 16 if those of keys are.
        group_size: Query heads of a kv head, at most 16.
        num_sinks: Of the timeline.
        ring_size: Of the timeline.
        dtype: Of queries and exact tokens: bfloat16 or float16.
    """

    key_dim: int
    value_dim: int
    key_bits: int
    value_bits: int
    group_size: int
    num_sinks: int
    ring_size: int
    dtype: torch.dtype

    @property
    def is_supported(self) -> bool:
        """Tell whether there is a kernel; if not, the Triton kernel is for it."""
        dims = self.key_dim, self.value_dim
        dims_fit = all(dim % 16 == 0 and 16 <= dim <= _MAX_DIM for dim in dims)
        sums_fit = self.group_size <= (_MAX_GROUP if max(dims) <= 128 else 8)
        return dims_fit and sums_fit and self.dtype in (torch.bfloat16, torch.float16)

    @property
    def copy_bytes(self) -> int:
        """Return the size of half a record and of the means that it shares with the other half."""
        if self.key_bits == PLAIN_BITS:
            return HALF_SIZE * (self.key_dim + self.value_dim) * 2
        return RecordLayout(self.key_dim, self.key_bits, self.value_dim, self.value_bits).starts[-1]

    @property
    def partial_size(self) -> int:
        """Return the numbers of what is found of a request and kv head: sums, references and denominators."""
        return -(-self.group_size * (self.value_dim + 2) // 4) * 4

    @property
    def has_key_parts(self) -> bool:
        """Tell whether keys of 4 bits are multiplied as integers: IN_PARTS in the source."""
        return self.key_bits == 4 and self.group_size <= 4

    @property
    def key_factor(self) -> int:
        """Return what the codebook's levels of keys are multiplied with."""
        return 8 if self.has_key_parts else 1

    @property
    def around_threads(self) -> int:
        """Return the threads of a block of the kernels before and after attention."""
        return 256 if max(self.key_dim, self.value_dim) > 128 else 512

    @property
    def many(self) -> int:
        """Return for how many requests such a block works, where there are many: their heads are 16 rows."""
        return max(1, 16 // self.group_size)

    def query_bytes(self, arch: int) -> int:
        """Return the size of a warp's queries in shared memory, 0 if they stay in registers.

        Many leave no room there for 12 warps; nor do products with keys of other bits.
        """
        is_kept_there = self.group_size > 8 and self.key_bits == 4 and arch == 90
        return 64 * self.key_dim if is_kept_there else 0

    def max_warps(self, arch: int) -> int:
        """Return for how many warps a multiprocessor has registers."""
        dim = max(self.key_dim, self.value_dim)
        if self.query_bytes(arch):
            return 12
        if self.group_size > 8 or dim > 128:
            return 8
        # Without a conversion from e4m3, or with 8-bit keys for more than 4 heads, there is more to hold.
        if arch < 89 or (self.key_bits == 8 and self.group_size > 4):
            return 12
        if dim <= 64:
            return 20
        # Where shared memory is small, only 2 bits have room for more than 12 then, and lack a register.
        return 12 if dim > 96 and arch not in _SHARED_BYTES else 16


class Fit(NamedTuple):
    """What a multiprocessor has room for, in one thread block.

    Attributes:
        num_warps: Warps.
        ring_slots: Places of its ring, each for half a block and its means.
        query_bytes: Of each warp's queries: see `DecodeShape.query_bytes`.
        shared_bytes: For all that, and what else a thread block needs.
    """

    num_warps: int
    ring_slots: int
    query_bytes: int
    shared_bytes: int


def kernel_constants(shape: DecodeShape, fit: Fit) -> dict[str, int]:
    """Return what `decode.cu` is compiled with."""
    constants = {
        "KEY_DIM": shape.key_dim,
        "VALUE_DIM": shape.value_dim,
        "KEY_BITS": shape.key_bits,
        "VALUE_BITS": shape.value_bits,
        "GROUP": shape.group_size,
        "NUM_SINKS": shape.num_sinks,
        "RING_SIZE": shape.ring_size,
        "IS_BFLOAT16": int(shape.dtype == torch.bfloat16),
        "NUM_WARPS": fit.num_warps,
        "RING_SLOTS": fit.ring_slots,
        "QUERY_BYTES": fit.query_bytes,
        "AROUND_THREADS": shape.around_threads,
        "MANY": shape.many,
    }
    for name, levels in (("KEY", _key_levels(shape)), ("VALUE", _value_levels(shape.value_bits))):
        constants[f"{name}_LEVELS_LOW"] = int.from_bytes(levels[:4], "little")
        constants[f"{name}_LEVELS_HIGH"] = int.from_bytes(levels[4:], "little")
    return constants


def _levels(bits: int) -> list[float]:
    """Return eight levels: at 4 bits the magnitudes, else those of negative ones too."""
    magnitudes = e4m3_magnitudes(_MAX_DIM, bits)[0] if bits < 8 else ()
    return [*magnitudes, *(-magnitude for magnitude in magnitudes), *[0.0] * 8][:8]


def _value_levels(bits: int) -> bytes:
    return bytes(torch.tensor(_levels(bits)).to(torch.float8_e4m3fn).view(torch.uint8).tolist())


def _key_levels(shape: DecodeShape) -> bytes:
    """Return integers where keys are multiplied as such; those of 4 bits as what is left of 255."""
    if shape.key_bits == 4 and not shape.has_key_parts:
        return _value_levels(4)
    integers = [round(level * shape.key_factor) for level in _levels(shape.key_bits)]
    return bytes((255 - level if shape.has_key_parts else level) % 256 for level in integers)


def key_unit(shape: DecodeShape) -> float:
    """Return what the number 1 stands for among those that the kernel makes of codes of keys."""
    return _unit(shape.key_dim, shape.key_bits) / shape.key_factor


def value_unit(shape: DecodeShape) -> float:
    """Return the same of values."""
    return _unit(shape.value_dim, shape.value_bits)


def _unit(dim: int, bits: int) -> float:
    return 1.0 if bits >= 8 else e4m3_magnitudes(dim, bits)[1]


def _slot_bytes(num_bytes: int) -> int:
    """Return the size of a place for so many bytes at any alignment: `slot_bytes` in the source."""
    return -(-(num_bytes + 112) // 128) * 128


def fit_device(shape: DecodeShape, arch: int) -> Fit:
    """Return what a multiprocessor has room for; arch: 10 times the compute capability."""
    available = _SHARED_BYTES.get(arch, 99 << 10)
    # As in the source: of a tile of exact tokens the keys, or values, at once; what tells of a place, and of
    # a warp.
    slot_bytes = _slot_bytes(shape.copy_bytes)
    row_bytes = 2 * max(shape.key_dim, shape.value_dim)
    min_slots = next(n for n in (1, 2, 4, 8, 16) if _slot_bytes(16 // n * row_bytes) <= slot_bytes)
    query_bytes = shape.query_bytes(arch)
    warp_bytes = 44 + 4 * shape.group_size + query_bytes
    for num_warps in _NUM_WARPS:
        ring_slots = min(32, (available // num_warps - warp_bytes) // (slot_bytes + 16))
        if (
            ring_slots >= max(2, min_slots)
            and ring_slots * slot_bytes >= 4 * shape.partial_size
            and num_warps <= shape.max_warps(arch)
        ):
            shared_bytes = num_warps * (ring_slots * (slot_bytes + 16) + warp_bytes)
            return Fit(num_warps, ring_slots, query_bytes, shared_bytes)
    raise AssertionError(f"no kernel for {shape} fits into {available} bytes")
