"""Return memory: the mixture by hand, its two-term loss, what keys are, and which rows it leaves alone."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.keys import Keys
from marl_memory.memory.operator import Memory
from marl_memory.memory.return_memory import ReturnMemory
from marl_memory.spec import TaskSpec
from marl_memory.testing import check_memory_operator
from tests.memory.tasks import FIRST, SCOPES, normal, task

K = Keys()


def memory(spec: TaskSpec, **options: Any) -> ReturnMemory:
    sizes = {"capacity": 64 * spec.n_agents, "projection": None, "min_rows": 0, "gamma": 0.5}
    return ReturnMemory(spec=spec, **{**sizes, **options})


def rows(
    spec: TaskSpec,
    observation: Tensor,
    reward: Tensor | None = None,
    *,
    action: Tensor | None = None,
    alive: Tensor | None = None,
    number: Tensor | None = None,
    critics: int = 1,
) -> TensorDict:
    """Rows ``[B]`` with observations ``[B, A, F]``, each an episode of its own; value targets are 10."""
    b, a = observation.shape[:2]
    reward = torch.zeros(b, a) if reward is None else reward
    td = TensorDict(batch_size=(b,))
    for prefix, lives in (((), torch.ones(b, a, dtype=torch.bool)), (("next",), torch.zeros(b, a, dtype=torch.bool))):
        td.set((*prefix, *K.observation), observation.clone())
        td.set((*prefix, K.state), observation.flatten(1))
        td.set((*prefix, *K.alive), lives if alive is None or prefix else alive)
        if not spec.continuous:
            td.set((*prefix, *K.action_mask), torch.tensor(spec.action_valid).expand(b, -1, -1).clone())
    if action is None:
        action = torch.zeros(b, a, spec.action_size) if spec.continuous else torch.zeros(b, a, dtype=torch.int64)
    td.set(K.action, action)
    for key in (K.learn_reward, ("next", *K.reward)):
        td.set(key, reward.unsqueeze(-1))
    td.set(("next", *K.discount), torch.zeros(b, a, 1))
    td.set(("next", K.done), torch.ones(b, 1, dtype=torch.bool))
    td.set(("next", K.truncated), torch.zeros(b, 1, dtype=torch.bool))
    td.set(K.value_target, torch.full((b, a, critics), 10.0))
    if number is not None:
        td.set(K.row, number)
    return td


def no_values(td: TensorDictBase) -> Tensor:
    raise AssertionError("no episode was truncated, and a value is asked for")


def taught(operator: ReturnMemory, td: TensorDict) -> None:
    operator.write(td)
    operator.refresh(no_values)


def target(operator: ReturnMemory, td: TensorDict) -> Tensor:
    """``[B, A, C]`` after recall."""
    return operator(td.clone()).get(K.value_target)


def set_scale(operator: ReturnMemory, bandwidth: float) -> None:
    """Keys are compared as they are, with this h."""
    store = operator.trace.store
    store.scale.fill_(1.0)
    store._rescale()  # type: ignore[union-attr]
    store.bandwidth.fill_(bandwidth)  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("critics", [1, 2])
def test_the_mixture_by_hand(critics: int) -> None:
    """Returns 4 at (0.3, 0.4) and −2 at (0, 1); the query is at 0, h = 0.5, so that d² = 0.25 and 1."""
    operator = memory(task(), coefficient=0.2, strength=0.5)
    taught(operator, rows(operator.spec, torch.tensor([[[0.3, 0.4]], [[0.0, 1.0]]]), torch.tensor([[4.0], [-2.0]])))
    set_scale(operator, 0.5)
    near, far = math.exp(-0.25 / 0.5), math.exp(-1 / 0.5)
    recalled = (4 * near - 2 * far) / (near + far)
    found = target(operator, rows(operator.spec, torch.zeros(1, 1, 2), critics=critics))
    assert found.flatten().tolist() == pytest.approx([0.9 * 10 + 0.1 * recalled] * critics, rel=1e-6)
    metrics = operator.metrics(operator(rows(operator.spec, torch.zeros(1, 1, 2))))
    expected = {"rows": 2, "used": 1, "neighbours": 2, "effective_strength": 0.1, "recalled": recalled, "strength": 0.5}
    assert {name: metrics[name].item() for name in expected} == pytest.approx(expected)
    assert metrics["bytes"] == operator.bytes > 0


def test_only_the_k_nearest_count() -> None:
    operator = memory(task(), neighbours=1, coefficient=1.0)
    taught(operator, rows(operator.spec, torch.tensor([[[0.3, 0.4]], [[0.0, 1.0]]]), torch.tensor([[4.0], [-2.0]])))
    set_scale(operator, 0.5)
    assert target(operator, rows(operator.spec, torch.zeros(1, 1, 2))).item() == pytest.approx(4.0)


def test_a_task_with_few_states_is_remembered_as_soon_as_one_with_many() -> None:
    """Of returns of one state the highest stays: a task with few states never has ``min_rows`` rows."""
    operator = memory(task(), min_rows=16, coefficient=1.0)
    probe = rows(operator.spec, torch.zeros(1, 1, 2))
    for came, expected in ((8, 10.0), (16, 3.0)):
        taught(operator, rows(operator.spec, torch.zeros(8, 1, 2), torch.full((8, 1), 3.0)))
        assert (operator.trace.store.seen.item(), len(operator)) == (came, 1)
        assert target(operator, probe).item() == expected


def test_where_nothing_is_near_the_target_stays_to_the_last_bit() -> None:
    operator = memory(task(), coefficient=1.0)
    taught(operator, rows(operator.spec, torch.zeros(2, 1, 2) + torch.tensor([0.0, 0.1]).view(2, 1, 1)))
    set_scale(operator, 0.5)
    probe = rows(operator.spec, torch.tensor([[[0.0, 0.0]], [[1.4, 0.0]], [[1.7, 0.0]]]))
    probe.set(K.value_target, normal(3, 1, 1, seed=0))
    found = target(operator, probe)
    assert (found == probe.get(K.value_target)).flatten().tolist() == [False, False, True]  # 3h = 1.5


def test_the_target_has_the_gradient_of_the_two_term_loss() -> None:
    value, y, h = normal(6, seed=1).requires_grad_(), normal(6, seed=2), normal(6, seed=3)
    alpha = 0.3
    two = (1 - alpha) * (value - y).square() + alpha * (value - h).square()
    one = (value - torch.lerp(y, h, alpha)).square()
    (expected,), (found,) = (torch.autograd.grad(loss.sum(), value) for loss in (two, one))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((two - one).detach(), alpha * (1 - alpha) * (y - h).square())


def test_a_return_is_known_when_its_episode_ends_and_bootstraps_where_it_was_cut() -> None:
    operator = memory(task(), coefficient=1.0, neighbours=1)
    td = rows(operator.spec, torch.tensor([[[0.0, 0.0]], [[5.0, 0.0]]]), torch.tensor([[1.0], [2.0]]))
    td.get(("next", *K.discount)).fill_(1.0)
    td.get(("next", *K.alive))[0] = True
    td.get(("next", K.done))[0] = False
    td.get(("next", K.truncated))[1] = True
    operator.write(td[:1])
    operator.refresh(no_values)
    assert len(operator) == 0
    operator.write(td[1:])
    operator.refresh(lambda last: torch.full((len(last), 1, 1), 6.0))
    assert len(operator) == 2
    set_scale(operator, 0.5)
    assert target(operator, td).flatten().tolist() == pytest.approx([1 + 0.5 * (2 + 0.5 * 6), 2 + 0.5 * 6])


def test_of_equal_keys_the_best_return_stays_or_with_fifo_all() -> None:
    for policy, expected in (("best", 7.0), ("fifo", 3.0)):
        operator = memory(task(), policy=policy, coefficient=1.0, neighbours=3)
        for reward in (1.0, 7.0, 1.0):
            taught(operator, rows(operator.spec, torch.zeros(1, 1, 2), torch.tensor([[reward]])))
        assert len(operator) == (1 if policy == "best" else 3)
        assert target(operator, rows(operator.spec, torch.zeros(1, 1, 2))).item() == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------- keys, rows, scopes


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("continuous", [True, False])
def test_keys_hold_the_action_where_the_critic_does(continuous: bool, scope: str) -> None:
    spec = task(2, continuous=continuous)
    one, other = (
        (normal(1, 2, 2, seed=i).tanh() for i in (1, 2))
        if continuous
        else (torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    )
    for off_policy in (False, True):
        operator = memory(spec, off_policy=off_policy, scope=scope, coefficient=1.0, neighbours=1)
        assert operator.writes_on == ("collection" if off_policy else "update")
        assert (K.action in operator.in_keys) == off_policy
        here = torch.zeros(1, 2, 2)
        taught(operator, rows(spec, here, torch.ones(1, 2), action=one))
        set_scale(operator, 0.05)
        same = target(operator, rows(spec, here, action=one)).flatten()
        others = target(operator, rows(spec, here, action=other)).flatten()
        assert same.tolist() == [1.0, 1.0]
        assert others.tolist() == ([10.0, 10.0] if off_policy else [1.0, 1.0])


def test_a_row_of_the_replay_never_recalls_itself() -> None:
    """Neither as a row of its own, nor as the best of several that had its key."""
    spec = task()
    operator = memory(spec, off_policy=True, coefficient=1.0, neighbours=1)
    for number, reward in ((0, 1.0), (1, 5.0), (2, 3.0)):
        # The collected batch has no numbers: the memory counts as the replay does.
        taught(operator, rows(spec, torch.zeros(1, 1, 2), torch.tensor([[reward]])))
        found = target(operator, rows(spec, torch.zeros(3, 1, 2), number=torch.arange(3))).flatten().tolist()
        best = [1.0, 5.0, 5.0][number]
        assert found == [10.0 if i == [0, 1, 1][number] else best for i in range(3)]


def test_agents_recall_what_the_scope_says() -> None:
    spec = task(2)
    here = torch.tensor([[[0.0, 0.0], [3.0, 3.0]]])
    swapped = here.flip(1)
    expected = {
        "per_agent": ([1.0, 2.0], [10.0, 10.0]),
        "shared": ([1.0, 2.0], [2.0, 1.0]),
        "centralized": ([1.0, 2.0], [10.0, 10.0]),
    }
    for scope, (same, other) in expected.items():
        operator = memory(spec, scope=scope, coefficient=1.0, neighbours=1)
        taught(operator, rows(spec, here, torch.tensor([[1.0, 2.0]])))
        set_scale(operator, 0.5)
        assert target(operator, rows(spec, here)).flatten().tolist() == same
        assert target(operator, rows(spec, swapped)).flatten().tolist() == other


@pytest.mark.parametrize("scope", SCOPES)
def test_the_dead_are_neither_written_nor_changed(scope: str) -> None:
    spec, alive = task(2), torch.tensor([[True, False]])
    operator = memory(spec, scope=scope, coefficient=1.0)
    reward = torch.tensor([[1.0, torch.nan]])
    taught(operator, rows(spec, torch.zeros(1, 2, 2), reward, alive=alive))
    assert len(operator) == 1 and not operator.trace.store.rejected.any()
    found = target(operator, rows(spec, torch.zeros(1, 2, 2))).flatten().tolist()
    assert found == ([1.0, 1.0] if scope == "shared" else [1.0, 10.0])
    found = target(operator, rows(spec, torch.zeros(1, 2, 2), alive=alive)).flatten().tolist()
    assert found == [1.0, 10.0]


def test_what_is_not_finite_is_refused_and_counted() -> None:
    operator = memory(task())
    reward = torch.tensor([[1.0], [torch.nan], [torch.inf], [2.0]])
    taught(operator, rows(operator.spec, normal(4, 1, 2, seed=0), reward))
    assert len(operator) == 2 and int(operator.trace.store.rejected.sum()) == 2
    assert all(x.isfinite().all() for x in operator.trace.store.payload)


def test_shuffled_payloads_are_the_returns_of_other_rows() -> None:
    spec, here, reward = task(), normal(32, 1, 2, seed=0), torch.arange(32.0).view(32, 1)
    own, shuffled = (memory(spec, payloads=payloads, coefficient=1.0, neighbours=1) for payloads in ("own", "shuffled"))
    for operator in (own, shuffled):
        taught(operator, rows(spec, here, reward))
        set_scale(operator, 1e-3)
    assert torch.equal(target(own, rows(spec, here)).flatten(), reward.flatten())
    other = target(shuffled, rows(spec, here)).flatten()
    assert not torch.equal(other, reward.flatten()) and sorted(other.tolist()) == reward.flatten().tolist()


def test_a_reset_forgets_what_runs_and_keeps_what_ended() -> None:
    operator = memory(task())
    td = rows(operator.spec, normal(2, 1, 2, seed=0))
    td.get(("next", K.done))[1] = False
    taught(operator, td)
    operator.cut_episodes()
    assert len(operator) == 1 and operator.metrics(operator(td))["dropped"] == 1


def test_a_replay_keeps_what_is_recalled_and_not_what_is_written_of_the_collection() -> None:
    for scope, key in (("shared", K.observation), ("centralized", K.state)):
        reads = Memory([(scope, memory(task(2), scope=scope, off_policy=True))]).reads
        assert set(reads) == {key, K.alive, K.action}


# ------------------------------------------------------------------------------------------------- contract, bad input


@pytest.mark.parametrize("scope", FIRST)
@pytest.mark.parametrize(
    "options",
    [
        {"off_policy": True},
        {"off_policy": True, "policy": "fifo", "payloads": "shuffled"},
        {"projection": None, "half_life": 100.0},
        {"payloads": "shuffled"},
    ],
    ids=str,
)
def test_options_keep_the_contract(options: dict[str, Any], scope: str) -> None:
    check_memory_operator(partial(ReturnMemory, scope=scope, capacity=48, min_rows=1, **options), capacity=48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "merge"}, "policy='merge' must be one of best, fifo"),
        ({"coefficient": 1.5}, r"coefficient=1.5 must lie in \[0, 1\]"),
        ({"capacity": 0}, "capacity=0 must be positive"),
        ({"capacity": 2, "neighbours": 2}, "neighbours=2 are more than the 1 rows"),
        ({"neighbours": 0}, "neighbours=0 must be positive"),
        ({"projection": 0}, "projection=0 must be positive"),
        ({"half_life": 0.0}, "half_life=0.0 must be positive"),
        ({"budget": "half"}, "budget='half' must be 'total' or 'per_bank'"),
        ({"min_rows": -1}, "min_rows=-1 must not be negative"),
        ({"payloads": "none"}, "payloads='none' must be 'own' or 'shuffled'"),
        ({"scope": "nobody"}, "scope='nobody' must be one of"),
        ({"strength": 1.5}, "strength=1.5 must lie in"),
        ({"horizon": 0}, "horizon=0 must be positive"),
    ],
)
def test_bad_values_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReturnMemory(spec=task(2), **{"scope": "per_agent", **options})


def test_strength_follows_its_schedule() -> None:
    operator = memory(task(), coefficient=0.2, strength=1.0, strength_final=0.0, neighbours=1)
    taught(operator, rows(operator.spec, torch.zeros(1, 1, 2)))
    for progress, alpha in ((0.0, 0.2), (0.5, 0.1), (1.0, 0.0)):
        operator.set_progress(0, progress)
        assert target(operator, rows(operator.spec, torch.zeros(1, 1, 2))).item() == pytest.approx(10 * (1 - alpha))
