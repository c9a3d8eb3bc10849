"""The target network: hard and averaged updates, lending without a trace, checkpoints."""

import pytest
import torch
from torch import nn

from textgym.agents.common.target_network import TargetNetwork


def pair() -> tuple[nn.Sequential, nn.Linear]:
    torch.manual_seed(0)
    first, second = nn.Sequential(nn.Linear(2, 2), nn.Tanh()), nn.Linear(2, 1)
    first[0].bias.requires_grad_(False)
    return first, second


def moved(modules: tuple[nn.Module, ...], by: float) -> None:
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(by)


def lent_weight(target: TargetNetwork, module: nn.Linear) -> torch.Tensor:
    with target.lent():
        return module.weight.detach().clone()


def test_hard_update_copies_at_the_interval_and_only_then() -> None:
    modules = pair()
    before = modules[1].weight.detach().clone()
    target = TargetNetwork({"a": modules[0], "b": modules[1]}, tau=1.0, interval=3)
    for step in (1, 2):
        moved(modules, 1.0)
        target.after_step(step)
        torch.testing.assert_close(lent_weight(target, modules[1]), before)
    moved(modules, 1.0)
    target.after_step(3)
    assert torch.equal(lent_weight(target, modules[1]), modules[1].weight)


def test_averaged_update_moves_by_tau() -> None:
    modules = pair()
    before = modules[1].weight.detach().clone()
    target = TargetNetwork({"a": modules[0], "b": modules[1]}, tau=0.25, interval=1)
    moved(modules, 1.0)
    target.after_step(1)
    torch.testing.assert_close(lent_weight(target, modules[1]), before + 0.25)
    target.after_step(2)
    torch.testing.assert_close(lent_weight(target, modules[1]), before + 0.25 + 0.75 * 0.25)


def test_lending_leaves_graphs_and_weights_as_they_were() -> None:
    modules, inputs = pair(), torch.tensor([[0.3, -0.7]])

    def output() -> torch.Tensor:
        return modules[1](modules[0](inputs)).sum()

    expected = torch.autograd.grad(output(), modules[1].weight)[0], torch.autograd.grad(output(), modules[0][0].weight)[0]
    target = TargetNetwork({"a": modules[0], "b": modules[1]})
    old = output().item()
    moved(modules, 0.5)
    new_gradients = torch.autograd.grad(output(), modules[1].weight)[0], torch.autograd.grad(output(), modules[0][0].weight)[0]
    graph, weights = output(), modules[1].weight.detach().clone()
    with target.lent():
        lagged = output()
    assert not lagged.requires_grad and lagged.item() == pytest.approx(old)
    assert torch.equal(modules[1].weight, weights)
    graph.backward()
    torch.testing.assert_close((modules[1].weight.grad, modules[0][0].weight.grad), new_gradients)
    assert not torch.allclose(expected[1], new_gradients[1])


def test_weights_come_back_after_an_error() -> None:
    modules = pair()
    target = TargetNetwork({"a": modules[0], "b": modules[1]})
    moved(modules, 1.0)
    weights = modules[1].weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), target.lent():
        raise RuntimeError("inside")
    assert torch.equal(modules[1].weight, weights)


def test_frozen_parameters_are_not_copied_and_a_checkpoint_holds_the_rest() -> None:
    modules = pair()
    target = TargetNetwork({"a": modules[0], "b": modules[1]})
    assert set(target.tensors()) == {"a.0.weight", "b.weight", "b.bias"}
    saved = {name: tensor.clone() for name, tensor in target.tensors().items()}
    moved(modules, 1.0)
    other = TargetNetwork({"a": modules[0], "b": modules[1]})
    other.load(saved)
    torch.testing.assert_close(lent_weight(other, modules[1]), saved["b.weight"])
