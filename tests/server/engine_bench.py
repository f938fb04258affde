"""An engine on a small model, built by hand, whose steps a test takes itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from turboquant_core import (
    KEY_SCALE,
    VALUE_SCALE,
    BlockCodec,
    BlockQuantizer,
    CacheManager,
    ExactCodec,
    HostStore,
    LayerShape,
    PagedStore,
    StatePool,
    StoreLayer,
    Timeline,
    Visibility,
    use_paged_attention,
)
from turboquant_server.attention_check import ModelAttention
from turboquant_server.engine.engine import Engine
from turboquant_server.engine.model_runner import ModelRunner
from turboquant_server.engine.request import RequestFailedError, RequestOutput
from turboquant_server.engine.sampling_params import SamplingParams
from turboquant_server.engine.scheduler import Scheduler


class RecordingModel:
    """Wrap a model: write down the shape of each forward, and raise where a test asks for it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        self.config = model.config
        self.dtype = model.dtype
        self.forward = self
        self.shapes: list[tuple[int, int]] = []
        self.fail: Callable[[torch.Tensor], None] = lambda position_ids: None
        self.spoil: Callable[[torch.Tensor, torch.Tensor], None] = lambda input_ids, logits: None

    def __copy__(self) -> RecordingModel:
        twin = object.__new__(RecordingModel)
        twin.__dict__ = {**self.__dict__, "model": copy.copy(self.model)}
        return twin

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def named_modules(self) -> Any:
        return self.model.named_modules()

    @property
    def _modules(self) -> dict[str, Any]:
        return self.model._modules

    @_modules.setter
    def _modules(self, modules: dict[str, Any]) -> None:
        self.model._modules = modules

    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: Any = 0,
        **options: Any,
    ) -> Any:
        self.shapes.append((input_ids.shape[0], input_ids.shape[1]))
        self.fail(position_ids)
        outputs = self.model(
            input_ids=input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **options
        )
        self.spoil(input_ids, outputs.logits)
        return outputs


