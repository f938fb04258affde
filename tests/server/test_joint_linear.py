"""Layers that read the same input become one product, and the model stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from turboquant_server.engine.joint_linear import join_linears, lay_together

JOINT = torch.ops.turboquant.joint_linear.default


class Layers(nn.Module):
    """Three layers that read the input, and one that reads what they make."""

    def __init__(self, *, bias: bool = True, rows: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(8, rows, bias)
        self.second = nn.Linear(8, 8, bias)
        self.third = nn.Linear(8, 16, bias)
        self.last = nn.Linear(8, 8, bias)

    def forward(self, states: Tensor) -> Tensor:
        one, two, three = self.first(states), self.second(states), self.third(states)
        output: Tensor = self.last(one[..., :8].sigmoid() * two) + three[..., :8]
        return output


@torch.inference_mode()
def targets(model: nn.Module, states: Tensor) -> tuple[list[Any], Tensor]:
    """Return what a graph with joint layers calls, and what it gives."""
    called: list[Any] = []

    def backend(module: fx.GraphModule, inputs: list[Any]) -> Any:
        join_linears(module, inputs)
        module.recompile()
        called.extend(node.target for node in module.graph.find_nodes(op="call_function", target=JOINT))
        called.extend(
            node.target for node in module.graph.find_nodes(op="call_function", target=nn.functional.linear)
        )
        return module.forward

    torch._dynamo.reset()
    return called, torch.compile(model, backend=backend, fullgraph=True)(states)


@pytest.fixture
def states() -> Tensor:
    return torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def run(model: nn.Module, states: Tensor) -> Tensor:
    output: Tensor = model(states)
    return output


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_read_the_same_are_one_product(bias: bool, states: Tensor) -> None:
    model = Layers(bias=bias)
    expected = run(model, states)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(lay_together(model, lambda: run(model, states)), expected)
    called, output = targets(model, states)
    assert called == [JOINT, nn.functional.linear]
    torch.testing.assert_close(output, expected)
    assert torch.equal(run(model, states), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    addresses = [layer.weight.data_ptr() for layer in (model.first, model.second, model.third)]
    assert addresses == [addresses[0], addresses[0] + 256, addresses[0] + 512]
    assert all(not parameter.is_inference() for parameter in model.parameters())


def test_laying_together_twice_changes_nothing(states: Tensor) -> None:
    model = Layers()
    lay_together(model, lambda: run(model, states))
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    lay_together(model, lambda: run(model, states))
    assert addresses == [parameter.data_ptr() for parameter in model.parameters()]


def tie(model: Layers) -> None:
    model.second.weight = model.first.weight


def share_memory(model: Layers) -> None:
    model.second.weight = nn.Parameter(torch.randn(16, 8)[8:])


def mix_biases(model: Layers) -> None:
    model.second.bias = None


def mix_types(model: Layers) -> None:
    class Other(nn.Linear):
        """A linear layer in name."""

    model.second = Other(8, 8)


def make_for_inference(model: Layers) -> None:
    with torch.inference_mode():
        model.second.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)


@pytest.mark.parametrize("spoil", [tie, share_memory, mix_biases, mix_types, make_for_inference])
def test_what_does_not_go_together_is_left_alone(spoil: Any, states: Tensor) -> None:
    model = Layers()
    spoil(model)
    expected = run(model, states)
    lay_together(model, lambda: run(model, states))
    called, output = targets(model, states)
    torch.testing.assert_close(output, expected)
    assert torch.equal(run(model, states), expected)
    assert JOINT not in called or spoil is mix_types


def test_unaligned_weights_are_left_where_they_are(states: Tensor) -> None:
    model = Layers(rows=9)  # the bias of 36 bytes
    lay_together(model, lambda: run(model, states))
    called, output = targets(model, states)
    assert JOINT not in called
    torch.testing.assert_close(output, run(model, states))


def test_weights_that_were_moved_apart_are_noticed(states: Tensor) -> None:
    model = Layers()
    lay_together(model, lambda: run(model, states))
    weights = [model.first.weight.detach(), model.second.weight.detach()]
    torch.testing.assert_close(JOINT(states, weights), states @ torch.cat(weights).mT)
    with pytest.raises(AssertionError, match="moved"):
        JOINT(states, [weights[0], weights[1].clone()])
