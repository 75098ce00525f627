"""Toy tasks: both contracts, alone ≡ in a vector, saved state, pictures, and the best returns that docstrings state."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pettingzoo.test import parallel_api_test, parallel_seed_test
from tensordict import TensorDict
from torchrl.envs.utils import check_env_specs

from marl_memory_envs.base import environment_seeds
from marl_memory_envs.toy.chain import Chain, ContinuousChain
from marl_memory_envs.toy.cliff_walking import CliffWalking
from marl_memory_envs.toy.dark_chamber import DarkChamber
from marl_memory_envs.toy.four_rooms import FourRooms
from marl_memory_envs.toy.hidden_coupling import HiddenCoupling
from marl_memory_envs.toy.homogeneous_team import HomogeneousTeam
from marl_memory_envs.toy.redundant_observations import RedundantObservations
from marl_memory_envs.toy.rules import Rules, Streams, thermometer
from marl_memory_envs.toy.shown import Simulator, ToyEnv, ToyVector
from marl_memory_envs.vector import vector_env
from tests.envs.solve import best_return, optimal_values

CONFIGS = Path(__file__).parents[2] / "configs" / "env" / "toy"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem not in ("masked_duel", "rendezvous"))
TABULAR = (CliffWalking, FourRooms, DarkChamber, Chain)

every = pytest.mark.parametrize("name", NAMES)


def config(name: str) -> tuple[Any, dict[str, Any]]:
    """The module of a task, and its options."""
    options = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    module, _, function = options.pop("_target_").rpartition(".")
    assert function == "vector_env"
    return import_module(module), options


def vector(name: str, n_envs: int = 4, seed: int = 0) -> ToyVector:
    module, options = config(name)
    return module.vector_env(n_envs=n_envs, seed=seed, **options)


def single(name: str) -> Callable[..., ToyEnv]:
    module, options = config(name)
    del options["group"]
    return partial(module.parallel_env, **options)


def follow(env: Any, action: Callable[[TensorDict], torch.Tensor], steps: int) -> torch.Tensor:
    """``[N]``: the sum of the first agent's rewards over the first ``steps`` steps of a vector."""
    td, total = env.reset(), torch.zeros(env.n_envs)
    for _ in range(steps):
        td.set(("agents", "action"), action(td))
        stepped, td = env.step_and_maybe_reset(td)
        total += stepped["next", "agents", "reward"][:, 0, 0]
    return total


# ---- contracts -------------------------------------------------------------------------------------------------------


@every
def test_pettingzoo_contract(name: str) -> None:
    parallel_api_test(single(name)(), num_cycles=210)
    parallel_seed_test(single(name), num_cycles=30)


@every
def test_torchrl_contract(name: str) -> None:
    env = vector(name)
    check_env_specs(env)
    assert all(env.full_observation_spec.is_in(env.reset()) for _ in range(2))


@every
def test_a_vector_is_its_copies_bit_for_bit(name: str) -> None:
    """Every entry of 250 steps, resets included, equals that of a `VectorEnv` around single environments."""
    ours = vector(name, n_envs=5, seed=3)
    spec = ours.task_spec
    beside = vector_env(
        single(name),
        n_envs=5,
        seed=3,
        common_reward=spec.common_reward,
        success="success",
        max_episode_steps=spec.max_episode_steps,
    )
    td, other = ours.reset(), beside.reset()
    torch.manual_seed(0)
    ends = 0
    for _ in range(250):
        assert sorted(map(str, td.keys(True))) == sorted(map(str, other.keys(True)))
        assert (td == other).all()
        action = ours.rand_action()["agents", "action"]
        if name.startswith("chain"):  # random steps never reach the end: mostly to the right
            right = torch.rand(action.shape) < 0.9
            action = torch.where(right, 1, action.long()) if not spec.continuous else torch.where(right, 1.0, action)
        one, td = ours.step_and_maybe_reset(td.set(("agents", "action"), action))
        two, other = beside.step_and_maybe_reset(other.set(("agents", "action"), action))
        assert (one["next"] == two["next"]).all()
        ends += int(one["next", "done"].sum())
    assert ends > 0


@every
def test_what_was_handed_out_is_never_written_to(name: str) -> None:
    env = vector(name)
    td = env.reset()
    kept = []
    for _ in range(120):
        stepped, td = env.step_and_maybe_reset(env.rand_action(td))
        kept.append((stepped, stepped.clone()))
    assert all((now == then).all() for now, then in kept)


@every
def test_a_copy_does_not_depend_on_how_many_others_there_are(name: str) -> None:
    seeds = environment_seeds(0, 6)
    module, options = config(name)
    del options["group"]
    rules = module.parallel_env(**options).simulator.rules
    few, many = Simulator(rules, seeds[:2]), Simulator(rules, seeds)
    few.reset(), many.reset()
    action = vector(name, n_envs=6).rand_action()["agents", "action"].numpy()
    for _ in range(min(rules.spec.max_episode_steps, 10)):
        some, all_ = few.step(action[:2]), many.step(action)
        assert all(np.array_equal(a, b[:2]) for a, b in zip(some, all_, strict=True))


@every
def test_a_snapshot_continues_in_another_environment(name: str) -> None:
    torch.manual_seed(0)
    env, other = vector(name, seed=0), vector(name, seed=7)
    assert env.resumable
    env.rollout(37, break_when_any_done=False)
    saved = env.snapshot()
    td, again = env.restore(saved), other.restore(saved)
    assert (td == again).all()
    for _ in range(150):
        action = env.rand_action(td)["agents", "action"]
        _, td = env.step_and_maybe_reset(td)
        _, again = other.step_and_maybe_reset(again.set(("agents", "action"), action))
        assert (td == again).all()
    with pytest.raises(ValueError, match="of the snapshot is not"):
        vector(name, n_envs=3).restore(saved)


@every
def test_seeds_repeat_and_matter_where_there_is_chance(name: str) -> None:
    def play(seed: int) -> TensorDict:
        torch.manual_seed(0)
        return vector(name, seed=seed).rollout(60, break_when_any_done=False)

    first = play(0)
    assert (first == play(0)).all()
    chance = "noisy" in name or name in ("hidden_coupling", "redundant_observations", "homogeneous_team")
    assert (first == play(1)).all() is not chance
    observation = first["agents", "observation"]
    if name in ("hidden_coupling", "redundant_observations", "homogeneous_team"):
        assert len(observation[:, :5].flatten(1).unique(dim=0)) == len(observation)


