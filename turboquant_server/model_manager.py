"""A model of a server, from loading to unloading: its engine, and a cache for each request."""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from turboquant_core import BLOCK_SIZE, RequestCache, use_paged_attention, use_plain_attention
from turboquant_server.attention_check import UnsupportedModelError, find_attention
from turboquant_server.cache_memory import build_store, fit_context, open_manager, size_cache
from turboquant_server.cache_plan import plan_cache
from turboquant_server.cache_size import TIMELINE
from turboquant_server.cache_usage import measure_usage
from turboquant_server.engine.async_engine import AsyncEngine
from turboquant_server.engine.compiled_forward import compile_forward
from turboquant_server.engine.engine import Engine
from turboquant_server.engine.followers import Followers
from turboquant_server.engine.grammar import GrammarCompiler
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.engine.scheduler import Scheduler
from turboquant_server.fidelity_check import build_fidelity, measure_range, size_exact_cache
from turboquant_server.load_error import ModelLoadError
from turboquant_server.memory import free_memory
from turboquant_server.metrics import EngineState, Metrics
from turboquant_server.model_loader import LoadedModel, find_eos_token_ids, load_model
from turboquant_server.parsing.chat_format import ChatFormat
from turboquant_server.startup_report import format_report
from turboquant_server.swap_space import build_host_store, count_host_blocks, describe_swap, measure_swap
from turboquant_server.tensor_parallel import check_devices, rank_device
from turboquant_server.warm_up import queue_warm_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from turboquant_server.attention_check import ModelAttention
    from turboquant_server.config import ServerConfig
    from turboquant_server.engine.compiled_forward import CompiledForward

__all__ = ["ModelLoadError", "ModelManager"]

DEMO_MODEL_NAME = "turboquant-demo"

logger = logging.getLogger(__name__)


