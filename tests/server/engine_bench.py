"""An engine on a small model, built by hand, whose steps a test takes itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from turboquant_core import (
    BlockCodec,
    BlockQuantizer,
    CacheManager,
    ExactCodec,
    PagedStore,
    StoreLayer,
    Timeline,
    Visibility,
    use_paged_attention,
)
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
        self.forward = self
        self.shapes: list[tuple[int, int]] = []
        self.fail: Callable[[torch.Tensor], None] = lambda position_ids: None
        self.spoil: Callable[[torch.Tensor, torch.Tensor], None] = lambda input_ids, logits: None

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


class Bench:
    """An engine over a Llama or Qwen2 model; block memory is full of NaN before it is written.

    Args:
        model: Left as it is.
        tokenizer: Of the model, or what takes its place.
        num_blocks: Blocks of 64 tokens.
        num_slots: Most requests that run at once.
        bits: Of keys and values; None keeps blocks as they are.
        max_model_len: Most tokens of a request.
        options: Of scheduler, cache manager and engine.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        num_blocks: int = 200,
        num_slots: int = 16,
        bits: int | None = 4,
        max_model_len: int = 2048,
        max_num_batched_tokens: int = 2048,
        caches_prefixes: bool = True,
        eos_token_ids: Iterable[int] = (0, 2),
    ) -> None:
        timeline = Timeline()
        inner = copy.deepcopy(model)
        assert use_paged_attention(inner)
        config: Any = inner.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        codec: BlockCodec | ExactCodec = ExactCodec(head_dim, head_dim, inner.dtype)
        if bits is not None:
            codec = BlockCodec(
                BlockQuantizer(head_dim, bits, scale="norm_corrected"),
                BlockQuantizer(head_dim, bits, scale="unbiased"),
            )
        layer = StoreLayer(codec, config.num_key_value_heads, head_dim, head_dim, group=0)
        self.store = PagedStore(
            dict.fromkeys(range(config.num_hidden_layers), layer),
            [Visibility()],
            timeline,
            num_blocks=[num_blocks],
            num_slots=num_slots,
            dtype=inner.dtype,
            device=inner.device,
        )
        for records in self.store.records.values():
            records.fill_(255)
        for pair in self.store.exact.values():
            for tensor in pair:
                tensor.fill_(torch.nan)
        self.manager = CacheManager(timeline, [Visibility()], [num_blocks], num_slots, caches_prefixes)
        self.model = RecordingModel(inner)
        self.scheduler = Scheduler(self.manager.open, timeline, max_num_batched_tokens)
        self.engine = Engine(
            self.scheduler,
            ModelRunner(self.model, self.store, None, is_paged=True),  # type: ignore[arg-type]
            tokenizer,
            eos_token_ids=frozenset(eos_token_ids),
            vocab_size=config.vocab_size,
            max_model_len=max_model_len,
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
        assert (
            self.manager.num_free_blocks == [records.shape[0] for records in self.store.records.values()][:1]
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
