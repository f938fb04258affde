"""The bytes that each token stands for, before they make characters. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_FALLBACK = re.compile("<0x([0-9A-F]{2})>")
SENTENCEPIECE_SPACE = "\u2581"


class Spelling(NamedTuple):
    """What a token stands for.

    Attributes:
        bytes: Of its text in UTF-8, which may be a part of a character; none for one without a name.
        is_special: It is skipped in texts.
    """

    bytes: bytes
    is_special: bool

    @property
    def text(self) -> str:
        """The text, with replacement characters where it is no text by itself."""
        return self.bytes.decode(errors="replace")

    @property
    def unique_text(self) -> str:
        """The text or, where it is none by itself, what OpenAI's completions write for it."""
        try:
            return self.bytes.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)


def spell_tokens(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> dict[int, Spelling]:
    """Return the spellings of tokens."""
    ids = list(token_ids)
    added = tokenizer.added_tokens_decoder
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    rules = "" if decoder is None else decoder.__getstate__().decode()
    spellings = {}
    for token_id, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if token_id in added:
            spellings[token_id] = Spelling(added[token_id].content.encode(), added[token_id].special)
        else:
            spellings[token_id] = Spelling(_spell(tokenizer, token_id, name, rules), False)
    return spellings


def _spell(tokenizer: PreTrainedTokenizerBase, token_id: int, name: str | None, rules: str) -> bytes:
    """Undo by the rules of a tokenizer's decoder, for one token, how its names are written."""
    if name is None:
        return b""
    if '"ByteLevel"' in rules and all(character in _BYTES for character in name):
        return bytes(_BYTES[character] for character in name)
    if '"ByteFallback"' in rules and (byte := BYTE_FALLBACK.fullmatch(name)):
        return bytes.fromhex(byte[1])
    if SENTENCEPIECE_SPACE in rules:
        return name.replace(SENTENCEPIECE_SPACE, " ").encode()
    return str(tokenizer.decode([token_id], clean_up_tokenization_spaces=False)).encode()


def _byte_characters() -> dict[str, int]:
    """Return GPT-2's characters for bytes: printable ones stand for themselves, others follow 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_characters()
