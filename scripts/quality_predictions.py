"""How predictions through a cache differ from those of a reference: perplexity, divergence, agreement.

Text goes in by chunks of 64 tokens, so every prediction attends to a past that has gone through the cache; a
one-shot prefill would never see the compression. Knows neither which caches these are nor how to show them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from quality_reader import CHUNK, FIRST_CHUNK, CacheReader
from torch import Tensor
from transformers import Cache

EXACT_BITS = 16.0


class Predictions:
    """Collects how one setting predicts the second half of each window.

    Attributes:
        bits: Bits per value of the cache at the end of a window: (compressed part, everything).
    """

    def __init__(self) -> None:
        self.bits = (EXACT_BITS, EXACT_BITS)
        self._parts: list[Tensor] = []

    @torch.inference_mode()
    def add(
        self,
        reader: CacheReader,
        open_cache: Callable[[], Cache],
        windows: Tensor,
        reference: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """Measures ``[batch, context]`` tokens against the logits of the reference; None: this is it.

        Returns the logits, a tensor a chunk. Those of a reference have to be kept for the others: for the 13
        windows of the demo text 13 x 4,096 predictions x 4,096 tokens x 4 bytes = 0.9 GB, for one window and
        a vocabulary of 150,000 2.5 GB. So they are kept for one batch, as they came from the model.
        """
        first = windows.shape[1] // 2
        cache, kept, parts = open_cache(), [], []
        reader.read(cache, windows[:, :FIRST_CHUNK])
        for i, chunk_logits in enumerate(reader.predict(cache, windows[:, FIRST_CHUNK:])):
            start = FIRST_CHUNK + i * CHUNK
            logits = chunk_logits[:, max(0, first - start) :]
            targets = windows[:, max(start, first) + 1 : start + CHUNK + 1]
            if targets.shape[1] == 0:
                continue
            logits = logits[:, : targets.shape[1]]
            base = logits if reference is None else reference[len(parts)]
            parts.append(_compare(base, logits, targets))
            if reference is None:
                kept.append(logits)
        self._parts.append(torch.cat(parts, dim=1).cpu())
        self.bits = bits_per_value(cache, reader.model.dtype)
        return kept

    def summary(self) -> dict[str, float | None]:
        losses, divergences, agreements = torch.cat(self._parts).unbind(-1)
        # Tokens of one window have much in common, windows little: the spread of their means is what counts.
        windows = divergences.mean(1)
        spread = windows.std().item() / math.sqrt(len(windows)) if len(windows) > 1 else None
        return {
            "predictions": losses.numel(),
            "perplexity": losses.mean().exp().item(),
            "kld_mean": divergences.mean().item(),
            "kld_standard_error": spread,
            # torch.quantile takes 16 million numbers at most
            "kld_p99": float(np.quantile(divergences.numpy(), 0.99)),
            "top1_agreement": agreements.mean().item(),
            "bits_per_value": self.bits[0],
            "bits_with_exact_tokens": self.bits[1],
        }


def _compare(base: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Returns of each prediction the loss, the KL divergence of `logits` to `base`, and whether both agree.

    In float64: float32 rounds each log-probability by up to 1e-6, 8 bits diverge by a few 1e-6.

    Args:
        base, logits: ``[batch, num_tokens, vocabulary]``.
        targets: ``[batch, num_tokens]``.

    Returns:
        ``[batch, num_tokens, 3]`` float64.
    """
    expected, log_probs = base.double().log_softmax(-1), logits.double().log_softmax(-1)
    losses = -log_probs.gather(-1, targets[..., None])[..., 0]
    divergences = (expected.exp() * (expected - log_probs)).sum(-1)
    return torch.stack([losses, divergences, (base.argmax(-1) == logits.argmax(-1)).double()], dim=-1)


def bits_per_value(cache: Cache, dtype: torch.dtype) -> tuple[float, float]:
    """Returns a cache's bits per number: those of the compressed part alone, and with its exact tokens.

    A cache without `memory_footprint` may say so in an attribute `bits_per_value`; else it is bf16. Exact
    tokens count as bf16, whatever the `dtype` of the model.
    """
    if not hasattr(cache, "memory_footprint"):
        bits = getattr(cache, "bits_per_value", EXACT_BITS)
        return bits, bits
    footprint = cache.memory_footprint()
    exact_bits = EXACT_BITS * footprint.exact_bytes / dtype.itemsize
    total_bits = 8 * footprint.compressed_bytes + exact_bits
    return footprint.bits_per_compressed_value, total_bits / footprint.num_values


class Continuations:
    """Greedy continuations: how many tokens of a setting's are the reference's before the first that is not.

    Args:
        prompts: ``[num_prompts, num_tokens]``.
        num_tokens: Length of a continuation.
        batch: Prompts at once.
    """

    def __init__(self, prompts: Tensor, num_tokens: int, batch: int) -> None:
        self._batches, self._num_tokens = prompts.split(batch), num_tokens
        self._expected: list[Tensor] = []  # of each batch, [batch, num_tokens]
        self.num_fed = prompts.numel() + len(prompts) * (num_tokens - 1)

    @torch.inference_mode()
    def measure(self, reader: CacheReader, open_cache: Callable[[], Cache]) -> dict[str, float]:
        """Measures one setting; the first is the reference."""
        if not self._expected:
            self._expected = [self._continue(reader, open_cache(), prompts) for prompts in self._batches]
            lengths = torch.cat(
                [torch.full_like(tokens[:, 0], self._num_tokens) for tokens in self._expected]
            )
        else:
            pairs = zip(self._batches, self._expected, strict=True)
            lengths = torch.cat([self._agreement(reader, open_cache(), *pair) for pair in pairs])
        return {
            "prompts": len(lengths),
            "tokens": self._num_tokens,
            "mean_agreement": lengths.double().mean().item(),
            "share_to_the_end": (lengths == self._num_tokens).double().mean().item(),
        }

    def _continue(self, reader: CacheReader, cache: Cache, prompts: Tensor) -> Tensor:
        reader.read(cache, prompts[:, :-1])
        tokens = [prompts[:, -1:]]
        for _ in range(self._num_tokens):
            [logits] = reader.predict(cache, tokens[-1])
            tokens.append(logits.argmax(-1))
        return torch.cat(tokens[1:], dim=1)

    def _agreement(self, reader: CacheReader, cache: Cache, prompts: Tensor, expected: Tensor) -> Tensor:
        """Returns each row's number of agreeing tokens; up to there both have continued in the same way."""
        reader.read(cache, prompts[:, :-1])
        tokens = torch.cat([prompts[:, -1:], expected], dim=1)
        agrees = torch.ones_like(prompts[:, :1], dtype=torch.bool)
        lengths = torch.zeros_like(prompts[:, 0])
        for i in range(self._num_tokens):
            [logits] = reader.predict(cache, tokens[:, i : i + 1])
            agrees &= logits.argmax(-1) == tokens[:, i + 1 : i + 2]
            lengths += agrees[:, 0]
            if not agrees.any():
                reader.bar.update((self._num_tokens - 1 - i) * len(prompts))
                break
        return lengths
