"""Which kernel attends for generated tokens: CUDA where it has the shape, Triton for all the rest."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from turboquant_core.exact_codec import ExactCodec
from turboquant_core.kernels import triton_decode
from turboquant_core.kernels.cuda_decode import CudaDecode
from turboquant_core.kernels.cuda_kernel import KernelError
from turboquant_core.kernels.decode_shape import PLAIN_BITS, DecodeShape
from turboquant_core.reference import AttentionOptions, Codec
from turboquant_core.step_plan import DecodeTables
from turboquant_core.timeline import Timeline

logger = logging.getLogger(__name__)


def decode(
    queries: Tensor,
    new: tuple[Tensor, Tensor] | None,
    exact: tuple[Tensor, Tensor],
    records: Tensor,
    tables: DecodeTables,
    timeline: Timeline,
    codec: Codec,
    options: AttentionOptions,
) -> Tensor | None:
    """Keep the new tokens and attend for them; arguments and result are those of :class:`CudaDecode`.

    Returns:
        None, and nothing is kept, if only the reference attends to such blocks.

    Raises:
        RuntimeError: There may be rows without a request, which only the CUDA kernel knows.
    """
    keys, values = exact
    shape = DecodeShape(
        key_dim=keys.shape[-1],
        value_dim=values.shape[-1],
        key_bits=PLAIN_BITS if isinstance(codec, ExactCodec) else codec.key_quantizer.bits,
        value_bits=PLAIN_BITS if isinstance(codec, ExactCodec) else codec.value_quantizer.bits,
        group_size=queries.shape[1] // keys.shape[1],
        num_sinks=timeline.num_sinks,
        ring_size=timeline.ring_size,
        dtype=queries.dtype,
    )
    kernel = cuda_decode(shape, queries.device) if queries.dtype == keys.dtype else None
    if kernel is not None:
        return kernel(queries, new, exact, records, tables, codec, options)
    if tables.has_free_rows:
        raise RuntimeError("the attention of a layer has no CUDA kernel")
    if isinstance(codec, ExactCodec):
        return None
    if new is not None:
        slots, positions = tables.slots.long(), tables.positions.long()
        in_ring = timeline.num_sinks + (positions - timeline.num_sinks) % timeline.ring_size
        places = torch.where(positions < timeline.num_sinks, positions, in_ring)
        for held, states in zip(exact, new, strict=True):
            held[slots, :, places] = states.to(held.dtype)
    return triton_decode.decode(queries, exact, records, tables, timeline, codec, options)


@functools.lru_cache(maxsize=64)
def cuda_decode(shape: DecodeShape, device: torch.device) -> CudaDecode | None:
    """Return the kernel that all layers of a shape share; None, with a line in the log, if there is none."""
    if not shape.is_supported:
        reason = "it has no kernel for that"
    elif torch.version.cuda is None:
        reason = "this is no CUDA device"
    else:
        try:
            return CudaDecode(shape, device)
        except ImportError:
            reason = "the package cuda-bindings is missing"
        except KernelError as error:
            reason = str(error)
    logger.warning(
        "attention over heads of %d / %d at %d / %d bits in groups of %d, %s, runs in Triton, not CUDA: %s",
        shape.key_dim,
        shape.value_dim,
        shape.key_bits,
        shape.value_bits,
        shape.group_size,
        shape.dtype,
        reason,
    )
    return None
