"""A model of random weights, made from a configuration alone. Reads no checkpoint."""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from turboquant_server.engine.ranks import Ranks
from turboquant_server.tensor_parallel import division

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


def build_divided_dummy_model(config: PreTrainedConfig, dtype: str, ranks: Ranks) -> PreTrainedModel:
    """Make a rank's part of such a model; other weights than those of one that is not divided.

    Args:
        config: Of the model.
        dtype: Of the weights; ``auto`` is the configuration's own.
        ranks: Those that have the parts.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    devices = [ranks.device] if torch.cuda.is_available() else []
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would say of each weight that it is missing
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a CPU ranks may draw the same numbers; with these seeds not
            torch.manual_seed(SEED + ranks.rank)
            model = model_class.from_pretrained(
                None, config=config, state_dict={}, dtype=dtype, **division(ranks)
            )
    finally:
        logging.set_verbosity(verbosity)
    assert isinstance(model, PreTrainedModel)
    for parameter in model.parameters():
        if not isinstance(parameter, DTensor):  # all ranks have it
            ranks.take_first(parameter.data)
    return model
