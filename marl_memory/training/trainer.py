"""The training loop: collect, let memory act, learn, write, log; and stop and resume exactly."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from marl_memory.algorithms.algorithm import Algorithm, derive_seed
from marl_memory.memory.operator import Memory, Stage
from marl_memory.training.checkpoint import CheckpointFolder, Kind, NotWrittenError, check_state
from marl_memory.training.clock import Clock, collecting_and_learning
from marl_memory.training.collection import Collector, TaskEnv
from marl_memory.training.evaluation import evaluate
from marl_memory.training.logging import Logger


def check_count(name: str, value: Any) -> int:
    """``value``, if it is a whole number of at least 1; else a ValueError that names the key."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    return value


class TrainingDivergedError(RuntimeError):
    """A loss, a gradient or a parameter is no finite number any more."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things happen, all in frames (one frame: one step of one environment, all its agents acting).

    Args:
        total_frames: length of the run; what every schedule is stretched over.
        stop_at_frames: leave earlier, without touching any schedule; None to run to the end.
        steps: vector steps per batch, so ``steps × n_envs`` frames per iteration.
        checkpoint_every_frames: distance of scheduled checkpoints.
        evaluation_every_frames: distance of greedy evaluations; one comes before the first update, one at the end.
        evaluation_episodes: episodes of each evaluation.

    Raises:
        ValueError: for a number that is not positive, or a stop beyond the end.
    """

    total_frames: int
    steps: int
    checkpoint_every_frames: int
    evaluation_every_frames: int
    evaluation_episodes: int
    stop_at_frames: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "stop_at_frames" or value is not None:
                check_count(f"training.{name}", value)
        if self.end > self.total_frames:
            raise ValueError(
                f"training.stop_at_frames={self.stop_at_frames} must not lie beyond "
                f"training.total_frames={self.total_frames}"
            )

    @property
    def end(self) -> int:
        """Where this process stops."""
        return self.total_frames if self.stop_at_frames is None else self.stop_at_frames

    def check_iteration(self, n_envs: int) -> None:
        """Raise ValueError if something is to come more often than iterations do."""
        least = self.steps * n_envs
        for name in ("total_frames", "checkpoint_every_frames", "evaluation_every_frames"):
            if getattr(self, name) < least:
                raise ValueError(
                    f"training.{name}={getattr(self, name)} must be at least the frames of one iteration, "
                    f"training.n_envs={n_envs} × training.steps={self.steps} = {least}"
                )


