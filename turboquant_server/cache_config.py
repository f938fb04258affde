"""The settings of the KV cache: how it is kept, what it may take, and what else may be kept of it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import NoDecode

SUPPORTED_BITS = (2, 3, 4, 8)


class CacheConfig(BaseModel):
    """Say how the KV cache is kept and what it may take."""

    kv_cache_dtype: Literal["turboquant", "bf16"] = Field(
        "turboquant",
        description="turboquant compresses the KV cache; bf16 does not: the same server with 16 bits per "
        "number, to compare with",
    )
    bits: int = Field(4, description="bits per stored number of the compressed KV cache: 2, 3, 4 or 8")
    kv_bits: Annotated[tuple[int, int] | None, NoDecode] = Field(
        None, description="bits of keys and of values apart, such as 4,3 (default: --bits for both)"
    )
    kv_budget_bits: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="average bits per number, norms and means included, such as 3.5; each layer gets the "
        "bits that it needs (default: --bits for all)",
    )
    kv_cache_memory: int | None = Field(
        None,
        gt=0,
        description="bytes of the cache, on each GPU, such as 10GiB or 10GB, in place of "
        "--gpu-memory-utilization and --vram-limit (default: what those leave)",
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="share of the GPU's memory that weights, cache and scratch may take; on a CPU, share of "
        "what is available beside the weights (default: 0.9; on a CPU 0.5)",
    )
    vram_limit: int | None = Field(
        None,
        gt=0,
        description="most bytes of a GPU that weights, cache and scratch take, such as 10GiB or 10GB; "
        "does nothing on a CPU (default: no limit)",
    )
    enable_prefix_caching: bool = Field(
        True, description="let prompts that begin alike share what was read of them"
    )
    fidelity_sample_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="share of the answers, such as 0.01, that are compared with what the model predicts "
        "without compression, while there is nothing else to do (default: none); see fidelity_* in /metrics",
    )
    swap_space: int | None = Field(
        None,
        ge=0,
        description="bytes of host memory, such as 16GiB, for what was read of prompts and has no room left "
        "on the GPU; copied back, it need not be read again (default: none)",
    )

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int) -> int:
        if bits not in SUPPORTED_BITS:
            raise PydanticCustomError("unsupported_bits", "Input should be 2, 3, 4 or 8")
        return bits

    @field_validator("kv_bits", mode="before")
    @classmethod
    def _split_bits(cls, bits: Any) -> Any:
        if bits is None:
            return None
        parts = bits.split(",") if isinstance(bits, str) else bits
        if (
            not isinstance(parts, (list, tuple))
            or len(parts) != 2
            or any(str(part).strip() not in map(str, SUPPORTED_BITS) for part in parts)
        ):
            raise PydanticCustomError(
                "unsupported_bits", "Input should be two of 2, 3, 4 and 8 with a comma between them"
            )
        return tuple(int(part) for part in parts)

    @field_validator("vram_limit", "kv_cache_memory", "swap_space", mode="before")
    @classmethod
    def _parse_size(cls, size: Any) -> Any:
        if not isinstance(size, str):
            return size
        match = re.fullmatch(r"(\d+)(?:([KMGT])(i?)B)?", size.strip(), re.IGNORECASE)
        if match is None:
            raise PydanticCustomError(
                "no_size",
                "Input should be a number of bytes, or of a unit from KiB to TiB or KB to TB, such as 10GiB",
            )
        number, prefix, binary = match.groups()
        power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
        return int(number) * (1024 if binary else 1000) ** power
