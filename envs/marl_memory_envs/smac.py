"""SMAC and SMACv2 on StarCraft II: N battles as one environment, each game beside a worker process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from marl_memory_envs import smac_install
from marl_memory_envs.smac_env import MEASURES, parallel_env, task_name
from marl_memory_envs.stepping import Processes
from marl_memory_envs.vector import VectorEnv

REQUIRES = {"smacv2": "smac", "pysc2": "smac"}
"""Packages this module needs beyond the core, and the extra of ``marl-memory`` that goes with them."""


def lacking() -> str:
    """What of all that SMAC needs is not here; empty if nothing."""
    names = [row.name for row in smac_install.examine() if not row.there]
    return f"{', '.join(names)} (marl-memory doctor)" if names else ""


def vector_env(
    *,
    map: str,
    n_envs: int,
    seed: int,
    game_version: str = smac_install.VERSION,
    difficulty: str = "7",
    timeouts: str = "truncate",
    step_timeout: float = 30.0,
    reset_timeout: float = 180.0,
    attempts: int = 5,
    capabilities: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    group: str = "agents",
) -> VectorEnv:
    """N battles on ``map`` as one environment, each in a worker process with a game of its own.

    Args:
        map: a map of SMAC (``3m``) or a scenario of SMACv2 (``terran_5_vs_5``).
        n_envs: N.
        seed: the run's seed, from which every game's own is derived.
        game_version: of StarCraft II.
        difficulty: of the game's own player: 1 (very easy) to 9 and A; published results are for 7 (very hard).
        timeouts, attempts: see `Smac`.
        step_timeout, reset_timeout: seconds after which a game counts as hanging, and is killed.
        capabilities: entries of smacv2's ``capability_config``, beside a scenario's own or in place of them.
        options: further keywords of smacv2's `StarCraft2Env`, as in ``{conic_fov: true}``.
        group: the agents' group in the TensorDict.

    Raises:
        ValueError: for an unknown map or value, or a game or map that is not where ``SC2PATH`` says.
        ImportError: if a package is missing.
        ChildProcessError: if a game can not be kept alive.
    """
    if n_envs < 1:
        raise ValueError(f"n_envs={n_envs} must be at least 1")
    smac_install.check(map, game_version)
    arguments = {
        "map": map,
        "game_version": game_version,
        "difficulty": difficulty,
        "timeouts": timeouts,
        "step_timeout": step_timeout,
        "reset_timeout": reset_timeout,
        "attempts": attempts,
        "capabilities": capabilities,
        "options": options,
    }
    label = f"{parallel_env.__module__}:{parallel_env.__name__}"
    processes = Processes(parallel_env, arguments, n_envs, workers=n_envs, label=label)
    try:
        envs = processes.environments()
        first = envs[0]
        n_actions = first.action_space(first.possible_agents[0]).n  # type: ignore[attr-defined]
        vector = VectorEnv(
            envs,
            name=task_name(map),
            common_reward=True,
            success="battle_won",
            measures=MEASURES,
            dropped="dropped",
            action_embedding=_action_embedding(int(n_actions)),
            max_episode_steps=first.metadata["episode_limit"],
            group=group,
            stepping="processes",
        )
    except BaseException:
        processes.close()
        raise
    vector.set_seed(seed)
    return vector


def _action_embedding(n_actions: int) -> tuple[tuple[float, ...], ...]:
    """Movements on the unit circle, no-op and stop at its centre, everything else on an axis of its own."""
    plane = ((0.0, 0.0), (0.0, 0.0), (0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0))
    rest = n_actions - len(plane)
    axes = tuple((0.0, 0.0, *(float(i == j) for j in range(rest))) for i in range(rest))
    return tuple((*point, *(0.0,) * rest) for point in plane) + axes
