"""Collection beside the environments' own speed: the adapter's overhead, and what policy and storage leave of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from benchmarks.measure import Row, calmest, ratio, seconds, turns
from marl_memory.algorithms.ppo import PPO
from marl_memory.algorithms.td3 import TD3
from marl_memory.networks.mlp import MLP
from marl_memory.spec import TaskSpec
from marl_memory.training.collection import Collector
from marl_memory_envs.base import AgentsEnv, environment_seeds
from marl_memory_envs.vector import VectorEnv, vector_env

STEPS = 100


def tasks() -> dict[str, dict[str, Any]]:
    """The Python environments measured here, as arguments of `vector_env`."""
    return {
        "CartPole": {"factory": "marl_memory_envs.classic:cartpole"},
        "LunarLander": {"factory": "marl_memory_envs.box2d:lunar_lander"},
        "simple_spread": {"factory": "marl_memory_envs.mpe:simple_spread"},
        "HalfCheetah": {"factory": "marl_memory_envs.mujoco:half_cheetah"},
        "MaMuJoCo HalfCheetah 2x3": {
            "factory": "marl_memory_envs.mamujoco:task",
            "kwargs": {
                "scenario": "HalfCheetah",
                "agent_conf": "2x3",
                "agent_obsk": 1,
                "global_categories": ["qpos", "qvel"],
            },
            "common_reward": True,
        },
        "multiwalker": {"factory": "marl_memory_envs.sisl:multiwalker", "common_reward": True},
    }


class Timed:
    """A ParallelEnv whose `step` and `reset` book their seconds."""

    def __init__(self, env: Any) -> None:
        self.env, self.inside = env, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, actions: Any) -> Any:
        started = time.perf_counter()
        result = self.env.step(actions)
        self.inside += time.perf_counter() - started
        return result

    def reset(self, **options: Any) -> Any:
        started = time.perf_counter()
        result = self.env.reset(**options)
        self.inside += time.perf_counter() - started
        return result


def random_actions(env: AgentsEnv, steps: int) -> torch.Tensor:
    """``[steps, N, A]`` discrete actions that every environment allows, or ``[steps, N, A, P]`` continuous ones."""
    spec, generator = env.task_spec, torch.Generator().manual_seed(0)
    shape = (steps, env.n_envs, spec.n_agents)
    if not spec.continuous:
        return torch.randint(min(spec.action_sizes), shape, generator=generator)
    low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
    return low + (high - low) * torch.rand(*shape, spec.action_size, generator=generator)


def overheads(repeats: int) -> Iterator[Row]:
    """µs that a vector step of 16 takes over a raw loop of the same environments with the same actions.

    Of both only the time outside the environments' own `step` and `reset` is compared: these do the same in both, and
    their noise would be larger than the difference.
    """
    for name in ("CartPole", "LunarLander", "simple_spread"):
        env, beside = (vector_env(**tasks()[name], n_envs=16, seed=0) for _ in range(2))
        for vector in (env, beside):
            vector.envs[:] = [Timed(one) for one in vector.envs]  # type: ignore[list-item]
        actions, seeds = random_actions(env, STEPS), environment_seeds(0, 16)

        def ours(env: VectorEnv = env, actions: torch.Tensor = actions) -> None:
            env.set_seed(0)
            td = env.reset()
            for t in range(STEPS):
                td.set(env.task_spec.keys.action, actions[t])
                _, td = env.step_and_maybe_reset(td)

        raw = partial(raw_loop, beside.envs, actions.numpy(), seeds)
        ours(), raw()
        pairs, kept = calmest(partial(_outside_both, ours, env.envs, raw, beside.envs), _whole, repeats)
        values = [(mine - bare) / STEPS * 1e6 for (mine, _), (bare, _) in pairs]
        inside = statistics.median(within for (_, within), _ in pairs) / STEPS * 1e6
        details = {"environments": 16, "µs inside the environments": round(inside), "calm turns": kept}
        yield Row(f"overhead of a vector step, {name}", values, "µs", details)


Outside = tuple[tuple[float, float], tuple[float, float]]
"""Of ours and of the raw loop: seconds outside and inside the environments."""


def _outside_both(ours: Callable[[], None], our_envs: list[Any], raw: Callable[[], None], envs: list[Any]) -> Outside:
    return outside(ours, our_envs), outside(raw, envs)


def _whole(turn: Outside) -> float:
    return sum(map(sum, turn))


def outside(work: Callable[[], None], envs: list[Any]) -> tuple[float, float]:
    """Seconds of ``work`` outside and inside the `Timed` environments."""
    for one in envs:
        one.inside = 0.0
    whole = seconds(work)
    inside = sum(one.inside for one in envs)
    return whole - inside, inside


def acting(spec: TaskSpec) -> Callable[[TensorDictBase], TensorDictBase]:
    """What collects with an MLP of 2×64: PPO's actor, or TD3's and its noise."""
    body = partial(MLP, hidden=(64, 64))
    if not spec.continuous:
        return PPO(spec=spec, network=body, seed=0, share_parameters=True).actor
    behaviour = TD3(spec=spec, network=body, seed=0).behaviour
    behaviour.uniform = False
    return behaviour


def raw_loop(envs: list[Any], actions: np.ndarray, first_reset: list[int]) -> None:
    """The same environments, stepped one by one with nothing kept."""
    for env, seed in zip(envs, first_reset, strict=True):
        env.reset(seed=seed)
    for row in actions:
        for env, chosen in zip(envs, row, strict=True):
            env.step(dict(zip(env.agents, chosen, strict=False)))
            if not env.agents:
                env.reset()


def fractions(repeats: int) -> Iterator[Row]:
    """Raw / ours: the share of the raw speed that is left with an MLP policy and every entry stored.

    The policy is PPO's, and TD3's with noise where actions are continuous.
    """
    for name in ("LunarLander", "simple_spread", "HalfCheetah", "MaMuJoCo HalfCheetah 2x3", "multiwalker"):
        env, beside = (vector_env(**tasks()[name], n_envs=8, seed=0) for _ in range(2))
        collector = Collector(env, acting(env.task_spec), lambda td: None, steps=STEPS, learn_entries={}, seed=0)
        actions, seeds = random_actions(beside, STEPS).numpy(), environment_seeds(0, 8)
        timed = turns(partial(raw_loop, beside.envs, actions, seeds), collector.collect, repeats)
        yield ratio(f"collection, share of raw, {name}", timed, calls=STEPS, environments=8, width="2×64")


def toy(repeats: int) -> Iterator[Row]:
    """Environment steps a second of the slowest toy task, 16 environments, resets and adapter and all, no policy.

    Those with chance, which draw random numbers at every step; an absolute speed, so a busy machine lowers it.
    """
    modules = {"cliff_walking": "slip", "four_rooms": "slip", "chain": "slip", "dark_chamber": "slip"}
    modules |= {"hidden_coupling": "noise", "redundant_observations": "noise", "homogeneous_team": "slip"}
    found: dict[str, list[float]] = {}
    for name, chance in modules.items():
        env = import_module(f"marl_memory_envs.toy.{name}").vector_env(n_envs=16, seed=0, **{chance: 0.1})
        drawn, state = random_actions(env, STEPS), {"td": env.reset()}

        def turn(env: Any = env, drawn: Any = drawn, state: Any = state) -> float:
            def steps() -> None:
                for row in drawn:
                    state["td"].set(env.task_spec.keys.action, row)
                    _, state["td"] = env.step_and_maybe_reset(state["td"])

            return seconds(steps)

        taken, _ = calmest(turn, float, repeats)
        found[name] = [16 * STEPS / each / 1000 for each in taken]
    slowest = min(found, key=lambda name: statistics.median(found[name]))
    others = {name: f"{statistics.median(values):.0f}" for name, values in found.items() if name != slowest}
    yield Row(
        "toy tasks, the slowest's steps a second",
        found[slowest],
        "k",
        {"environments": 16, "slowest": slowest, **others},
    )


def smax(repeats: int) -> Iterator[Row]:
    """JaxMARL's own jitted step / ours with a policy: the share of the raw speed that is left."""
    import jax  # after it: marl_memory_envs.smax sets JAX up
    from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

    from marl_memory_envs.smax import vector_env as smax_env

    game = HeuristicEnemySMAX(scenario=map_name_to_scenario("3m"))
    for n in (64, 256):
        env = smax_env(map="3m", n_envs=n, seed=0)
        policy = PPO(spec=env.task_spec, network=partial(MLP, hidden=(64, 64)), seed=0, share_parameters=True).actor

        @jax.jit
        def step(carry: Any, actions: Any, n: int = n) -> Any:
            key, used = jax.random.split(carry[0])
            chosen = {agent: actions[:, i] for i, agent in enumerate(game.agents)}
            seen, states, *rest = jax.vmap(game.step)(jax.random.split(used, n), carry[1], chosen)
            return (key, states), seen, rest

        key = jax.random.PRNGKey(0)
        raw: dict[str, Any] = {"carry": (key, jax.vmap(game.reset)(jax.random.split(key, n))[1])}
        ours: dict[str, Any] = {"td": env.reset()}
        drawn = torch.randint(env.task_spec.action_size, (STEPS, n, 3), generator=torch.Generator().manual_seed(0))
        actions = drawn.to(torch.int32).numpy()

        def raw_steps(raw: Any = raw, step: Any = step, actions: Any = actions) -> None:
            for row in actions:
                raw["carry"], *seen = step(raw["carry"], row)
                jax.block_until_ready(seen)

        def our_steps(ours: Any = ours, policy: Any = policy, env: Any = env) -> None:
            for _ in range(STEPS):
                _, ours["td"] = env.step_and_maybe_reset(policy(ours["td"]))

        timed = turns(raw_steps, our_steps, repeats)
        yield ratio(f"SMAX 3m with a policy, share of raw, {n}", timed, calls=STEPS, environments=n, width="2×64")
