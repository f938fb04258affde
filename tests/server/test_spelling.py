"""The bytes of single tokens, joined, are the text that all of them make."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from turboquant_server.api.spelling import Spelling, spell_tokens

TEXT = "Das Maß, 天気 🌦️ naïve\n  two  spaces\t\x7f"


def joined(tokenizer: PreTrainedTokenizerFast, token_ids: list[int]) -> bytes:
    spellings = spell_tokens(tokenizer, set(token_ids))
    return b"".join(spellings[token_id].bytes for token_id in token_ids)


def test_bytes_of_byte_level_tokens_make_the_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = tiny_tokenizer.encode(TEXT, add_special_tokens=False)
    assert len(token_ids) > 20
    assert joined(tiny_tokenizer, token_ids) == TEXT.encode()


def test_bytes_of_tokens_with_byte_fallback_make_the_text() -> None:
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "\u2581a", "é"]
    model = BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=[("\u2581", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = Tokenizer(model)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    token_ids = [names.index(name) for name in ("b", "\u2581a", "é", "<0xF0>", "<0x9F>", "\u2581", "a")]
    assert joined(tokenizer, token_ids) == "b aé".encode() + b"\xf0\x9f a"


def test_special_tokens_are_told_apart_and_ids_without_a_token_have_no_bytes(
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    [start] = tiny_tokenizer.encode("<|im_start|>", add_special_tokens=False)
    spellings = spell_tokens(tiny_tokenizer, [start, 10**6])
    assert spellings == {start: Spelling(b"<|im_start|>", True), 10**6: Spelling(b"", False)}


@pytest.mark.parametrize(
    ("spelling", "text", "unique"),
    [(b" a", " a", " a"), ("é".encode(), "é", "é"), (b"\xf0\x9f", "\ufffd", r"bytes:\xf0\x9f")],
)
def test_a_part_of_a_character_has_a_text_of_its_own(spelling: bytes, text: str, unique: str) -> None:
    assert (Spelling(spelling, False).text, Spelling(spelling, False).unique_text) == (text, unique)
