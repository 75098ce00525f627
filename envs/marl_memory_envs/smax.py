"""SMAX, JaxMARL's StarCraft-like battles: one battle as a PettingZoo `ParallelEnv`, and N stepped as one in JAX.

Both run the *same* jitted functions (`Simulator`), the first with N = 1, so they agree step by step.  Randomness:
every battle owns one key, ``PRNGKey(seed)`` at the start; each step and each reset splits it, keeps one half and uses
the other.
"""

from __future__ import annotations

import difflib
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.spec import TaskSpec
from marl_memory_envs.base import AgentsEnv, assemble, environment_seeds
from marl_memory_envs.smax_frames import frames_within, picture

REQUIRES = {"jaxmarl": "smax"}
"""Packages this module needs beyond the core, and the extra of ``marl-memory`` that installs each."""

STOP = 4
"""SMAX's action that does nothing; 0 to 3 move north, east, south and west, 5 + i attacks enemy i."""

ATTACK_MODES = ("closest", "random")

FLOATS = ("observation", "state", "reward", "discount")
BOOLS = ("action_mask", "alive", "done", "terminated", "truncated", "success")


def __getattr__(name: str) -> Any:
    if name == "MAPS":  # lazily: listing them imports JAX
        return tuple(_scenarios())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _jax() -> Any:
    """Import JAX for small CPU computations beside PyTorch, unless the process has set it up otherwise.

    Where JAX is not imported yet and the variables are not set: it runs on the CPU (``JAX_PLATFORMS=cpu``; elsewhere it
    would reserve most of a GPU's memory, which PyTorch needs) with one worker thread (``PJRT_NPROC=1``: a vector step
    is too small to share out, the other threads would only wait for it, and runs side by side would take each other's
    cores), and a call computes before it returns (nobody has anything to do meanwhile; a handover costs some 80 µs).
    """
    first = "jax" not in sys.modules
    if first:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("PJRT_NPROC", "1")
    streams = sys.stdout, sys.stderr
    try:
        import jax
        import jaxmarl  # noqa: F401
    except ImportError as error:
        raise ImportError('SMAX needs JaxMARL: pip install "marl-memory[smax]"') from error
    finally:  # importing JaxMARL points them at the terminal: a notebook, or whoever redirects output, would lose it
        sys.stdout, sys.stderr = streams
    if first:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    return jax


def _scenarios() -> dict[str, Any]:
    _jax()
    from jaxmarl.environments.smax.smax_env import MAP_NAME_TO_SCENARIO

    return MAP_NAME_TO_SCENARIO


@dataclass(frozen=True, kw_only=True)
class Options:
    """What distinguishes one SMAX task from another (JaxMARL's `HeuristicEnemySMAX`).

    Args:
        map: a map of SMAC or SMACv2, as in ``3m``, ``2s3z``, ``smacv2_5_units``.
        max_steps: JaxMARL's time limit.  It looks at the clock before it moves it on, so an episode that neither side
            wins lasts ``max_steps + 1`` steps.
        see_enemy_actions: whether an ally observes what visible enemies last did.
        walls_cause_death: whether a unit that touches the border of the field dies.
        enemy_shoots: whether enemies shoot back.
        attack_mode: which ally an enemy shoots at: ``closest`` or ``random``.
        won_battle_bonus: reward for a won battle, on top of at most 1 for all the enemies' health.

    Raises:
        ValueError: for an unknown map or attack mode, or a time limit below 1.
    """

    map: str
    max_steps: int = 100
    see_enemy_actions: bool = True
    walls_cause_death: bool = True
    enemy_shoots: bool = True
    attack_mode: str = "closest"
    won_battle_bonus: float = 1.0

    def __post_init__(self) -> None:
        maps = list(_scenarios())
        if self.map not in maps:
            near = ", ".join(difflib.get_close_matches(str(self.map), maps)) or "nothing"
            raise ValueError(f"map={self.map!r} is unknown; near it: {near}; all maps: {', '.join(maps)}")
        if self.attack_mode not in ATTACK_MODES:
            raise ValueError(f"attack_mode={self.attack_mode!r} must be one of {', '.join(ATTACK_MODES)}")
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps} must be at least 1")


