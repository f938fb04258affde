"""Turns what --model names into a model and its tokenizer, or into a ModelLoadError. Serves nothing."""
# mypy: disable-error-code="no-untyped-call"
# (transformers' own methods)

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from turboquant_server.dummy_model import build_divided_dummy_model, build_dummy_model
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.load_error import ModelLoadError, explain, is_about_the_hub
from turboquant_server.memory import memory_budget
from turboquant_server.rope import freeze_rope
from turboquant_server.tensor_parallel import check_model, check_weights, division

if TYPE_CHECKING:
    from turboquant_server.config import ServerConfig

DEMO_DIRECTORY = Path(__file__).parent / "demo"

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model on its device, in evaluation mode, its tokenizer, and how many tokens a request may have.

    The model's rotary embeddings are those of so many tokens.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_model_len: int


def load_model(config: ServerConfig, ranks: Ranks = ALONE) -> LoadedModel:
    """Load what ``--model`` names, as ``--device``, ``--dtype``, ``--revision`` and ``--quantize`` say.

    With ``--load-format dummy`` only its configuration counts, and its tokenizer if there is one. Each of
    several ranks loads its part.

    Raises:
        ModelLoadError: It cannot be loaded, or is no language model.
    """
    device = ranks.device or _find_device(config.device)
    _check_quantize(config, device)
    source = _find_source(config.model)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        model_config = AutoConfig.from_pretrained(source, **options)
        _check_config(source, model_config, config)
        if ranks.size > 1:
            check_model(source, model_config, ranks.size)
            ranks.join()
        max_model_len = find_max_model_len(source, model_config, config.max_model_len)
        if config.load_format == "dummy":
            tokenizer = _find_tokenizer(source, model_config, options)
            if ranks.size > 1:
                model = build_divided_dummy_model(model_config, config.dtype, ranks)
            else:
                model = build_dummy_model(model_config, config.dtype, device, config.trust_remote_code)
        else:
            tokenizer = _load_tokenizer(source, options)
            model = _load_weights(source, config, device, options | division(ranks))
            if ranks.size > 1:
                check_weights(source, model)
        if config.dtype == "auto" and device.type == "cpu":
            _widen_on_cpu(model, config.gpu_memory_utilization, ranks)
        model.eval()
        freeze_rope(model, max_model_len)
    except ModelLoadError:
        raise
    except Exception as error:
        logger.debug("loading %s failed", source, exc_info=True)
        raise ModelLoadError(explain(error, source, config.revision, device)) from error
    return LoadedModel(model, tokenizer, max_model_len)


def _find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"there is no device {name}; give --device cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ModelLoadError(
                f"--device {name} needs an NVIDIA GPU and PyTorch sees none; use --device cpu"
            )
        if device.index is not None and device.index >= count:
            raise ModelLoadError(f"there is no device {name}; the last one is cuda:{count - 1}")
    return device


