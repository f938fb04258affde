"""Decode attention in CUDA: compiles `decode.cu` for a layer's shapes and launches it.

Knows neither requests nor whose blocks they are: see `DecodeTables`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from turboquant_core.block_codec import BlockCodec
from turboquant_core.kernels.cuda_kernel import Kernel
from turboquant_core.kernels.decode_shape import (
    DecodeShape,
    fit_device,
    kernel_constants,
    key_unit,
    value_unit,
)
from turboquant_core.reference import AttentionOptions, Codec
from turboquant_core.step_plan import DecodeTables
from turboquant_core.transform import Transform

# What `Transform.matrices` has for queries, and for sums of transformed values.
_FOR_SUMS, _FOR_QUERIES = 1, 2


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
        self._decode = Kernel("decode", "decode", constants, device, 32 * fit.num_warps, fit.shared_bytes)
        num_threads = shape.around_threads

        def around(name: str, shared_bytes: int = 0) -> Kernel:
            return Kernel("decode", name, constants, device, num_threads, shared_bytes)

        def merge(name: str, requests: int) -> Kernel:
            num_quads = requests * shape.group_size * shape.value_dim // 4
            num_parts = min(32, max(1, num_threads // num_quads))
            return around(name, 2 * num_parts * num_quads * 16 + requests * 2 * (self._grid + 1) * 4)

        self._prepare, self._prepare_many = around("prepare"), around("prepare_many")
        self._merge_few = around("merge_few", 4 * (2 * (self._grid + 1) + 127))  # a chunk has at most 128
        self._merge, self._merge_many = merge("merge", 1), merge("merge_many", shape.many)

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
        stored_bytes = torch.empty(batch, num_heads, 2, shape.key_dim, dtype=torch.uint8, device=device)
        stored_scales = torch.empty(batch, num_heads, device=device)
        num_partials = 2 * (self._grid + 2 * batch * num_kv_heads)
        partials = torch.empty(num_partials, shape.partial_size, device=device)
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
        prepare, merge = (self._prepare_many, self._merge_many) if is_many else (self._prepare, self._merge)
        grid = merge_grid = (-(-batch // (shape.many if is_many else 1)) * num_kv_heads,)
        if batch * num_heads <= self._grid:  # a kv head's query heads find room at once
            merge, merge_grid = self._merge_few, (batch * num_heads,)
        if key_operands is not None:
            prepare.launch(
                grid,
                queries,
                key_operands,
                _stride(key_operands),
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
            keys,
            values,
            *exact,
            queries,
            stored_bytes,
            stored_scales,
            tables.slots,
            tables.positions,
            tables.exact_starts,
            tables.first_visible,
            tables.block_tables,
            tables.block_starts,
            tables.counts_before,
            tables.counts_before.stride(0),
            partials,
            batch,
            num_kv_heads,
            tables.block_tables.stride(0),
            scale,
            softcap,
            key_unit(shape),
            value_unit(shape),
            overlaps=True,
        )
        merge.launch(
            merge_grid,
            partials,
            tables.counts_before,
            tables.counts_before.stride(0),
            value_operands,
            _stride(value_operands),
            sinks,
            output,
            batch,
            num_kv_heads,
            self._grid,
            value_unit(shape),
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
        # Rows of a step are 4t + 2e + b, as rows of queries are read; e goes between a lane's two operands.
        tiled = parts.view(-1, 2, dim // 16, 4, 2, 2, dim // 8, 8).permute(0, 6, 2, 7, 3, 1, 4, 5)
        return tiled.reshape(-1, dim // 8, dim // 16, 32, 2, 4)


def _stride(operands: Tensor | None) -> int:
    """Return the operands, of 16 bytes, between neighbouring heads; 0 if all have the same, or none."""
    return 0 if operands is None or len(operands) == 1 else operands[0].numel() // 8