class Trainer:
    """Drives one run.

    Everything a step reads is in `state_dict`: 2k iterations equal k, a new process, and k more, bit for bit.

    Args:
        algorithm: the learner.
        memory: operators acting on the batch; `Memory()` for none.
        env: the training environments.
        evaluation_env: environments used by evaluation only.
        schedule: when things happen.
        checkpoints: where states go.
        logger: where numbers go.
        seed: the run's seed.
    """

    def __init__(
        self,
        *,
        algorithm: Algorithm,
        memory: Memory,
        env: TaskEnv,
        evaluation_env: TaskEnv,
        schedule: Schedule,
        checkpoints: CheckpointFolder,
        logger: Logger,
        seed: int,
    ) -> None:
        schedule.check_iteration(env.n_envs)
        self.frames_per_iteration = schedule.steps * env.n_envs
        algorithm.check_batch(self.frames_per_iteration)
        _check_stages(algorithm, memory)
        self.algorithm, self.memory = algorithm, memory
        self.evaluation_env, self.schedule = evaluation_env, schedule
        self.checkpoints, self.logger, self.seed = checkpoints, logger, seed
        self.frames = self.iteration = 0
        self.best: tuple[float, float] = (-math.inf, -math.inf)  # success rate, then return
        self.stop_requested = False
        self.clock = Clock()
        memory.timed = partial(self.clock.section, "memory")
        self.collector = Collector(
            env,
            algorithm.actor,
            lambda td: memory.act(Stage.ACT, td),
            steps=schedule.steps,
            learn_entries=algorithm.learn_entries,
            seed=derive_seed(seed, "env", 0),
            clock=self.clock,
        )

    # --------------------------------------------------------------------------------------------- one iteration

    def step(self) -> dict[str, float]:
        """One on-policy iteration: the way of the data, a line per arrow."""
        memory, algorithm = self.memory, self.algorithm
        algorithm.set_progress(self.frames / self.schedule.total_frames)

        batch, episodes = self.collector.collect()  # env → policy → ACT → env
        memory.write("collection", batch)

        algorithm.derive_rewards(batch)
        memory.act(Stage.REWARD, batch)
        metrics = algorithm.compute_advantages(batch)
        memory.act(Stage.TARGET, batch)
        memory.act(Stage.REGION, batch)
        memory.act(Stage.REPLAY, batch)
        losses = [algorithm.update(minibatch) for minibatch in algorithm.minibatches(batch)]
        metrics |= self._checked_means(metrics, losses)
        algorithm.finish_update(batch)

        memory.write("update", batch)

        self.frames += self.frames_per_iteration
        self.iteration += 1
        return {"frames": self.frames, "iteration": self.iteration, **episodes.metrics("train"), **metrics}

    # ------------------------------------------------------------------------------------------------- the whole run

    def _checked_means(self, metrics: dict[str, float], losses: list[dict[str, Tensor]]) -> dict[str, float]:
        """The means of ``losses`` over the gradient steps, if everything that was learnt is finite.

        Raises:
            TrainingDivergedError: if a metric of the batch, a loss, a gradient norm or a parameter is not.
        """
        keys = list(losses[0])
        table = torch.stack([torch.stack([row[key] for row in losses]) for key in keys])  # [keys, gradient steps]
        if wrong := _not_finite(metrics, keys, table, dict(self.algorithm.named_parameters())):
            raise TrainingDivergedError(
                f"training diverged: {wrong}, in iteration {self.iteration + 1}, frames {self.frames:,} to "
                f"{self.frames + self.frames_per_iteration:,}; a smaller step size may help"
            )
        return dict(zip(keys, table.mean(1).tolist(), strict=True))

    def run(self) -> None:
        """Train to the schedule's end, or until a signal asks to leave (the iteration is finished and saved first).

        Raises:
            TrainingDivergedError, NotWrittenError: with a note that names the checkpoint that was kept.
        """
        try:
            self._run()
        except (TrainingDivergedError, NotWrittenError) as error:
            kept = self.checkpoints.scheduled()
            error.add_note(f"kept: {kept[0].path}" if kept else "kept: no checkpoint, none was written yet")
            if isinstance(error, NotWrittenError):
                error.add_note(f"go on once there is room: marl-memory resume {self.checkpoints.path.parent}")
            raise

    def _run(self) -> None:
        end, total = self.schedule.end, self.schedule.total_frames
        new = self.checkpoints.newest_frames() is None
        self.clock.restart()
        with _signals(self._request_stop), self._writing(-1 if new else self.frames):
            if new:
                self._log({"frames": 0, "iteration": 0, **self.evaluate()})
                self.scheduled_checkpoint()  # a kill before the next one loses little, and not the run
            while self.frames < end and not self.stop_requested:
                before = self.frames
                with self.clock.section("learn"):  # collecting and memory have sections of their own
                    row = self.step()
                if self._due(self.schedule.evaluation_every_frames, before):
                    row |= self.evaluate()
                self._log(row)  # before the checkpoint: rows it has not seen are cut when resuming
                if self._due(self.schedule.checkpoint_every_frames, before):
                    self.scheduled_checkpoint()
            if self.frames < total:
                self._leave()
        self.logger.metrics.add_to_last(self.clock.take())

    @contextmanager
    def _writing(self, frames: int) -> Iterator[None]:
        with self.clock.section("logging"), self.logger.writing(frames), self.clock.section("other"):
            yield

    def _log(self, row: dict[str, float]) -> None:
        """Log ``row`` and where the time went since the row before: its own logging and checkpoint come in the next."""
        seconds = self.clock.take()
        if self.iteration:
            seconds["time/frames_per_second"] = self.frames_per_iteration / collecting_and_learning(seconds)
        with self.clock.section("logging"):
            self.logger.log(row | seconds)

    def _due(self, every: int, before: int) -> bool:
        """Whether a multiple of ``every``, or the end of the run, was passed since ``before``."""
        return self.frames // every > before // every or self.frames >= self.schedule.total_frames

    def _leave(self) -> None:
        """Save on the way out, unless this very frame is saved already."""
        if self.checkpoints.newest_frames() == self.frames:
            return
        if self.collector.env.resumable:
            self.scheduled_checkpoint()
        else:  # resetting the environments here would make this run differ from an uninterrupted one
            self._save("signal")

    def evaluate(self) -> dict[str, float]:
        """A greedy evaluation; keeps the best policy's checkpoint."""
        with self.clock.section("evaluate"):
            episodes = evaluate(
                self.evaluation_env,
                self.algorithm.actor,
                episodes=self.schedule.evaluation_episodes,
                seed=derive_seed(self.seed, "evaluation"),
            )
        row = episodes.metrics("evaluation")
        score = (row.get("evaluation/success", 0.0), row["evaluation/return"])
        if score > self.best:
            self.best = score
            self._save("best", **row)
        return row

    def scheduled_checkpoint(self) -> None:
        """Save; environments that can not be saved are reset first, in every run alike, so that resuming is exact."""
        with self.clock.section("checkpoint"):
            self._begin_episodes()
        self._save("scheduled")

    def _save(self, kind: Kind, **more: float) -> None:
        with self.clock.section("checkpoint"):
            self.checkpoints.save(self.state_dict(), kind, frames=self.frames, **more)

    def close(self) -> None:
        """Close the environments."""
        self.collector.env.close()
        self.evaluation_env.close()

    def warnings(self) -> list[str]:
        """What the user should know before a long run begins."""
        env, every = self.collector.env, self.schedule.checkpoint_every_frames
        least = 20 * (env.task_spec.max_episode_steps or 0) * env.n_envs
        if env.resumable or every >= min(least, self.schedule.total_frames):
            return []
        return [
            f"training.checkpoint_every_frames={every:,}: the environments of {env.task_spec.name} cannot be saved and "
            f"are reset there; from {least:,} on, 20 full episodes would lie between"
        ]

    def _begin_episodes(self) -> None:
        """Reset environments that can not be saved, with seeds that follow from the run's seed and the frame count."""
        if not self.collector.env.resumable:
            self.collector.reset(derive_seed(self.seed, "env", self.frames))
            self.algorithm.cut_episodes()

    def _request_stop(self) -> None:
        self.stop_requested = True

    # -------------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step reads."""
        return {
            "frames": self.frames,
            "iteration": self.iteration,
            "best": list(self.best),
            "seed": self.seed,
            "algorithm": dict(self.algorithm.state_dict()),
            "memory": self.memory.state_dict(),
            "collector": self.collector.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; environments that can not be saved start anew, as they did there.

        Raises:
            IncompatibleCheckpointError: if an entry of the algorithm or of a memory is missing, unknown or of another
                shape.
        """
        check_state("algorithm", self.algorithm.state_dict(), state["algorithm"])
        for name in self.memory.operators.keys() & state["memory"].keys():
            check_state(f"memory.{name}", self.memory.operators[name].state_dict(), state["memory"][name])
        self.frames, self.iteration, self.best = state["frames"], state["iteration"], tuple(state["best"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.memory.load_state_dict(state["memory"])
        self._begin_episodes()
        self.collector.load_state_dict(state["collector"])


def _check_stages(algorithm: Algorithm, memory: Memory) -> None:
    for name, operator in memory.operators.items():
        if operator.stage.value not in algorithm.stages:
            known = ", ".join(sorted(algorithm.stages))
            raise ValueError(
                f"memory={name} acts at the stage {operator.stage.value!r}, which {type(algorithm).__name__} does not "
                f"have; it has {known}"
            )


def _not_finite(
    metrics: Mapping[str, float], keys: Sequence[str], table: Tensor, parameters: Mapping[str, Tensor]
) -> str:
    """The first number that is not finite, in the order in which they arise; empty if all are.

    Args:
        metrics: of the batch.
        keys: K names.
        table: ``[K, M]``, what each of M gradient steps reported; losses and gradient norms are looked at.
        parameters: by name, after the last step.
    """
    for key, value in metrics.items():
        if not math.isfinite(value):
            return f"{key} is {value}"
    watched = torch.tensor([key.startswith(("loss/", "grad_norm/")) for key in keys])
    steps = table.shape[1]
    for i, k in (~table.T.isfinite() & watched).nonzero().tolist():
        return f"{keys[k]} is {table[k, i].item()} in minibatch {i + 1} of {steps}"
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            return f"the parameter {name} is not finite after minibatch {steps} of {steps}"
    return ""


@contextmanager
def _signals(request_stop: Callable[[], None]):
    """SIGINT and SIGTERM ask to leave after the iteration; a second one leaves at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        request_stop()
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
