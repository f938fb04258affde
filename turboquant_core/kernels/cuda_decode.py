"""Decode attention in CUDA: compiles `decode.cu` for a layer's shapes and launches it.

Knows neither requests nor whose blocks they are: see `DecodeTables`.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_core.block_codec import BlockCodec
from turboquant_core.codebook import e4m3_magnitudes
from turboquant_core.config import MEAN_SIZE
from turboquant_core.kernels.cuda_kernel import Kernel
from turboquant_core.record import RecordLayout
from turboquant_core.reference import AttentionOptions, Codec
from turboquant_core.step_plan import HALF_WORK, TILE_WORK, DecodeTables
from turboquant_core.transform import Transform

_NUM_WARPS = (16, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1)  # the first for which there is room
PLAIN_BITS = 16
# What `Transform.matrices` has for queries, and for sums of transformed values.
_FOR_SUMS, _FOR_QUERIES = 1, 2
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
    def half_bytes(self) -> int:
        """Return the size of half a record."""
        if self.key_bits == PLAIN_BITS:
            return MEAN_SIZE * (self.key_dim + self.value_dim) * 2
        return RecordLayout(self.key_dim, self.key_bits, self.value_dim, self.value_bits).record_bytes // 2

    def max_warps(self, arch: int) -> int:
        """Return for how many warps a multiprocessor has registers."""
        if self.group_size > 8 or max(self.key_dim, self.value_dim) > 128:
            return 8
        # Without a conversion from e4m3, or with 8-bit keys for more than 4 heads, there is more to hold.
        return 12 if arch < 89 or (self.key_bits == 8 and self.group_size > 4) else 16


class Fit(NamedTuple):
    """What a multiprocessor has room for, in one thread block.

    Attributes:
        num_warps: Warps.
        ring_slots: Halves of blocks that each has room for.
        shared_bytes: For both.
    """

    num_warps: int
    ring_slots: int
    shared_bytes: int


class CudaDecode:
    """Attend for one new token of each of several requests: `reference.decode_attention` on the device.

    Args:
        shape: What to compile for.
        device: A CUDA device.

    Raises:
        KernelError: The kernels do not compile or load.
    """

    def __init__(self, shape: DecodeShape, device: torch.device) -> None:
        self._shape = shape
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        fit = fit_device(shape, arch)
        self._grid = properties.multi_processor_count
        constants = kernel_constants(shape, fit)
        self._partial = shape.group_size * (shape.value_dim + 2)
        self._decode = Kernel("decode", "decode", constants, device, 32 * fit.num_warps, fit.shared_bytes)
        self._many = max(1, 16 // shape.group_size)
        num_threads = 256 if max(shape.key_dim, shape.value_dim) > 128 else 512  # as in the source
        around = []
        for suffix, requests in (("", 1), ("_many", self._many)):
            rows = requests * shape.group_size
            num_found = num_threads // shape.value_dim if requests == 1 else 1
            merge_bytes = 8 * (rows * num_found * shape.value_dim + (rows + requests) * (self._grid + 1))
            around.append(
                (
                    Kernel("decode", f"prepare{suffix}", constants, device, num_threads),
                    Kernel("decode", f"merge{suffix}", constants, device, num_threads, merge_bytes),
                )
            )
        self._around_one, self._around_many = around

    def __call__(
        self,
        queries: Tensor,
        new: tuple[Tensor, Tensor] | None,
        exact: tuple[Tensor, Tensor],
        records: Tensor,
        tables: DecodeTables,
        codec: Codec,
        options: AttentionOptions,
    ) -> Tensor:
        """Attend, and keep the new keys and values before.

        Args:
            queries: ``[batch, num_heads, key_dim]``.
            new: Keys ``[batch, num_kv_heads, key_dim]`` and values of the new tokens; None: they are kept.
            exact: Keys ``[num_slots, num_kv_heads, num_sinks + ring_size, key_dim]`` and values of all slots.
            records: uint8 ``[num_blocks, num_kv_heads, record_bytes]``, of all requests.
            tables: What each request sees.
            codec: Of the records.
            options: How scores are made.

        Returns:
            ``[batch, num_heads, value_dim]`` in the dtype of the queries.
        """
        shape = self._shape
        batch, num_heads, _ = queries.shape
        num_kv_heads = num_heads // shape.group_size
        device = queries.device
        queries = queries.contiguous()
        keys, values = (states.contiguous() for states in new) if new else (None, None)
        stored_queries = torch.empty(queries.shape, dtype=torch.float16, device=device)
        stored_bytes = torch.empty(batch, num_heads, 2, shape.key_dim, dtype=torch.uint8, device=device)
        stored_scales = torch.empty(batch, num_heads, device=device)
        num_partials = 2 * (self._grid + 2 * batch * num_kv_heads)
        partials = torch.empty(num_partials, self._partial, device=device)
        output = queries.new_empty(batch, num_heads, shape.value_dim)
        key_operands = value_operands = None
        if isinstance(codec, BlockCodec):
            key_operands = _operands(codec.key_quantizer.transform, _FOR_QUERIES, device)
            value_operands = _operands(codec.value_quantizer.transform, _FOR_SUMS, device)
        scale = options.softmax_scale * math.log2(math.e)
        softcap = (options.softcap or 0.0) * math.log2(math.e)
        sinks = None if options.sink_scores is None else options.sink_scores.float().contiguous()
        # A matrix that is read for several requests at once is read less often, by fewer multiprocessors.
        is_many = batch * num_kv_heads > self._grid
        prepare, merge = self._around_many if is_many else self._around_one
        grid = (-(-batch // (self._many if is_many else 1)) * num_kv_heads,)
        prepare.launch(
            grid,
            queries,
            keys,
            values,
            key_operands,
            _stride(key_operands),
            *exact,
            tables.slots,
            tables.positions,
            stored_queries,
            stored_bytes,
            stored_scales,
            batch,
            num_kv_heads,
            scale,
            overlaps=True,
        )
        self._decode.launch(
            (self._grid,),
            records,
            *exact,
            queries,
            stored_queries,
            stored_bytes,
            stored_scales,
            tables.slots,
            tables.positions,
            tables.exact_starts,
            tables.first_visible,
            tables.block_tables,
            tables.block_starts,
            tables.work_starts,
            partials,
            batch,
            num_kv_heads,
            tables.block_tables.stride(0),
            scale,
            softcap,
            _unit(shape.key_dim, shape.key_bits),
            _unit(shape.value_dim, shape.value_bits),
            overlaps=True,
        )
        merge.launch(
            grid,
            partials,
            tables.work_starts,
            value_operands,
            _stride(value_operands),
            sinks,
            output,
            batch,
            num_kv_heads,
            self._grid,
            _unit(shape.value_dim, shape.value_bits),
            overlaps=True,
        )
        return output


@functools.lru_cache(maxsize=1024)
def _operands(transform: Transform, which: int, device: torch.device) -> Tensor:
    """Return one of a transform's matrices as the kernels multiply with it.

    bfloat16 ``[1 or num_heads, dim / 8, dim / 16, 32, 2, 4]``: for each tile of 8 columns and step of 16 rows
    a lane's B operands of mma.m16n8k16, what numbers are rounded to and then what is left of them.
    """
    with torch.inference_mode(False):
        matrices = transform.matrices(device)[which]
        dim = transform.dim
        rounded = matrices.bfloat16()
        parts = torch.stack([rounded, (matrices - rounded.float()).bfloat16()], 1)
        # head, part, step, b, t, e, tile, g: see prepare.cuh
        tiled = parts.view(-1, 2, dim // 16, 2, 4, 2, dim // 8, 8).permute(0, 6, 2, 7, 4, 1, 3, 5)
        return tiled.reshape(-1, dim // 8, dim // 16, 32, 2, 4)


def _stride(operands: Tensor | None) -> int:
    """Return the operands, of 16 bytes, between neighbouring heads; 0 if all have the same, or none."""
    return 0 if operands is None or len(operands) == 1 else operands[0].numel() // 8


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
        "TILE_WORK": TILE_WORK,
        "HALF_WORK": HALF_WORK,
        "IS_BFLOAT16": int(shape.dtype == torch.bfloat16),
        "NUM_WARPS": fit.num_warps,
        "RING_SLOTS": fit.ring_slots,
    }
    # Keys of 2 and 3 bits are multiplied as integers, which their levels are.
    key_type = torch.float8_e4m3fn if shape.key_bits == 4 else torch.int8
    for name, bits, dtype in (
        ("KEY", shape.key_bits, key_type),
        ("VALUE", shape.value_bits, torch.float8_e4m3fn),
    ):
        levels = _level_bytes(bits, dtype)
        constants[f"{name}_LEVELS_LOW"] = int.from_bytes(levels[:4], "little")
        constants[f"{name}_LEVELS_HIGH"] = int.from_bytes(levels[4:], "little")
    return constants


def _level_bytes(bits: int, dtype: torch.dtype) -> bytes:
    """Return eight levels' bytes: at 4 bits the magnitudes, else those of negative ones too."""
    if bits >= 8:
        return bytes(8)
    magnitudes, _ = e4m3_magnitudes(_MAX_DIM, bits)
    levels = [*magnitudes, *(-magnitude for magnitude in magnitudes)][:8]
    return bytes(torch.tensor(levels).to(dtype).view(torch.uint8).tolist()).ljust(8, b"\0")


def _unit(dim: int, bits: int) -> float:
    """Return what the number 1 stands for among those that the kernel makes of codes."""
    return 1.0 if bits >= 8 else e4m3_magnitudes(dim, bits)[1]


def fit_device(shape: DecodeShape, arch: int) -> Fit:
    """Return what a multiprocessor has room for; arch: 10 times the compute capability."""
    available = _SHARED_BYTES.get(arch, 99 << 10)
    # As in the source: room for any alignment, a barrier and an offset.
    slot_bytes = -(-(shape.half_bytes + 112) // 128) * 128 + 8 + 4
    partial_bytes = 4 * shape.group_size * (shape.value_dim + 2)
    for num_warps in _NUM_WARPS:
        ring_slots = min(32, (available // num_warps - 36) // slot_bytes)
        if (
            ring_slots >= 2
            and ring_slots * (slot_bytes - 12) >= partial_bytes
            and num_warps <= shape.max_warps(arch)
        ):
            return Fit(num_warps, ring_slots, num_warps * (ring_slots * slot_bytes + 36))
    raise AssertionError(f"no kernel for {shape} fits into {available} bytes")
