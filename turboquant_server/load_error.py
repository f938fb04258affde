"""Why a model cannot be served, in one sentence. Knows the errors of transformers, the Hub and torch."""

from __future__ import annotations

import json

import huggingface_hub.errors as hub_errors
import torch
import transformers
from safetensors import SafetensorError


class ModelLoadError(RuntimeError):
    """The model cannot be served; the message is one sentence that says what to do."""


def _causes(error: BaseException | None) -> list[BaseException]:
    causes = []
    while error is not None:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def is_about_the_hub(error: Exception) -> bool:
    """Tell whether the Hub, or the way to it, is the reason for an error."""
    hub = (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)
    return any(isinstance(cause, hub) for cause in _causes(error))


def explain(error: Exception, source: str, revision: str | None, device: torch.device) -> str:
    """Return one sentence for an error that was raised while ``source`` was loaded."""
    causes = _causes(error)

    def is_a(*types: type[BaseException]) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    text = str(error)
    if is_a(hub_errors.GatedRepoError):
        return (
            f"{source} is gated; accept its terms on https://huggingface.co/{source} and run: hf auth login"
        )
    if is_a(hub_errors.RevisionNotFoundError):
        return f"{source} has no revision {revision}; give a branch, tag or commit of it for --revision"
    if is_a(hub_errors.RepositoryNotFoundError):
        return (
            f"the Hugging Face Hub has no model {source}, or hides it; check --model, or run: hf auth login"
        )
    if is_a(hub_errors.HFValidationError):
        return f"{source} is neither a directory nor a Hugging Face model id; check --model"
    if is_a(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled):
        return (
            f"{source} is neither a directory nor in the local cache, and the Hugging Face Hub cannot be "
            "reached; check --model and the network"
        )
    if "trust_remote_code" in text:
        return f"{source} brings its own Python code; read it and, if you trust it, give --trust-remote-code"
    if is_a(json.JSONDecodeError):
        return f"the config.json of {source} is not valid JSON; download the model again"
    if "does not recognize this architecture" in text or "`model_type`" in text:
        return (
            f"the architecture of {source} is unknown to transformers {transformers.__version__}; "
            "upgrade transformers or choose another --model"
        )
    if "no file named model.safetensors" in text or "does not appear to have a file named" in text:
        return f"{source} has no weights; give a checkpoint with safetensors or PyTorch weights"
    if "ignore_mismatched_sizes" in text:
        return f"the weights of {source} do not fit its config.json; download the model again"
    if is_a(SafetensorError):
        return f"the weights of {source} are damaged; download the model again"
    if is_a(torch.OutOfMemoryError):
        return f"{source} does not fit into {device}; try --quantize int8 or int4, or a smaller model"
    if is_a(MemoryError) or "can't allocate memory" in text:  # torch's error on a CPU is a RuntimeError
        return f"{source} does not fit into this machine's memory; try a smaller model"
    # Validators of configurations name the reason last, all others first.
    lines = text.strip().splitlines() or ["no message"]
    reason = lines[-1 if "validation error" in lines[0] else 0].strip()
    return f"{source} cannot be loaded ({type(error).__name__}: {reason[:200]}); check the checkpoint"
