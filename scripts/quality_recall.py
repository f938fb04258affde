"""How well a model finds through a cache what stands in its context: planted codes and long lists.

Answers are fed as if the model had given them. Greedy decoding gives an answer back exactly if and only if
each of its tokens is the most likely one after those before, so one pass yields exact match and probability.
Knows neither which caches these are nor how results are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from quality_reader import CacheReader
from recall_prompts import RecallPrompt, has_chat_tokens, list_prompts, planted_prompt
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORTEST_NEEDLE = 1024
MOST_KEYS, TOKENS_PER_KEY = 16, 128  # asked for in a list; fewer where 16 would take much of the context

Cell = TypeVar("Cell")


class RecallTest:
    """Prompts in cells, whose answers are counted by cell.

    Args:
        cells: The prompts of each cell.
        batch: Prompts at once.
        device: Of the model.

    Attributes:
        num_fed: Tokens that a measurement feeds.
    """

    def __init__(
        self, cells: Mapping[Cell, Sequence[RecallPrompt]], batch: int, device: torch.device
    ) -> None:
        self._cells, self._device = list(cells), device
        groups: dict[int, list[tuple[Cell, RecallPrompt]]] = {}
        for cell, prompts in cells.items():
            for prompt in prompts:
                groups.setdefault(prompt.start, []).append((cell, prompt))
        self._batches = [
            group[i : i + batch] for group in groups.values() for i in range(0, len(group), batch)
        ]
        self.num_fed = sum(self._joined(batch).numel() - len(batch) for batch in self._batches)

    def measure(self, reader: CacheReader, open_cache: Callable[[], Cache]) -> dict[Cell, dict[str, Any]]:
        """Returns by cell the number of answers, the share that is exact, and their mean log-probability."""
        found: dict[Cell, list[tuple[bool, float]]] = {cell: [] for cell in self._cells}
        for batch in self._batches:
            start = batch[0][1].start
            log_probs, is_top = _score(reader, open_cache(), self._joined(batch), start)
            for row, (cell, prompt) in enumerate(batch):
                for answer in prompt.answers:
                    place = slice(answer.start - start, answer.stop - start)
                    exact, log_prob = is_top[row, place].all(), log_probs[row, place].sum()
                    found[cell].append((exact.item(), log_prob.item()))
        return {
            cell: {
                "answers": len(answers),
                "exact": float(np.mean([exact for exact, _ in answers])),
                "log_prob": float(np.mean([log_prob for _, log_prob in answers])),
            }
            for cell, answers in found.items()
        }

    def _joined(self, batch: Sequence[tuple[Cell, RecallPrompt]]) -> Tensor:
        """Returns ``[batch, num_tokens]``, zeros behind shorter prompts, where no answer sees them."""
        rows = [torch.tensor(prompt.tokens, device=self._device) for _, prompt in batch]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.inference_mode()
def _score(reader: CacheReader, cache: Cache, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Returns each token's log-probability and whether it is the most likely, from token `start` on."""
    reader.read(cache, ids[:, : start - 1])
    targets = ids[:, start:, None]
    log_probs, is_top, done = [], [], 0
    for logits in reader.predict(cache, ids[:, start - 1 : -1]):
        chunk = targets[:, done : done + logits.shape[1]]
        log_probs.append(logits.double().log_softmax(-1).gather(-1, chunk)[..., 0])
        is_top.append(logits.argmax(-1) == chunk[..., 0])
        done += logits.shape[1]
    return torch.cat(log_probs, dim=1).cpu(), torch.cat(is_top, dim=1).cpu()


def needle_lengths(context: int) -> list[int]:
    """Returns 1024, 2048, 4096 and so on up to the context, and the context."""
    lengths = []
    while SHORTEST_NEEDLE * 2 ** len(lengths) < context:
        lengths.append(SHORTEST_NEEDLE * 2 ** len(lengths))
    return [*lengths, context]


def needle_cells(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[int], context: int, samples: int, prefix: Sequence[int]
) -> dict[tuple[int, float], list[RecallPrompt]]:
    """Returns `samples` prompts of each length and depth, every second a chat if the model knows chats."""
    has_chats = has_chat_tokens(tokenizer)
    cells: dict[tuple[int, float], list[RecallPrompt]] = {}
    for length in needle_lengths(context):
        rng = np.random.default_rng([length, 1])
        for row, depth in enumerate(DEPTHS):
            for i in range(samples):
                start = int(rng.integers(len(text) - length + 1))
                chat = has_chats and (row + i) % 2 == 0
                haystack = text[start : start + length]
                prompt = planted_prompt(rng, tokenizer, haystack, length, depth, chat, prefix)
                cells.setdefault((length, depth), []).append(prompt)
    return cells


def list_cells(
    tokenizer: PreTrainedTokenizerBase, text: Sequence[int], context: int, samples: int, prefix: Sequence[int]
) -> dict[int, list[RecallPrompt]]:
    """Returns `samples` lists that fill the context, with keys asked for; their one cell is the context."""
    num_keys = min(MOST_KEYS, max(1, context // TOKENS_PER_KEY))
    rng = np.random.default_rng([context, 2])
    return {context: list_prompts(rng, tokenizer, text, context, num_keys, samples, prefix)}