class Simulator:
    """N battles of one task as pure jitted functions over a *carry* ``(keys, states)``, JAX pytrees with leading N.

    Get it from `simulator`, which shares one instance, and so its compiled functions, among all environments of a task.
    What the functions return is packed into two flat arrays, floats and bools, because every array that crosses to
    PyTorch costs some 10 µs; `unpack` gives them their names and shapes.
    """

    def __init__(self, options: Options) -> None:
        jax = _jax()
        from jaxmarl.environments.smax import HeuristicEnemySMAX

        arguments = asdict(options)
        self.game = HeuristicEnemySMAX(scenario=_scenarios()[arguments.pop("map")], **arguments)
        self.cpu = jax.devices("cpu")[0]
        self.spec = _task_spec(options, self.game)
        self._layouts: dict[tuple[int, int], Any] = {}
        self.start = jax.jit(jax.vmap(jax.random.PRNGKey))
        self.observe = jax.jit(self._observe)
        self.reset = jax.jit(self._reset)
        self.step = jax.jit(self._step)
        self.step_and_reset = jax.jit(self._step_and_reset)

    def keys(self, seeds: list[int]) -> Any:
        """``[N, 2]``: each battle's first key, on the CPU, which holds everything computed from it there too."""
        return _jax().device_put(self.start(np.asarray(seeds, dtype=np.uint32)), self.cpu)

    def blank(self, seeds: list[int]) -> Any:
        """A carry with new keys whose states are only placeholders: `reset` all of them before the first step."""
        keys = self.keys(seeds)
        jax = _jax()
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(self._new, keys)[1])
        # On the device like every later carry: where an input lives is part of what a function is compiled for.
        return keys, jax.device_put(zeros, self.cpu)

    def one(self, carry: Any) -> tuple[Any, Any]:
        """The key that battle 0's next step uses, and its state, without the leading N."""
        first = _jax().tree.map(lambda leaf: leaf[:1], carry)
        key, state = self._split(first[0])[1], first[1]
        return _jax().tree.map(lambda leaf: leaf[0], (key, state))

    def unpack(self, floats: Any, bools: Any, times: int = 1) -> list[dict[str, Tensor]]:
        """Name and shape the views of two packed arrays (no copy); each entry is contiguous.

        `step_and_reset` packs two ``times``: what the step showed, and what to act on; the others one.
        """
        layout = self._layouts.get((len(bools), times))
        if layout is None:
            layout = self._layouts[len(bools), times] = _layout(self.spec, len(bools) // times, times)
        entries: list[dict[str, Tensor]] = [{} for _ in range(times)]
        for array, (places, sizes) in zip((floats, bools), layout, strict=True):
            # JAX may compute in the background: PyTorch may look only at what is ready.
            parts = torch.from_dlpack(array.block_until_ready()).split_with_sizes(sizes)
            for (time, name, shape), part in zip(places, parts, strict=True):
                entries[time][name] = part.view(shape)
        return entries

    def _observe(self, carry: Any) -> tuple[Any, Any]:
        """What can be seen of the states as they are: packed floats and bools, rewards 0."""
        states = carry[1]
        return _pack(self._show(states, _jax().numpy.zeros(states.state.done.shape)))

    def _reset(self, carry: Any, which: Any) -> tuple[Any, Any, Any]:
        """Begin anew where ``which [N]`` holds; returns the carry and the packed floats and bools."""
        new = self._new(carry[0])
        carry = _jax().tree.map(lambda x, y: _where(which, x, y), new, carry)
        return carry, *self._observe(carry)

    def _step(self, carry: Any, actions: Any) -> tuple[Any, Any, Any]:
        """One step with ``actions [N, A]``; returns the carry and the packed floats and bools."""
        carry, shown = self._advance(carry, actions)
        return carry, *_pack(shown)

    def _step_and_reset(self, carry: Any, actions: Any) -> tuple[Any, Any, Any]:
        """A step, then a reset where an episode ended: the carry, and what the step showed with what to act on.

        Only a few battles end at a step: they begin anew a handful at a time, which is less work than all N with most
        of it thrown away.
        """
        jax = _jax()
        jnp = jax.numpy
        carry, shown = self._advance(carry, actions)
        n = len(shown["done"])
        slots = max(n // 16, 1)

        def begin_some(loop: Any) -> Any:
            carry, seen, waiting = loop
            rows = jnp.nonzero(waiting, size=slots, fill_value=n)[0]  # n: an empty slot, dropped below
            new = self._new(carry[0].at[rows].get(mode="clip"))
            put = lambda old, new: old.at[rows].set(new, mode="drop")  # noqa: E731
            carry, seen = jax.tree.map(put, (carry, seen), (new, self._show(new[1], jnp.zeros(slots))))
            return carry, seen, waiting.at[rows].set(False, mode="drop")

        carry, following, _ = jax.lax.while_loop(lambda loop: loop[2].any(), begin_some, (carry, shown, shown["done"]))
        return carry, *_pack(shown, following)

    def _new(self, keys: Any) -> Any:
        """A new battle for every key: the carry of its start."""
        keys, used = self._split(keys)
        return keys, _strong(_jax().vmap(self.game.reset)(used)[1])

    def _split(self, keys: Any) -> tuple[Any, Any]:
        """``[N, 2]`` twice: the keys to keep and the keys to use now."""
        pairs = _jax().vmap(_jax().random.split)(keys)
        return pairs[:, 0], pairs[:, 1]

    def _advance(self, carry: Any, actions: Any) -> tuple[Any, dict[str, Any]]:
        """One step with ``actions [N, A]``; returns the carry and what it shows."""
        jax = _jax()
        keys, used = self._split(carry[0])
        actions = jax.numpy.where(carry[1].state.unit_alive[:, : self.spec.n_agents], actions, STOP)
        by_name = {agent: actions[:, i] for i, agent in enumerate(self.spec.agents)}
        _, states, rewards, _, _ = jax.vmap(self.game.step_env)(used, carry[1], by_name)
        states = _strong(states)
        # A common reward: every ally gets the same, dead ones too.
        return (keys, states), self._show(states, rewards[self.spec.agents[0]])

    def _show(self, states: Any, reward: Any) -> dict[str, Any]:
        """Everything an environment shows of its ``states``, by name, each ``[N, …]``; ``reward [N]`` is the team's."""
        jax, a = _jax(), self.spec.n_agents
        jnp = jax.numpy
        unit_alive = states.state.unit_alive
        alive = unit_alive[:, :a]
        won = ~unit_alive[:, a:].any(-1) & alive.any(-1)
        terminated = ~unit_alive[:, a:].any(-1) | ~alive.any(-1)
        done = states.state.done
        acts = alive & ~terminated[:, None]  # or would act, had time not run out
        everyone = jax.vmap(self.game.get_obs)(states)
        avail = jax.vmap(self.game.get_avail_actions)(states)
        observation = jnp.stack([everyone[agent] for agent in self.spec.agents], 1)
        mask = jnp.stack([avail[agent] for agent in self.spec.agents], 1).astype(bool)
        nothing = jnp.arange(self.spec.action_size) == 0
        shape = (len(done), a)
        floats = {
            "observation": jnp.where(alive[..., None], observation, 0.0),
            "state": jax.vmap(self.game.get_world_state)(states),
            "reward": jnp.broadcast_to(reward[:, None], shape),
            "discount": jnp.broadcast_to(1.0 - terminated[:, None], shape),
        }
        bools = {
            "action_mask": jnp.where(acts[..., None], mask, nothing),
            "alive": acts, "done": done, "terminated": terminated, "truncated": done & ~terminated, "success": won,
        }  # fmt: skip
        return {name: entry.astype(jnp.float32) for name, entry in floats.items()} | bools


@cache
def simulator(options: Options) -> Simulator:
    """The one `Simulator` of a task, so that a second environment (for evaluation, say) compiles nothing again."""
    return Simulator(options)


class Smax(ParallelEnv):
    """One SMAX battle; the agents are the allies, the enemies follow JaxMARL's heuristic.

    An ally that dies is terminated and leaves ``agents``.  The reward is common.  ``infos[agent]["action_mask"]``
    (int8) are the allowed actions, of a dead ally only action 0 (which then does nothing); at the end
    ``infos[agent]["won"]`` tells whether all enemies are dead and an ally is alive.

    Args:
        map: the map's name; further keywords are those of `Options`.
        render_mode: ``rgb_array`` for pictures, or None.

    Raises:
        ValueError: for another ``render_mode``; see `Options` for the rest.
    """

    metadata = {"name": "smax", "render_modes": ["rgb_array"], "render_fps": 2, "is_parallelizable": True}

    def __init__(self, map: str, *, render_mode: str | None = None, **options: Any) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode={render_mode!r} must be 'rgb_array' or None")
        self.render_mode = render_mode
        self.simulator = simulator(Options(map=map, **options))
        spec = self.task_spec = self.simulator.spec
        self.possible_agents = list(spec.agents)
        self.agents: list[str] = []
        box = (-np.inf, np.inf)
        self.observation_spaces = {a: spaces.Box(*box, (spec.observation_size,), np.float32) for a in spec.agents}
        self.action_spaces = {a: spaces.Discrete(spec.action_size) for a in spec.agents}
        self.state_space = spaces.Box(*box, (spec.state_size,), np.float32)
        self._carry: Any = None

    def observation_space(self, agent: str) -> spaces.Space:
        """The agent's one space object."""
        return self.observation_spaces[agent]

    def action_space(self, agent: str) -> spaces.Space:
        """The agent's one space object."""
        return self.action_spaces[agent]

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        """Begin a battle; without a seed, continue the random stream (a first one is drawn from the system)."""
        if seed is not None or self._carry is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0] & 0x7FFFFFFF) if seed is None else seed
            self._carry = self.simulator.blank([seed])
        self._carry, floats, bools = self.simulator.reset(self._carry, np.ones(1, bool))
        self._seen = self._unpack(floats, bools)
        self.agents = list(self.possible_agents)
        return self._observations(self.agents), self._infos(self.agents)

    def step(self, actions: dict[str, int]) -> tuple[dict, dict, dict, dict, dict]:
        """One step with the actions of the agents alive."""
        for agent in self.agents:
            if not self.action_spaces[agent].contains(actions.get(agent)):
                raise ValueError(f"action {actions.get(agent)!r} of {agent} is not in {self.action_spaces[agent]}")
        acting = self.agents
        if not acting:
            return {}, {}, {}, {}, {}
        row = np.array([[actions[a] if a in acting else STOP for a in self.possible_agents]], np.int32)
        self._carry, floats, bools = self.simulator.step(self._carry, row)
        seen = self._seen = self._unpack(floats, bools)
        over, cut = bool(seen["terminated"][0]), bool(seen["truncated"][0])
        alive = dict(zip(self.possible_agents, seen["alive"].tolist(), strict=True))
        terminated = {agent: over or not alive[agent] for agent in acting}
        truncated = {agent: cut and alive[agent] for agent in acting}
        rewards = dict.fromkeys(acting, float(seen["reward"][0, 0]))
        infos = self._infos(acting)
        if over or cut:
            for agent in acting:
                infos[agent]["won"] = bool(seen["success"][0])
        self.agents = [agent for agent in acting if not (terminated[agent] or truncated[agent])]
        return self._observations(acting), rewards, terminated, truncated, infos

    def state(self) -> np.ndarray:
        """``[S]``: every unit's features, as JaxMARL's world state."""
        return self._seen["state"].copy()

    def render(self) -> np.ndarray | None:
        """The battle as it stands, ``[480, 480, 3]`` uint8; nothing without ``render_mode``."""
        if self.render_mode is None:
            return None
        return picture(self.simulator.game, self.simulator.one(self._carry)[1].state)

    def close(self) -> None:
        """Nothing to release."""

    def _unpack(self, floats: Any, bools: Any) -> dict[str, np.ndarray]:
        return {name: entry[0].numpy() for name, entry in self.simulator.unpack(floats, bools)[0].items()}

    def _observations(self, agents: list[str]) -> dict[str, np.ndarray]:
        index = self.possible_agents.index
        return {agent: self._seen["observation"][index(agent)].copy() for agent in agents}

    def _infos(self, agents: list[str]) -> dict[str, dict[str, Any]]:
        mask, index = self._seen["action_mask"].astype(np.int8), self.possible_agents.index
        return {agent: {"action_mask": mask[index(agent)]} for agent in agents}


