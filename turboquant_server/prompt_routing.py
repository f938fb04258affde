"""Which replica gets a prompt: the one that has read how it begins, unless it has too much to do.

Knows bodies of requests and names of replicas, and neither Ray nor HTTP.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from turboquant_server.api.messages_chat import BILLING_HEADER

# Long enough to tell conversations apart, and short enough that questions about one document go together.
BEGINNING_LENGTH = 1024
# To read a larger body would hold up the streams of others.
MAX_READ_BYTES = 8 * 2**20
# A replica takes a prompt of its own until it has this many times the mean of requests, and at least so many.
MOST_LOAD = 1.25
FEW_REQUESTS = 8
INSTRUCTION_ROLES = ("system", "developer")


def prompt_beginning(body: bytes) -> bytes | None:
    """Return what decides where a request goes, or None if it has no prompt or a huge one.

    Instructions count whole, because many conversations share them; of what comes after them, the first
    message does, and of that its beginning. So a conversation stays where it began, however long it gets.

    Args:
        body: Of a request of any of the APIs.
    """
    if len(body) > MAX_READ_BYTES:
        return None
    try:
        return _beginning(json.loads(body))
    except (ValueError, RecursionError):
        return None


def _beginning(fields: Any) -> bytes | None:
    if not isinstance(fields, dict):
        return None
    prompt = next((fields[name] for name in ("messages", "input", "prompt") if fields.get(name)), None)
    if prompt is None:
        return None
    parts = [_text(fields.get(name)) for name in ("cache_salt", "system", "instructions")]
    if isinstance(prompt, list) and isinstance(prompt[0], dict):
        num_instructions = 0
        while num_instructions < len(prompt) - 1 and _is_instruction(prompt[num_instructions]):
            num_instructions += 1
        parts += map(_text, prompt[:num_instructions])
        prompt = _text(prompt[num_instructions])
    elif isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
        prompt = prompt[0]  # several prompts, which travel together
    if isinstance(prompt, (str, list)):
        prompt = prompt[:BEGINNING_LENGTH]
    return "\0".join([*parts, _text(prompt)]).encode(errors="replace")


def _is_instruction(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in INSTRUCTION_ROLES


def _text(value: Any) -> str:
    """Return the text of a message, or of whatever is there, without what changes from request to request."""
    if isinstance(value, str):
        return BILLING_HEADER.sub("", value)
    if isinstance(value, list):
        return "\n".join(map(_text, value))
    if isinstance(value, dict):
        return _text(value.get("content") or value.get("text"))
    return "" if value is None else str(value)


def order_replicas(beginning: bytes, loads: Mapping[str, int]) -> list[str]:
    """Return all replicas, the one that should get a prompt first.

    The order is rendezvous hashing's: all who ask agree without talking to each other, and when a replica
    comes or goes only its own prompts move. Replicas with more than their share of requests come last, so a
    beginning that all prompts have in common spreads over as many replicas as the requests need (consistent
    hashing with bounded loads, arXiv 1608.01350).

    Args:
        beginning: What ``prompt_beginning`` returned.
        loads: How many requests each replica is working on.
    """
    most = max(FEW_REQUESTS, MOST_LOAD * (sum(loads.values()) + 1) / len(loads))

    def rank(name: str) -> tuple[bool, bytes]:
        digest = hashlib.blake2b(beginning, digest_size=16, key=hashlib.sha256(name.encode()).digest())
        return loads[name] >= most, digest.digest()

    return sorted(loads, key=rank)
