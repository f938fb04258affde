"""The lines that a server prints when it is ready: what it loaded, and what its cache takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from turboquant_server.memory import CPU_SHARE, CUDA_SHARE, free_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from turboquant_server.cache_probe import CacheMeasurement


def format_report(
    name: str,
    model: PreTrainedModel,
    quantize: str,
    load_seconds: float,
    bits: int,
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
        bits: Bits of a code.
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
            f"{bits}-bit codes, {measurement.bits_per_further_value:.3f} bits per value with norms and "
            f"means; {measurement.bits_per_value:.2f} measured at {compressed.num_tokens:,} tokens, "
            f"the newest in {dtype}"
        ),
        "room for": (
            f"{_format_tokens(compressed.count_tokens(num_bytes))} tokens in {num_bytes / 2**30:.1f} GiB "
            f"({share}), against {_format_tokens(bf16.count_tokens(num_bytes))} in bfloat16"
        ),
    }
    width = max(map(len, lines)) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in lines.items())


def _format_tokens(num_tokens: int | None) -> str:
    return "any number of" if num_tokens is None else f"{num_tokens:,}"


def _format_count(number: int) -> str:
    """Return three significant digits: 471K, 13.4M, 8.03B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
