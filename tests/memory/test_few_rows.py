"""The choice by NumPy is that by PyTorch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from marl_memory.memory.reflection import Reflection
from tests.memory.test_reflection import SCOPES, K, batch, memory, task, taught


def both_ways(operator: Reflection, **options: Any) -> None:
    """Rows of dead agents and forbidden actions, by both ways from the same generator."""
    td = batch(operator.spec, 50, 4, 3)
    td.get(K.alive)[::3, :, 1] = False
    observation, mask, able = td.get(K.observation), td.get(K.action_mask), td.get(K.alive) & operator.ready
    assert operator.few.fit(observation)
    for name, value in options.items():
        setattr(operator, name, value)
    settings = {"threshold": operator.threshold.logit, "strength": operator.strength, "greedy": operator.greedy}
    before = operator.generator.get_state()
    quick = operator.few.choose(observation, mask, able, generator=operator.generator, **settings)
    after = operator.generator.get_state()
    operator.generator.set_state(before)
    plain = operator._choose(observation, mask, able)
    assert torch.equal(after, operator.generator.get_state()) and quick.taken.any() and not quick.taken.all()
    torch.testing.assert_close(quick._asdict(), plain._asdict())


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"strength": 0.5}])
@pytest.mark.parametrize("scope", SCOPES)
def test_it_chooses_as_pytorch_does(scope: str, options: dict[str, Any]) -> None:
    both_ways(taught(memory(task(2, features=(3, 2), actions=(3, 2), continuous=False), scope=scope)), **options)


def test_it_follows_parameters_wherever_they_are() -> None:
    operator = taught(memory(task(2, continuous=False)))
    both_ways(operator)
    operator.write(batch(operator.spec, 9))
    operator.learn()
    both_ways(operator)
    moved = copy.deepcopy(operator)
    moved.networks.policy.requires_grad_(False)
    for p in moved.networks.parameters():
        p.mul_(1.1)
    both_ways(moved)
    both_ways(operator)


def test_many_rows_real_actions_and_other_numbers_are_left_to_pytorch() -> None:
    operator = memory(task(2, continuous=False))
    observation = batch(operator.spec, 0).get(K.observation)
    assert operator.few.fit(observation) and not operator.few.fit(observation.double())
    rows = operator.few.most // 2
    assert operator.few.fit(observation[:1, :1].expand(rows, 1, -1, -1))
    assert not operator.few.fit(observation[:1, :1].expand(rows + 1, 1, -1, -1))
    assert not memory(task(2, continuous=True)).few.fit(observation)
