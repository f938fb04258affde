"""How much memory of a device a server may take, and how much it takes. Knows no model."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

# Where the user says nothing: a GPU is ours; a machine's memory is shared.
CUDA_SHARE = 0.9
CPU_SHARE = 0.5
CGROUP = Path("/sys/fs/cgroup")  # version 2: inside a container, the container's own


def memory_budget(
    device: torch.device, utilization: float | None = None, vram_limit: int | None = None
) -> int:
    """Return the bytes that this process may take on a device.

    On a GPU they count what the process holds already, such as weights, but not CUDA's own context. On a CPU
    they come on top of it.

    Args:
        device: CPU or GPU.
        utilization: Share of the GPU's memory, or of what is available on the machine now; 0.9 and 0.5 by
            default.
        vram_limit: Most bytes on a GPU; a CPU knows no such limit.
    """
    if device.type != "cuda":
        return int(available_bytes() * (CPU_SHARE if utilization is None else utilization))
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    # What the process holds is not free; other processes may hold a part as well.
    reachable = free_bytes + torch.cuda.memory_reserved(device)
    budget = min(reachable, int(total_bytes * (CUDA_SHARE if utilization is None else utilization)))
    return budget if vram_limit is None else min(budget, vram_limit)


def memory_in_use(device: torch.device) -> int:
    """Return the bytes of `memory_budget` that tensors take: none on a CPU, whose budget leaves them out."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def available_bytes() -> int:
    """Return what Linux says is available to new programs without swapping, within a container's limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.exists() and limit.read_text().strip() != "max":
        return min(available, max(0, int(limit.read_text()) - int(used.read_text())))
    return available


def free_memory() -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
