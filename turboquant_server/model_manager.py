"""The one model of a server, from loading to unloading: its engine, and a cache for each request."""

from __future__ import annotations

import copy
import gc
import time
from typing import TYPE_CHECKING, Any

import torch

from turboquant_core import TurboQuantCache
from turboquant_server.cache_plan import CachePlan, plan_cache
from turboquant_server.cache_probe import (
    CacheMeasurement,
    UnsupportedCacheError,
    check_cache,
    measure_cache,
)
from turboquant_server.engine.async_engine import AsyncEngine
from turboquant_server.engine.engine import Engine
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.scheduler import Scheduler
from turboquant_server.load_error import ModelLoadError
from turboquant_server.model_loader import load_model
from turboquant_server.startup_report import format_report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from turboquant_server.config import ServerConfig

__all__ = ["ModelLoadError", "ModelManager"]

DEMO_MODEL_NAME = "turboquant-demo"


class ModelManager:
    """Own the model, its tokenizer and its engine, from load() to unload().

    Args:
        config: Which model, and how.

    Attributes:
        model_names: What clients may call the model; the first is its own name.
        created: When this server was made, in Unix seconds.
        is_ready: load() has succeeded and unload() was not called; only then the other properties exist.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.model_names = list(config.served_model_name) or [config.model or DEMO_MODEL_NAME]
        self.created = int(time.time())
        self.is_ready = False
        self._config = config

    def load(self) -> None:
        """Load the model, try it out with a compressed cache, and start the engine.

        Raises:
            ModelLoadError: The model cannot be served.
        """
        started = time.monotonic()
        self._load()
        self._load_seconds = time.monotonic() - started
        self.is_ready = True

    def _load(self) -> None:
        source = self._config.model or DEMO_MODEL_NAME
        model, tokenizer, max_model_len = load_model(self._config)
        try:
            states = check_cache(model)
            self._cache_plan: CachePlan = plan_cache(self._config, model, tokenizer, max_model_len)
            self._measurement: CacheMeasurement = measure_cache(
                lambda: self._cache_plan.open_cache(model), states, max_model_len
            )
        except UnsupportedCacheError as error:
            raise ModelLoadError(
                f"{source} cannot be served with a compressed KV cache: {error}; choose another --model"
            ) from error
        except torch.OutOfMemoryError as error:
            raise ModelLoadError(
                f"{source} leaves no memory for a cache on {model.device}; "
                "try --quantize int8 or int4, or a smaller model"
            ) from error
        self.max_model_len: int = max_model_len
        self.tokenizer: PreTrainedTokenizerBase = tokenizer
        self._model: PreTrainedModel = model
        embeddings: Any = model.get_input_embeddings()
        engine = Engine(
            Scheduler(self.open_cache),
            ModelRunner(model),
            # Fast tokenizers must not be shared between threads.
            copy.deepcopy(tokenizer),
            find_eos_token_ids(model, tokenizer),
            vocab_size=embeddings.num_embeddings,
            max_model_len=max_model_len,
        )
        self.engine = AsyncEngine(engine)
        self.engine.start()

    def open_cache(self) -> TurboQuantCache:
        """Return an empty compressed cache for one request."""
        return self._cache_plan.open_cache(self._model)

    def unload(self) -> None:
        """Stop the engine and release the model's memory; requests in flight get EngineDeadError."""
        self.is_ready = False
        self.engine.shutdown()
        del self.engine, self._model, self.tokenizer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def startup_report(self) -> str:
        """Return aligned lines about the loaded model and its cache, to be printed once."""
        return format_report(
            name=" ".join(self.model_names),
            model=self._model,
            quantize=self._config.quantize,
            load_seconds=self._load_seconds,
            cache_plan=self._cache_plan,
            measurement=self._measurement,
            max_model_len=self.max_model_len,
        )


def find_eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer, by the model's generation config and by its tokenizer."""
    generation_config = model.generation_config
    configured = generation_config.eos_token_id if generation_config is not None else None
    token_ids = configured if isinstance(configured, list) else [configured]
    return {token_id for token_id in [*token_ids, tokenizer.eos_token_id] if token_id is not None}
