"""`FlatAdam` against PyTorch's own Adam."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from marl_memory.networks.optimiser import FlatAdam


def networks(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Linear(3, 1)


def loss_of(first: nn.Module, second: nn.Module, step: int) -> Tensor:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step)).to(next(first.parameters()).dtype)
    return (first(x).square().sum() + (second(x) - 1).square().sum()) * (1 + step)


def advance(modules: tuple[nn.Module, nn.Module], optimiser: FlatAdam, steps: range) -> list[list[Tensor]]:
    norms = []
    for step in steps:
        optimiser.zero_grad()
        loss_of(*modules, step).backward()
        optimiser.gather()
        norms.append(optimiser.clip(5.0))
        optimiser.step()
    return norms


def same(a: tuple[nn.Module, ...], b: tuple[nn.Module, ...], **tolerance: float) -> None:
    for one, other in zip(nn.ModuleList(a).parameters(), nn.ModuleList(b).parameters(), strict=True):
        torch.testing.assert_close(one, other, **tolerance)


def test_the_numbers_are_those_of_adam() -> None:
    ours, theirs = networks(), networks()
    flat = FlatAdam(*ours, lr=1e-2, eps=1e-5)
    adam = torch.optim.Adam([*theirs[0].parameters(), *theirs[1].parameters()], lr=1e-2, eps=1e-5)
    found = advance(ours, flat, range(50))
    for step in range(50):
        adam.zero_grad()
        loss_of(*theirs, step).backward()
        norms = [clip_grad_norm_(module.parameters(), 5.0) for module in theirs]
        torch.testing.assert_close(found[step], norms, rtol=1e-4, atol=0.0)
        adam.step()
    same(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("then", ["copied", "double", "replaced"])
def test_parameters_that_moved_away_are_found_again(then: str) -> None:
    straight = networks()
    advance(straight, FlatAdam(*straight, lr=1e-2), range(20))
    modules = networks()
    optimiser = FlatAdam(*modules, lr=1e-2)
    advance(modules, optimiser, range(10))
    if then == "copied":
        modules, optimiser = copy.deepcopy((modules, optimiser))
    elif then == "double":
        for module in modules:
            module.double()
    else:
        last = list(modules[0].parameters())[-1]
        last.data = last.data.clone()
    advance(modules, optimiser, range(10, 20))
    if then == "double":
        assert next(modules[0].parameters()).dtype == torch.float64
        same(tuple(module.float() for module in modules), straight, rtol=1e-3, atol=1e-4)
    else:
        same(modules, straight, rtol=0.0, atol=0.0)


def test_a_resumed_one_goes_on_bit_for_bit() -> None:
    straight = networks()
    advance(straight, FlatAdam(*straight, lr=1e-2), range(20))
    modules = networks()
    optimiser = FlatAdam(*modules, lr=1e-2)
    advance(modules, optimiser, range(10))
    state = optimiser.named_state(dict(nn.ModuleList(modules).named_parameters()))
    again = networks(seed=1)
    for module, saved in zip(again, modules, strict=True):
        module.load_state_dict(saved.state_dict())
    other = FlatAdam(*again, lr=1e-2)
    other.load_named_state(dict(nn.ModuleList(again).named_parameters()), state)
    advance(again, other, range(10, 20))
    same(again, straight, rtol=0.0, atol=0.0)


def test_state_that_does_not_fit() -> None:
    modules = networks()
    optimiser, named = FlatAdam(*modules, lr=1e-2), dict(nn.ModuleList(modules).named_parameters())
    assert optimiser.named_state(named) == {}
    advance(modules, optimiser, range(1))
    state = optimiser.named_state(named)
    with pytest.raises(KeyError, match="nobody"):
        optimiser.load_named_state(named, {**state, "nobody": {}})
    with pytest.raises(KeyError, match="but not of all"):
        optimiser.load_named_state(named, {"0.0.weight": state["0.0.weight"]})


def test_a_parameter_without_a_gradient_stays() -> None:
    modules = networks()
    before = modules[1].weight.detach().clone()
    optimiser = FlatAdam(*modules, lr=1e-2)
    optimiser.zero_grad()
    modules[0](torch.ones(1, 3)).sum().backward()
    optimiser.gather()
    optimiser.step()
    assert torch.equal(modules[1].weight, before)
