"""Logits made in slices of hidden states are those that the whole model gives, whatever it does to them."""

from __future__ import annotations

import architectures
import pytest
import torch
from transformers import DynamicCache

from turboquant_server.engine.model_forward import ModelForward
from turboquant_server.engine.split_forward import SplitForward

SERVED = [name for name, entry in architectures.ARCHITECTURES.items() if entry.serving != "unsupported"]
TOKENS = torch.arange(3, 23)[None]
PLACES = torch.arange(20)


@torch.inference_mode()
@pytest.mark.parametrize("name", SERVED)
def test_slices_are_the_whole(name: str) -> None:
    model = architectures.build(name)
    children = dict(model.named_children())

    def cache() -> DynamicCache:
        return DynamicCache(config=model.config)

    forward = ModelForward(model)
    expected = forward(TOKENS, PLACES[None], PLACES, cache())
    split = SplitForward(model)
    logits, states = split(TOKENS, PLACES[None], PLACES[[19, 4]], cache())
    tolerance = {"rtol": 0, "atol": 1e-5 * float(expected.std())}
    torch.testing.assert_close(logits, expected[:, [19, 4]], **tolerance)
    slices = torch.cat([split.logits(part) for part in torch.split(states[0], 7)])
    torch.testing.assert_close(slices, expected[0], **tolerance)
    # The model itself has not changed, and the same split goes on to other tokens.
    assert dict(model.named_children()) == children
    few = TOKENS[:, :5], PLACES[None, :5], PLACES[[4]]
    torch.testing.assert_close(split(*few, cache())[0], forward(*few, cache()), **tolerance)


def test_nothing_is_kept_of_a_forward_that_failed() -> None:
    model = architectures.build("llama")
    split = SplitForward(model)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        split(TOKENS, PLACES[None], PLACES[[19]], DynamicCache(config=model.config))
    with pytest.raises(ZeroDivisionError):
        split.logits(torch.zeros(3, model.config.hidden_size))
    assert (split._exchange.states, split._exchange.given) == (None, None)
    handle.remove()
