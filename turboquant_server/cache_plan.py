"""How the cache of the loaded model is kept: bits, and transforms measured on the model itself.

Both are measured on `sample_text.txt`, which comes along; nobody has to provide data.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turboquant_core import (
    KEY_SCALE,
    VALUE_SCALE,
    BitPlan,
    BlockCodec,
    BlockQuantizer,
    ExactCodec,
    LayerShape,
    LayerTransforms,
    StoreLayer,
    measure_transforms,
    plan_bits,
    rotation,
)
from turboquant_server.attention_check import ModelAttention, UnsupportedModelError
from turboquant_server.engine.ranks import ALONE, Ranks
from turboquant_server.load_error import ModelLoadError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from turboquant_server.config import ServerConfig

SAMPLE_TEXT = Path(__file__).parent / "sample_text.txt"
# Windows and their tokens. A large model on a CPU would take minutes for as many.
SAMPLE_SHAPE = (4, 1088)
SMALL_SAMPLE_SHAPE = (1, 512)
LARGE_FOR_A_CPU = 100_000_000  # parameters

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachePlan:
    """What every request's cache is made with.

    Attributes:
        key_bits: Bits of a code of a key, or of its number where there are no codes.
        value_bits: Likewise of a value.
        bit_plan: Bits by layer in place of these, if there is a budget.
        transforms: Of each layer's keys and values; rotations where a layer has none.
        exact_dtype: Blocks are kept in this type, and there are no codes.
    """

    key_bits: int
    value_bits: int
    bit_plan: BitPlan | None = None
    transforms: Mapping[int, LayerTransforms] = field(default_factory=dict)
    exact_dtype: torch.dtype | None = None

    def store_layers(self, attention: ModelAttention) -> dict[int, StoreLayer]:
        """Return what a store keeps of each layer.

        Raises:
            UnsupportedModelError: A layer's heads are too small to be compressed.
        """
        return {
            index: StoreLayer(
                self._codec(index, shape),
                shape.num_kv_heads,
                shape.key_dim,
                shape.value_dim,
                attention.group_of(index),
            )
            for index, shape in attention.shapes.items()
        }

    def _codec(self, layer_idx: int, shape: LayerShape) -> BlockCodec | ExactCodec:
        if self.exact_dtype is not None:
            return ExactCodec(shape.key_dim, shape.value_dim, self.exact_dtype)
        bits = self.key_bits, self.value_bits
        if self.bit_plan:
            bits = self.bit_plan.layer_bits.get(layer_idx, bits)
        transforms = self.transforms.get(layer_idx, LayerTransforms(None, None))
        dims = shape.key_dim, shape.value_dim
        try:
            return BlockCodec(
                *(
                    BlockQuantizer(dim, width, scale=scale, transform=transform or rotation(dim, 0))
                    for dim, width, scale, transform in zip(
                        dims, bits, (KEY_SCALE, VALUE_SCALE), transforms, strict=True
                    )
                )
            )
        except ValueError as error:
            raise UnsupportedModelError(f"its heads are too small ({error})") from error


def plan_cache(
    config: ServerConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_model_len: int,
    ranks: Ranks = ALONE,
) -> CachePlan:
    """Measure what the model's cache needs; nothing, if it is not compressed.

    Transforms are of each head, so ranks have those of theirs; the bits of layers are the same on all.

    Raises:
        ModelLoadError: The budget cannot be met.
    """
    if config.kv_cache_dtype == "bf16":
        has_16_bits = model.dtype in (torch.bfloat16, torch.float16)
        return CachePlan(16, 16, exact_dtype=model.dtype if has_16_bits else torch.bfloat16)
    key_bits, value_bits = config.kv_bits or (config.bits, config.bits)
    sample = sample_windows(model, tokenizer, max_model_len)
    try:
        transforms = measure_transforms(model, sample) if sample.numel() else {}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        logger.warning(
            "keys and values could not be measured (%s: %s); random rotations take the transforms' place",
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        transforms = {}
    bit_plan = None
    if config.kv_budget_bits is not None:
        try:
            bit_plan = plan_bits(
                model, sample, config.kv_budget_bits, context=max_model_len, transforms=transforms
            )
        except ValueError as error:
            raise ModelLoadError(f"--kv-budget-bits cannot be met: {error}") from error
    return CachePlan(key_bits, value_bits, ranks.of_first(bit_plan), transforms)


def sample_windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> Tensor:
    """Return ``[num_windows, num_tokens]`` of the sample text, each with what starts a text in front.

    No windows where the context has no room for more than that.
    """
    is_large = model.device.type == "cpu" and model.num_parameters() > LARGE_FOR_A_CPU
    num_windows, num_tokens = SMALL_SAMPLE_SHAPE if is_large else SAMPLE_SHAPE
    prefix = tokens_before_a_text(tokenizer)
    # Not verbose: tokenizers warn of texts that are longer than a prompt may be.
    text = SAMPLE_TEXT.read_text("utf-8")
    token_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    width = min(num_tokens, max_model_len, len(prefix) + len(token_ids)) - len(prefix)
    starts = range(0, min(num_windows * width, len(token_ids) - width + 1), width) if width > 0 else ()
    windows = [[*prefix, *token_ids[start : start + width]] for start in starts]
    return torch.tensor(windows, device=model.device)


def tokens_before_a_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts in front of a text by itself, such as a token for its beginning."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []
