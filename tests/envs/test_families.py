"""Every task family: PettingZoo's contract, TorchRL's contract, seeds; and the configs that name them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pettingzoo.test import parallel_api_test, parallel_seed_test
from torchrl.collectors import Collector
from torchrl.envs.utils import check_env_specs

from marl_memory_envs import classic, mpe, sisl
from marl_memory_envs.toy import MaskedDuel, Rendezvous
from marl_memory_envs.vector import vector_env

CONFIGS = Path(__file__).parents[2] / "configs" / "env"
FAMILIES = ("mpe", "classic", "box2d", "sisl", "mujoco", "mamujoco", "toy")
GENERIC = ("pettingzoo", "mamujoco/task")  # they ask for values
ADAPTER = "marl_memory_envs.vector.vector_env"  # tasks with a vector of their own have tests of their own
NAMES = sorted(
    name
    for folder in FAMILIES
    for path in (CONFIGS / folder).glob("*.yaml")
    if (name := str(path.relative_to(CONFIGS).with_suffix(""))) not in GENERIC
    and yaml.safe_load(path.read_text())["_target_"] == ADAPTER
)
VARIANTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "spread, continuous": (mpe.simple_spread, {"continuous_actions": True}),
    "spread, one reward": (mpe.simple_spread, {"local_ratio": 0.0}),
    "speaker, continuous": (mpe.simple_speaker_listener, {"continuous_actions": True}),
    "duel, unequal": (MaskedDuel, {"unequal": True, "common_reward": False}),
    "rendezvous, unequal": (Rendezvous, {"n_agents": 3, "unequal": True}),
    "multiwalker, going on without the fallen": (sisl.multiwalker, {"terminate_on_fall": False}),
}


def load(name: str) -> dict[str, Any]:
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert config.pop("_target_") == ADAPTER
    config.pop("defaults", None)
    return config


def require(module: str) -> None:
    for package, extra in import_module(module).REQUIRES.items():
        pytest.importorskip(package, reason=f"needs the extra {extra}")


def maker(name: str) -> Callable[[], Any]:
    if name in VARIANTS:
        require(VARIANTS[name][0].__module__)
        return partial(VARIANTS[name][0], **VARIANTS[name][1])
    config = load(name)
    module, _, attribute = config["factory"].partition(":")
    require(module)
    return partial(getattr(import_module(module), attribute), **config["kwargs"])


def build(name: str, n_envs: int = 3, seed: int = 0):
    maker(name)  # skips where the suite is not installed
    if name in VARIANTS:
        return vector_env(VARIANTS[name][0], n_envs=n_envs, seed=seed, kwargs=VARIANTS[name][1])
    return vector_env(**load(name), n_envs=n_envs, seed=seed)


LONG = ("box2d/car_racing",)
"""Tasks of some 10 ms a step."""

every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in (*NAMES, *VARIANTS)]
)


@every
def test_pettingzoo_contract(name: str) -> None:
    parallel_api_test(maker(name)(), num_cycles=60)
    parallel_seed_test(maker(name), num_cycles=30)


@every
def test_torchrl_contract(name: str) -> None:
    env = build(name)
    check_env_specs(env)
    assert all(env.full_observation_spec.is_in(env.reset()) for _ in range(2))


@every
def test_starts_differ_across_environments_and_repeat_with_the_seed(name: str) -> None:
    def starts(seed: int) -> torch.Tensor:
        env = build(name, n_envs=4, seed=seed)
        return torch.cat([env.reset()["agents", "observation"] for _ in range(3)]).flatten(1)

    first = starts(0)
    assert len(first.unique(dim=0)) == len(first)
    assert torch.equal(first, starts(0))
    assert not torch.equal(first, starts(1))


@every
def test_a_seeded_reset_forgets_what_was_before(name: str) -> None:
    """So that a run which is taken up at a reset in a new process goes on as the first one did."""

    def play(env: Any) -> Any:
        torch.manual_seed(0)
        env.set_seed(5)
        return env.rollout(60, break_when_any_done=False)

    used = build(name, n_envs=2)
    used.rollout(100, break_when_any_done=False)
    assert (play(used) == play(build(name, n_envs=2, seed=99))).all()


@every
def test_rollouts_repeat_with_the_seed_and_episodes_end_where_declared(name: str) -> None:
    def play() -> Any:
        torch.manual_seed(0)
        return build(name).rollout(60, break_when_any_done=False)

    data = play()
    assert (data == play()).all()
    after, limit = data["next"], build(name).task_spec.max_episode_steps
    assert torch.equal(after["done"], after["terminated"] | after["truncated"])
    assert not (after["terminated"] & after["truncated"]).any()
    if limit is not None and limit <= 60:
        assert after["done"].any(1).all()


@every
def test_a_thousand_steps(name: str) -> None:
    if name in VARIANTS:
        pytest.skip("one of each task is enough")
    torch.manual_seed(0)
    env = build(name, n_envs=1)
    after, limit = env.rollout(1000, break_when_any_done=False)["next"], env.task_spec.max_episode_steps
    assert after["agents", "observation"].isfinite().all()
    ends = [0, *(after["done"][0, :, 0].nonzero()[:, 0] + 1).tolist(), 1000]
    assert max(stop - start for start, stop in zip(ends, ends[1:], strict=False)) <= (limit or 1000)


def test_time_limits_are_the_environments_own() -> None:
    for name in ("mountain_car", "acrobot"):  # a random policy does not solve them
        config = load(f"classic/{name}")
        env = vector_env(**config, n_envs=1, seed=0)
        data = env.rollout(config["max_episode_steps"] + 5)
        assert data.shape[1] == config["max_episode_steps"]
        assert data["next", "truncated"][0, -1].item()


def test_mpe_state_is_all_observations_and_rewards_are_common_only_where_configured() -> None:
    pytest.importorskip("mpe2")
    env = build("mpe/simple_spread", n_envs=1)
    state = env.reset()["state"][0].numpy()
    assert not env.task_spec.own_state
    assert np.array_equal(env.envs[0].aec_env.state(), state)

    def apart(name: str) -> bool:
        torch.manual_seed(0)
        reward = build(name, n_envs=8).rollout(50, break_when_any_done=False)["next", "agents", "reward"]
        return bool((reward - reward[..., :1, :]).abs().max() > 1e-4)

    assert {name: apart(name) for name in NAMES if name.startswith("mpe/")} == {
        name: not load(name)["common_reward"] for name in NAMES if name.startswith("mpe/")
    }
    assert not apart("spread, one reward")


def test_toy_rewards_follow_their_argument() -> None:
    for common in (True, False):
        torch.manual_seed(0)
        kwargs = {"common_reward": common}
        env = vector_env(MaskedDuel, n_envs=8, seed=0, common_reward=common, kwargs=kwargs)
        reward = env.rollout(30, break_when_any_done=False)["next", "agents", "reward"]
        assert reward.max() > 0
        assert (reward[..., 0, :] == reward[..., 1, :]).all().item() is common


def test_duel_deaths_come_at_different_times_and_all_ends_occur() -> None:
    torch.manual_seed(0)
    env = vector_env(**load("toy/masked_duel"), n_envs=16, seed=0)
    after = env.rollout(100, break_when_any_done=False)["next"]
    assert (after["agents", "alive"].sum(-1) == 1).any()
    assert after["truncated"].any()
    assert after["success"].any()
    assert (after["terminated"] & ~after["success"]).any()


def test_rendezvous_can_be_met_and_a_forbidden_team_is_refused() -> None:
    env = vector_env(**load("toy/rendezvous"), n_envs=4, seed=0)
    td = env.reset()
    for _ in range(12):
        td["agents", "action"] = (td["agents", "observation"][..., 2:] * 5).clamp(-1, 1)
        done, td = env.step_and_maybe_reset(td)
        if done["next", "success"].any():
            break
    assert torch.equal(done["next", "success"], done["next", "terminated"])
    assert done["next", "success"].any()
    with pytest.raises(ValueError, match="n_agents=4 must be 2 or 3"):
        Rendezvous(n_agents=4)


def test_torchrl_collector_reads_it() -> None:
    env = vector_env(classic.cartpole, n_envs=4, seed=0)
    collector = Collector(env, env.rand_action, frames_per_batch=80, total_frames=160)
    batches = list(collector)
    assert [batch.shape for batch in batches] == [(4, 20)] * 2
    following, done = batches[0]["agents", "observation"][:, 1:], batches[0]["next", "done"][:, :-1, 0]
    after = batches[0]["next", "agents", "observation"][:, :-1]
    assert done.any()
    assert torch.equal(following[~done], after[~done])
    assert (following[done] != after[done]).any()
    collector.shutdown()


def test_every_config_lists_every_keyword() -> None:
    keywords = set(inspect.signature(vector_env).parameters) - {"n_envs", "seed"}
    for name in [*NAMES, *GENERIC]:
        config = load(name)
        assert set(config) == keywords
        assert name in GENERIC or config["name"] == name
    assert load("pettingzoo")["factory"] == "???"
