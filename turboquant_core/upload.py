"""Numbers of the host to a device. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(numbers: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of numbers, or of equally long sequences of them, without waiting for the device.

    From pinned memory, as the host waits for a copy from any other. torch uses that for something else only
    when the copy has been made.
    """
    is_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=dtype, pin_memory=is_cuda).to(device, non_blocking=is_cuda)
