"""The benchmarks compare like with like: each plain baseline computes the same numbers with the same settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as table
from benchmarks import collection, spread, update
from benchmarks import plain_mappo as plain
from benchmarks.measure import PATIENCE, Row, calmest, ratio, turns
from marl_memory.functional.returns import gae
from marl_memory_envs.base import environment_seeds
from marl_memory_envs.vector import vector_env


def settings_of(optimiser: torch.optim.Optimizer) -> dict[str, object]:
    (group,) = optimiser.param_groups
    return {key: value for key, value in group.items() if key != "params"}


@pytest.mark.parametrize(("rows", "width"), [(64, 16), (512, 64)])
def test_minibatch_updates_are_the_same_computation(rows: int, width: int) -> None:
    ours, beside, td, data = update.pair(rows, width)
    assert settings_of(ours.optimiser) == settings_of(beside.optimiser)
    before = ours.actor.body.layers[0].weight.detach().clone()
    for _ in range(5):
        ours.update(ours.prepare(td))
        plain.gradient_step(beside, data)
    assert (ours.actor.body.layers[0].weight - before).abs().max() > 1e-3
    for network, copied in ((ours.actor, beside.actor), (ours.critic, beside.critic)):
        linears = [module for module in copied.modules() if isinstance(module, torch.nn.Linear)]
        for layer, linear in zip(network.body.layers, linears, strict=True):
            torch.testing.assert_close(layer.weight, linear.weight, atol=2e-5, rtol=1e-4)


def test_advantages_are_the_same_numbers() -> None:
    generator = torch.Generator().manual_seed(1)
    reward, value, next_value = torch.randn(3, 20, 4, 3, generator=generator)
    ends = torch.rand(20, 4, 3, generator=generator) < 0.1
    ours = gae(reward, value, next_value, 1.0 - ends.float(), ends, gamma=0.99, lam=0.95)
    beside = plain.advantages(reward, value, next_value, 1.0 - ends.float(), ends.float(), 0.99, 0.95)
    torch.testing.assert_close(ours, beside)


def test_the_raw_loop_steps_the_same_environments() -> None:
    arguments = collection.tasks()["CartPole"]
    env, beside = (vector_env(**arguments, n_envs=3, seed=0) for _ in range(2))
    actions = collection.random_actions(env, 40)
    env.set_seed(0)
    td = env.reset()
    for chosen in actions:
        td.set(env.task_spec.keys.action, chosen)
        _, td = env.step_and_maybe_reset(td)
    collection.raw_loop(beside.envs, actions.numpy(), environment_seeds(0, 3))
    states = [[one.env.unwrapped.state for one in side.envs] for side in (env, beside)]  # type: ignore[attr-defined]
    assert [list(state) for state in states[0]] == [list(state) for state in states[1]]


def test_simple_spread_is_trained_with_the_same_settings(tmp_path: Path) -> None:
    pytest.importorskip("mpe2", reason='needs the extra "mpe"')
    trainer = spread.mappo_trainer(tmp_path, 0)
    beside = spread.PlainMAPPO(trainer.algorithm, 0)  # type: ignore[arg-type]
    assert settings_of(trainer.algorithm.optimiser) == settings_of(beside.learner.optimiser)  # type: ignore[attr-defined]
    td = trainer.collector.current
    observation, state = td["agents", "observation"], td["state"]
    torch.testing.assert_close(
        trainer.algorithm.actor.distribution(td).loc,  # type: ignore[union-attr]
        beside.learner.actor(observation),
    )
    torch.testing.assert_close(trainer.algorithm.bootstrap_values(td), beside.learner.critic(state))
    trainer.close()


def test_every_row_has_a_bound_of_one_kind() -> None:
    limits = table.bounds()
    assert all(set(limit) <= {"least", "most"} and len(limit) == 1 for limit in limits.values())
    rows = [*update.advantages(1)]
    assert all(row.name in limits for row in rows)


def test_a_missed_bound_is_seen_and_the_median_counts() -> None:
    row = Row("x", [0.1, 3.0, 1.0])
    assert row.value == 1.0
    assert table.missed(row, {"most": 0.9})
    assert table.missed(row, {"least": 1.1})
    assert not table.missed(row, {"most": 1.0})
    assert "MISSED" in table.line(row, {"most": 0.9})


def test_what_misses_its_bound_is_measured_again() -> None:
    figures = {"slow": iter([2.0, 1.5, 0.9]), "fine": iter([0.5, 3.0, 3.0])}

    def measure(repeats: int) -> Iterator[Row]:
        yield from (Row(name, [next(values)] * repeats) for name, values in figures.items())

    limits, rows = {name: {"most": 1.0} for name in figures}, {}
    kept: list[list[float]] = []
    keep = lambda: kept.append([row.value for row in rows.values()])  # noqa: E731
    assert [table.take(measure, 3, limits, rows, keep) for _ in range(3)] == [True, True, False]
    assert kept[-1] == [row.value for row in rows.values()]
    assert (rows["slow"].value, rows["slow"].earlier) == (0.9, [2.0, 1.5])
    assert (rows["fine"].value, rows["fine"].earlier) == (0.5, [])


def test_turns_alternate() -> None:
    calls: list[str] = []
    timed = turns(lambda: calls.append("a"), lambda: calls.append("b"), 3, warm_up=1)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert 8 <= len(calls) <= 2 * (1 + 3 * PATIENCE)
    assert len(ratio("x", timed).values) == 3


def test_disturbed_turns_do_not_count() -> None:
    given = iter([5.0, 1.0, 9.0, 1.05, 1.2, 1.02, 8.0])
    assert calmest(lambda: next(given), float, 3) == ([1.0, 1.02, 1.05], "3 of 6")
    noisy = iter(range(1, 100))
    kept, words = calmest(lambda: next(noisy), float, 2)  # never calm: the shortest of all that were made
    assert (kept, words) == ([1, 2], f"2 of {2 * PATIENCE}")
