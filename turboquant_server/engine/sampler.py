"""Logits to one token, on the logits' device. Knows no request and no model.

The random choice is the Gumbel-max rule: adding independent Gumbel noise to log-probabilities and taking the
largest is a draw from the distribution. The noise is a pure function of (seed, position, vocabulary index) by
integer arithmetic that is the same on every device, so a seeded request gets its tokens whatever runs beside
it. All is done in float64, so that neither rare tokens nor tiny temperatures are distorted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turboquant_server.engine.sampling_params import SamplingParams

# What the sampler returns in place of a token when the logits hold NaN or infinity.
INVALID_TOKEN_ID = -1

# SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_FINAL_SHIFT = 31
_MASK_64 = (1 << 64) - 1


def sample(logits: Tensor, sampling_params: SamplingParams, seed: int, position: int) -> Tensor:
    """Choose the next token.

    Args:
        logits: ``[vocab_size]``, any float dtype.
        sampling_params: temperature, top_k and top_p, applied in this order. Of equally likely tokens the
            one with the lower id counts as the likelier, as in argmax; so top_k keeps exactly k tokens.
        seed: Any integer.
        position: Index in the sequence of the token to choose.

    Returns:
        The token id, int64 without dimensions, on the logits' device; ``INVALID_TOKEN_ID`` where the logits
        hold NaN or plus infinity, or nothing but minus infinity.
    """
    highest = logits.max()
    if sampling_params.temperature == 0:
        token_id = logits.argmax()
    else:
        # The highest becomes 0 first, so that no temperature, however small, makes infinities or NaN.
        scores = (logits.double() - highest) / sampling_params.temperature
        noise = gumbel_noise(logits.shape[-1], seed, position, logits.device)
        if sampling_params.top_k or sampling_params.top_p < 1:
            scores, token_ids = keep_most_likely(scores, sampling_params.top_k, sampling_params.top_p)
            token_id = token_ids[(scores + noise[token_ids]).argmax()]
        else:
            token_id = (scores + noise).argmax()
    return torch.where(highest.isfinite(), token_id, INVALID_TOKEN_ID)


def keep_most_likely(scores: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Sort ``[vocab_size]`` scores downwards and set those that top_k and top_p remove to minus infinity.

    Returns:
        The sorted scores and the token id of each.
    """
    scores, token_ids = scores.sort(descending=True, stable=True)
    if top_k:
        scores[top_k:] = -torch.inf
    if top_p < 1:
        probabilities = scores.softmax(dim=-1)
        # A token stays while the likelier ones do not reach top_p; the first always does.
        reached_before = probabilities.cumsum(dim=-1).roll(1)
        reached_before[0] = 0
        scores[reached_before >= top_p] = -torch.inf
    return scores, token_ids


def gumbel_noise(vocab_size: int, seed: int, position: int, device: torch.device) -> Tensor:
    """Return standard Gumbel noise, float64 ``[vocab_size]``, that depends on nothing but the arguments."""
    key = _splitmix64(_splitmix64(seed & _MASK_64) ^ position)
    bits = torch.arange(1, vocab_size + 1, device=device) * _signed(_INCREMENT) + _signed(key)
    for shift, multiplier in _MULTIPLIERS:
        bits = (bits ^ _logical_shift(bits, shift)) * _signed(multiplier)
    bits = bits ^ _logical_shift(bits, _FINAL_SHIFT)
    # 52 bits and the half are exact in float64, and the half keeps the uniform number off 0 and 1.
    uniform = (_logical_shift(bits, 64 - 52).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))


def _splitmix64(state: int) -> int:
    bits = (state + _INCREMENT) & _MASK_64
    for shift, multiplier in _MULTIPLIERS:
        bits = ((bits ^ (bits >> shift)) * multiplier) & _MASK_64
    return bits ^ (bits >> _FINAL_SHIFT)


def _logical_shift(bits: Tensor, shift: int) -> Tensor:
    """Shift int64 to the right and fill with zeros; torch's own shift copies the sign."""
    return (bits >> shift) & ((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    """Read 64 bits as the signed integer that torch takes."""
    return value - (1 << 64) if value >= 1 << 63 else value
