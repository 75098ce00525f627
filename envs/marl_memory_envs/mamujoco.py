"""MaMuJoCo of gymnasium-robotics: one MuJoCo body whose joints are divided among several agents with one reward.

Source: Peng et al., FACMAC: Factored Multi-Agent Centralised Policy Gradients, NeurIPS 2021, in the version of
gymnasium-robotics (``mamujoco_v1``), whose returns are not comparable with those of the original package.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gymnasium as gym
from pettingzoo import ParallelEnv

REQUIRES = {"gymnasium_robotics": "mamujoco", "mujoco": "mamujoco"}

FACTORISATIONS: dict[str, tuple[str, ...]] = {
    "Ant": ("2x4", "2x4d", "4x2"),
    "CoupledHalfCheetah": ("1p1",),
    "HalfCheetah": ("2x3", "6x1"),
    "Hopper": ("3x1",),
    "Humanoid": ("9|8",),
    "HumanoidStandup": ("9|8",),
    "InvertedDoublePendulum": (),
    "InvertedPendulum": (),
    "Pusher": ("3p",),
    "Reacher": ("2x1",),
    "Swimmer": ("2x1",),
    "Walker2d": ("2x3",),
}
"""Scenarios of a fixed body, and the ways in which its joints can be divided among agents."""

SEGMENTED = {"ManySegmentAnt": 1, "ManySegmentSwimmer": 2}
"""Scenarios whose body is built of N × M segments, M for each of N agents, and the fewest segments."""

CATEGORIES = ("qpos", "qvel")
"""What can be shown of the root joints: gymnasium-robotics adds nothing or breaks for others."""


def task(
    scenario: str,
    agent_conf: str | None,
    agent_obsk: int | None = 1,
    global_categories: Sequence[str] | None = CATEGORIES,
    render_mode: str | None = None,
    **kwargs: Any,
) -> ParallelEnv[str, Any, Any]:
    """One body whose joints belong to several agents; its state is the whole body's observation.

    All agents get the body's reward, and their episode ends together.  In CoupledHalfCheetah both agents are shown the
    *second* cheetah's joints: so it is in gymnasium-robotics 1.4.2, as in the original package.

    Args:
        scenario: the body: a key of `FACTORISATIONS` or `SEGMENTED`.
        agent_conf: how its joints are divided: one of ``FACTORISATIONS[scenario]``; for those of `SEGMENTED` ``"NxM"``,
            N agents with M segments each; None: one agent.
        agent_obsk: k, how many joints away an agent sees (0: only its own); None with one agent, who sees everything.
        global_categories: what every agent sees of the root joints, in this order, out of `CATEGORIES`; None with one
            agent, who sees everything.
        render_mode: what ``render()`` gives, as in Gymnasium.
        kwargs: of Gymnasium's environment, such as ``forward_reward_weight``.

    Raises:
        ValueError: for a scenario, factorisation, depth or category that does not exist, or options that change what
            is observed.
    """
    _check(scenario, agent_conf, agent_obsk, global_categories)
    _check_options(scenario, kwargs)
    suite = import_module("gymnasium_robotics.envs.multiagent_mujoco.mujoco_multi")
    body = _body(scenario, agent_conf, render_mode, kwargs)
    env = suite.MultiAgentMujocoEnv(
        scenario, agent_conf, agent_obsk=agent_obsk, global_categories=global_categories, gym_env=body
    )
    if agent_conf is not None:
        _order(env)
    env.render_mode, env.metadata = render_mode, {**env.metadata, **body.metadata}
    return env


def _order(env: Any) -> None:
    """Put the joints that an agent sees in one order: by label, then by action.

    gymnasium-robotics orders them by label, starting from a set; two of Pusher's joints bear one label, so that their
    order there would differ from one environment to the next.  In all other scenarios this changes nothing.
    """
    for distances in env.k_dicts:
        for joints in distances.values():
            joints.sort(key=lambda joint: (joint.label, joint.act_ids))


def _body(scenario: str, agent_conf: str | None, render_mode: str | None, kwargs: dict[str, Any]) -> gym.Env[Any, Any]:
    """The undivided environment.

    It is made here because gymnasium-robotics writes the segments' XML into its own folder, where two processes that
    start together overwrite and delete each other's file.
    """
    if scenario == "CoupledHalfCheetah":
        suite = import_module("gymnasium_robotics.envs.multiagent_mujoco.coupled_half_cheetah")
        return gym.wrappers.TimeLimit(suite.CoupledHalfCheetahEnv(render_mode), max_episode_steps=1000)
    options = {**kwargs, "render_mode": render_mode, "disable_env_checker": True}
    if scenario not in SEGMENTED:
        return gym.make(f"{scenario}-v5", **options)
    agents, each = map(int, str(agent_conf).split("x"))
    kind = scenario.removeprefix("ManySegment")
    segments = import_module(f"gymnasium_robotics.envs.multiagent_mujoco.many_segment_{kind.lower()}")
    with TemporaryDirectory() as folder:
        file = Path(folder) / "body.xml"
        segments.gen_asset(n_segs=agents * each, asset_path=str(file))
        return gym.make(f"{kind}-v5", xml_file=str(file), **options)


def _check(
    scenario: str, agent_conf: str | None, agent_obsk: int | None, global_categories: Sequence[str] | None
) -> None:
    if scenario not in FACTORISATIONS and scenario not in SEGMENTED:
        raise ValueError(
            f"scenario={scenario!r} does not exist; there are {_nearest([*FACTORISATIONS, *SEGMENTED], scenario)}"
        )
    if scenario in SEGMENTED:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(agent_conf))
        least = SEGMENTED[scenario]
        if not match or int(match[1]) * int(match[2]) < least:
            raise ValueError(
                f"agent_conf={agent_conf!r} does not divide {scenario}; right is 'NxM', N agents with M segments each "
                f"and at least {least} in all, such as '2x3'"
            )
    elif agent_conf is not None and agent_conf not in (known := FACTORISATIONS[scenario]):
        there = f"{_nearest(known, agent_conf)}, or null for one agent" if known else "only null, for one agent"
        raise ValueError(f"agent_conf={agent_conf!r} does not divide {scenario}; there is {there}")
    if agent_conf is None:
        if agent_obsk is not None or global_categories is not None:
            raise ValueError(
                f"agent_conf=None makes one agent that sees everything, but agent_obsk={agent_obsk!r} and "
                f"global_categories={global_categories!r}; set both to null too"
            )
        return
    if isinstance(agent_obsk, bool) or not isinstance(agent_obsk, int) or agent_obsk < 0:
        raise ValueError(f"agent_obsk={agent_obsk!r} must be a whole number of joints, 0 or more")
    given = global_categories
    if given is None or isinstance(given, str) or len(set(given)) < len(given) or not set(given) <= set(CATEGORIES):
        raise ValueError(
            f"global_categories={given!r} must be a list of some of {', '.join(CATEGORIES)}, each at most once"
        )


def _check_options(scenario: str, kwargs: dict[str, Any]) -> None:
    if scenario == "CoupledHalfCheetah" and kwargs:
        raise ValueError(f"{sorted(kwargs)} have no effect: CoupledHalfCheetah has no options; leave them out")
    if scenario in SEGMENTED and "xml_file" in kwargs:
        raise ValueError(f"xml_file={kwargs['xml_file']!r} has no effect: the body of {scenario} follows agent_conf")
    if fixed := sorted(key for key in kwargs if key.endswith("_observation")):
        raise ValueError(f"{fixed} change what is observed; in MaMuJoCo agent_obsk and global_categories say that")


def _nearest(names: Iterable[str], given: str) -> str:
    """``names`` in order of their likeness to ``given``."""

    def likeness(name: str) -> float:
        return SequenceMatcher(None, name.lower(), str(given).lower().replace("_", "")).ratio()

    return ", ".join(sorted(names, key=likeness, reverse=True))
