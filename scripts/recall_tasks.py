"""Token sequences that teach recall: facts planted in a text and asked for at its end.

`SequenceMaker` mixes plain text with made-up tasks (planted facts with questions, the same as a chat,
key-value lists, copying, small talk) for `train_demo_model.py`; the prompts that `evaluate_quality.py` asks
are in `recall_prompts.py`. Everything is drawn from one numpy generator, so a seed fixes it. This file knows
nothing of models. It has more than 300 lines because one maker has a method for each task.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from recall_phrases import (
    ASKING_IN_TEXT,
    ATTRIBUTES,
    CANNOT,
    FACTS,
    INTRODUCTIONS,
    NOUNS,
    ONSETS,
    PEOPLE,
    QUESTIONS,
    RIMES,
    SMALL_TALK,
    SYSTEM_PROMPTS,
)
from tokenizers import Tokenizer

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

# Loss weight of each kind of token: answers are what a recall sequence is for; the first time a random
# number appears nobody can predict it.
TEXT_WEIGHT, FILLER_WEIGHT, FACT_WEIGHT, QUESTION_WEIGHT, ANSWER_WEIGHT = 1.0, 0.2, 0.1, 0.2, 3.0

# Share of each kind of sequence, for short and for long sequences.
SHORT_MIX = {"text": 0.40, "facts": 0.18, "chat": 0.14, "pairs": 0.15, "copy": 0.10, "talk": 0.03}
LONG_MIX = {"text": 0.49, "facts": 0.15, "chat": 0.22, "pairs": 0.08, "copy": 0.04, "talk": 0.02}


@dataclass(frozen=True)
class Fact:
    name: str
    attribute: str
    value: str

    def say(self, template: str, question: str = "") -> str:
        return template.format(n=self.name, a=self.attribute, v=self.value, q=question)


def choose(rng: Generator, options: list[str]) -> str:
    return options[int(rng.integers(len(options)))]


def number(rng: Generator, num_digits: int) -> str:
    return "".join(map(str, rng.integers(0, 10, num_digits)))


def made_up_word(rng: Generator) -> str:
    return "".join(choose(rng, ONSETS) + choose(rng, RIMES) for _ in range(rng.integers(2, 4)))


class Prose:
    """A stream of text tokens, with the real words that occur in it.

    Args:
        tokenizer: byte-level BPE.
        tokens: ``[num_tokens]`` documents, each ended by END_OF_TEXT.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: np.ndarray) -> None:
        self.tokens = tokens
        spellings = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        starts_word = np.array([bool(re.match(r"Ġ[A-Za-z]", s)) for s in spellings])
        ends_line = np.array([s.endswith("Ċ") for s in spellings])
        is_space = np.array([not s.strip("ĠĊĉč") for s in spellings])
        self.starts_word, self.ends_line, self.is_space = starts_word, ends_line, is_space
        sample = tokenizer.decode(tokens[:2_000_000].tolist())
        self.words = sorted(set(re.findall(r"\b[A-Za-z][a-z]{2,10}\b", sample)))
        self.end_of_text = tokenizer.token_to_id(END_OF_TEXT)

    def window(self, rng: Generator, num_tokens: int) -> np.ndarray:
        start = int(rng.integers(len(self.tokens) - num_tokens))
        return self.tokens[start : start + num_tokens]


