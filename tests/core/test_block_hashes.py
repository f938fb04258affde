"""Two prompts share a hash exactly where they agree on the salt and on every token up to the block's end."""

from __future__ import annotations

import hashlib
import struct
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core.block_hashes import chain_hashes


def digest(previous: bytes, tokens: list[int]) -> bytes:
    return hashlib.blake2b(previous + struct.pack(f"<{len(tokens)}q", *tokens), digest_size=16).digest()


def test_a_hash_covers_the_salt_the_sinks_and_all_blocks_up_to_its_own() -> None:
    tokens = [3 * i + 1000 * (i % 7) for i in range(200)]
    first = digest(b"salt", tokens[:68])
    second = digest(first, tokens[68:132])
    third = digest(second, tokens[132:196])
    assert chain_hashes(tokens, b"salt", 4) == [first, second, third]
    assert chain_hashes(tuple(tokens), b"salt", 4) == [first, second, third]


def test_only_full_blocks_have_a_hash() -> None:
    for num_tokens, num_blocks in ((0, 0), (3, 0), (4, 0), (67, 0), (68, 1), (131, 1), (132, 2)):
        assert len(chain_hashes([5] * num_tokens, b"", 4)) == num_blocks
    assert len(chain_hashes([5] * 128, b"", 0)) == 2


def test_known_hashes() -> None:
    """These bytes are the same on every machine and in every version."""
    hashes = chain_hashes(range(132), b"", 4)
    assert [block_hash.hex() for block_hash in hashes] == [
        "472e9123cd3b6c50dac123469186c60e",
        "f21db45b46ec3bff0133efc2c9a012c0",
    ]


@given(
    left=st.lists(st.integers(0, 1), min_size=250, max_size=300),
    changed=st.integers(0, 299),
    salt=st.sampled_from([b"", b"a"]),
    num_sinks=st.integers(0, 5),
)
@settings(deadline=None, max_examples=100, derandomize=True)
def test_hashes_agree_up_to_the_first_difference(
    left: list[int], changed: int, salt: bytes, num_sinks: int
) -> None:
    right = [token + (i == changed) * 2**40 for i, token in enumerate(left)]
    hashes = chain_hashes(left, b"", num_sinks)
    others = chain_hashes(right, salt, num_sinks)
    for i, (ours, theirs) in enumerate(zip(hashes, others, strict=True)):
        end = num_sinks + 64 * (i + 1)
        assert (ours == theirs) == (not salt and left[:end] == right[:end])
    assert len({*hashes, *others}) == len(hashes) + sum(a != b for a, b in zip(hashes, others, strict=True))


def test_a_hundred_thousand_tokens_take_no_time() -> None:
    tokens = list(range(100_000))
    fastest = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        assert len(chain_hashes(tokens, b"", 4)) == 1562
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 0.1