@every
def test_pictures(name: str) -> None:
    env = single(name)(render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first is not None
    assert first.dtype == np.uint8
    assert first.ndim == 3 and first.shape[2] == 3 and max(first.shape) <= 500
    onward = np.ones(1, np.float32) if env.task_spec.continuous else 0 if "cliff" in name else 1
    for _ in range(3):
        env.step(dict.fromkeys(env.agents, onward))
    now = env.render()
    assert now is not None
    assert now.shape == first.shape
    assert (now != first).any()
    beside = vector(name, n_envs=2)
    beside.reset()
    assert beside.frames()[0].shape == first.shape
    assert single(name)().render() is None


@every
def test_configs_have_the_options_of_both_and_their_defaults(name: str) -> None:
    module, options = config(name)
    alone = inspect.signature(module.parallel_env).parameters
    together = inspect.signature(module.vector_env).parameters
    assert set(alone) - {"render_mode"} == set(together) - {"n_envs", "seed", "group"}
    for key in set(alone) - {"render_mode"}:
        assert alone[key].default == together[key].default
        changed = key in ("slip", "noise") and name.endswith("_noisy") or key == "continuous" and "continuous" in name
        changed |= key in ("length", "left_reward") and name.startswith("long")
        changed |= key == "length" and "continuous" in name  # steps of random size spread half as far
        assert (options[key] == alone[key].default) is not changed, key


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "options", "message"),
    [
        (CliffWalking, {"cliff": "ends"}, "cliff='ends' must be one of restart, terminate"),
        (FourRooms, {"start": "middle"}, "start='middle' must be one of corner, anywhere"),
        (FourRooms, {"slip": 1.0}, r"slip=1.0 must lie in \[0, 1\)"),
        (DarkChamber, {"noise": 0.2}, r"noise=0.2 must lie in \[0, 0.1\]"),
        (DarkChamber, {"glow": 0.0}, r"glow=0.0 must lie in \(0, 0.5\]"),
        (Chain, {"length": 0}, "length=0 must be a whole number, at least 1"),
        (ContinuousChain, {"max_steps": 2.5}, "max_steps=2.5 must be a whole number, at least 1"),
        (HiddenCoupling, {"n_agents": 1}, "n_agents=1 must be a whole number, at least 2"),
        (RedundantObservations, {"noise": -0.1}, r"noise=-0.1 must lie in \[0, 1\)"),
        (HomogeneousTeam, {"size": 1}, "size=1 must be a whole number, at least 2"),
    ],
)
def test_an_option_out_of_range_is_named(rules: Callable[..., Rules], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rules(**options)


def test_wrong_actions_and_calls_are_named() -> None:
    env = vector("chain", n_envs=2)
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.step(TensorDict({"agents": {"action": torch.zeros(2, 1, dtype=torch.int64)}}, batch_size=[2]))
    td = env.reset()
    for wrong in (2, -1):
        with pytest.raises(ValueError, match="toy/chain has 2, from 0"):
            env.step(td.set(("agents", "action"), torch.full((2, 1), wrong)))
    with pytest.raises(ValueError, match="takes \\(2, 1\\)"):
        env._step(TensorDict({"agents": {"action": torch.zeros(2, 2, dtype=torch.int64)}}, batch_size=[2]))
    real = vector("chain_continuous", n_envs=2)
    td = real.reset()
    for beyond in (1.5, math.nan):
        with pytest.raises(ValueError, match="takes −1 to 1"):
            real.step(td.set(("agents", "action"), torch.full((2, 1, 1), beyond)))
    alone = single("chain")()
    alone.reset()
    with pytest.raises(ValueError, match="action 5 of agent_0 is not in Discrete"):
        alone.step({"agent_0": 5})
    with pytest.raises(ValueError, match="render_mode='human' must be 'rgb_array' or None"):
        single("chain")(render_mode="human")
    with pytest.raises(ValueError, match="n_envs=0 must be at least 1"):
        vector("chain", n_envs=0)


# ---- the dynamics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slip", [0.0, 2 / 3])
def test_cliff_walking_is_gymnasiums(slip: float) -> None:
    """State by state and action by action; cells are numbered alike."""
    tables = CliffWalking(slip=slip).tables
    theirs: Any = gymnasium.make("CliffWalking-v1", is_slippery=slip > 0).unwrapped
    for cell, action in itertools.product(range(37), range(4)):  # no other is ever left
        ours: dict[tuple[int, float], float] = {}
        for successor, reward, odds in zip(
            tables.successors[cell, action], tables.rewards[cell, action], tables.odds, strict=True
        ):
            ours[int(successor), float(reward)] = ours.get((int(successor), float(reward)), 0.0) + odds
        given: dict[tuple[int, float], float] = {}
        for odds, successor, reward, _ in theirs.P[cell][action]:
            given[int(successor), float(reward)] = given.get((int(successor), float(reward)), 0.0) + odds
        assert ours == pytest.approx(given)


def test_a_fall_restarts_or_terminates() -> None:
    for cliff in ("restart", "terminate"):
        env = import_module("marl_memory_envs.toy.cliff_walking").parallel_env(cliff=cliff)
        start, _ = env.reset()
        seen, rewards, terminations, _, infos = env.step({"agent_0": 1})
        assert rewards["agent_0"] == -100
        assert terminations["agent_0"] is (cliff == "terminate")
        assert not infos["agent_0"]["success"]
        assert np.array_equal(seen["agent_0"], start["agent_0"]) is (cliff == "restart")


@pytest.mark.parametrize("rules", TABULAR)
@pytest.mark.parametrize("slip", [0.0, 0.3])
def test_steps_follow_the_tables(rules: Callable[..., Any], slip: float) -> None:
    """Random play: every observed step is an outcome of the tables, about as often as they say."""
    game = rules(slip=slip)
    tables, simulator = game.tables, Simulator(game, environment_seeds(0, 400))
    simulator.reset()
    generator, counts = np.random.default_rng(0), np.zeros(len(tables.odds))
    for _ in range(80):
        cell = simulator.copies["cell"]
        action = generator.integers(tables.successors.shape[1], size=(simulator.n, 1))
        seen = simulator.step(action)
        after = simulator.copies["cell"]
        fits = (tables.successors[cell, action[:, 0]] == after[:, None]) & (
            tables.rewards[cell, action[:, 0]].astype(np.float32) == seen.reward[:, None]
        )
        assert fits.any(1).all()
        counts += fits[fits.sum(1) == 1].sum(0)
        assert np.array_equal(seen.terminated, tables.terminal[after])
        assert np.array_equal(seen.success, (after == tables.goal) & simulator.over)
        if simulator.over.any():
            simulator.reset(simulator.over.nonzero()[0])
    if slip:
        plain = counts[0] / counts.sum()
        assert abs(plain - (1 - slip)) < 0.08  # outcomes that coincide are left out, so only roughly


@given(st.integers(1, 12), st.floats(0, 12))
def test_a_thermometer_adds_up_to_its_position(size: int, position: float) -> None:
    position = min(position, size)
    code = thermometer(np.array([position]), size)[0]
    assert code.sum() == pytest.approx(position, abs=1e-5)
    assert (np.diff(code) <= 0).all()


def test_the_chains_agree_at_whole_steps() -> None:
    for slip in (0.0, 0.3):
        discrete = Simulator(Chain(length=6, slip=slip, left_reward=0.1), environment_seeds(0, 50))
        real = Simulator(ContinuousChain(length=6, slip=slip, left_reward=0.1), environment_seeds(0, 50))
        discrete.reset(), real.reset()
        generator = np.random.default_rng(0)
        for _ in range(60):
            action = generator.integers(2, size=(50, 1))
            one, two = discrete.step(action), real.step((2.0 * action - 1)[..., None])
            assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
            if discrete.over.any():
                rows = discrete.over.nonzero()[0]
                discrete.reset(rows), real.reset(rows)


def test_a_real_step_moves_by_its_size_and_not_below_zero() -> None:
    env = import_module("marl_memory_envs.toy.chain").parallel_env(length=2, continuous=True)
    env.reset()
    act = lambda by: env.step({"agent_0": np.array([by], np.float32)})  # noqa: E731
    assert act(-0.5)[0]["agent_0"].tolist() == [0, 0]
    assert act(0.75)[0]["agent_0"].tolist() == [0.75, 0]
    assert act(0.5)[0]["agent_0"].tolist() == [1, 0.25]
    seen, rewards, terminations, *_ = act(1.0)
    assert (seen["agent_0"].tolist(), rewards["agent_0"], terminations["agent_0"]) == ([1, 1], 1.0, True)


def test_who_arrives_with_the_last_step_has_arrived() -> None:
    env = import_module("marl_memory_envs.toy.chain").vector_env(n_envs=2, seed=0, length=3, max_steps=3)
    td = env.reset()
    for _ in range(3):
        stepped, td = env.step_and_maybe_reset(td.set(("agents", "action"), torch.tensor([[1], [0]])))
    after = stepped["next"]
    for flag, expected in {"terminated": [1, 0], "truncated": [0, 1], "done": [1, 1], "success": [1, 0]}.items():
        assert after[flag][:, 0].tolist() == expected
    assert after["agents", "discount"].flatten().tolist() == [0, 1]


def test_two_pictures_of_the_dark_chamber_differ_in_eight_pixels_by_the_glow() -> None:
    views = DarkChamber().views[:, 0]
    apart = np.abs(views[:, None] - views[None])
    others = ~np.eye(len(views), dtype=bool)
    assert views.shape == (81, 324)
    assert ((apart > 1e-6).sum(-1)[others] == 8).all()
    assert apart.max() == pytest.approx(0.04)


def test_grain_changes_every_picture_within_its_bounds_and_hides_no_cell() -> None:
    rules = DarkChamber(noise=0.01)
    simulator = Simulator(rules, environment_seeds(0, 3))
    first = simulator.reset().observation
    assert np.array_equal(first, simulator.look().observation)
    for _ in range(5):
        simulator.step(np.zeros((3, 1), np.int64))  # up: into the wall
        seen, clean = simulator.look().observation, rules.views[simulator.copies["cell"]]
        assert 0.009 < (seen - clean).max() <= 0.01 + 1e-7
        assert 0.009 < (clean - seen).max() <= 0.01 + 1e-7
        assert (np.abs(seen[:, 0, None] - rules.views[None, :, 0]).sum(-1).argmin(1) == simulator.copies["cell"]).all()
    assert (seen != first).all(-1).any()


# ---- the best returns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "options", "best", "value"),
    [
        (CliffWalking, {}, -13.0, -12.248),
        (CliffWalking, {"slip": 0.1}, -23.29, -21.838),
        (CliffWalking, {"cliff": "terminate"}, -13.0, -12.248),
        (CliffWalking, {"cliff": "terminate", "slip": 0.1}, -22.06, -20.701),
        (FourRooms, {}, 1.0, 0.99**19),
        (FourRooms, {"slip": 0.1}, 1.0, 0.8066),
        (DarkChamber, {}, 1.0, 0.99**15),
        (DarkChamber, {"slip": 0.1}, 1.0, 0.8472),
        (Chain, {}, 1.0, 0.99**19),
        (Chain, {"slip": 0.1}, 1.0, 0.7874),
        (Chain, {"length": 60, "left_reward": 0.001}, 1.04, 0.99**59),
        (Chain, {"length": 60, "left_reward": 0.001, "slip": 0.1}, 1.0017, 0.4773),
    ],
)
def test_the_stated_optimum_is_the_solvers(
    rules: Callable[..., Any], options: dict[str, Any], best: float, value: float
) -> None:
    game = rules(**options)
    assert best_return(game.tables, game.spec.max_episode_steps) == pytest.approx(best, abs=5e-3)
    assert optimal_values(game.tables, 0.99).max(1)[game.tables.starts[0]] == pytest.approx(value, abs=5e-4)
    documented = " ".join((rules.__doc__ or "").split())
    for figure in (best, value):
        shown = f"{figure:.4f}".rstrip("0").rstrip(".").replace("-", "−")
        assert shown in documented, shown


