"""Block hashes: names for a prompt's blocks, equal where two prompts agree on everything up to a block's end.

Knows tokens and bytes only: no block id, no cache.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

from turboquant_core.config import BLOCK_SIZE

_HASH_BYTES = 16
_TOKEN_BYTES = 8


def chain_hashes(token_ids: Sequence[int], salt: bytes, num_sinks: int) -> list[bytes]:
    """Return one 128-bit hash per full block; it covers the salt and every token up to the block's end.

    Args:
        token_ids: The tokens from position 0 on.
        salt: What else must agree; requests with different salts share no hash.
        num_sinks: Tokens before the first block.
    """
    num_blocks = max(0, len(token_ids) - num_sinks) // BLOCK_SIZE
    tokens = array("q", token_ids[: num_sinks + BLOCK_SIZE * num_blocks])
    if sys.byteorder == "big":
        tokens.byteswap()
    data = memoryview(tokens).cast("B")
    hashes = []
    previous = salt
    start = 0
    for i in range(num_blocks):
        end = _TOKEN_BYTES * (num_sinks + BLOCK_SIZE * (i + 1))
        block = hashlib.blake2b(previous, digest_size=_HASH_BYTES)
        block.update(data[start:end])
        previous = block.digest()
        hashes.append(previous)
        start = end
    return hashes
