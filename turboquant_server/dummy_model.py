"""A model of random weights, made from a configuration alone. Reads no checkpoint."""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

SEED = 0


def build_dummy_model(
    config: PreTrainedConfig, dtype: str, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Make a model with the weights that its training would begin with, always the same on a kind of device.

    They are drawn on the device and in their final type: a billion parameters take a GPU a fraction of a
    second, and the memory of the model is all that is taken.

    Args:
        config: Of the model; on return its dtype is that of the weights.
        dtype: Of the weights; ``auto`` is the configuration's own.
        device: Where they are made.
        trust_remote_code: Run Python code that comes with the configuration.
    """
    options: dict[str, Any] = {} if dtype == "auto" else {"dtype": getattr(torch, dtype)}
    # The model's own constructor, not empty memory filled afterwards: it also computes its buffers, such as
    # the frequencies of rotary embeddings, which no checkpoint holds.
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)
    assert isinstance(model, PreTrainedModel)
    return model
