"""How much memory a device has to spare. Knows no model."""

from __future__ import annotations

from pathlib import Path

import torch

# Of what is free now: a GPU is ours but for the activations; a machine's memory is shared.
CUDA_SHARE = 0.9
CPU_SHARE = 0.5


def free_memory(device: torch.device) -> int:
    """Return the bytes that a server may plan with: 90% of a GPU's free memory, half of a machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * CUDA_SHARE)
    return int(_available_bytes() * CPU_SHARE)


def _available_bytes() -> int:
    """Return what Linux says is available to new programs without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")
