"""Rotary embeddings that do not depend on what else is in a batch. Knows no cache and no request."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def freeze_rope(model: nn.Module, max_model_len: int) -> None:
    """Fix the frequencies of a model's rotary embeddings to those of its longest sequence.

    With the rope types ``longrope`` and ``dynamic``, transformers chooses them at each forward by the longest
    sequence in the batch: neighbours would change a request's answer, and a request that grows would read
    keys that were rotated by other frequencies. Where they do not change, the model is left as it is; so is
    one that has been frozen before.

    Args:
        model: Of transformers, on its device.
        max_model_len: Most tokens of a sequence; what transformers takes for one so long is taken for all.
    """
    rotary: Any
    for rotary in model.modules():
        rope_type = getattr(rotary, "rope_type", None)
        if isinstance(rope_type, dict):  # one for each type of layer
            for layer_type, name in rope_type.items():
                if _changes(name):
                    _freeze(rotary, name, layer_type, max_model_len)
                    rope_type[layer_type] = "default"
        elif isinstance(rope_type, str) and _changes(rope_type):
            _freeze(rotary, rope_type, None, max_model_len)
            rotary.rope_type = "default"


def _changes(rope_type: str) -> bool:
    """Say whether transformers' ``dynamic_rope_update`` does anything for a rope type."""
    return "dynamic" in rope_type or rope_type == "longrope"


def _freeze(rotary: Any, rope_type: str, layer_type: str | None, max_model_len: int) -> None:
    """Set one ``inv_freq``; the scaling of cosine and sine never depends on the length, but in PhiMoE."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    parameters = rotary.config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    if rope_type == "longrope":
        is_long = max_model_len > parameters["original_max_position_embeddings"]
    else:
        is_long = max_model_len > rotary.original_max_seq_len
    device = getattr(rotary, f"{prefix}inv_freq").device
    inv_freq: Tensor = getattr(rotary, f"{prefix}original_inv_freq").to(device)
    if is_long:
        # A tensor, as transformers has it: a number would be rounded in other places.
        length = torch.tensor(max_model_len, device=device)
        inv_freq, _ = ROPE_INIT_FUNCTIONS[rope_type](
            rotary.config, device, seq_len=length, layer_type=layer_type
        )
    setattr(rotary, f"{prefix}inv_freq", inv_freq)
    if "long_mscale" in parameters:
        _freeze_phimoe(rotary, parameters["long_mscale" if is_long else "short_mscale"])


def _freeze_phimoe(rotary: Any, scaling: float) -> None:
    """Fix what PhiMoE's rotary embedding works out for itself at each forward.

    It scales cosine and sine by the longest sequence, unless its configuration says ``default``; then by what
    ``rope_init_fn`` returns. Its frequencies come from there in any case, without regard to the length.
    """
    inv_freq = rotary.rope_init_fn(rotary.config)[0].to(rotary.inv_freq.device)
    rotary.config = copy.deepcopy(rotary.config)
    rotary.config.rope_parameters["rope_type"] = "default"
    rotary.rope_init_fn = lambda config: (inv_freq, scaling)
