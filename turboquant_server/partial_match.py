"""Texts that are being written: how much of the end of one may be the beginning of another."""

from __future__ import annotations

from collections.abc import Collection


def count_begun(text: str, wanted: Collection[str]) -> int:
    """Return the length of the longest end of ``text`` with which one of ``wanted`` begins."""
    longest = max(map(len, wanted), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(each.startswith(text[-length:]) for each in wanted):
            return length
    return 0
