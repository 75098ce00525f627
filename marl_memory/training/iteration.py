"""One iteration of training: the way of the data, a line per arrow, on-policy and off-policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.algorithms.algorithm import OffPolicyAlgorithm, OnPolicyAlgorithm, derive_seed
from marl_memory.memory.operator import Memory, Stage
from marl_memory.training.clock import Clock
from marl_memory.training.collection import Collector, Episodes, TaskEnv, concatenate
from marl_memory.training.replay import ReplayRing

Losses = list[dict[str, Tensor]]
"""What each gradient step reported."""


@dataclass
class Report:
    """What an iteration tells: the episodes that ended, metrics, and what each gradient step reported."""

    episodes: Episodes
    metrics: dict[str, float]
    losses: Losses


class OnPolicyIteration:
    """Collect a batch with the present policy, learn from it, let it go.

    Args:
        algorithm, memory, env: see `Trainer`.
        steps: vector steps per batch.
        seed: the run's seed.
        clock: where the time of the environments is booked.

    Raises:
        ValueError: if batches of this size do not fit the learner.
    """

    def __init__(
        self, algorithm: OnPolicyAlgorithm, memory: Memory, env: TaskEnv, *, steps: int, seed: int, clock: Clock
    ) -> None:
        algorithm.check_batch(steps * env.n_envs)
        self.algorithm, self.memory = algorithm, memory
        self.collector = Collector(
            env,
            algorithm.actor,
            lambda td: memory.act(Stage.ACT, td),
            steps=steps,
            learn_entries=algorithm.learn_entries | memory.entries,
            seed=derive_seed(seed, "env", 0),
            clock=clock,
        )

    def __call__(self) -> Report:
        """Batch → REWARD → advantages, targets → TARGET → REGION, REPLAY → minibatch steps → write, refresh, learn."""
        memory, algorithm = self.memory, self.algorithm
        batch, episodes = self.collector.collect()  # env → policy → ACT → env
        memory.write("collection", batch)

        algorithm.derive_rewards(batch)
        memory.act(Stage.REWARD, batch)
        metrics = algorithm.compute_advantages(batch)
        memory.act(Stage.TARGET, batch)
        memory.act(Stage.REGION, batch)
        memory.act(Stage.REPLAY, batch)
        for stage in (Stage.ACT, Stage.REWARD, Stage.TARGET, Stage.REGION, Stage.REPLAY):
            metrics |= {key: value.item() for key, value in memory.metrics(stage, batch).items()}
        losses = [algorithm.update(minibatch) for minibatch in algorithm.minibatches(batch)]
        algorithm.finish_update(batch)

        memory.write("update", batch)
        memory.refresh(algorithm.bootstrap_values)
        metrics |= memory.learn()
        return Report(episodes, metrics, losses)

    def cut_episodes(self) -> None:
        """The environments are reset."""
        self.algorithm.cut_episodes()
        self.memory.cut_episodes()

    def save_parts(self, add: Callable[[str, bytes], str]) -> dict[str, str]:
        """Nothing is kept beside the state."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing outlives an iteration but what algorithm, memory and collector hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], parts: Iterable[Mapping[str, Any]]) -> None:
        """The inverse of `state_dict`."""


class LentSteps:
    """The replay's steps as operators are lent them: with the rewards that learning sees (`Steps`).

    Args:
        replay: whose steps.
        algorithm, memory: which derive and add to rewards.
    """

    def __init__(self, replay: ReplayRing, algorithm: OffPolicyAlgorithm, memory: Memory) -> None:
        self.replay, self.algorithm, self.memory = replay, algorithm, memory
        self.n_envs, self.ends_between = replay.n_envs, replay.ends_between

    @property
    def written(self) -> int:
        """See `Steps`."""
        return self.replay.written

    @property
    def oldest(self) -> int:
        """See `Steps`."""
        return self.replay.oldest

    def block(self, first: int, last: int) -> TensorDictBase:
        """See `ReplayRing.block`; then `derive_rewards` and the operators of REWARD."""
        td = self.replay.block(first, last)
        self.algorithm.derive_rewards(td)
        self.memory.act(Stage.REWARD, td)
        return td