class Parts:
    """What an engine on a model is made of; memory that nothing has been written to is poisoned.

    Args:
        model: Attends as `attention` says.
        attention: Of the model.
        timeline: Where its requests are cut.
        num_blocks: Blocks of 64 tokens, of each group of layers.
        num_slots: Most requests that run at once.
        bits: Of keys and values; None keeps blocks as they are.
        max_num_batched_tokens: Most tokens of prompts in a step.
        caches_prefixes: Whether prompts find blocks of earlier ones.
        num_host_blocks: Blocks of each group that there is room for on the host.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        attention: ModelAttention,
        timeline: Timeline,
        *,
        num_blocks: int,
        num_slots: int,
        bits: int | None,
        max_num_batched_tokens: int,
        caches_prefixes: bool,
        num_host_blocks: int = 0,
    ) -> None:
        counts = [num_blocks] * len(attention.groups)
        self.store = PagedStore(
            {
                index: StoreLayer(
                    _codec(shape, bits, model.dtype),
                    shape.num_kv_heads,
                    shape.key_dim,
                    shape.value_dim,
                    attention.group_of(index),
                )
                for index, shape in attention.shapes.items()
            },
            attention.groups,
            timeline,
            num_blocks=counts,
            num_slots=num_slots,
            dtype=model.dtype,
            device=model.device,
        )
        _poison(self.store)
        states = StatePool(num_slots) if attention.state_bytes else None
        self.manager = CacheManager(
            timeline, attention.groups, counts, num_slots, caches_prefixes, num_host_blocks
        )
        self.runner = ModelRunner(
            model,
            self.store,
            states,
            is_paged=attention.is_paged,
            host_store=HostStore(self.store, num_host_blocks) if num_host_blocks else None,
        )
        self.scheduler = Scheduler(
            self.manager.open,
            timeline,
            max_num_batched_tokens,
            one_shot=attention.one_shot,
            take_moves=self.manager.take_moves,
        )


def _codec(shape: LayerShape, bits: int | None, dtype: torch.dtype) -> BlockCodec | ExactCodec:
    if bits is None:
        return ExactCodec(shape.key_dim, shape.value_dim, dtype)
    return BlockCodec(
        BlockQuantizer(shape.key_dim, bits, scale=KEY_SCALE),
        BlockQuantizer(shape.value_dim, bits, scale=VALUE_SCALE),
    )


def _poison(store: PagedStore) -> None:
    """Fill memory that nothing has been written to with what no result survives."""
    for records in store.records.values():
        records.fill_(255)
    for exact in store.exact.values():
        for tensor in exact:
            tensor.fill_(torch.nan)


class Bench:
    """An engine whose steps a test takes itself.

    Args:
        model: Left as it is.
        tokenizer: Of the model, or what takes its place.
        attention: Of the model; left out, that of a Llama or Qwen2.
        timeline: Where requests are cut.
        num_blocks: Blocks of 64 tokens, of each group of layers.
        num_slots: Most requests that run at once.
        bits: Of keys and values; None keeps blocks as they are.
        max_model_len: Most tokens of a request.
        max_num_batched_tokens: Most tokens of prompts in a step.
        caches_prefixes: Whether prompts find blocks of earlier ones.
        num_host_blocks: Blocks of each group that there is room for on the host.
        eos_token_ids: Tokens that end an answer.
        overlaps_steps: Whether a step is launched before the one before it is taken in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        attention: ModelAttention | None = None,
        timeline: Timeline | None = None,
        num_blocks: int = 200,
        num_slots: int = 16,
        bits: int | None = 4,
        max_model_len: int = 2048,
        max_num_batched_tokens: int = 2048,
        caches_prefixes: bool = True,
        num_host_blocks: int = 0,
        eos_token_ids: Iterable[int] = (0, 2),
        overlaps_steps: bool = False,
    ) -> None:
        inner = copy.deepcopy(model)
        attention = attention or plain_attention(inner.config)
        if attention.is_paged:
            assert use_paged_attention(inner)
        self.model = RecordingModel(inner)
        parts = Parts(
            self.model,  # type: ignore[arg-type]
            attention,
            timeline or Timeline(),
            num_blocks=num_blocks,
            num_slots=num_slots,
            bits=bits,
            max_num_batched_tokens=max_num_batched_tokens,
            caches_prefixes=caches_prefixes,
            num_host_blocks=num_host_blocks,
        )
        self.store, self.manager, self.scheduler = parts.store, parts.manager, parts.scheduler
        self._num_blocks = parts.manager.num_free_blocks
        self.engine = Engine(
            self.scheduler,
            parts.runner,
            tokenizer,
            eos_token_ids=frozenset(eos_token_ids),
            vocab_size=inner.config.vocab_size,
            max_model_len=max_model_len,
            overlaps_steps=overlaps_steps,
        )

    def run(self) -> dict[str, list[RequestOutput | RequestFailedError]]:
        """Take steps until nothing is left to do; return what each request got, by its id."""
        outputs: dict[str, list[RequestOutput | RequestFailedError]] = {}
        while self.engine.has_unfinished_requests:
            for output in self.engine.step():
                outputs.setdefault(output.request_id, []).append(output)
            self.manager.check_integrity()
        self.check_empty()
        return outputs

    def generate(
        self, prompt_token_ids: list[int], params: SamplingParams, **options: Any
    ) -> list[RequestOutput]:
        """Run one request by itself."""
        self.engine.add_request("r", prompt_token_ids, params, **options)
        outputs = self.run()["r"]
        assert all(isinstance(output, RequestOutput) for output in outputs), outputs
        return [output for output in outputs if isinstance(output, RequestOutput)]

    def check_empty(self) -> None:
        """Fail unless every block and every slot is free."""
        self.manager.check_integrity()
        assert self.manager.num_running == 0
        assert self.manager.num_free_blocks == self._num_blocks


def plain_attention(config: Any) -> ModelAttention:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = range(config.num_hidden_layers)
    return ModelAttention(
        is_paged=True,
        one_shot=False,
        shapes=dict.fromkeys(layers, LayerShape(config.num_key_value_heads, head_dim, head_dim)),
        visibilities=dict.fromkeys(layers, Visibility()),
    )


def greedy(max_tokens: int, **options: Any) -> SamplingParams:
    """Return parameters that take the likeliest token."""
    return SamplingParams(max_tokens=max_tokens, temperature=0, **options)


def tokens_of(outputs: Iterable[RequestOutput | RequestFailedError], choice_index: int = 0) -> list[int]:
    """Return the tokens of one choice."""
    return [
        token_id
        for output in outputs
        if isinstance(output, RequestOutput) and output.choice_index == choice_index
        for token_id in output.token_ids
    ]


def text_of(outputs: Iterable[RequestOutput]) -> str:
    """Return the text of a request with one choice."""
    return "".join(output.text for output in outputs)
