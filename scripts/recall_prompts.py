"""Prompts that ask a model for what stands in its context: a planted code, or entries of a long list.

They are written with any Hugging Face tokenizer and know nothing of models; how they are scored is in
`quality_recall.py`. Chats are in ChatML. A numpy generator fixes a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from recall_tasks import TURN_END, TURN_START, made_up_word, number
from transformers import PreTrainedTokenizerBase

WORD_STARTS = ("Ġ", "▁")  # of byte-level and of SentencePiece tokenizers


@dataclass(frozen=True)
class RecallPrompt:
    """A prompt with its right answers.

    Attributes:
        tokens: Prompt and answers, as they follow each other.
        start: Number of tokens before the first that may be part of an answer.
        answers: Where each answer's tokens stand.
    """

    tokens: list[int]
    start: int
    answers: list[range]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Returns the tokens of a text, without those that a tokenizer puts around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def has_chat_tokens(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Returns whether a tokenizer has a token for each of ChatML's marks."""
    return all(len(encode(tokenizer, mark)) == 1 for mark in (TURN_START, TURN_END))


def split(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Returns the tokens of question and answer as they are in one text.

    Encoding the answer alone would put a second word mark in front of it with SentencePiece.
    """
    tokens = encode(tokenizer, question + answer)
    common = _num_common(encode(tokenizer, question), tokens)
    return tokens[:common], tokens[common:]


def planted_prompt(
    rng: Generator,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    num_tokens: int,
    depth: float,
    chat: bool,
    prefix: Sequence[int] = (),
) -> RecallPrompt:
    """Hides an access code of six digits in a text and asks for it.

    Args:
        text: Tokens of a haystack, at least `num_tokens` of them.
        num_tokens: Length of prompt and answer, exactly.
        depth: Where the fact stands, from 0 (start) to 1 (end).
        chat: In the chat format, else as plain text.
        prefix: Tokens that start every text.
    """
    name, code = made_up_word(rng).capitalize() + " " + made_up_word(rng).capitalize(), number(rng, 6)
    question = f"What is the access code of {name}?"
    if chat:
        head = encode(tokenizer, f"{TURN_START}user\n")
        tail = f"\n\n{question}{TURN_END}\n{TURN_START}assistant\n"
    else:
        head, tail = [], f"\n\nQuestion: {question}\nAnswer:"
    asking, answer = split(tokenizer, tail, code if chat else " " + code)
    fact = encode(tokenizer, f" The access code of {name} is {code}.")
    room = num_tokens - len(prefix) - len(head) - len(fact) - len(asking) - len(answer)
    if room < 0:
        raise ValueError(
            f"a planted code with its question takes {num_tokens - room} tokens, not {num_tokens}"
        )
    cut = round(depth * room)
    spellings = tokenizer.convert_ids_to_tokens(list(text[:room]))
    while 0 < cut < room and not spellings[cut].startswith(WORD_STARTS):
        cut += 1
    prompt = [*prefix, *head, *text[:cut], *fact, *text[cut:room], *asking]
    return RecallPrompt([*prompt, *answer], len(prompt), [range(len(prompt), num_tokens)])


def list_prompts(
    rng: Generator,
    tokenizer: PreTrainedTokenizerBase,
    text: Sequence[int],
    num_tokens: int,
    num_keys: int,
    num_prompts: int,
    prefix: Sequence[int] = (),
) -> list[RecallPrompt]:
    """Writes lists of made-up words with six digits each, then asks for some, spread evenly over the list.

    A list looks as one of those that `recall_tasks.py` makes, and a question with its answer as its entry.

    Args:
        text: Tokens that fill what no whole entry fits in, in front of the list.
        num_tokens: Most tokens of a prompt and its answers; all prompts have the same `start`.
    """
    all_entries = [_entries(rng, tokenizer, num_tokens) for _ in range(num_prompts)]
    longest = max(len(line) for entries in all_entries for line, _ in entries)
    blank_line = split(tokenizer, "0", "\n\n")[1]
    start = num_tokens - num_keys * longest
    prompts = []
    for entries in all_entries:
        room = start - len(prefix) - len(blank_line)
        sizes = np.cumsum([len(line) for line, _ in entries])
        num_entries = int(np.searchsorted(sizes, room, side="right"))
        if num_entries < num_keys:
            raise ValueError(
                f"a list of {num_keys} entries and questions does not fit in {num_tokens} tokens"
            )
        listing = [token for line, _ in entries[:num_entries] for token in line]
        last_line, last_number = entries[num_entries - 1]
        listing[last_number.stop - len(last_line) :] = blank_line
        tokens = [*prefix, *text[: start - len(prefix) - len(listing)], *listing]
        answers = []
        for i in rng.permutation(np.linspace(0, num_entries - 1, num_keys).astype(int)):
            line, place = entries[i]
            answers.append(range(len(tokens) + place.start, len(tokens) + place.stop))
            tokens += line
        prompts.append(RecallPrompt(tokens, start, answers))
    return prompts


def _entries(
    rng: Generator, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> list[tuple[list[int], range]]:
    """Returns entries of so many tokens in all: their tokens, and which of them are the number's."""
    numbers: dict[str, str] = {}
    entries: list[tuple[list[int], range]] = []
    size = 0
    while size < num_tokens:
        new = {made_up_word(rng): number(rng, 6) for _ in range(64)}  # one call encodes them all
        new = {key: value for key, value in new.items() if key not in numbers}
        numbers |= new
        texts = [text for k, v in new.items() for text in (f"{k}:", f"{k}: {v}", f"{k}: {v}\n")]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        for key, through_value, line in zip(*(iter(encoded),) * 3, strict=True):
            entries.append((line, range(_num_common(key, line), _num_common(through_value, line))))
            size += len(line)
    return entries


def _num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns how many tokens two sequences start with in common."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
