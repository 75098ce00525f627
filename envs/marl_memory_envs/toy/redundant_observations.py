"""A team whose agents all see the same, and should all do the same."""

from __future__ import annotations

import numpy as np

from marl_memory.spec import TaskSpec
from marl_memory_envs.toy.drawing import BLANK, PALETTE, enlarge
from marl_memory_envs.toy.rules import Copies, Draw, Moved, Rules, check_options, one_hot, pick
from marl_memory_envs.toy.shown import ToyEnv, ToyVector


class RedundantObservations(Rules):
    """At every step all agents see the same one of C contexts, and each has the same one right action in it.

    The team's reward is the share of agents whose action is right.  Which action is right is drawn once for each
    context (by a generator of fixed seed: every run has the same); the next context is drawn at random.  So what one
    agent finds out holds for all, and what it keeps to itself each of them must find out alone.  With probability
    ``noise`` an agent's action is replaced by a random one.  An agent sees the context as a one-hot code, ``[C]``; so
    does the state.

    Best expected return: ``max_steps``, 25; with noise ``max_steps · (1 − noise · (1 − 1/P))``, with ``noise=0.1`` 23.
    An episode is won if nobody was ever wrong.

    Args:
        n_agents: A.
        contexts: C.
        actions: P.
        noise: probability that an action is replaced.
        max_steps: the time limit.

    Raises:
        ValueError: for an option out of range.
    """

    def __init__(
        self, *, n_agents: int = 4, contexts: int = 32, actions: int = 5, noise: float = 0.0, max_steps: int = 25
    ) -> None:
        least = {"n_agents": (n_agents, 1), "contexts": (contexts, 1), "actions": (actions, 2)}
        check_options({**least, "max_steps": (max_steps, 1)}, {"noise": noise})
        self.right = np.random.default_rng(0).integers(actions, size=contexts)
        self.contexts, self.actions, self.noise = contexts, actions, noise
        self.spec = TaskSpec(
            name="toy/redundant_observations",
            agents=tuple(f"agent_{i}" for i in range(n_agents)),
            observation_sizes=(contexts,) * n_agents,
            action_sizes=(actions,) * n_agents,
            continuous=False,
            state_size=contexts,
            own_state=True,
            common_reward=True,
            has_success=True,
            max_episode_steps=max_steps,
        )

    def start(self, draw: Draw, n: int) -> Copies:
        """A context; nobody has acted yet (−1)."""
        played = np.full((n, self.spec.n_agents), -1)
        return {"context": pick(draw(1)[:, 0], self.contexts), "played": played, "flawless": np.ones(n, bool)}

    def move(self, copies: Copies, actions: np.ndarray, draw: Draw) -> Moved:
        """Everybody acts; then another context."""
        agents = self.spec.n_agents
        if self.noise:
            actions = np.where(draw(agents) < self.noise, pick(draw(agents), self.actions), actions)
        right = actions == self.right[copies["context"]][:, None]
        flawless = copies["flawless"] & right.all(1)
        after = {"context": pick(draw(1)[:, 0], self.contexts), "played": actions.copy(), "flawless": flawless}
        return Moved(after, right.mean(1), np.zeros(len(right), bool), flawless)

    def observe(self, copies: Copies) -> np.ndarray:
        """The context, the same for all, ``[N, A, C]``."""
        return np.repeat(one_hot(copies["context"], self.contexts)[:, None], self.spec.n_agents, axis=1)

    def state(self, copies: Copies) -> np.ndarray:
        """The context, ``[N, C]``."""
        return one_hot(copies["context"], self.contexts)

    def picture(self, copies: Copies) -> np.ndarray:
        """Above the right action, below it what each agent did at the last step."""
        played, right = copies["played"][0], self.right[copies["context"][0]]
        rows = [[PALETTE[right % len(PALETTE)]] * len(played)]
        rows.append([PALETTE[i % len(PALETTE)] if i >= 0 else BLANK for i in played])
        return enlarge(np.array(rows), 48)


def parallel_env(
    *,
    n_agents: int = 4,
    contexts: int = 32,
    actions: int = 5,
    noise: float = 0.0,
    max_steps: int = 25,
    render_mode: str | None = None,
) -> ToyEnv:
    """One `RedundantObservations` as a PettingZoo environment."""
    rules = RedundantObservations(
        n_agents=n_agents, contexts=contexts, actions=actions, noise=noise, max_steps=max_steps
    )
    return ToyEnv(rules, render_mode)


def vector_env(
    *,
    n_envs: int,
    seed: int,
    n_agents: int = 4,
    contexts: int = 32,
    actions: int = 5,
    noise: float = 0.0,
    max_steps: int = 25,
    group: str = "agents",
) -> ToyVector:
    """N copies of `RedundantObservations` as one environment; see `ToyVector` for the other arguments."""
    rules = RedundantObservations(
        n_agents=n_agents, contexts=contexts, actions=actions, noise=noise, max_steps=max_steps
    )
    return ToyVector(rules, n_envs, seed, group)