@pytest.mark.parametrize("name", ["cliff_walking", "cliff_walking_noisy", "four_rooms_noisy", "chain_noisy"])
def test_the_solvers_policy_earns_the_optimum_when_played(name: str) -> None:
    """Played with the greedy policy of Q*, which is best up to the time limit's influence."""
    env = vector(name, n_envs=2000)
    game: Any = env.simulator.rules
    best, greedy = (
        best_return(game.tables, game.spec.max_episode_steps),
        optimal_values(game.tables, 1 - 1e-6).argmax(1),
    )
    simulator = env.simulator
    simulator.reset()
    total, going = np.zeros(env.n_envs), np.ones(env.n_envs, bool)
    for _ in range(game.spec.max_episode_steps):
        seen = simulator.step(greedy[simulator.copies["cell"]][:, None])
        total += np.where(going, seen.reward, 0.0)
        going &= ~simulator.over
        if simulator.over.any():
            simulator.reset(simulator.over.nonzero()[0])
    error = total.std() / math.sqrt(env.n_envs)
    assert abs(total.mean() - best) <= 4 * error + 1e-6


@pytest.mark.parametrize("slip", [0.0, 0.2])
def test_no_shorter_step_is_better_on_the_continuous_chain(slip: float) -> None:
    """Value iteration over positions and steps in quarters, against the discrete chain's Q*."""
    length, parts, gamma = 5, 4, 0.9
    x = np.arange(length * parts + 1)
    steps = np.arange(-parts, parts + 1)
    ahead, slipped = np.clip(x[:, None] + steps, 0, x[-1]), np.maximum(x - parts, 0)[:, None]
    values = np.zeros(len(x))
    for _ in range(400):
        worth = np.where(x == x[-1], 1.0, gamma * values)
        values = ((1 - slip) * worth[ahead] + slip * worth[slipped]).max(1)
    discrete = optimal_values(Chain(length=length, slip=slip).tables, gamma).max(1)
    assert values[::parts][:-1] == pytest.approx(discrete[:-1], abs=1e-9)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_best_code_of_the_hidden_coupling(noise: float) -> None:
    """Every joint policy of two agents with two hints, by enumeration: telling one-to-one and playing it is best."""
    tells = list(itertools.product(range(2), repeat=2))  # hint → number
    plays = list(itertools.product(range(2), repeat=4))  # own hint, number heard → action
    heard = np.array([[1 - noise / 2, noise / 2], [noise / 2, 1 - noise / 2]])  # told → shown

    def right(told: tuple[int, ...], play: tuple[int, ...], own: int, others: int) -> float:
        return sum(heard[told[others], shown] * (play[2 * own + shown] == others) for shown in range(2))

    best = max(
        sum(right(t2, p1, h1, h2) * right(t1, p2, h2, h1) for h1 in range(2) for h2 in range(2)) / 4
        for t1, t2, p1, p2 in itertools.product(tells, tells, plays, plays)
    )
    assert best == pytest.approx((1 - noise / 2) ** 2)
    # ... and played, by three agents with three hints
    module = import_module("marl_memory_envs.toy.hidden_coupling")
    env = module.vector_env(n_envs=2000, seed=0, n_agents=3, rounds=5, noise=noise)

    def truthful(td: TensorDict) -> torch.Tensor:
        hint, playing, told = td["agents", "observation"].split([3, 1, 3], -1)
        return torch.where(playing[..., 0] > 0, told.argmax(-1), hint.argmax(-1))

    total = follow(env, truthful, 10)
    assert abs(total.mean() - 5 * (1 - noise * 2 / 3) ** 3) <= 4 * total.std() / math.sqrt(2000)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_what_is_right_is_the_same_for_all_who_see_the_same(noise: float) -> None:
    module = import_module("marl_memory_envs.toy.redundant_observations")
    env = module.vector_env(n_envs=1000, seed=0, noise=noise)
    observation = env.reset()["agents", "observation"]
    assert (observation == observation[:, :1]).all()
    right = torch.from_numpy(env.simulator.rules.right)
    assert len(right.unique()) == 5
    total = follow(env, lambda td: right[td["agents", "observation"].argmax(-1)], 25)
    assert abs(total.mean() - 25 * (1 - noise * 4 / 5)) <= 4 * total.std() / math.sqrt(1000) + 1e-4