class SmaxVector(AgentsEnv):
    """N SMAX battles stepped as one jitted JAX computation; tensors cross over dlpack without a copy.

    The entries are those of `marl_memory.keys.Keys`; no tensor handed out is ever written to again.  ``terminated``
    when a side is wiped out, ``truncated`` when time is up and neither is, ``success`` when all enemies are dead and
    an ally lives.  A dead ally has a zero observation, only action 0 allowed (what it does is ignored), and the common
    reward.

    Args:
        options: the task.
        n_envs: N.
        seed: the run seed, from which every battle's own seed is derived (`environment_seeds`).
        group: the agents' group in the TensorDict.
    """

    resumable = True
    frames_per_second = 16.0

    def __init__(self, options: Options, n_envs: int, seed: int, group: str = "agents") -> None:
        self.simulator = simulator(options)
        spec = replace(self.simulator.spec, group=group)
        super().__init__(spec, n_envs)
        self._carry = self.simulator.blank(environment_seeds(seed, n_envs))
        self._started = False
        self._drawn = False  # from the first call of `frames` on, a step keeps what it began with
        self._before: tuple[Any, np.ndarray] | None = None
        self._action_key = spec.keys.action
        self._agents_size = torch.Size((n_envs, spec.n_agents))

    def _set_seed(self, seed: int | None) -> None:
        """Derive every battle's key anew; battles under way go on from where they stand, until they are reset."""
        if seed is None:
            raise ValueError("seed=None: give an integer, from which the seeds of all battles are derived")
        self._carry = (self.simulator.keys(environment_seeds(seed, self.n_envs)), self._carry[1])

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDictBase:
        """Begin anew where ``_reset [N, 1]`` holds (everywhere without it); the others stay as they are."""
        which = None if tensordict is None else tensordict.get("_reset", None)
        chosen = np.ones(self.n_envs, bool) if which is None else which.reshape(self.n_envs).numpy()
        if not (self._started or chosen.all()):
            raise RuntimeError("the first reset must reset all environments; its _reset mask names only some")
        self._started = True
        if chosen[0]:
            self._before = None
        self._carry, floats, bools = self.simulator.reset(self._carry, chosen)
        return self._entries(*self.simulator.unpack(floats, bools), reward=False)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One step of every battle: the entries of time t + 1."""
        actions = self._actions(tensordict)
        if self._drawn:
            self._before = self._carry, actions
        self._carry, floats, bools = self.simulator.step(self._carry, actions)
        return self._entries(*self.simulator.unpack(floats, bools), reward=True)

    def step_and_maybe_reset(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """As in `AgentsEnv`, in one jitted call."""
        actions = self._actions(tensordict)
        if self._drawn:
            self._before = self._carry, actions
        self._carry, *packed = self.simulator.step_and_reset(self._carry, actions)
        shown, following = self.simulator.unpack(*packed, times=2)
        tensordict.set("next", self._entries(shown, reward=True))
        return tensordict, self._entries(following, reward=False)

    def frames(self) -> list[np.ndarray]:
        """Pictures of battle 0, ``[480, 480, 3]`` uint8: the 8 ticks of its last step; its state at the start, and
        at the first call.
        """
        game, agents = self.simulator.game, self.task_spec.agents
        self._drawn = True
        if self._before is None:
            return [picture(game, self.simulator.one(self._carry)[1].state)]
        carry, actions = self._before
        return frames_within(game, *self.simulator.one(carry), dict(zip(agents, actions[0], strict=True)))

    def snapshot(self) -> dict[str, Tensor]:
        """Keys and states of all battles, one tensor per leaf."""
        leaves = _jax().tree.leaves(self._carry)
        # uint32 (the keys) as int32 of the same bits: PyTorch knows few operations on unsigned integers.
        arrays = [np.array(leaf) for leaf in leaves]
        return {
            f"leaf_{i:02d}": torch.from_numpy(array.view(np.int32) if array.dtype == np.uint32 else array)
            for i, array in enumerate(arrays)
        }

    def restore(self, snapshot: dict[str, Tensor]) -> TensorDictBase:
        """Continue from a `snapshot`; returns the observations to act on.

        Raises:
            ValueError: for a snapshot of another task or another N.
        """
        jax = _jax()
        leaves, tree = jax.tree.flatten(self._carry)
        arrays = []
        for i, leaf in enumerate(leaves):
            saved = snapshot.get(f"leaf_{i:02d}")
            if saved is None or tuple(saved.shape) != leaf.shape or len(snapshot) != len(leaves):
                wanted = f"{self.task_spec.name} with n_envs={self.n_envs}"
                raise ValueError(f"leaf_{i:02d} of the snapshot is not {leaf.shape}: it is not of {wanted}")
            arrays.append(jax.device_put(saved.cpu().numpy().view(leaf.dtype).copy(), self.simulator.cpu))
        self._carry, self._started, self._before = jax.tree.unflatten(tree, arrays), True, None
        return self._entries(*self.simulator.unpack(*self.simulator.observe(self._carry)), reward=False)

    def _actions(self, tensordict: TensorDictBase) -> np.ndarray:
        """``[N, A]`` int32 (JAX has no int64 here)."""
        if not self._started:
            raise RuntimeError("step() before the first reset()")
        action = tensordict.get(self._action_key).numpy()
        if action.view(np.uint64).max() >= self.task_spec.action_size:  # a negative one reads as a huge one
            low, high = action.min(), action.max()
            raise ValueError(f"actions from {low} to {high}: there are {self.task_spec.action_size}, from 0")
        return action.astype(np.int32)

    def _entries(self, seen: dict[str, Tensor], *, reward: bool) -> TensorDict:
        names = ("observation", "action_mask", "alive", "discount") + (("reward",) if reward else ())
        group = assemble({name: seen[name] for name in names}, self._agents_size)
        rest = {name: seen[name] for name in ("state", "done", "terminated", "truncated", "success")}
        return assemble({self.task_spec.group: group, **rest}, self.batch_size)


def parallel_env(map: str, **options: Any) -> Smax:
    """One battle on ``map``; the keywords are those of `Options`."""
    return Smax(map, **options)


def vector_env(
    *,
    map: str,
    n_envs: int,
    seed: int,
    max_steps: int = 100,
    see_enemy_actions: bool = True,
    walls_cause_death: bool = True,
    enemy_shoots: bool = True,
    attack_mode: str = "closest",
    won_battle_bonus: float = 1.0,
    group: str = "agents",
) -> SmaxVector:
    """N battles on ``map`` as one environment; see `Options` for the task and `SmaxVector` for the rest."""
    options = Options(
        map=map,
        max_steps=max_steps,
        see_enemy_actions=see_enemy_actions,
        walls_cause_death=walls_cause_death,
        enemy_shoots=enemy_shoots,
        attack_mode=attack_mode,
        won_battle_bonus=won_battle_bonus,
    )
    return SmaxVector(options, n_envs, seed, group)


def _task_spec(options: Options, game: Any) -> TaskSpec:
    """The record of a task: movements embedded on the unit circle, stop at its centre, each attack on its own axis."""
    agents, enemies = tuple(game.agents), game.num_enemies
    moves = ((0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0), (0.0, 0.0))
    attacks = tuple((0.0, 0.0, *(float(i == j) for j in range(enemies))) for i in range(enemies))
    return TaskSpec(
        name=f"smax/{options.map}",
        agents=agents,
        observation_sizes=(game.obs_size,) * len(agents),
        action_sizes=(game.num_ally_actions,) * len(agents),
        continuous=False,
        state_size=game.state_size,
        own_state=True,
        common_reward=True,
        has_success=True,
        max_episode_steps=options.max_steps + 1,
        action_embedding=tuple((*move, *(0.0,) * enemies) for move in moves) + attacks,
    )


def _layout(spec: TaskSpec, n_bools: int, times: int) -> list[tuple[list[tuple[int, str, tuple[int, ...]]], list[int]]]:
    """Of the packed floats and of the packed bools: which of ``times`` each entry is of, its name, shape and size.

    ``n_bools`` is how many bools there are of one time.
    """
    a, p = spec.n_agents, spec.action_size
    n = n_bools // (a * p + a + 4)
    shapes: dict[str, tuple[int, ...]] = {
        "observation": (n, a, spec.observation_size),
        "state": (n, spec.state_size),
        "reward": (n, a, 1),
        "discount": (n, a, 1),
        "action_mask": (n, a, p),
        "alive": (n, a),
    }
    layout = []
    for names in (FLOATS, BOOLS):
        places = [(time, name, shapes.get(name, (n, 1))) for time in range(times) for name in names]
        layout.append((places, [math.prod(shape) for _, _, shape in places]))
    return layout


def _pack(*shown: dict[str, Any]) -> tuple[Any, Any]:
    """The entries as two flat arrays, in the order of `FLOATS` and of `BOOLS`, one of ``shown`` after the other."""
    join = _jax().numpy.concatenate
    floats, bools = (join([one[name].reshape(-1) for one in shown for name in names]) for names in (FLOATS, BOOLS))
    return floats, bools


def _where(which: Any, new: Any, old: Any) -> Any:
    """``new`` where ``which [N]`` holds, else ``old``; both ``[N, ...]``."""
    return _jax().numpy.where(which.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _strong(tree: Any) -> Any:
    """The same values without JAX's weak types: a step's states and a reset's are then one type, compiled for once."""
    jax = _jax()
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), tree)