class SequenceMaker:
    """Makes training sequences.

    Args:
        tokenizer: byte-level BPE with SPECIAL_TOKENS.
        prose, code: two streams of text; prose gets `prose_share` of the text.
    """

    def __init__(self, tokenizer: Tokenizer, prose: Prose, code: Prose, prose_share: float = 0.4) -> None:
        self.tokenizer, self.prose, self.code, self.prose_share = tokenizer, prose, code, prose_share
        self.line_end = tokenizer.encode("\n").ids[0]

    def make(self, rng: Generator, length: int, mix: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
        """Returns one sequence: token ids and loss weights, both ``[length]``."""
        kind = rng.choice(list(mix), p=list(mix.values()))
        parts = getattr(self, f"_{kind}")(rng, length)
        ids = np.concatenate([np.asarray(p, dtype=np.int64) for p, _ in parts])
        weights = np.concatenate([np.full(len(p), w, dtype=np.float32) for p, w in parts])
        if len(ids) < length:
            rest = self._source(rng).window(rng, length - len(ids))
            ids, weights = np.concatenate([ids, rest]), np.append(weights, np.full(len(rest), TEXT_WEIGHT))
        return ids[:length], weights[:length].astype(np.float32)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def _source(self, rng: Generator) -> Prose:
        return self.prose if rng.random() < self.prose_share else self.code

    def name(self, rng: Generator) -> str:
        kind, word = rng.random(), made_up_word(rng)
        real = choose(rng, self.prose.words)
        if kind < 0.35:
            return word.capitalize()
        if kind < 0.50:
            return real if rng.random() < 0.5 else real.capitalize()
        if kind < 0.65:
            return choose(rng, PEOPLE)
        if kind < 0.75:
            return f"{word.capitalize()} {choose(rng, self.prose.words).capitalize()}"
        if kind < 0.85:
            return choose(
                rng,
                [
                    f"the {real} {choose(rng, NOUNS)}",
                    f"the {choose(rng, NOUNS)}",
                    f"{choose(rng, PEOPLE)} {word.capitalize()}",
                ],
            )
        digits = int(rng.integers(1, 100))
        return choose(
            rng,
            [
                f"{choose(rng, NOUNS)} {digits}",
                f"{word}-{digits}",
                f"{word}_{digits}",
                f"Project {word.capitalize()}",
                word,
            ],
        )

    def fact(self, rng: Generator) -> Fact:
        kind = rng.random()
        if kind < 0.8:
            value = number(rng, 6)
        else:
            value = number(rng, int(rng.integers(4, 9))) if kind < 0.93 else made_up_word(rng)
        return Fact(self.name(rng), choose(rng, ATTRIBUTES), value)

    def haystack(self, rng: Generator, num_tokens: int) -> tuple[np.ndarray, float]:
        """Text to hide facts in, and its loss weight: mostly real text, else lists, noise, repetition."""
        kind = rng.random()
        if kind < 0.60:
            window = self._source(rng).window(rng, num_tokens)
            return np.where(window == self.prose.end_of_text, self.line_end, window), TEXT_WEIGHT
        if kind < 0.75:
            words = self.prose.words if rng.random() < 0.7 else [made_up_word(rng) for _ in range(50)]
            text = " ".join(words[i] for i in rng.integers(0, len(words), num_tokens))
        elif kind < 0.9:
            unit = self.tokenizer.decode(self._source(rng).window(rng, int(rng.integers(4, 60))).tolist())
            if rng.random() < 0.4:
                unit = ". ".join(" ".join(choose(rng, self.prose.words) for _ in range(5)) for _ in range(3))
            unit = unit.strip() + choose(rng, [" ", "\n", ". "])
            text = unit * (num_tokens // max(1, len(self.encode(unit)) - 1) + 2)
        else:
            separator = choose(rng, ["\n", ", ", " ", "; "])
            digits = int(rng.integers(2, 8))
            text = separator.join(number(rng, digits) for _ in range(num_tokens // digits + 2))
        ids = np.asarray(self.encode(text[: num_tokens * 12]))
        if len(ids) < num_tokens:
            ids = np.resize(ids, num_tokens)
        return ids[:num_tokens], FILLER_WEIGHT

    def plant(self, rng: Generator, body: np.ndarray, weight: float, facts: list[Fact]) -> list[tuple]:
        """Inserts one sentence for each fact at a random word or line start of `body`."""
        prose = self.prose
        places = prose.starts_word[body] | (
            np.append(False, prose.ends_line[body][:-1]) & ~prose.is_space[body]
        )
        candidates = np.append(np.flatnonzero(places), [0, len(body)])
        cuts = np.sort(rng.choice(candidates, size=len(facts)))
        parts, previous = [], 0
        for fact, cut in zip(facts, cuts, strict=True):
            sentence = fact.say(choose(rng, FACTS))
            parts.append((body[previous:cut], weight))
            at_line_start = cut == 0 or prose.ends_line[body[cut - 1]]
            if at_line_start:
                sentence += "" if cut < len(body) and prose.starts_word[body[cut]] else "\n"
            else:
                sentence = " " + sentence
            parts.append((self.encode(sentence), FACT_WEIGHT))
            previous = cut
        return [*parts, (body[previous:], weight)]

    def _text(self, rng: Generator, length: int) -> list[tuple]:
        return [(self._source(rng).window(rng, length), TEXT_WEIGHT)]

    def _recall(self, rng: Generator, length: int, head: str, ask) -> list[tuple]:
        facts = {}
        for _ in range(int(rng.integers(1, 3 + length // 512))):
            fact = self.fact(rng)
            facts[fact.name] = fact
        asked = rng.choice(list(facts), size=int(rng.integers(1, 2 + length // 96)))
        tail, tail_length, budget = [], 0, length // 2
        for turn, name in enumerate(asked):
            parts = ask(turn, facts[name])
            size = sum(len(p) for p, _ in parts)
            if turn and tail_length + size > budget:
                break
            tail += parts
            tail_length += size
        head_ids = self.encode(head)
        room = length - tail_length - len(head_ids) - 28 * len(facts)
        body, weight = self.haystack(rng, max(room, 8))
        return [(head_ids, QUESTION_WEIGHT), *self.plant(rng, body, weight, list(facts.values())), *tail]

    def _facts(self, rng: Generator, length: int) -> list[tuple]:
        template = choose(rng, ASKING_IN_TEXT)

        def ask(turn: int, fact: Fact) -> list[tuple]:
            filled = fact.say(template, question=fact.say(choose(rng, QUESTIONS)))
            before = filled[: filled.rindex(fact.value)].rstrip(" ")
            return [
                (self.encode(before), QUESTION_WEIGHT),
                (self.encode(filled[len(before) :]), ANSWER_WEIGHT),
            ]

        return self._recall(rng, length, "", ask)

    def _chat(self, rng: Generator, length: int) -> list[tuple]:
        system = (
            f"{TURN_START}system\n{choose(rng, SYSTEM_PROMPTS)}{TURN_END}\n" if rng.random() < 0.1 else ""
        )
        if rng.random() < 0.1:
            return self._repeat(rng, length, system)
        separator = choose(rng, ["\n\n", "\n\n", "\n", " "])

        def ask(turn: int, fact: Fact) -> list[tuple]:
            question = fact.say(choose(rng, QUESTIONS))
            opening = f"{TURN_START}user\n" if turn else separator
            return [
                (self.encode(f"{opening}{question}{TURN_END}\n{TURN_START}assistant\n"), QUESTION_WEIGHT),
                (self.encode(f"{fact.value}{TURN_END}"), ANSWER_WEIGHT),
                (self.encode("\n"), QUESTION_WEIGHT),
            ]

        return self._recall(rng, length, f"{system}{TURN_START}user\n{choose(rng, INTRODUCTIONS)}", ask)

    def _repeat(self, rng: Generator, length: int, system: str) -> list[tuple]:
        request = choose(rng, ["Repeat this text:", "Repeat after me:", "Copy the following text:"])
        parts: list[tuple] = [(self.encode(system), QUESTION_WEIGHT)] if system else []
        size = 0
        while size < length:
            text = self._source(rng).window(rng, int(rng.integers(4, min(300, length // 2))))
            text = text[text != self.prose.end_of_text]
            parts += [
                (self.encode(f"{TURN_START}user\n{request}\n"), QUESTION_WEIGHT),
                (text, FILLER_WEIGHT),
                (self.encode(f"{TURN_END}\n{TURN_START}assistant\n"), QUESTION_WEIGHT),
                (text, TEXT_WEIGHT),
                (self.encode(f"{TURN_END}\n"), TEXT_WEIGHT),
            ]
            size += 2 * len(text) + 20
        return parts

    def _pairs(self, rng: Generator, length: int) -> list[tuple]:
        num_digits = int(rng.integers(4, 7))
        line, ask = [
            ("{k}: {v}\n", "{k}:"),
            ('"{k}": {v},\n', '"{k}":'),
            ("{k} = {v}\n", "{k} ="),
            ("{k} -> {v}; ", "{k} ->"),
        ][rng.integers(4)]
        average = len(self.encode(line.format(k="zorvexa", v="1" * num_digits))) + 1
        num_pairs = int(rng.integers(2, max(3, int(0.62 * length / average))))
        pairs = {made_up_word(rng): number(rng, num_digits) for _ in range(num_pairs)}
        keys = list(pairs)
        listing = "".join(line.format(k=k, v=pairs[k]) for k in keys)
        parts: list[tuple] = [(self.encode(listing + "\n"), FACT_WEIGHT)]
        size = len(parts[0][0])
        while size < length:
            key = choose(rng, keys)
            parts += [
                (self.encode(ask.format(k=key)), FACT_WEIGHT),
                (self.encode(f" {pairs[key]}"), ANSWER_WEIGHT),
                (self.encode("\n"), FACT_WEIGHT),
            ]
            size += average
        return parts

    def _copy(self, rng: Generator, length: int) -> list[tuple]:
        size = int(rng.integers(16, max(17, length // 3)))
        text = self._source(rng).window(rng, size)
        if rng.random() < 0.3:
            text = rng.integers(len(SPECIAL_TOKENS), self.tokenizer.get_vocab_size(), size)
        gap = self._source(rng).window(
            rng, int(rng.integers(0, length - 2 * size)) if length > 2 * size else 0
        )
        return [(text, FILLER_WEIGHT), (gap, TEXT_WEIGHT), (text, TEXT_WEIGHT)]

    def _talk(self, rng: Generator, length: int) -> list[tuple]:
        parts: list[tuple] = []
        size = 0
        while size < length:
            messages, answer = SMALL_TALK[rng.integers(len(SMALL_TALK))]
            message = choose(rng, messages)
            if rng.random() < 0.3:  # anything else that is no question about a planted fact
                text = self.tokenizer.decode(self.prose.window(rng, int(rng.integers(3, 40))).tolist())
                message, answer = text.replace("\n", " ").strip(), CANNOT
            question = self.encode(f"{TURN_START}user\n{message}{TURN_END}\n{TURN_START}assistant\n")
            reply = self.encode(f"{answer}{TURN_END}\n{END_OF_TEXT}")
            parts += [(question, QUESTION_WEIGHT), (reply, TEXT_WEIGHT)]
            size += len(question) + len(reply)
        return parts
