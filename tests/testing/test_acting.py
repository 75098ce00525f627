"""The contract holds operators at ACT to what they say: each way to break it is caught."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

from marl_memory.memory.reflection import Reflection
from marl_memory.testing import check_memory_operator
from marl_memory.testing.batches import SPECS

CONTINUOUS, MASKED = SPECS[0], SPECS[1]
SMALL: dict[str, Any] = {"capacity": 48, "least": 1, "alike": 10, "hidden": (8,), "batches": 2, "batch_size": 16}
SMALL |= {"kappa": 0.05, "upper": 0.6, "lower": 0.4}


class LooksAtThePolicysAction(Reflection):
    """Takes over where the policy's action is positive only: then b is no mixture of fixed weights."""

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        k, chosen = self.spec.keys, td.get(self.spec.keys.action).clone()
        super().forward(td)
        wanted = (chosen > 0).reshape(*td.get(k.taken).shape, -1).all(-1)
        td.get(k.act_weight).mul_(wanted)
        td.get(k.taken).logical_and_(wanted)
        where = wanted.reshape(*wanted.shape, *[1] * (chosen.ndim - wanted.ndim))
        td.get(k.action).copy_(torch.where(where, td.get(k.action), chosen))
        return td


class DrawsInEvaluation(Reflection):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        greedy, self.greedy = self.greedy, False
        super().forward(td)
        self.greedy = greedy
        return td


class ActsByItsMode(Reflection):
    """Says that it draws from its policy, and takes the likeliest action."""

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        greedy, self.greedy = self.greedy, True
        super().forward(td)
        self.greedy = greedy
        return td


class ActsOftenerThanItSays(Reflection):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        td.get(self.spec.keys.act_weight).mul_(0.5)
        return td


class HidesWhatItTook(Reflection):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        td.get(self.spec.keys.taken).zero_()
        return td


class TakesMaskedActions(Reflection):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        k = self.spec.keys
        forbidden = td.get(k.action_mask).long().argmin(-1)
        td.get(k.action).copy_(torch.where(td.get(k.taken), forbidden, td.get(k.action)))
        return td


class ActsForTheDead(Reflection):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        k, alive = self.spec.keys, td.get(self.spec.keys.alive).clone()
        lively = td.clone()
        lively.get(k.alive).fill_(True)
        super().forward(lively)
        assert alive.shape == lively.get(k.taken).shape
        for key in self.out_keys:
            if td.is_locked:
                td.get(key).copy_(lively.get(key))
            else:
                td.set(key, lively.get(key))
        return td


class DrawsFromTheGlobalGenerator(Reflection):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        if not self.greedy:
            torch.rand(())
        return super().forward(td)


BROKEN: list[tuple[type[Reflection], str]] = [
    (LooksAtThePolicysAction, "does what it says.*depend on the action that the policy chose"),
    (DrawsInEvaluation, "Forward changes nothing but out_keys"),
    (ActsByItsMode, "does what it says.*not distributed as memory's policy|how often memory acts"),
    (ActsOftenerThanItSays, "does what it says.*not how often memory acts"),
    (HidesWhatItTook, "does what it says.*changed where memory says that it took none"),
    (TakesMaskedActions, "Masked actions stay at zero.*an action is taken that is masked"),
    (ActsForTheDead, "Rows of dead agents.*acts on agents that are dead"),
    (DrawsFromTheGlobalGenerator, "does what it says.*global generator"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_operator_is_caught(broken: type[Reflection], message: str) -> None:
    spec = MASKED if broken is TakesMaskedActions else CONTINUOUS
    with pytest.raises(AssertionError, match=f"^{broken.__name__}, {spec.name}: .*{message}"):
        check_memory_operator(partial(broken, **SMALL), specs=(spec,), capacity=48, trainable=True)


ADAPTIVE = {"kappa_schedule": "adaptive", "members": 1, "lr": 1e-2}
"""κ is at least ½ then, and of what was drawn at random an ensemble is not that confident."""


@pytest.mark.parametrize("options", [ADAPTIVE, {"members": 3, "balance": 0.2}], ids=str)
def test_options_keep_the_contract(options: dict[str, Any]) -> None:
    check_memory_operator(partial(Reflection, **{**SMALL, **options}), specs=(MASKED,), capacity=48, trainable=True)
