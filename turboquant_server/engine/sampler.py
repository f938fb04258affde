"""Logits to tokens, on the logits' device and without waiting for it. Knows no request and no model.

The random choice is the Gumbel-max rule: adding independent Gumbel noise to log-probabilities and taking the
largest is a draw from the distribution. The noise is a pure function of (seed, choice index, position,
vocabulary index) by integer arithmetic that is the same on every device. Rows never meet, and what is summed
along a row is integers, in which the order does not matter; so a row gets its token, to the bit, whatever
rows are beside it. All else is done in float64, so that neither rare tokens nor tiny temperatures are
distorted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from turboquant_core import upload
from turboquant_server.engine.logit_adjustments import adjust_logits
from turboquant_server.engine.sampling_params import SamplingParams

# What the sampler returns in place of a token when the logits hold NaN or infinity.
INVALID_TOKEN_ID = -1

# Bounds what drawing takes from the cache's memory: a float64 tensor of so many elements is 64 MiB, and
# sorting and noise hold up to nine at a time. So many already fill a large GPU; more at once is no faster.
_MAX_ELEMENTS_AT_ONCE = 1 << 23

# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_FINAL_SHIFT = 31
_MASK_64 = (1 << 64) - 1


class SamplingRow(NamedTuple):
    """Hold what decides the token of one row of logits.

    Attributes:
        sampling_params: What `adjust_logits` does, then temperature, min_p, top_k and top_p, applied in this
            order. Of equally likely tokens the one with the lower id counts as the likelier, as in argmax; so
            top_k keeps exactly k tokens.
        seed: Any integer.
        choice_index: Index among the answers to one prompt, which share its seed.
        position: Index in the sequence of the token to choose.
        slot: Whose tokens are counted there, for penalties.
        banned_token_ids: Tokens that may not come yet, if the parameters have min_tokens.
    """

    sampling_params: SamplingParams
    seed: int
    choice_index: int
    position: int
    slot: int = 0
    banned_token_ids: Collection[int] = ()

    @property
    def noise_key(self) -> int:
        """Where `gumbel_noise` starts: seed, choice index and position mixed in turn, as signed 64 bits."""
        return _signed(_splitmix64(_choice_key(self.seed, self.choice_index) ^ self.position))


def sample(logits: Tensor, rows: Sequence[SamplingRow], counts: Tensor | None = None) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits: ``[num_rows, vocab_size]``, any float dtype.
        rows: One for each row of the logits.
        counts: `TokenCounts.table`, if a row has penalties.

    Returns:
        The token ids, int64 ``[num_rows]``, on the logits' device; ``INVALID_TOKEN_ID`` where the row's
        logits hold NaN or plus infinity, or nothing but minus infinity.

    Raises:
        ValueError: There are more or fewer rows than logits.
    """
    if len(rows) != len(logits):
        raise ValueError(f"logits of {len(logits)} rows need as many sampling rows, got {len(rows)}")
    adjusted = [index for index, row in enumerate(rows) if row.sampling_params.adjusts_logits]
    if not adjusted:
        return _choose(logits, rows)
    plain = [index for index, row in enumerate(rows) if not row.sampling_params.adjusts_logits]
    token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    if plain:
        indices = upload(plain, torch.int64, logits.device)
        token_ids[indices] = _choose(logits[indices], [rows[index] for index in plain])
    num_at_once = max(1, _MAX_ELEMENTS_AT_ONCE // logits.shape[-1])
    for start in range(0, len(adjusted), num_at_once):
        part = adjusted[start : start + num_at_once]
        some = [rows[index] for index in part]
        indices = upload(part, torch.int64, logits.device)
        token_ids[indices] = _choose(adjust_logits(logits[indices], some, counts), some)
    return token_ids


def _choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Do what `sample` does, with logits that are not to be changed."""
    highest, token_ids = logits.max(dim=-1)
    drawn = [index for index, row in enumerate(rows) if row.sampling_params.temperature > 0]
    # Sorting is most of the work, so the rows that need none are kept apart.
    truncated = [index for index in drawn if _is_truncated(rows[index].sampling_params)]
    whole = [index for index in drawn if not _is_truncated(rows[index].sampling_params)]
    num_at_once = max(1, _MAX_ELEMENTS_AT_ONCE // logits.shape[-1])
    for group in (truncated, whole):
        for start in range(0, len(group), num_at_once):
            part = group[start : start + num_at_once]
            if len(part) == len(rows):
                token_ids = _draw(logits, highest, rows)
                continue
            indices = upload(part, torch.int64, logits.device)
            tokens = _draw(logits[indices], highest[indices], [rows[index] for index in part])
            token_ids.index_copy_(0, indices, tokens)
    # In fewer launches than isfinite.
    return torch.where(highest.abs() < torch.inf, token_ids, INVALID_TOKEN_ID)


def _is_truncated(sampling_params: SamplingParams) -> bool:
    return sampling_params.top_k > 0 or sampling_params.top_p < 1


def _draw(logits: Tensor, highest: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Draw from rows of which either all or none are truncated."""
    temperatures = upload([row.sampling_params.temperature for row in rows], torch.float64, logits.device)
    keys = upload([row.noise_key for row in rows], torch.int64, logits.device)
    # The highest becomes 0 first, so that no temperature, however small, makes infinities or NaN.
    scores = (logits.double() - highest[:, None]).div_(temperatures[:, None])
    if any(row.sampling_params.min_p > 0 for row in rows):
        # A share of the highest probability is a distance from the highest score.
        lowest = [_log(row.sampling_params.min_p) for row in rows]
        scores.masked_fill_(scores < upload(lowest, torch.float64, logits.device)[:, None], -torch.inf)
    noise = gumbel_noise(keys, logits.shape[-1])
    if not _is_truncated(rows[0].sampling_params):
        return noise.add_(scores).argmax(dim=-1)
    scores, token_ids = keep_most_likely(scores, [row.sampling_params for row in rows])
    places = scores.add_(noise.gather(1, token_ids)).argmax(dim=-1, keepdim=True)
    return token_ids.gather(1, places)[:, 0]


def keep_most_likely(scores: Tensor, sampling_params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Sort rows of scores downwards and set those that top_k and top_p remove to minus infinity.

    Args:
        scores: ``[num_rows, vocab_size]``, float64, the highest of each row 0.
        sampling_params: One for each row.

    Returns:
        The sorted scores and the token id of each.
    """
    vocab_size = scores.shape[-1]
    top_k = [min(params.top_k or vocab_size, vocab_size) for params in sampling_params]
    # No probability reaches infinity: a top_p of 1 keeps also the tokens whose weight rounds to 0.
    top_p = [params.top_p if params.top_p < 1 else torch.inf for params in sampling_params]
    scores, token_ids = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(vocab_size, device=scores.device)
    scores.masked_fill_(ranks >= upload(top_k, torch.int64, scores.device)[:, None], -torch.inf)
    # Devices add floats in an order that depends on the number of rows, and on chance. Integers have no such
    # order; with this scale the sum of a row stays below 2**62, and 128k tokens are weighed to 2**-45.
    weights = (scores.exp() * 2.0 ** (62 - vocab_size.bit_length())).round_().long()
    reached = weights.cumsum(dim=-1)
    # A token stays while the likelier ones do not reach top_p; the first always does.
    enough = reached[:, -1:] * upload(top_p, torch.float64, scores.device)[:, None]
    return scores.masked_fill_(reached.sub_(weights) >= enough, -torch.inf), token_ids


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Return standard Gumbel noise that depends on nothing but the key and the vocabulary index.

    Token i of a row gets output i of the SplitMix64 generator that starts in the state
    ``mix(mix(mix(seed) ^ choice_index) ^ position)``, where mix(state) is the generator's output 0.

    Args:
        keys: ``[num_rows]``, int64, the `SamplingRow.noise_key` of each row.
        vocab_size: Number of tokens.

    Returns:
        Float64 ``[num_rows, vocab_size]``.
    """
    bits = torch.arange(1, vocab_size + 1, device=keys.device) * _signed(_INCREMENT) + keys[:, None]
    for shift, multiplier in _MULTIPLIERS:
        bits.bitwise_xor_(_logical_shift(bits, shift)).mul_(_signed(multiplier))
    bits.bitwise_xor_(_logical_shift(bits, _FINAL_SHIFT))
    # 52 bits and the half are exact in float64, and the half keeps the uniform number off 0 and 1.
    uniform = _logical_shift(bits, 64 - 52).double().add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


@lru_cache(maxsize=4096)
def _choice_key(seed: int, choice_index: int) -> int:
    return _splitmix64(_splitmix64(seed & _MASK_64) ^ choice_index)


def _splitmix64(state: int) -> int:
    bits = (state + _INCREMENT) & _MASK_64
    for shift, multiplier in _MULTIPLIERS:
        bits = ((bits ^ (bits >> shift)) * multiplier) & _MASK_64
    return bits ^ (bits >> _FINAL_SHIFT)


def _logical_shift(bits: Tensor, shift: int) -> Tensor:
    """Shift int64 to the right and fill with zeros; torch's own shift copies the sign."""
    return (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """Read 64 bits as the signed integer that torch takes."""
    return value - (1 << 64) if value >= 1 << 63 else value
