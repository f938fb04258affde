"""How much memory a device has to spare. Knows no model."""

from __future__ import annotations

from pathlib import Path

import torch

# Of what is free now: a GPU is ours but for the activations; a machine's memory is shared.
CUDA_SHARE = 0.9
CPU_SHARE = 0.5
CGROUP = Path("/sys/fs/cgroup")  # version 2: inside a container, the container's own


def free_memory(device: torch.device) -> int:
    """Return the bytes that a server may plan with: 90% of a GPU's free memory, half of a machine's."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes * CUDA_SHARE)
    return int(_available_bytes() * CPU_SHARE)


def _available_bytes() -> int:
    """Return what Linux says is available to new programs without swapping, within a container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and limit.read_text().strip() != "max":
        return min(available, max(0, int(limit.read_text()) - int(used.read_text())))
    return available
