"""Which models several GPUs can share, each with a part of the heads; in one sentence where they cannot.

How a model's weights are divided is transformers' matter: its plan for the model says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.distributed.configuration_utils import DistributedConfig

from turboquant_server.engine.ranks import Ranks
from turboquant_server.load_error import ModelLoadError

if TYPE_CHECKING:
    from turboquant_server.config import ServerConfig

# What a plan calls the layers that make keys, and how it says that each rank makes those of its heads.
_KEY_LAYERS = ("k_proj", "qkv_proj", "query_key_value")
_SPLIT = "colwise"


def rank_device(name: str | None, rank: int) -> torch.device:
    """Return the device of a rank, of which `check_devices` says that it is there."""
    is_cuda = torch.cuda.is_available() and name != "cpu"
    return torch.device("cuda", rank) if is_cuda else torch.device("cpu")


def check_devices(config: ServerConfig) -> None:
    """Check what can be checked before there are ranks.

    Raises:
        ModelLoadError: There are not so many GPUs, or the flags do not go together.
    """
    size, name = config.tensor_parallel_size, config.device
    flags = f"--tensor-parallel-size {size}"
    num_gpus = torch.cuda.device_count()
    if name not in (None, "cpu", "cuda"):
        raise ModelLoadError(
            f"{flags} takes the first {size} GPUs; start without --device {name} and, for others, "
            "set CUDA_VISIBLE_DEVICES"
        )
    if name == "cpu" and num_gpus:
        raise ModelLoadError(
            f"{flags} with --device cpu needs hidden GPUs; set CUDA_VISIBLE_DEVICES to nothing"
        )
    if name == "cuda" and not num_gpus:
        raise ModelLoadError(f"{flags} needs {size} NVIDIA GPUs and PyTorch sees none; try --device cpu")
    if 0 < num_gpus < size:
        raise ModelLoadError(
            f"{flags} needs {size} GPUs and PyTorch sees {num_gpus}; give {num_gpus} or less"
        )
    for other, is_given in (
        (f"--quantize {config.quantize}", config.quantize != "none"),
        ("--swap-space", bool(config.swap_space)),
        ("--fidelity-sample-rate", config.fidelity_sample_rate > 0),
    ):
        if is_given:
            raise ModelLoadError(f"{other} is for one GPU; start without it or without {flags}")
    if importlib.util.find_spec("accelerate") is None:
        raise ModelLoadError(f"{flags} needs the package accelerate; install it with: pip install accelerate")


def check_model(source: str, model_config: PreTrainedConfig, size: int) -> None:
    """Check that each rank can have its part of a model's heads.

    Raises:
        ModelLoadError: It cannot.
    """
    config = model_config.get_text_config(decoder=True)
    flags = f"--tensor-parallel-size {size}"
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=config).layers):
        raise ModelLoadError(f"{source} has recurrent layers, which are for one GPU; start without {flags}")
    plan = config.base_model_tp_plan or {}
    if not any(name.split(".")[-1] in _KEY_LAYERS and style == _SPLIT for name, style in plan.items()):
        raise ModelLoadError(
            f"transformers has no plan that divides the heads of {config.model_type} models among GPUs; "
            f"start {source} without {flags}"
        )
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    for number, what in ((num_kv_heads, "key/value heads"), (num_heads, "attention heads")):
        if number % size:
            raise ModelLoadError(
                f"{source} has {number} {what}, which {size} GPUs cannot share evenly; "
                "choose a --tensor-parallel-size that divides them"
            )


def check_weights(source: str, model: PreTrainedModel) -> None:
    """Check that ranks have the parts of the weights that they should have.

    Raises:
        ModelLoadError: The checkpoint has some of them in one tensor, parts of which transformers mixes up.
    """
    conversions: Any = get_model_conversion_mapping(model)
    if any(len(getattr(conversion, "target_patterns", ())) > 1 for conversion in conversions):
        raise ModelLoadError(
            f"transformers cannot divide a checkpoint of {model.config.model_type} models among GPUs; "
            f"start {source} without --tensor-parallel-size"
        )


def division(ranks: Ranks) -> dict[str, Any]:
    """Return the options with which ``from_pretrained`` loads a rank's part of a model."""
    return {"distributed_config": DistributedConfig(tp_size=ranks.size)} if ranks.size > 1 else {}


@contextmanager
def undivided(model: PreTrainedModel) -> Iterator[None]:
    """Let each rank compute with all of a divided model's weights, which it gets one after another.

    What transformers has put around the modules is left out; so this shows whether its plan is right.
    """
    forwards: dict[nn.Module, Any] = {}
    for module in model.modules():
        is_divided = any(isinstance(parameter, DTensor) for parameter in module._parameters.values())
        if is_divided or getattr(module, "_is_hooked", False):
            forwards[module] = vars(module).get("forward")
            module.forward = _undivided_forward(module)
    try:
        yield
    finally:
        for module, forward in forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward


def _undivided_forward(module: nn.Module) -> Callable[..., Any]:
    def forward(*arguments: Any, **options: Any) -> Any:
        parameters = dict(module._parameters)
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                with torch.inference_mode(False), torch.no_grad():  # torch 2.11 cannot do it in that mode
                    whole = parameter.full_tensor()
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)
        try:
            return type(module).forward(module, *arguments, **options)
        finally:
            module._parameters.update(parameters)

    return forward
