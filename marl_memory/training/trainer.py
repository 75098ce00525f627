"""The training loop: collect, let memory act, learn, write, log; and stop and resume exactly."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from marl_memory.algorithms.algorithm import Algorithm, OffPolicyAlgorithm, OnPolicyAlgorithm, derive_seed
from marl_memory.memory.operator import Memory, Stage
from marl_memory.training.checkpoint import CheckpointFolder, Kind, NotWrittenError, check_state
from marl_memory.training.clock import Clock, collecting_and_learning
from marl_memory.training.collection import TaskEnv
from marl_memory.training.evaluation import evaluate
from marl_memory.training.iteration import Losses, OffPolicyIteration, OnPolicyIteration
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
        check_stages(algorithm, memory)
        self.algorithm, self.memory = algorithm, memory
        self.evaluation_env, self.schedule = evaluation_env, schedule
        self.checkpoints, self.logger, self.seed = checkpoints, logger, seed
        self.frames = self.iteration = 0
        self.best: tuple[float, float] = (-math.inf, -math.inf)  # success rate, then return
        self.stop_requested = False
        self.clock = Clock()
        memory.timed = partial(self.clock.section, "memory")
        how: dict[str, Any] = {"steps": schedule.steps, "seed": seed, "clock": self.clock}
        if isinstance(algorithm, OnPolicyAlgorithm):
            self.iterate = OnPolicyIteration(algorithm, memory, env, **how)
        elif isinstance(algorithm, OffPolicyAlgorithm):
            folder = checkpoints.path.parent / "replay"
            self.iterate = OffPolicyIteration(algorithm, memory, env, **how, folder=folder)
        else:
            raise TypeError(f"{type(algorithm).__name__} must derive from OnPolicyAlgorithm or OffPolicyAlgorithm")
        self.collector = self.iterate.collector

    def step(self) -> dict[str, float]:
        """One iteration; the way of the data itself is in `OnPolicyIteration` and `OffPolicyIteration`."""
        self.algorithm.set_progress(self.frames / self.schedule.total_frames)
        self.memory.set_progress(self.frames, self.frames / self.schedule.total_frames)
        report = self.iterate()
        metrics = report.metrics | self._checked_means(report.metrics, report.losses)
        self.frames += self.frames_per_iteration
        self.iteration += 1
        return {"frames": self.frames, "iteration": self.iteration, **report.episodes.metrics("train"), **metrics}

    # ------------------------------------------------------------------------------------------------- the whole run

    def _checked_means(self, metrics: dict[str, float], losses: Losses) -> dict[str, float]:
        """The means of ``losses`` over the gradient steps that report them, if everything that was learnt is finite.

        Raises:
            TrainingDivergedError: if a metric of the batch, a loss, a gradient norm or a parameter is not.
        """
        keys = list(dict.fromkeys(key for row in losses for key in row))
        columns = {key: torch.stack([row[key] for row in losses if key in row]) for key in keys}
        if wrong := _not_finite(metrics, columns, dict(self.algorithm.named_parameters())):
            raise TrainingDivergedError(
                f"training diverged: {wrong}, in iteration {self.iteration + 1}, frames {self.frames:,} to "
                f"{self.frames + self.frames_per_iteration:,}; a smaller step size may help"
            )
        return {key: column.mean().item() for key, column in columns.items()}

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
                for text in self.memory.remarks():
                    self.logger.say(f"{self.frames:,} frames: {text}")
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
        """A greedy evaluation of the policy alone, and with memory where that acts; keeps the best checkpoint."""
        how: dict[str, Any] = {
            "episodes": self.schedule.evaluation_episodes,
            "seed": derive_seed(self.seed, "evaluation"),
        }
        with self.clock.section("evaluate"):
            evaluated = evaluate(self.evaluation_env, self.algorithm.actor, **how, critic=self.algorithm)
            row = evaluated.metrics("evaluation")
            if self.memory.acts:
                with self.memory.greedily() as act:
                    together = evaluate(self.evaluation_env, self.algorithm.actor, **how, act=act)
                row |= together.metrics("evaluation_with_memory")
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
            # The best policy is there to be used, not to go on from: it needs no replay.
            parts = {} if kind == "best" else self.iterate.save_parts(self.checkpoints.add_part)
            self.checkpoints.save(self.state_dict(), kind, frames=self.frames, parts=parts, **more)

    def close(self) -> None:
        """Close the environments."""
        self.collector.env.close()
        self.evaluation_env.close()

    def warnings(self) -> list[str]:
        """What the user should know before a long run begins."""
        env, every = self.collector.env, self.schedule.checkpoint_every_frames
        least = 20 * (env.task_spec.max_episode_steps or 0) * env.n_envs
        remarks = self.memory.remarks()
        if env.resumable or every >= min(least, self.schedule.total_frames):
            return remarks
        return [
            *remarks,
            f"training.checkpoint_every_frames={every:,}: the environments of {env.task_spec.name} cannot be saved and "
            f"are reset there; from {least:,} on, 20 full episodes would lie between",
        ]

    def _begin_episodes(self) -> None:
        """Reset environments that can not be saved, with seeds that follow from the run's seed and the frame count."""
        if not self.collector.env.resumable:
            self.collector.reset(derive_seed(self.seed, "env", self.frames))
            self.iterate.cut_episodes()

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
            "iterate": self.iterate.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], parts: Iterable[Mapping[str, Any]] = ()) -> None:
        """Continue where `state_dict` was taken; environments that can not be saved start anew, as they did there.

        Args:
            state: what `state_dict` gave.
            parts: the parts written for it (see `Checkpoint.parts`), oldest first.

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
        self.iterate.load_state_dict(state["iterate"], parts)
        self._begin_episodes()
        self.collector.load_state_dict(state["collector"])


def check_stages(algorithm: Algorithm, memory: Memory) -> None:
    """Raise ValueError for an operator whose stage, or what it reads, this learner does not have."""
    acting = [name for name, operator in memory.operators.items() if operator.stage is Stage.ACT]
    if len(acting) > 1:
        raise ValueError(f"memory=[{','.join(acting)}] act in the policy's place: one of them at most can")
    for name, operator in memory.operators.items():
        if operator.stage.value not in algorithm.stages:
            known = ", ".join(sorted(algorithm.stages))
            raise ValueError(
                f"memory={name} acts at the stage {operator.stage.value!r}, which {type(algorithm).__name__} does not "
                f"have; it has {known}. Hosts with that stage: {operator.stage.hosts}"
            )
        if operator.keeps_rewards and algorithm.rescales_rewards:
            raise ValueError(
                f"memory={name} remembers rewards, and algorithm.scale_rewards=true keeps changing their unit: what is "
                "old would count too much or too little. Set algorithm.scale_rewards=false (with "
                "algorithm.value_norm=true the critic learns in units of its own)"
            )
        if not memory.acts and (key := next((key for key in operator.in_keys if key[0] == "act"), None)):
            raise ValueError(f"memory={name} reads {'.'.join(key)}: list a memory beside it that acts, as reflection")
        for key in operator.asks.keys() - algorithm.offers:
            raise ValueError(
                f"memory={name} reads {'.'.join(key)}, which {type(algorithm).__name__} does not write; it offers "
                f"{', '.join(sorted('.'.join(offer) for offer in algorithm.offers))}"
            )


def _not_finite(metrics: Mapping[str, float], columns: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> str:
    """The first number that is not finite, in the order in which they arise; empty if all are.

    Args:
        metrics: of the batch.
        columns: by key, ``[M]``: what M gradient steps reported; losses and gradient norms are looked at.
        parameters: by name, after the last step.
    """
    for key, value in metrics.items():
        if not math.isfinite(value):
            return f"{key} is {value}"
    watched = {key: column for key, column in columns.items() if key.startswith(("loss/", "grad_norm/"))}
    wrong = [
        (int((~column.isfinite()).int().argmax()), key)
        for key, column in watched.items()
        if not column.isfinite().all()
    ]
    if wrong:
        i, key = min(wrong, key=lambda pair: (pair[0] / len(watched[pair[1]]), list(watched).index(pair[1])))
        return f"{key} is {watched[key][i].item()} in minibatch {i + 1} of {len(watched[key])}"
    for name, parameter in parameters.items():
        if not parameter.isfinite().all():
            steps = max((len(column) for column in columns.values()), default=0)
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