def _check_quantize(config: ServerConfig, device: torch.device) -> None:
    quantize = config.quantize
    if quantize == "none":
        return
    if config.load_format == "dummy":
        raise ModelLoadError(
            f"--quantize {quantize} needs weights to read; start without --load-format dummy"
        )
    if device.type != "cuda":
        raise ModelLoadError(
            f"--quantize {quantize} needs an NVIDIA GPU; start without --quantize on {device}"
        )
    for package in ("bitsandbytes", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelLoadError(
                f"--quantize {quantize} needs the package {package}; "
                "install it with: pip install 'turboquant-server[cuda]'"
            )


def _find_source(name: str | None) -> str:
    """Return a directory with a config.json, or a name to look up on the Hub."""
    if name is None:
        if not (DEMO_DIRECTORY / "config.json").is_file():
            raise ModelLoadError("the demo model is not part of this installation; give --model")
        return str(DEMO_DIRECTORY)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(
                f"the directory {name} has no config.json; give the directory of a checkpoint"
            )
        return str(path)
    if path.exists():
        raise ModelLoadError(
            f"{name} is a file; give the directory of a checkpoint or a Hugging Face model id"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelLoadError(
            f"there is no directory {name}; give an existing one or a Hugging Face model id for --model"
        )
    return name


def _check_config(source: str, model_config: PreTrainedConfig, config: ServerConfig) -> None:
    generates = type(model_config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(model_config, "auto_map")
    # transformers loads encoders as language models too; what they say is noise.
    is_encoder = any(name.endswith("ForMaskedLM") for name in model_config.architectures or ())
    if not generates or is_encoder:
        raise ModelLoadError(
            f"{source} is a {model_config.model_type} model, which does not generate text; "
            "choose another --model"
        )
    if not getattr(model_config, "quantization_config", None):
        return
    if config.quantize != "none":
        raise ModelLoadError(f"the weights of {source} are quantized already; start without --quantize")
    if config.load_format == "dummy":
        raise ModelLoadError(
            f"the weights of {source} are quantized, and --load-format dummy makes none of that kind; "
            "choose another --model"
        )


def find_eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer, by the model's generation config and by its tokenizer."""
    generation_config = model.generation_config
    configured = generation_config.eos_token_id if generation_config is not None else None
    token_ids = configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in [*token_ids, tokenizer.eos_token_id] if token_id is not None}


def find_max_model_len(source: str, config: PreTrainedConfig, wanted: int | None) -> int:
    """Return how many tokens a request may have: ``wanted``, or what the model was made for.

    How many the memory of the cache holds is another matter.

    Raises:
        ModelLoadError: The model was not made for so many, or does not say for how many.
    """
    text_config = config.get_text_config(decoder=True)
    positions: int | None = getattr(text_config, "max_position_embeddings", None)
    if positions is None:
        if wanted is None:
            raise ModelLoadError(f"{source} does not say how long its context is; give --max-model-len")
        return wanted
    longest = _longest_context(text_config, positions)
    if wanted is not None and wanted > longest:
        raise ModelLoadError(
            f"--max-model-len {wanted} is more than the {longest} tokens that {source} was made for; "
            f"give {longest} or less"
        )
    return wanted or positions


def _longest_context(text_config: PreTrainedConfig, positions: int) -> int:
    """Return the number of positions, or what the scaling of its rotary embeddings stretches it to."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    # Models with two kinds of layers have one set of parameters for each kind.
    sets = [value for value in parameters.values() if isinstance(value, dict)] or [parameters]
    stretched = [
        int(rope.get("original_max_position_embeddings", positions) * rope.get("factor", 1)) for rope in sets
    ]
    return max(positions, *stretched)


def _load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    message = f"{source} has no usable tokenizer; add its tokenizer.json and tokenizer_config.json"
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        if is_about_the_hub(error) or "trust_remote_code" in str(error):
            raise
        logger.debug("loading the tokenizer of %s failed", source, exc_info=True)
        raise ModelLoadError(message) from error
    # Where the files are missing, transformers may return a tokenizer that knows no text.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ModelLoadError(message)
    return tokenizer


def _find_tokenizer(
    source: str, config: PreTrainedConfig, options: dict[str, Any]
) -> PreTrainedTokenizerBase:
    """Return a model's own tokenizer, else the demo model's: random weights know no language."""
    try:
        return _load_tokenizer(source, options)
    except ModelLoadError:
        tokenizer = _load_tokenizer(str(DEMO_DIRECTORY), {})
        if len(tokenizer) > config.get_text_config(decoder=True).vocab_size:
            raise
    logger.warning("%s has no tokenizer; that of the demo model takes its place", source)
    return tokenizer


def _load_weights(
    source: str, config: ServerConfig, device: torch.device, options: dict[str, Any]
) -> PreTrainedModel:
    options = {**options, "dtype": config.dtype, "output_loading_info": True}
    if config.quantize == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif config.quantize == "int4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    # With accelerate the weights go straight to the GPU; without it they pass through the CPU's memory.
    has_accelerate = importlib.util.find_spec("accelerate") is not None
    if device.type == "cuda" and has_accelerate and "distributed_config" not in options:
        options["device_map"] = {"": device}
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    model, loading_info = loaded
    missing = sorted(loading_info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{source} lacks {len(missing)} of the model's weights, {missing[0]} for one; "
            "give a complete checkpoint of a language model"
        )
    if "device_map" not in options and "distributed_config" not in options:
        model.to(device)
    assert isinstance(model, PreTrainedModel)
    return model


def _widen_on_cpu(model: PreTrainedModel, utilization: float | None, ranks: Ranks) -> None:
    """Make 16-bit weights float32 where there is room.

    Measured (6 layers of 384, 2 cores): decoding is 5 to 10% quicker in float32, and reading a prompt three
    times as quick on CPUs without bfloat16 instructions; on those with them it is 1.7 times as slow.
    """
    num_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    is_narrow = model.dtype in (torch.bfloat16, torch.float16)
    if is_narrow and num_bytes <= ranks.smallest(memory_budget(model.device, utilization)):
        model.float()