@pytest.mark.parametrize("name", ["redundant_observations", "hidden_coupling"])
def test_an_episode_with_one_mistake_is_not_won(name: str) -> None:
    env = vector(name, n_envs=3)
    rules, simulator = env.simulator.rules, env.simulator
    simulator.reset()
    for t in range(rules.spec.max_episode_steps):
        if name == "redundant_observations":
            action = np.repeat(rules.right[simulator.copies["context"]][:, None], 4, axis=1)
        else:
            copies = simulator.copies
            action = np.where(copies["playing"][:, None], np.roll(copies["told"], -1, axis=1), copies["hint"])
        if t == 7:  # in hidden_coupling the fourth time to play
            action[1, 0] = (action[1, 0] + 1) % rules.spec.action_size
        seen = simulator.step(action)
        assert not seen.success[:].any() or simulator.over.all()
    assert seen.success.tolist() == [True, False, True]


@pytest.mark.parametrize(("slip", "stated"), [(0.0, 17.76), (0.1, 17.404)])
def test_the_homogeneous_teams_best_return(slip: float, stated: float) -> None:
    """By dynamic programming over one agent's distance, and played; the same for any number of agents."""
    limit = 20
    values = np.zeros(9)
    for _ in range(limit):
        there = 1.0 + values[0]
        nearer = np.concatenate([[there], values[:-1]])
        nearer[1] = there  # from distance 1 onto the target
        values = np.concatenate([[there], (1 - slip) * nearer[1:] + slip * values[1:]])
    distances = [abs(a - b) + abs(c - d) for a, b, c, d in itertools.product(range(5), repeat=4)]
    best = float(values[distances].mean())
    assert best == pytest.approx(stated, abs=5e-3)
    assert f"{stated}" in (HomogeneousTeam.__doc__ or "")

    def straight(td: TensorDict) -> torch.Tensor:
        row, column, to_row, to_column = td["agents", "observation"].unflatten(-1, (4, 4)).sum(-1).unbind(-1)
        action = torch.where(to_row < row, 1, torch.where(to_row > row, 3, 0))
        return torch.where(to_column > column, 2, torch.where(to_column < column, 4, action))

    for agents in (1, 7):
        module = import_module("marl_memory_envs.toy.homogeneous_team")
        total = follow(module.vector_env(n_envs=2000, seed=0, n_agents=agents, slip=slip), straight, limit)
        assert abs(total.mean() - best) <= 4 * total.std() / math.sqrt(2000)


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_streams_are_uniform_and_independent_and_do_not_depend_on_how_they_are_drawn() -> None:
    streams = Streams(environment_seeds(0, 50))
    drawn = streams.draw(slice(None), 2000)
    assert drawn.min() >= 0 and drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # χ², 19 degrees of freedom, p = 0.001
    assert np.abs(np.corrcoef(drawn) - np.eye(50)).max() < 0.1
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.012
    again = Streams(environment_seeds(0, 50))
    rows = np.array([3, 4])
    pieces = [again.draw(rows, k) for k in (1, 7, 100)]
    assert np.array_equal(np.concatenate(pieces, axis=1), drawn[rows, :108])
    assert np.array_equal(again.draw(slice(None), 5)[0], drawn[0, :5])


