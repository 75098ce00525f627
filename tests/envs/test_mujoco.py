"""MuJoCo, divided (MaMuJoCo) and not: every scenario, what agents see, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchrl.envs.utils import check_env_specs

from marl_memory.cli import config_dir
from marl_memory_envs import mamujoco, mujoco
from marl_memory_envs.base import environment_seeds
from marl_memory_envs.vector import VectorEnv, vector_env

pytest.importorskip("mujoco", reason="needs the extra mujoco")

DIVIDED = [(scenario, conf) for scenario, known in mamujoco.FACTORISATIONS.items() for conf in known]
SEGMENTED = [("ManySegmentAnt", conf) for conf in ("1x1", "2x3", "4x1")]
SEGMENTED += [("ManySegmentSwimmer", conf) for conf in ("1x2", "2x1", "10x2")]
WHOLE = [(scenario, None) for scenario in mamujoco.FACTORISATIONS]
SINGLE = {
    "half_cheetah": "HalfCheetah-v5",
    "hopper": "Hopper-v5",
    "walker2d": "Walker2d-v5",
    "ant": "Ant-v5",
    "humanoid": "Humanoid-v5",
    "swimmer": "Swimmer-v5",
    "inverted_double_pendulum": "InvertedDoublePendulum-v5",
    "reacher": "Reacher-v5",
}


@pytest.fixture
def robotics() -> Any:
    return pytest.importorskip("gymnasium_robotics", reason="needs the extra mamujoco").mamujoco_v1


def options(scenario: str, conf: str | None, **kwargs: Any) -> dict[str, Any]:
    whole = {"agent_obsk": None, "global_categories": None} if conf is None else {}
    return {"scenario": scenario, "agent_conf": conf, **whole, **kwargs}


def build(scenario: str, conf: str | None, n_envs: int = 1, **kwargs: Any) -> VectorEnv:
    given = options(scenario, conf, **kwargs)
    return vector_env(mamujoco.task, n_envs=n_envs, seed=0, common_reward=True, kwargs=given)


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = compose("config", overrides=["run_folder=somewhere", *overrides])
    return OmegaConf.to_container(config.env, resolve=True)


@pytest.mark.parametrize(("scenario", "conf"), [*DIVIDED, *SEGMENTED, *WHOLE], ids=str)
def test_the_same_steps_as_gymnasium_robotics(robotics: Any, scenario: str, conf: str | None) -> None:
    """Observations, state, rewards and ends of 1000 steps are the suite's own, padded with zeros."""
    env = build(scenario, conf)
    check_env_specs(env)
    theirs = robotics.parallel_env(scenario, conf)
    env.set_seed(7)
    td, spec, rng = env.reset(), env.task_spec, np.random.default_rng(0)
    seen, _ = theirs.reset(seed=environment_seeds(7, 1)[0])
    assert spec.agents == tuple(theirs.possible_agents) and spec.own_state
    assert spec.state_size == theirs.state().size
    for agent, low, high in zip(spec.agents, spec.action_low or (), spec.action_high or (), strict=True):
        space = theirs.action_space(agent)
        assert (low[: space.shape[0]], high[: space.shape[0]]) == (tuple(space.low), tuple(space.high))
    for _ in range(1000):
        for row, size, agent in zip(td["agents", "observation"][0], spec.observation_sizes, spec.agents, strict=True):
            ours, expected = row[:size].numpy(), seen[agent].astype(np.float32)
            if scenario == "Pusher":  # the order of two of its joints changes there with every environment
                ours, expected = np.sort(ours), np.sort(expected)
            assert np.array_equal(ours, expected)
            assert not row[size:].any()
        assert np.array_equal(td["state"][0].numpy(), theirs.state().astype(np.float32))
        actions = {
            a: rng.uniform(s.low, s.high).astype(np.float32) for a in spec.agents if (s := theirs.action_space(a))
        }
        sent = np.zeros((1, spec.n_agents, spec.action_size), dtype=np.float32)
        for index, action in enumerate(actions.values()):
            sent[0, index, : len(action)] = action
        td["agents", "action"] = torch.from_numpy(sent)
        seen, rewards, terminated, truncated, _ = theirs.step(actions)
        done, td = env.step_and_maybe_reset(td)
        after = done["next"]
        assert after["agents", "reward"][0, :, 0].tolist() == [np.float32(rewards[a]) for a in spec.agents]
        assert after["terminated"].item() == terminated[spec.agents[0]]
        assert after["done"].item() == (terminated[spec.agents[0]] or truncated[spec.agents[0]])
        if after["done"].item():
            seen, _ = theirs.reset()


