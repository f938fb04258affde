"""Text comes out in whole characters and without stop strings, however it is cut into tokens."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from turboquant_server.engine.detokenizer import MAX_HELD_TOKENS, Detokenizer


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, in GPT-2's alphabet, and a special token 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }
    tokenizer = Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build_sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with Llama 2's decoder: U+2581 before words, byte tokens for the rest."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    vocab |= {word: 257 + i for i, word in enumerate(["▁Hello", "▁world", "!", "▁"])}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES = build_byte_tokenizer()
SENTENCEPIECE = build_sentencepiece_tokenizer()
END = 256


def pieces_of(
    token_ids: list[int],
    stop: tuple[str, ...] = (),
    prompt: list[int] | None = None,
    tokenizer: PreTrainedTokenizerFast = BYTES,
) -> list[str]:
    """Feed tokens as the engine does: until a stop string is found, then flush."""
    detokenizer = Detokenizer(tokenizer, prompt or [], stop)
    pieces = []
    for token_id in token_ids:
        pieces.append(detokenizer.append(token_id))
        if detokenizer.stopped:
            break
    return [*pieces, detokenizer.flush()]


def cut_at_stop(text: str, stop: tuple[str, ...]) -> str:
    """Read character by character; when a stop string is complete, cut where the first one begins."""
    for end in range(len(text) + 1):
        starts = [start for word in stop if (start := text[:end].find(word)) >= 0]
        if starts:
            return text[: min(starts)]
    return text


def test_each_character_comes_out_when_its_last_byte_does() -> None:
    assert pieces_of(list("aé€😀z".encode())) == ["a", "", "é", "", "", "€", "", "", "", "😀", "z", ""]


def test_characters_joined_from_several_code_points_come_out_code_point_by_code_point() -> None:
    family = "👩‍👩‍👧"
    assert [piece for piece in pieces_of(list(family.encode())) if piece] == list(family)


@pytest.mark.parametrize("text", ["é", "€", "😀"])
def test_an_unfinished_character_at_the_end_is_left_out(text: str) -> None:
    encoded = text.encode()
    for length in range(1, len(encoded)):
        assert "".join(pieces_of([*b"ab", *encoded[:length]])) == "ab"


def test_bytes_that_are_no_text_become_replacement_characters_as_in_a_plain_decode() -> None:
    assert "".join(pieces_of([*b"a\xff\x80b"])) == "a\ufffd\ufffdb" == BYTES.decode([*b"a\xff\x80b"])


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=40))
def test_pieces_of_any_bytes_add_up_to_the_plain_decode_without_its_unfinished_end(data: bytes) -> None:
    assert "".join(pieces_of(list(data))) == data.decode(errors="replace").rstrip("\ufffd")


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30))
def test_pieces_of_any_text_are_exactly_that_text(text: str) -> None:
    pieces = pieces_of(list(text.encode()))
    assert "".join(pieces) == text.rstrip("\ufffd")
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None, max_examples=25)
@given(st.text(st.sampled_from("The accs od😀é€ \n"), max_size=60))
def test_a_merging_tokenizer_gives_back_its_text(tiny_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    token_ids = tiny_tokenizer.encode(text)
    assert "".join(pieces_of(token_ids, tokenizer=tiny_tokenizer)) == text


@settings(deadline=None, max_examples=200)
@given(
    text=st.text(st.sampled_from("abé"), max_size=24),
    stop=st.lists(st.text(st.sampled_from("abé"), min_size=1, max_size=4), max_size=4).map(tuple),
)
def test_stop_strings_cut_where_a_plain_search_finds_them(text: str, stop: tuple[str, ...]) -> None:
    assert "".join(pieces_of(list(text.encode()), stop)) == cut_at_stop(text, stop)


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(st.sampled_from("The acode1 "), max_size=40),
    stop=st.lists(st.text(st.sampled_from("The acode1 "), min_size=1, max_size=6), max_size=3).map(tuple),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_cut_into_tokens(
    tiny_tokenizer: PreTrainedTokenizerFast, text: str, stop: tuple[str, ...]
) -> None:
    token_ids = tiny_tokenizer.encode(text)
    assert "".join(pieces_of(token_ids, stop, tokenizer=tiny_tokenizer)) == cut_at_stop(text, stop)


def test_text_that_may_become_a_stop_string_waits_and_comes_out_when_it_does_not() -> None:
    assert pieces_of(list(b"aENxEND"), stop=("END",)) == ["a", "", "", "ENx", "", "", "", ""]


def test_what_waited_for_a_stop_string_comes_out_at_the_end() -> None:
    assert pieces_of(list(b"aEN"), stop=("END",)) == ["a", "", "", "EN"]


def test_a_stop_string_may_hold_characters_of_several_bytes() -> None:
    assert "".join(pieces_of(list("ab😀cd😀é".encode()), stop=("😀é",))) == "ab😀cd"


def test_a_stop_string_that_only_the_end_reveals_stops_too() -> None:
    # One token that ends inside a character holds back the whole token's text.
    tokenizer = build_byte_tokenizer()
    tokenizer.add_tokens(["END\ufffd"])
    detokenizer = Detokenizer(tokenizer, [], ("END",))
    assert detokenizer.append(257) == ""
    assert detokenizer.flush() == ""
    assert detokenizer.stopped


def test_special_tokens_and_unknown_ids_have_no_text() -> None:
    assert pieces_of([END, *b"a", END, 5000, *b"b"]) == ["", "a", "", "", "b", ""]


def test_a_special_token_inside_a_character_does_not_tear_it() -> None:
    assert "".join(pieces_of([0xC3, END, 0xA9])) == "é"


def test_the_space_of_the_first_word_stays_after_a_prompt() -> None:
    hello, world = 257, 258
    assert pieces_of([world], prompt=[hello], tokenizer=SENTENCEPIECE) == [" world", ""]
    assert "".join(pieces_of([hello, world, world], tokenizer=SENTENCEPIECE)) == "Hello world world"


def test_byte_tokens_of_a_sentencepiece_vocabulary_join_to_characters() -> None:
    token_ids = [257, *(1 + byte for byte in "é😀".encode()), 258]
    assert [piece for piece in pieces_of(token_ids, tokenizer=SENTENCEPIECE) if piece] == [
        "Hello",
        "é",
        "😀",
        " world",
    ]


@pytest.mark.parametrize("name", ["decode", "_decode"])
def test_a_tokenizer_that_decodes_in_a_way_of_its_own_is_asked(name: str) -> None:
    def decode_loudly(self: PreTrainedTokenizerFast, token_ids: list[int], **options: Any) -> str:
        return str(getattr(PreTrainedTokenizerFast, name)(self, token_ids, **options)).upper()

    loud = type("Loud", (PreTrainedTokenizerFast,), {name: decode_loudly})
    tokenizer = loud(tokenizer_object=BYTES.backend_tokenizer)
    assert "".join(pieces_of(list(b"quiet"), tokenizer=tokenizer)) == "QUIET"


@pytest.mark.parametrize("token_id", [0x80, END])
def test_a_long_run_of_tokens_without_text_does_not_slow_down(token_id: int) -> None:
    decoded_lengths: list[int] = []

    class CountingTokenizer:
        def decode(self, token_ids: list[int], **options: bool) -> str:
            decoded_lengths.append(len(token_ids))
            return str(BYTES.decode(token_ids, **options))

    detokenizer = Detokenizer(CountingTokenizer(), [])  # type: ignore[arg-type]
    for _ in range(5 * MAX_HELD_TOKENS):
        detokenizer.append(token_id)
    assert max(decoded_lengths) <= 2 * MAX_HELD_TOKENS


@pytest.mark.parametrize("min_tokens", [0, 1, 3, 5, 9])
def test_the_text_of_the_first_min_tokens_has_no_stop_string_in_it(
    tiny_tokenizer: PreTrainedTokenizerFast, min_tokens: int
) -> None:
    token_ids = [tiny_tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "abcabcab"]
    for include_stop in (False, True):
        detokenizer = Detokenizer(
            tiny_tokenizer, [], ("ca", "zz"), include_stop=include_stop, min_tokens=min_tokens
        )
        text = "".join(detokenizer.append(token_id) for token_id in token_ids) + detokenizer.flush()
        start = "abcabcab".find("ca", min_tokens)
        assert detokenizer.stopped is (start >= 0)
        assert text == ("abcabcab" if start < 0 else "abcabcab"[: start + 2 * include_stop])