class OffPolicyIteration:
    """Collect into a replay and learn from rows drawn from it, in turns of a few vector steps.

    Args:
        algorithm, memory, env: see `Trainer`.
        steps: vector steps per iteration, a multiple of ``algorithm.train_every``.
        seed: the run's seed.
        clock: where the time of the environments is booked.
        folder: where the replay lies if ``algorithm.storage`` is ``memmap``.

    Raises:
        ValueError: if steps, replay and environments do not fit each other.
    """

    def __init__(
        self,
        algorithm: OffPolicyAlgorithm,
        memory: Memory,
        env: TaskEnv,
        *,
        steps: int,
        seed: int,
        clock: Clock,
        folder: Path,
    ) -> None:
        settings = algorithm.replay
        if steps % settings.train_every:
            raise ValueError(
                f"training.steps={steps} must be a multiple of algorithm.train_every={settings.train_every}"
            )
        if settings.capacity < settings.train_every * env.n_envs:
            raise ValueError(
                f"algorithm.capacity={settings.capacity} must hold what is collected between updates, "
                f"algorithm.train_every={settings.train_every} × training.n_envs={env.n_envs}"
            )
        self.algorithm, self.memory, self.turns = algorithm, memory, steps // settings.train_every
        self.collector = Collector(
            env,
            algorithm.behaviour,
            lambda td: memory.act(Stage.ACT, td),
            steps=settings.train_every,
            learn_entries={},
            seed=derive_seed(seed, "env", 0),
            clock=clock,
            ended=algorithm.behaviour.episodes_ended,
        )
        self.replay = ReplayRing(
            capacity=settings.capacity,
            n_envs=env.n_envs,
            batch_size=settings.batch_size,
            entries=list(dict.fromkeys([*algorithm.replay_keys, *memory.reads])),
            learn_entries=algorithm.learn_entries | memory.entries,
            keys=env.task_spec.keys,
            seed=derive_seed(seed, "replay"),
            frame_stack=env.task_spec.frame_stack if env.task_spec.picture else None,
            folder=folder if settings.storage == "memmap" else None,
        )
        self.lent = LentSteps(self.replay, algorithm, memory)
        self.parts: dict[str, str] = {}
        """Files that hold the replay's steps, oldest first, and their checksums."""
        self.saved = 0
        """Vector steps that are in them."""

    def __call__(self) -> Report:
        """``turns`` times: env → policy → ACT → env, into the replay; then the updates that are due.  Then learn."""
        episodes, losses = [], []
        for _ in range(self.turns):
            self.algorithm.behaviour.uniform = self.frames < self.algorithm.replay.warmup_frames
            batch, ended = self.collector.collect()
            self.replay.extend(batch)
            losses.append(self.memory.metrics(Stage.ACT, batch))
            self.memory.write("collection", batch)
            self.memory.refresh(self.algorithm.bootstrap_values, self.lent)
            episodes.append(ended)
            losses += [self.update(self.replay.draw()) for _ in range(self._updates_due())]
        return Report(concatenate(episodes), {"replay/rows": len(self.replay), **self.memory.learn()}, losses)

    def update(self, rows: TensorDictBase) -> dict[str, Tensor]:
        """Draw → REWARD → targets → TARGET → critic step → action gradient → GRADIENT → actor step → write."""
        memory, algorithm = self.memory, self.algorithm
        algorithm.derive_rewards(rows)
        memory.act(Stage.REWARD, rows)
        algorithm.compute_targets(rows)
        memory.act(Stage.TARGET, rows)
        report = algorithm.update_critic(rows)
        report |= memory.metrics(Stage.REWARD, rows) | memory.metrics(Stage.TARGET, rows)
        if algorithm.actor_is_due:
            algorithm.compute_action_gradient(rows)
            memory.act(Stage.GRADIENT, rows)
            report |= algorithm.update_actor(rows) | memory.metrics(Stage.GRADIENT, rows)
            algorithm.update_targets()
            memory.write("update", rows)
        return report

    @property
    def frames(self) -> int:
        """Frames collected since the run began."""
        return self.replay.written * self.replay.n_envs

    def _updates_due(self) -> int:
        """Updates that the frames since the warm-up call for, and that were not made yet."""
        settings = self.algorithm.replay
        learnt_from = max(self.frames - settings.warmup_frames, 0)
        return int(learnt_from * settings.updates_per_frame) - self.algorithm.updates

    def cut_episodes(self) -> None:
        """The environments are reset."""
        self.algorithm.cut_episodes()
        self.replay.cut_episodes()
        self.memory.cut_episodes()

    def save_parts(self, add: Callable[[str, bytes], str]) -> dict[str, str]:
        """Write the steps since the last time through ``add(name, bytes)``, which returns a checksum.

        Returns:
            names and checksums of all parts in which the replay lies, oldest first.
        """
        replay = self.replay
        oldest = replay.oldest
        if replay.written > self.saved:
            first = max(self.saved, oldest)
            name = f"steps_{first:012d}_{replay.written:012d}.pt"
            self.parts[name] = add(name, replay.part(first))
            self.saved = replay.written
        self.parts = {name: sha for name, sha in self.parts.items() if int(name[19:31]) > oldest}
        return self.parts

    def state_dict(self) -> dict[str, Any]:
        """The replay's counters, and which parts its rows lie in."""
        return {"replay": self.replay.state_dict(), "parts": dict(self.parts), "saved": self.saved}

    def load_state_dict(self, state: Mapping[str, Any], parts: Iterable[Mapping[str, Any]]) -> None:
        """The inverse of `state_dict`."""
        self.parts, self.saved = dict(state["parts"]), state["saved"]
        self.replay.load_state_dict(state["replay"], parts)