def test_every_factorisation_of_the_suite_is_known(robotics: Any) -> None:
    suite = sys.modules[robotics.get_parts_and_edges.__module__], sys.modules[robotics.parallel_env.__module__]
    graphs, main = (Path(str(module.__file__)).read_text() for module in suite)
    offered: dict[str, tuple[str, ...]] = {}
    for part in re.split(r"(?:el)?if label in ", graphs)[1:]:
        for scenario in re.findall(r'"(\w+)"', part.partition("]:")[0]):
            offered[scenario] = tuple(re.findall(r'partitioning == "([^"]+)"', part))
    bodies = re.findall(r'"(\w+)"', main.partition("_MUJOCO_GYM_ENVIROMENTS = [")[2].partition("]")[0])
    assert set(mamujoco.FACTORISATIONS) | set(mamujoco.SEGMENTED) == {*bodies, *offered}
    for scenario, known in mamujoco.FACTORISATIONS.items():
        assert set(known) == set(offered.get(scenario, ()))


def test_padding_is_marked(robotics: Any) -> None:
    spec = build("Pusher", "3p").task_spec
    assert (spec.observation_sizes, spec.action_sizes) == ((16, 13, 16), (3, 1, 3))
    assert [sum(row) for row in spec.observation_valid] == [16, 13, 16]
    assert [sum(row) for row in spec.action_valid] == [3, 1, 3]
    assert spec.action_high is not None and spec.action_high[1] == (2.0, 0.0, 0.0)