class ModelManager:
    """Own the model, its tokenizer and its engine, from load() to unload(), which may come again and again.

    Args:
        config: Which model, and how.
        ranks: Those that share the model, if this process is not the first of them, which starts the others.

    Attributes:
        model_names: What clients may call the model; the first is its own name.
        created: When this server was made, in Unix seconds.
        is_ready: load() has succeeded, and unload() was not called since; only then there are the other
            properties.
        metrics: Of all requests, from the beginning.
        leaving: Held, for a moment, where unload() might come between a look at `is_ready` and the engine.
    """

    def __init__(self, config: ServerConfig, ranks: Ranks | None = None) -> None:
        self.model_names = list(config.served_model_name) or [config.model or DEMO_MODEL_NAME]
        self.created = int(time.time())
        self.is_ready = False
        self.metrics = Metrics(self.model_names[0])
        self._config = config
        self._ranks = ranks or ALONE
        self._followers: Followers | None = None
        self.leaving = threading.Lock()

    def load(self, loaded: LoadedModel | None = None) -> None:
        """Load the model, try it out with a paged cache, and start the engine.

        Args:
            loaded: What to serve in place of the model that the configuration names: one that attends as
                transformers has it. unload() leaves it to the caller, attending as it was served.

        Raises:
            ModelLoadError: The model cannot be served.
        """
        started = time.monotonic()
        size = self._config.tensor_parallel_size
        try:
            if size > self._ranks.size:
                check_devices(self._config)
                self._followers = Followers(size, rank_device(self._config.device, 0), self._config)
                self._ranks = self._followers.ranks
            self._load(loaded)
        except BaseException:
            self._forget()
            raise
        self._load_seconds = time.monotonic() - started
        self.is_ready = True

    def _load(self, loaded: LoadedModel | None) -> None:
        loaded = loaded or load_model(self._config, self._ranks)
        source = self._config.model or DEMO_MODEL_NAME
        try:
            attention = find_attention(*loaded, self._ranks)
            runner = self._build_runner(loaded, attention)
        except UnsupportedModelError as error:
            raise ModelLoadError(
                f"{source} cannot be served with a {self._config.kv_cache_dtype} KV cache: {error}; "
                "choose another --model"
            ) from error
        except torch.OutOfMemoryError as error:
            raise ModelLoadError(
                f"{source} leaves no memory for a cache on {loaded.model.device}; "
                "try --quantize int8 or int4, or a smaller model"
            ) from error
        self._model: PreTrainedModel = loaded.model
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        self.chat_format = ChatFormat(
            loaded.tokenizer, self._config.tool_call_parser, self._config.reasoning_parser
        )
        engine = self._build_engine(runner, one_shot=attention.one_shot)
        self.engine = AsyncEngine(engine, self.metrics, self._config.request_timeout, self._followers)
        if self._ranks.rank != 0:
            return
        self.engine.start()
        while engine.has_unfinished_requests and self.engine.is_alive:  # warming up
            time.sleep(0.001)
        if not self.engine.is_alive:
            raise ModelLoadError(f"the first step of {source} failed; the log above has the details")

    def _build_runner(self, loaded: LoadedModel, attention: ModelAttention) -> ModelRunner:
        """Plan the cache, divide the memory and allocate it; return what computes steps with it."""
        config, ranks = self._config, self._ranks
        model, tokenizer, max_model_len = loaded
        use_plain_attention(model)
        self._cache_plan = plan_cache(config, model, tokenizer, max_model_len, ranks)
        if attention.is_paged:
            use_paged_attention(model)
        layers = self._cache_plan.store_layers(attention)
        # Before there is a cache, so that it gets no memory that the compiled forward takes.
        compiled = self._compile(model, attention)
        exact_size = size_exact_cache(config, model, attention, max_model_len)
        reserved_bytes = exact_size.num_bytes if exact_size else 0
        self._cache_size = size = size_cache(
            config, model, tokenizer, attention, layers, max_model_len, compiled, reserved_bytes, ranks
        )
        num_host_blocks = count_host_blocks(config.swap_space, attention, size, model.device)
        self._cache_manager = open_manager(
            attention,
            size,
            caches_prefixes=config.enable_prefix_caching,
            num_host_blocks=num_host_blocks,
        )
        self.max_model_len = fit_context(config, size, self._cache_manager.max_tokens, max_model_len)
        store, states = build_store(attention, layers, size, model.dtype, model.device)
        self._fidelity = build_fidelity(config, model, attention, exact_size)
        runner = ModelRunner(
            model,
            store,
            states,
            is_paged=attention.is_paged,
            compiled=compiled,
            host_store=build_host_store(store, num_host_blocks),
            ranks=ranks,
        )
        if runner.can_capture and not config.enforce_eager:
            runner.capture_graphs(size.num_slots, self.max_model_len)
        return runner

    def _compile(self, model: PreTrainedModel, attention: ModelAttention) -> CompiledForward | None:
        if self._ranks.size > 1:
            logger.info("the model runs uncompiled, as each rank has only a part of it")
            return None
        if not attention.is_paged or attention.state_bytes or self._config.enforce_eager:
            return None
        return compile_forward(model, self._config.max_num_batched_tokens)

    def _build_engine(self, runner: ModelRunner, *, one_shot: bool) -> Engine:
        """Return an engine that has measured what it is to be compared with, or has a request to warm up."""
        model, tokenizer = self._model, self.tokenizer
        embeddings: Any = model.get_input_embeddings()
        eos_token_ids = find_eos_token_ids(model, tokenizer)
        self.grammars = GrammarCompiler(tokenizer, embeddings.num_embeddings, eos_token_ids)
        engine = Engine(
            Scheduler(
                self.open_cache,
                TIMELINE,
                self._config.max_num_batched_tokens,
                one_shot=one_shot,
                take_moves=self._cache_manager.take_moves,
            ),
            runner,
            # Fast tokenizers must not be shared between threads.
            copy.deepcopy(tokenizer),
            eos_token_ids,
            vocab_size=embeddings.num_embeddings,
            max_model_len=self.max_model_len,
            overlaps_steps=model.device.type == "cuda",
            fidelity=self._fidelity,
        )
        if self._fidelity is not None:
            measure_range(engine, self._fidelity, model, tokenizer)
        elif self._ranks.size == 1:  # others would not know of it
            queue_warm_up(engine)
        return engine

    def open_cache(
        self, token_ids: Sequence[int], num_prompt_tokens: int, salt: bytes = b""
    ) -> RequestCache | None:
        """Return a cache for one request, or None while there is no room for it.

        Args:
            token_ids: What the request has to compute.
            num_prompt_tokens: How many of them are its prompt.
            salt: Only requests with the same one share blocks.
        """
        return self._cache_manager.open(token_ids, num_prompt_tokens, salt)

    @property
    def config(self) -> ServerConfig:
        """What the server was told."""
        return self._config

    @property
    def num_queued(self) -> int:
        """How many requests wait for others to end."""
        return self.engine.count_queued(self._cache_size.num_slots)

    def engine_state(self) -> EngineState | None:
        """Return what /metrics tells of the engine; None if it is not ready."""
        with self.leaving:
            return self._engine_state() if self.is_ready else None

    def _engine_state(self) -> EngineState:
        size, engine, manager = self._cache_size, self.engine, self._cache_manager
        return EngineState(
            num_running=engine.num_running,
            num_waiting=engine.num_waiting,
            num_preemptions=engine.num_preemptions,
            usage=measure_usage(size, manager, engine.running, self._ranks.size),
            swap=measure_swap(manager),
            num_capacity_tokens=size.num_tokens,
            num_bf16_capacity_tokens=size.num_bf16_tokens,
            fidelity=self._fidelity.state if self._fidelity else None,
            cache_config={
                "block_size": str(BLOCK_SIZE),
                "cache_dtype": self._config.kv_cache_dtype,
                "enable_prefix_caching": str(manager.caches_prefixes),
                "num_gpu_blocks": str(sum(size.num_blocks)),
            },
        )

    @property
    def cache_bytes(self) -> int:
        """What the tensors of the cache take."""
        return self._cache_size.num_bytes

    def check_integrity(self) -> None:
        """Raise an AssertionError if blocks or slots do not add up; for an engine that is at rest."""
        self._cache_manager.check_integrity()

    def unload(self) -> None:
        """Stop the engine and release the model's memory; requests in flight get EngineDeadError."""
        with self.leaving:
            self.is_ready = False
        self._forget()
        free_memory()

    def _forget(self) -> None:
        """Drop what load() has made, be it all or a part.

        The tokenizer stays: answers that the engine has finished may still be read.
        """
        if "engine" in self.__dict__:
            self.engine.shutdown()
        for name in ("engine", "grammars", "_model", "_cache_manager", "_cache_plan", "_fidelity"):
            self.__dict__.pop(name, None)
        if self._followers is not None:
            self._followers.end()
            self._ranks, self._followers = ALONE, None

    def startup_report(self) -> str:
        """Return aligned lines about the loaded model and its cache, to be printed once."""
        return format_report(
            name=" ".join(self.model_names),
            model=self._model,
            load_format=self._config.load_format,
            quantize=self._config.quantize,
            load_seconds=self._load_seconds,
            chat_format=str(self.chat_format),
            cache_plan=self._cache_plan,
            cache_size=self._cache_size,
            swap_space=describe_swap(self._cache_manager, self._cache_size),
            max_model_len=self.max_model_len,
            fidelity=str(self._fidelity.state.range) if self._fidelity else "",
            num_ranks=self._ranks.size,
        )
