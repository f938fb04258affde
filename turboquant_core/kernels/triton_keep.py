"""New tokens to where their requests keep them as they came, in Triton."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
# (kernels, which Triton types)

from __future__ import annotations

import triton
from torch import Tensor
from triton import language as tl

from turboquant_core.kernels.triton_launch import cdiv, next_power_of_2, quick_launch
from turboquant_core.prefill_plan import PrefillPlan

_ROWS = 16


def keep_tokens(keys: Tensor, values: Tensor, exact: tuple[Tensor, Tensor], plan: PrefillPlan) -> None:
    """Write what slots keep of a step's tokens.

    Args:
        keys: ``[num_tokens, num_kv_heads, key_dim]``, the last dimension contiguous, as of all tensors here.
        values: ``[num_tokens, num_kv_heads, value_dim]``.
        exact: Written to: keys ``[num_slots, num_kv_heads, num_places, key_dim]`` and values.
        plan: Which tokens go where.
    """
    exact_keys, exact_values = exact
    num_kept, dims = plan.kept_rows.shape[0], (keys.shape[2], values.shape[2])
    _keep[(cdiv(num_kept, _ROWS), keys.shape[1])](
        keys,
        values,
        exact_keys,
        exact_values,
        plan.kept_rows,
        plan.kept_slots,
        plan.kept_places,
        num_kept,
        *keys.stride()[:2],
        *values.stride()[:2],
        *exact_keys.stride()[:3],
        *exact_values.stride()[:3],
        KEY_DIM=dims[0],
        VALUE_DIM=dims[1],
        COLS=next_power_of_2(max(dims)),
        ROWS=_ROWS,
    )


@quick_launch
@triton.jit(
    do_not_specialize=["num_kept"],
    do_not_specialize_on_alignment=["kept_rows", "kept_slots", "kept_places"],
)
def _keep(
    keys,
    values,
    exact_keys,
    exact_values,
    kept_rows,
    kept_slots,
    kept_places,
    num_kept,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    slot_key_stride,
    slot_key_head_stride,
    place_key_stride,
    slot_value_stride,
    slot_value_head_stride,
    place_value_stride,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    is_kept = index < num_kept
    row = tl.load(kept_rows + index, is_kept, -1)[:, None]
    slot = tl.load(kept_slots + index, is_kept, 0)[:, None]
    place = tl.load(kept_places + index, is_kept, 0)[:, None]
    dim = tl.arange(0, COLS)[None, :]
    number = tl.load(keys + row * key_stride + head * key_head_stride + dim, (row >= 0) & (dim < KEY_DIM), 0)
    target = exact_keys + slot * slot_key_stride + head * slot_key_head_stride + place * place_key_stride
    tl.store(target + dim, number, is_kept[:, None] & (dim < KEY_DIM))
    is_number = (row >= 0) & (dim < VALUE_DIM)
    number = tl.load(values + row * value_stride + head * value_head_stride + dim, is_number, 0)
    target = exact_values + slot * slot_value_stride + head * slot_value_head_stride
    tl.store(target + place * place_value_stride + dim, number, is_kept[:, None] & (dim < VALUE_DIM))
