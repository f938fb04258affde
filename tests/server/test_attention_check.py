"""A model gets the best way to attend that gives its own logits, or one line that says why there is none."""

from __future__ import annotations

from typing import Any

import architectures
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from turboquant_core import LayerShape, Visibility, use_plain_attention
from turboquant_server import attention_check
from turboquant_server.attention_check import ModelAttention, UnsupportedModelError, find_attention

LONGEST = architectures.NUM_POSITIONS
WINDOW = Visibility(window=architectures.WINDOW)
ALL = Visibility()
GPT2: dict[str, Any] = {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4}


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """Make weights so large that a wrong cache shows."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@torch.inference_mode()
def logits_of(model: PreTrainedModel) -> Tensor:
    logits: Tensor = model(torch.arange(3, 100)[None], use_cache=False).logits
    return logits


@pytest.mark.parametrize(
    ("name", "is_paged", "one_shot", "shapes", "sees"),
    [
        ("llama", True, False, [(2, 16, 16)] * 4, [ALL] * 4),
        ("gpt2", True, False, [(4, 16, 16)] * 4, [ALL] * 4),
        ("gemma3_text", True, False, [(2, 16, 16)] * 4, [WINDOW, ALL] * 2),
        ("mistral", True, False, [(2, 16, 16)] * 4, [WINDOW] * 4),
        ("llama4_text", True, False, [(2, 16, 16)] * 4, [Visibility(chunk=architectures.WINDOW), ALL] * 2),
        ("gemma3n_text", True, False, [(2, 16, 16)] * 2, [WINDOW, ALL]),  # two layers use others' keys
        ("mimo_v2_flash", True, False, [(4, 16, 24), (2, 16, 24)] * 2, [WINDOW, ALL] * 2),
        # Latent attention keeps 32 + 16 numbers where the interface would get 4 heads of 32 + 16.
        ("deepseek_v3", False, False, [(1, 32, 16)] * 4, [ALL] * 4),
        ("falcon", False, False, [(4, 16, 16)] * 4, [ALL] * 4),  # repeats its kv heads itself
        ("gpt_neo", False, False, [(4, 16, 16)] * 4, [ALL] * 4),  # applies its windows itself
        ("diffllama", False, False, [(2, 16, 16)] * 4, [ALL] * 4),  # the interface gets but a part of it
    ],
)
def test_a_model_attends_the_best_way_it_can(
    tiny_tokenizer: PreTrainedTokenizerFast,
    name: str,
    is_paged: bool,
    one_shot: bool,
    shapes: list[tuple[int, int, int]],
    sees: list[Visibility],
) -> None:
    attention = find_attention(architectures.build(name), tiny_tokenizer, LONGEST)
    assert (attention.is_paged, attention.one_shot, attention.state_bytes) == (is_paged, one_shot, 0)
    assert [attention.shapes[index] for index in sorted(attention.shapes)] == [LayerShape(*s) for s in shapes]
    assert [attention.visibilities[index] for index in sorted(attention.shapes)] == sees


@pytest.mark.parametrize(
    ("name", "one_shot", "num_layers"),
    [
        ("qwen3_next", False, 2),
        ("mamba2", False, 0),
        ("jamba", True, 2),  # its states cannot be computed from where a chunk ended
        ("falcon_mamba", True, 0),
    ],
)
def test_states_are_counted_beside_the_layers_of_keys(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, one_shot: bool, num_layers: int
) -> None:
    attention = find_attention(architectures.build(name), tiny_tokenizer, LONGEST)
    assert (attention.is_paged, attention.one_shot, len(attention.shapes)) == (True, one_shot, num_layers)
    assert attention.state_bytes > 0


def test_the_states_of_mamba_take_their_arithmetic(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    attention = find_attention(architectures.build("falcon_mamba"), tiny_tokenizer, LONGEST)
    # float32, in each of 4 layers and 96 channels: 8 numbers of state and the last 4 inputs
    assert attention.state_bytes == 4 * 4 * 96 * (8 + 4)


def test_layers_that_see_alike_are_one_group() -> None:
    attention = ModelAttention(
        True,
        False,
        dict.fromkeys(range(5), LayerShape(1, 16, 16)),
        {0: WINDOW, 1: ALL, 2: Visibility(window=architectures.WINDOW), 3: ALL, 4: Visibility(chunk=8)},
    )
    assert attention.groups == [WINDOW, ALL, Visibility(chunk=8)]
    assert [attention.group_of(index) for index in range(5)] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("max_model_len", [2, 5, 8, 100])
@pytest.mark.parametrize("name", ["llama", "falcon", "qwen3_next", "deepseek_v3"])
def test_a_short_context_is_enough(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, max_model_len: int
) -> None:
    seen: list[int] = []
    model = architectures.build(name)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[-1]), with_kwargs=True
    )
    find_attention(model, tiny_tokenizer, max_model_len)
    assert max(seen[:2]) <= max_model_len


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "deepseek_v3", "falcon", "jamba"])
def test_afterwards_the_model_can_attend_as_before(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    model = architectures.build(name)
    before, implementation = logits_of(model), model.config._attn_implementation
    find_attention(model, tiny_tokenizer, LONGEST)
    use_plain_attention(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "mixtral", "falcon", "qwen3_next"])
def test_models_in_16_bits_pass(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, dtype: torch.dtype
) -> None:
    expected = find_attention(architectures.build(name), tiny_tokenizer, LONGEST)
    found = find_attention(architectures.build(name).to(dtype), tiny_tokenizer, LONGEST)
    assert (found.is_paged, found.one_shot, found.shapes) == (
        expected.is_paged,
        expected.one_shot,
        expected.shapes,
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("minimax", "it fails with one (ValueError: MiniMax uses cache of its own"),
        ("openai-gpt", "it gives nothing to its cache"),
        ("recurrent_gemma", "its logits are off by 0.2 of their standard deviation"),
    ],
)
def test_a_model_that_no_way_suits_is_refused_in_one_line(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"^[^\n]+$") as caught:
        find_attention(architectures.build(name), tiny_tokenizer, LONGEST)
    assert str(caught.value).startswith(reason)


def test_a_model_that_looks_ahead_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    with pytest.raises(UnsupportedModelError, match="its logits are off by"):
        find_attention(randomized(BertLMHeadModel(config)), tiny_tokenizer, LONGEST)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_gets_its_cache_by_the_name_that_it_has_for_it(
    tiny_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    class Newer(GPT2LMHeadModel):
        def forward(self, input_ids: Any, cache: Any = None, position_ids: Any = None, **options: Any) -> Any:
            return super().forward(input_ids, past_key_values=cache, position_ids=position_ids, **options)

    class Older(GPT2LMHeadModel):
        def forward(
            self, input_ids: Any, past_key_values: Any = None, position_ids: Any = None, **options: Any
        ) -> Any:
            return super().forward(
                input_ids, past_key_values=past_key_values, position_ids=position_ids, **options
            )

    model = randomized((Newer if name == "cache" else Older)(GPT2Config(**GPT2)))
    assert set(find_attention(model, tiny_tokenizer, LONGEST).shapes) == {0, 1}


def test_a_model_that_forgets_a_layers_keys_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    class Forgetful(GPT2LMHeadModel):
        def forward(self, input_ids: Any, past_key_values: Any = None, **options: Any) -> Any:
            if past_key_values is not None:
                update = past_key_values.update
                past_key_values.update = lambda keys, values, layer_idx, **rest: (
                    (keys, values) if layer_idx else update(keys, values, layer_idx)
                )
            return super().forward(input_ids, past_key_values=past_key_values, **options)

    with pytest.raises(UnsupportedModelError, match="it fails with one"):
        find_attention(randomized(Forgetful(GPT2Config(**GPT2))), tiny_tokenizer, LONGEST)


def test_a_model_that_fails_without_a_cache_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    class Broken(GPT2LMHeadModel):
        def forward(self, *arguments: Any, **options: Any) -> Any:
            raise TypeError("no such kernel\nand more")

    with pytest.raises(UnsupportedModelError) as caught:
        find_attention(Broken(GPT2Config(**GPT2)), tiny_tokenizer, LONGEST)
    assert str(caught.value) == "it fails even without one (TypeError: no such kernel)"


def test_logits_that_are_not_finite_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = randomized(GPT2LMHeadModel(GPT2Config(**GPT2)))
    with torch.no_grad():
        model.lm_head.weight[3, 5] = torch.nan
    with pytest.raises(UnsupportedModelError, match="its logits are not finite"):
        find_attention(model, tiny_tokenizer, LONGEST)


@pytest.mark.parametrize("function", ["_plain_logits", "_paged_logits"])
def test_a_device_without_memory_is_no_reason_to_refuse_a_model(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def out_of_memory(*arguments: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention_check, function, out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        find_attention(architectures.build("llama"), tiny_tokenizer, LONGEST)
