"""The lines that a server prints when it is ready: what it loaded, and what its cache takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turboquant_server.memory import CPU_SHARE, CUDA_SHARE, free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from turboquant_server.cache_plan import CachePlan
    from turboquant_server.cache_probe import CacheMeasurement


def format_report(
    name: str,
    model: PreTrainedModel,
    quantize: str,
    load_seconds: float,
    cache_plan: CachePlan,
    measurement: CacheMeasurement,
    max_model_len: int,
) -> str:
    """Return aligned lines about a loaded model.

    The tokens that fit are those of one request: keys and values with everything that their compressed form
    carries beside the codes. The weights are in memory already; activations are not counted.

    Args:
        name: What clients call the model.
        model: On its device.
        quantize: How its weights were quantized on loading, or none.
        load_seconds: How long loading took.
        cache_plan: How the cache is compressed.
        measurement: Of this model's cache.
        max_model_len: Most tokens of a request.
    """
    dtype = str(model.dtype).removeprefix("torch.")
    weights = "" if quantize == "none" else f"weights in {quantize}, "
    num_bytes = free_memory(model.device)
    share = (
        f"{CUDA_SHARE:.0%} of the GPU's free memory"
        if model.device.type == "cuda"
        else f"{CPU_SHARE:.0%} of the available memory"
    )
    compressed, bf16 = measurement.compressed, measurement.bf16
    lines = {
        "model": (
            f"{name} ({model.config.model_type}, {_format_count(model.num_parameters())} parameters, "
            f"{weights}{dtype} on {model.device})"
        ),
        "loaded in": f"{load_seconds:.1f} s",
        "context": f"{max_model_len:,} tokens",
        "KV cache": (
            f"{_format_bits(cache_plan)}, {measurement.bits_per_further_value:.3f} bits per value with norms "
            f"and means; {measurement.bits_per_value:.2f} measured at {compressed.num_tokens:,} tokens, "
            f"the first and the newest in {dtype}"
        ),
        **_format_layers(cache_plan),
        "room for": (
            f"{_format_tokens(compressed.count_tokens(num_bytes))} tokens in {num_bytes / 2**30:.1f} GiB "
            f"({share}), against {_format_tokens(bf16.count_tokens(num_bytes))} in bfloat16"
        ),
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in lines.items())


def _format_bits(plan: CachePlan) -> str:
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


def _format_tokens(num_tokens: int | None) -> str:
    return "any number of" if num_tokens is None else f"{num_tokens:,}"


def _format_count(number: int) -> str:
    """Return three significant digits: 471K, 13.4M, 8.03B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
