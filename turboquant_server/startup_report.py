"""The lines that a server prints when it is ready: what it loaded, and what its cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turboquant_server.cache_size import TIMELINE, format_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from turboquant_server.cache_plan import CachePlan
    from turboquant_server.cache_size import CacheSize


def format_report(
    name: str,
    model: PreTrainedModel,
    load_format: str,
    quantize: str,
    load_seconds: float,
    chat_format: str,
    cache_plan: CachePlan,
    cache_size: CacheSize,
    max_model_len: int,
    fidelity: str = "",
    swap_space: str = "",
    num_ranks: int = 1,
) -> str:
    """Return aligned lines about a loaded model and its cache.

    Args:
        name: What clients call the model.
        model: On its device.
        load_format: Where its weights come from, auto or dummy.
        quantize: How its weights were quantized on loading, or none.
        load_seconds: How long loading took.
        chat_format: How its answers are read.
        cache_plan: How the cache is kept.
        cache_size: What it holds.
        max_model_len: Most tokens of a request.
        fidelity: How it compares with predictions without compression, if that was measured.
        swap_space: What that holds, if there is one.
        num_ranks: How many devices have a part of the model.
    """
    weights = "random weights, " if load_format == "dummy" else ""
    weights += "" if quantize == "none" else f"weights in {quantize}, "
    devices = (
        str(model.device) if num_ranks == 1 else f"{num_ranks} tensor-parallel ranks, {model.device.type}"
    )
    lines = {
        "model": (
            f"{name} ({model.config.model_type}, {_format_count(model.num_parameters())} parameters, "
            f"{weights}{_name(model.dtype)} on {devices})"
        ),
        "loaded in": f"{load_seconds:.1f} s",
        "context": f"{max_model_len:,} tokens",
        **_format_cache(cache_plan, cache_size, model.dtype, num_ranks),
        **({"fidelity": fidelity} if fidelity else {}),
        **({"swap space": swap_space} if swap_space else {}),
        "requests": _format_requests(cache_size, max_model_len),
        "answers": chat_format,
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in lines.items())


def _format_cache(plan: CachePlan, size: CacheSize, dtype: torch.dtype, num_ranks: int) -> dict[str, str]:
    memory = format_bytes(size.num_bytes) + (" a rank" if num_ranks > 1 else "")
    if not size.groups:
        return {"KV cache": "none, only states of recurrent layers", "memory": f"{memory} of states"}
    blocks = f"{_format_bits(plan, dtype)}, {size.bits_per_value:.3f} bits per value"
    tokens = f"{memory} for {size.num_tokens:,} tokens"
    if plan.exact_dtype is None:
        tokens += f"; in bfloat16 it would hold {size.num_bf16_tokens:,}"
    if plan.exact_dtype != dtype:
        blocks += (
            f"; a request's first {TIMELINE.num_sinks} and newest {TIMELINE.residual_length} tokens "
            f"stay {_name(dtype)}"
        )
    return {"KV cache": blocks, **_format_layers(plan), "memory": tokens}


def _format_requests(size: CacheSize, max_model_len: int) -> str:
    if size.num_slots == 1:
        return "one at a time"
    num_long = size.count_requests(max_model_len)
    long = "even" if num_long == size.num_slots else f"{num_long:,}"
    return f"up to {size.num_slots:,} at a time, {long} of full context"


def _format_bits(plan: CachePlan, dtype: torch.dtype) -> str:
    if plan.exact_dtype is not None:
        name = _name(plan.exact_dtype)
        return f"{name}, not compressed" if plan.exact_dtype == dtype else f"{_name(dtype)} rounded to {name}"
    if plan.bit_plan:
        return "codes of 2 to 8 bits by layer"
    if plan.key_bits == plan.value_bits:
        return f"{plan.key_bits}-bit codes"
    return f"keys in {plan.key_bits}-bit codes, values in {plan.value_bits}-bit codes"


def _format_layers(plan: CachePlan) -> dict[str, str]:
    """Return a line of bits, layer by layer, for keys and one for values, if they have a plan."""
    if not plan.bit_plan:
        return {}
    keys, values = zip(*(pair for _, pair in sorted(plan.bit_plan.layer_bits.items())), strict=True)
    return {
        "  key bits": " ".join(map(str, keys)),
        "  value bits": f"{' '.join(map(str, values))}  (layers in order)",
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _format_count(number: int) -> str:
    """Return three significant digits: 471K, 13.4M, 8.03B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