def test_streams_are_splitmix64() -> None:
    """Against the published recurrence in Python's integers."""

    def published(seed: int, count: int) -> list[float]:
        wide, out = 2**64 - 1, []
        for _ in range(count + 1):
            seed = (seed + 0x9E3779B97F4A7C15) & wide
            z = seed
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wide
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wide
            out.append(z ^ (z >> 31))
        return out

    origin = published(12345, 0)[0]  # seeds are hashed once, so that near ones have streams far apart
    expected = [(z >> 11) * 2.0**-53 for z in published(origin, 4)[:4]]
    assert Streams([12345]).draw(slice(None), 4)[0].tolist() == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31 - 1), st.sampled_from(["chain_noisy", "dark_chamber_noisy", "hidden_coupling_noisy"]))
def test_a_reset_with_a_seed_forgets_what_was_before(seed: int, name: str) -> None:
    used, fresh = single(name)(), single(name)()
    used.reset(seed=1)
    for _ in range(3):
        used.step({agent: 1 for agent in used.agents})
    for env in (used, fresh):
        env.reset(seed=seed)
    for _ in range(5):
        answers = [env.step({agent: 1 for agent in env.agents}) for env in (used, fresh)]
        for agent, seen in answers[0][0].items():
            assert np.array_equal(seen, answers[1][0][agent])