def test_pushers_joints_have_one_order(robotics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them bear one label; the suite takes them from a set, whose order follows their hashes."""
    node = sys.modules[robotics.get_parts_and_edges.__module__].Node
    for first, step in ((0, 1), (7, -1)):
        monkeypatch.setattr(node, "__hash__", lambda self, first=first, step=step: first + step * (self.act_ids or 0))
        after = build("Pusher", "3p", n_envs=2).rollout(3)["next"][:, -1]
        angles, state = after["agents", "observation"][:, 0, 0:6:2], after["state"]
        assert state[:, :3].unique().numel() == 6
        assert torch.equal(angles, state[:, [2, 0, 1]])  # by label, then by action


def test_a_fall_ends_the_return_of_all_and_the_time_limit_of_none(robotics: Any) -> None:
    torch.manual_seed(0)
    after = build("Hopper", "3x1").rollout(200)["next"][0, -1]
    assert after["terminated"].item() and not after["truncated"].item()
    assert not after["agents", "alive"].any() and not after["agents", "discount"].any()
    after = build("Reacher", "2x1").rollout(60)["next"][0]
    assert len(after) == 50
    assert after["truncated"][-1].item() and not after["terminated"].any()
    assert after["agents", "alive"].all() and after["agents", "discount"].all()


def test_agents_see_what_the_config_says(robotics: Any) -> None:
    def sizes(*overrides: str) -> tuple[int, ...]:
        given = composed("env=mamujoco/half_cheetah_6x1", *overrides)
        del given["_target_"]
        return vector_env(**given, n_envs=1, seed=0).task_spec.observation_sizes

    assert sizes() == (9, 9, 8, 9, 9, 8)
    assert sizes("env.kwargs.agent_obsk=0") == (7,) * 6  # own angle and velocity, and five of the root
    assert sizes("env.kwargs.agent_obsk=2") == (11, 10, 9, 11, 10, 9)
    assert sizes("env.kwargs.global_categories=[]") == (4, 4, 3, 4, 4, 3)
    assert sizes("env.kwargs.global_categories=[qvel]") == (7, 7, 6, 7, 7, 6)
    first, second = (
        build("HalfCheetah", "6x1", global_categories=order) for order in (["qpos", "qvel"], ["qvel", "qpos"])
    )
    first, second = (env.reset()["agents", "observation"][0, 0, -5:] for env in (first, second))
    assert torch.equal(torch.cat([first[2:], first[:2]]), second)


def test_the_generic_config_takes_any_scenario(robotics: Any) -> None:
    given = composed("env=mamujoco/task", "env.kwargs.scenario=Humanoid", "env.kwargs.agent_conf=9|8")
    assert given.pop("_target_") == "marl_memory_envs.vector.vector_env"
    spec = vector_env(**given, n_envs=1, seed=0).task_spec
    assert (spec.name, spec.n_agents, spec.action_sizes) == ("mamujoco/Humanoid_9|8", 2, (9, 8))
    with pytest.raises(OmegaConfBaseException, match=r"Missing mandatory value: env.kwargs.agent_conf"):
        composed("env=mamujoco/task", "env.kwargs.scenario=Humanoid")


def test_segments_leave_nothing_in_the_suites_folder(robotics: Any) -> None:
    assets = Path(str(sys.modules[robotics.parallel_env.__module__].__file__)).parent / "assets"
    before = assets.stat().st_mtime_ns
    env = build("ManySegmentAnt", "2x2", n_envs=2)
    assert env.task_spec.action_sizes == (8, 8)
    assert assets.stat().st_mtime_ns == before


def test_options_reach_the_body(robotics: Any) -> None:
    assert build("HalfCheetah", "2x3", reset_noise_scale=0.0).reset()["state"][0, :8].abs().max() == 0
    limited = build("ManySegmentSwimmer", "2x2", max_episode_steps=7)
    assert limited.rollout(20).shape[1] == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (options("half_cheetah", "2x3"), r"scenario='half_cheetah' does not exist; there are HalfCheetah, .*Swimmer"),
        (options("HalfCheetah", "2x4"), r"agent_conf='2x4' does not divide HalfCheetah; there is 2x3, 6x1, or null"),
        (options("Ant", "4x2d"), r"agent_conf='4x2d' .* there is 4x2, 2x4d, 2x4, or null for one agent"),
        (options("InvertedPendulum", "1x1"), "there is only null, for one agent"),
        (options("ManySegmentAnt", "10"), "agent_conf='10' does not divide ManySegmentAnt; right is 'NxM'"),
        (options("ManySegmentAnt", "2x0"), "agent_conf='2x0' does not divide"),
        (options("ManySegmentAnt", None), "agent_conf=None does not divide"),
        (options("ManySegmentSwimmer", "1x1"), "at least 2 in all"),
        (options("Ant", "2x4", agent_obsk=-1), "agent_obsk=-1 must be a whole number of joints"),
        (options("Ant", "2x4", agent_obsk=True), "agent_obsk=True must be a whole number"),
        (options("Ant", "2x4", agent_obsk=None), "agent_obsk=None must be a whole number"),
        (options("Ant", None, agent_obsk=1), "agent_obsk=1 and global_categories=None; set both to null too"),
        (
            options("Ant", "2x4", global_categories="qvel"),
            "global_categories='qvel' must be a list of some of qpos, qvel",
        ),
        (options("Ant", "2x4", global_categories=["qvle"]), "global_categories=.'qvle'. must be a list"),
        (options("Ant", "2x4", global_categories=["qvel", "qvel"]), "each at most once"),
        (options("CoupledHalfCheetah", "1p1", frame_skip=2), "'frame_skip'. have no effect"),
        (options("ManySegmentAnt", "2x2", xml_file="ant.xml"), "xml_file='ant.xml' has no effect"),
        (options("Ant", "2x4", include_cfrc_ext_in_observation=False), "change what is observed"),
    ],
)
def test_what_is_refused(robotics: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mamujoco.task(**given)


@pytest.mark.parametrize("name", SINGLE)
def test_the_same_steps_as_gymnasium(name: str) -> None:
    env = vector_env(getattr(mujoco, name), n_envs=1, seed=3)
    theirs, rng = gym.make(SINGLE[name]), np.random.default_rng(0)
    td, (seen, _) = env.reset(), theirs.reset(seed=environment_seeds(3, 1)[0])
    for _ in range(300):
        assert np.array_equal(td["agents", "observation"][0, 0].numpy(), seen.astype(np.float32))
        action = rng.uniform(theirs.action_space.low, theirs.action_space.high).astype(np.float32)
        td["agents", "action"] = torch.from_numpy(action).reshape(1, 1, -1)
        done, td = env.step_and_maybe_reset(td)
        seen, reward, terminated, truncated, _ = theirs.step(action)
        after = done["next"]
        assert after["agents", "reward"].item() == np.float32(reward)
        assert (after["terminated"].item(), after["truncated"].item()) == (terminated, truncated and not terminated)
        if terminated or truncated:
            seen, _ = theirs.reset()


@pytest.mark.parametrize(
    ("factory", "kwargs", "package", "extra"),
    [
        ("mujoco:ant", {}, "mujoco", "mujoco"),
        ("mujoco:ant", {}, "imageio", "mujoco"),
        ("mamujoco:task", options("Ant", "2x4"), "gymnasium_robotics", "mamujoco"),
    ],
)
def test_a_missing_suite_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, factory: str, kwargs: dict[str, Any], package: str, extra: str
) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs '{package}': pip install .marl-memory\[{extra}\]"):
        vector_env(f"marl_memory_envs.{factory}", n_envs=1, seed=0, kwargs=kwargs)


def test_importing_the_modules_imports_no_suite() -> None:
    code = (
        "import sys, marl_memory_envs.mujoco, marl_memory_envs.mamujoco, marl_memory_envs.sisl\n"
        "assert not {'mujoco', 'gymnasium_robotics', 'Box2D', 'pygame'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
