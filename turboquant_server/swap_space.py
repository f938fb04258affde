"""The swap space: host memory for blocks whose room on the device is needed; see `HostTier` in the core.

How many blocks `--swap-space` holds, whether the host has so much, and what is told of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from turboquant_core import BLOCK_SIZE, CacheManager, HostStore, PagedStore
from turboquant_server.cache_size import CacheSize, format_bytes
from turboquant_server.load_error import ModelLoadError
from turboquant_server.memory import available_bytes

if TYPE_CHECKING:
    from turboquant_server.attention_check import ModelAttention

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SwapUsage:
    """What has become of the swap space.

    Attributes:
        num_hit_tokens: Tokens found there and nowhere else, of prompts and, after a preemption, once more.
        num_blocks_out: Blocks of layer groups copied to the host.
        num_blocks_in: Blocks copied back.
        share: Of its blocks, those that are taken; of the layer group that has least left.
    """

    num_hit_tokens: int
    num_blocks_out: int
    num_blocks_in: int
    share: float


def count_host_blocks(
    num_bytes: int | None, attention: ModelAttention, size: CacheSize, device: torch.device
) -> int:
    """Return how many blocks of each layer group the swap space holds.

    Args:
        num_bytes: Of host memory; none for no swap space.
        attention: How the model attends.
        size: Of the cache on the device.
        device: Where that lies.

    Raises:
        ModelLoadError: The model has no use for it, the host has less memory, or no block fits.
    """
    if not num_bytes:
        return 0
    if attention.state_bytes or attention.one_shot or not size.groups:
        raise ModelLoadError(
            "--swap-space holds prompts that begin alike, and this model cannot go on from what was read of "
            "another prompt; leave it out"
        )
    available = available_bytes() - (0 if device.type == "cuda" else size.num_bytes)
    if num_bytes > available:
        raise ModelLoadError(
            f"--swap-space asks for {format_bytes(num_bytes)} and the host has {format_bytes(available)} "
            "left; give less"
        )
    num_blocks = num_bytes // sum(size.block_bytes)
    if not num_blocks:
        raise ModelLoadError(
            f"--swap-space of {format_bytes(num_bytes)} holds not even {BLOCK_SIZE} tokens, which take "
            f"{format_bytes(sum(size.block_bytes))}; give more, such as 16GiB"
        )
    if device.type != "cuda":
        logger.warning(
            "on a CPU the swap space lies beside the cache in the same memory; the same, given to "
            "--kv-cache-memory, does more"
        )
    return num_blocks


def build_host_store(store: PagedStore, num_blocks: int) -> HostStore | None:
    """Allocate the swap space, if there is to be one.

    Raises:
        ModelLoadError: The memory cannot be had.
    """
    if not num_blocks:
        return None
    try:
        return HostStore(store, num_blocks)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ModelLoadError(
            f"the host's memory for --swap-space cannot be had ({reason}); give less"
        ) from error


def describe_swap(manager: CacheManager, size: CacheSize) -> str:
    """Return what the swap space holds, as a person reads it; nothing, if there is none."""
    num_blocks = max((tier.num_blocks for tier in manager.tiers), default=0)
    if not num_blocks:
        return ""
    memory = format_bytes(num_blocks * sum(size.block_bytes))
    return f"{memory} of host memory for {BLOCK_SIZE * num_blocks:,} more tokens of prompts"


def measure_swap(manager: CacheManager) -> SwapUsage:
    """Return what has become of the swap space so far, while the engine goes on."""
    tiers = manager.tiers
    return SwapUsage(
        num_hit_tokens=manager.num_host_hit_tokens,
        num_blocks_out=sum(tier.num_to_host for tier in tiers),
        num_blocks_in=sum(tier.num_to_device for tier in tiers),
        share=max((tier.num_held / tier.num_blocks for tier in tiers if tier.num_blocks), default=0.0),
    )
