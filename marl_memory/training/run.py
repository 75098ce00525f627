"""A run folder: built from a resolved config, described, resumed, and read back as a policy."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from marl_memory.algorithms.algorithm import Algorithm, derive_seed
from marl_memory.memory.operator import Memory
from marl_memory.networks.actor import Actor
from marl_memory.spec import TaskSpec
from marl_memory.training.checkpoint import CheckpointFolder, NoCheckpointError, write_atomically
from marl_memory.training.collection import Episodes, TaskEnv
from marl_memory.training.evaluation import evaluate
from marl_memory.training.logging import Logger
from marl_memory.training.trainer import Schedule, Trainer, check_count

_CLAIMED: dict[Path, IO[str]] = {}
"""Lock files this process holds; the kernel lets go of them when it ends, however it ends."""

PACKAGES = (
    "marl-memory",
    "torch",
    "torchrl",
    "tensordict",
    "numpy",
    "gymnasium",
    "pettingzoo",
    "jaxmarl",
    "jax",
    "jaxlib",
    "flax",
    "mpe2",
    "box2d",
    "mujoco",
    "gymnasium-robotics",
)
"""What a run's numbers may depend on."""

SURROUNDINGS = ("threads", "git_commit", "platform", "python", "XLA_FLAGS", "PJRT_NPROC")
"""And what else they may depend on."""


class RunFolderError(ValueError):
    """A folder is not what was asked for: not a run, or already another run's."""


def make_env(config: Mapping[str, Any], n_envs: int, seed: int) -> TaskEnv:
    """The environments that ``config["env"]`` names."""
    return _instantiate(config["env"], n_envs=n_envs, seed=seed)


def make_algorithm(config: Mapping[str, Any], spec: TaskSpec) -> Algorithm:
    """The learner that ``config["algorithm"]`` names, with bodies as in ``config["network"]``."""
    body = _instantiate(config["network"])
    return _instantiate(config["algorithm"], spec=spec, network=body, seed=config["seed"])


def make_trainer(config: Mapping[str, Any], folder: Path) -> Trainer:
    """Everything a run needs, from its resolved config; ``folder`` is where it writes."""
    training, memory, seed = dict(config["training"]), config.get("memory") or {}, config["seed"]
    if config.get("scope") is not None and not memory:
        raise ValueError(
            f"scope={config['scope']} has no effect without a memory: leave it out, or name one in memory=[…]"
        )
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a whole number, 0 or more")
    threads, n_envs, keep = (
        check_count(f"training.{name}", training.pop(name)) for name in ("threads", "n_envs", "keep_checkpoints")
    )
    torch.set_num_threads(threads)
    schedule = Schedule(**training)
    env = make_env(config, n_envs, derive_seed(seed, "env", 0))
    return Trainer(
        algorithm=make_algorithm(config, env.task_spec),
        memory=Memory((name, _instantiate(node)) for name, node in memory.items()),
        env=env,
        evaluation_env=make_env(config, min(n_envs, schedule.evaluation_episodes), derive_seed(seed, "evaluation")),
        schedule=schedule,
        checkpoints=CheckpointFolder(folder / "checkpoints", keep=keep),
        logger=Logger(folder, total_frames=schedule.total_frames, **config["logger"]),
        seed=seed,
    )


def start(config: Mapping[str, Any], folder: Path) -> Trainer:
    """A new run in ``folder``, described there before any work starts.

    Raises:
        RunFolderError: if the folder holds a run already.
    """
    if (folder / "run.json").exists():
        raise RunFolderError(
            f"run_folder={folder} already holds a run: choose another, or `marl-memory resume {folder}`"
        )
    trainer = make_trainer(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    trainer.checkpoints.recover()
    _write_config(config, folder)
    write_atomically(
        folder / "run.json", json.dumps({**_session(), "task": trainer.algorithm.spec.to_dict()}, indent=1)
    )
    return trainer


def resume(
    folder: Path, overrides: Mapping[str, Any], *, from_signal: bool = False, say: Callable[[str], None] = print
) -> Trainer:
    """The run in ``folder``, at its newest scheduled checkpoint (or where a signal left it).

    Args:
        folder: the run.
        overrides: ``training.stop_at_frames`` and ``training.total_frames`` only.
        from_signal: continue from the signal's checkpoint: valid, but not bit-equal to an uninterrupted run.
        say: takes warnings.

    Raises:
        RunFolderError: if there is no run, an override is not allowed, or no signal's checkpoint exists.
        NoCheckpointError: if no checkpoint can be read.
    """
    config, run = read_config(folder), _read_run(folder)
    _claim(folder)
    config["training"]["stop_at_frames"] = None
    for key, value in overrides.items():
        if key not in ("training.stop_at_frames", "training.total_frames"):
            raise RunFolderError(
                f"{key}={value} can not change in a resumed run; training.stop_at_frames and training.total_frames can"
            )
        name = key.removeprefix("training.")
        if name == "total_frames" and value != config["training"][name]:
            say(f"warning: total_frames {config['training'][name]:,} → {value:,} stretches every schedule of this run")
        config["training"][name] = value
    trainer = make_trainer(config, folder)
    trainer.checkpoints.recover()
    _restore(trainer, folder, from_signal, say)
    end = trainer.schedule.end
    if overrides and end <= trainer.frames:
        raise RunFolderError(f"{overrides} ends at {end:,} frames, but {folder} is at {trainer.frames:,} already")
    trainer.checkpoints.drop_after(trainer.frames)
    session = _session()
    began, now = ({**record["versions"], **{key: record.get(key) for key in SURROUNDINGS}} for record in (run, session))
    for key in now:
        if now[key] != began.get(key):
            say(f"warning: {key} is {now[key]}, the run began with {began.get(key)}: it may not go on bit-equal")
    say(f"resuming {folder} at {trainer.frames:,} frames")
    resumed = [*run.get("resumed", []), {"frames": trainer.frames, **session}]
    _write_config(config, folder)
    write_atomically(folder / "run.json", json.dumps({**run, "resumed": resumed}, indent=1))
    return trainer


def _restore(trainer: Trainer, folder: Path, from_signal: bool, say: Callable[[str], None]) -> None:
    """Bring ``trainer`` to the checkpoint that was asked for; without any it stays at the beginning."""
    left = trainer.checkpoints.named("signal")
    if from_signal:
        if left is None:
            raise RunFolderError(f"{folder} holds no checkpoint left by a signal")
        trainer.load_state_dict(left.load())
    elif trainer.checkpoints.scheduled():
        trainer.load_state_dict(trainer.checkpoints.newest(say)[0])
        if left is not None:
            frames = left.meta["frames"]
            say(
                f"{frames - trainer.frames:,} frames since the last scheduled checkpoint are done again, bit-equal; "
                f"--from-signal would go on from {frames:,} instead"
            )


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run.

    Raises:
        RunFolderError: if ``folder`` holds no run.
    """
    from omegaconf import OmegaConf

    _read_run(folder)
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    assert isinstance(config, dict)
    return config  # type: ignore[return-value]


def load_policy(folder: str | Path, *, checkpoint: str = "best") -> Actor:
    """The greedy policy of a run: ``policy(td)`` sets the action for the observations in ``td``.

    Args:
        folder: the run.
        checkpoint: ``best``, or ``last`` for the newest scheduled one.

    Raises:
        RunFolderError: if there is no such run or checkpoint.
        ValueError: for another value of ``checkpoint``.
    """
    folder = Path(folder)
    if checkpoint not in ("best", "last"):
        raise ValueError(f"checkpoint={checkpoint!r} must be 'best' or 'last'")
    config = read_config(folder)
    spec = TaskSpec.from_dict(_read_run(folder)["task"])
    algorithm = make_algorithm(config, spec)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    if checkpoint == "best":
        best = checkpoints.named("best")
        if best is None:
            raise NoCheckpointError(f"{folder} has no best checkpoint yet; checkpoint='last' takes the newest")
        state = best.load()
    else:
        state, _ = checkpoints.newest(print)
    algorithm.load_state_dict(state["algorithm"])
    algorithm.actor.greedy = True
    return algorithm.actor


def evaluate_run(folder: Path, *, episodes: int, checkpoint: str = "best", seed: int | None = None) -> Episodes:
    """Play ``episodes`` greedy episodes with a run's policy, on seeds of their own.

    Args:
        folder: the run.
        episodes: how many.
        checkpoint: ``best`` or ``last``.
        seed: of the environments; None for one derived from the run's, different from training and its evaluations.
    """
    config = read_config(folder)
    torch.set_num_threads(config["training"]["threads"])
    actor = load_policy(folder, checkpoint=checkpoint)
    seed = derive_seed(config["seed"], "evaluate") if seed is None else seed
    env = make_env(config, min(episodes, config["training"]["n_envs"]), seed)
    try:
        return evaluate(env, actor, episodes=episodes, seed=seed)
    finally:
        env.close()


def _instantiate(node: Mapping[str, Any], **built: Any) -> Any:
    """The object a config node names; collaborators are handed over as they are."""
    from hydra.utils import get_object

    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    target = get_object(node["_target_"])
    known = list(inspect.signature(target).parameters)
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"unknown keys {unknown} for {node['_target_']}; known are {known}")
    if node.get("_partial_"):
        from functools import partial

        return partial(target, **arguments, **built)
    return target(**arguments, **built)


def _claim(folder: Path) -> None:
    """Make sure that this is the only process writing to ``folder``, until it ends.

    Raises:
        RunFolderError: if another process is at it.
    """
    path = (folder / ".lock").resolve()
    if path in _CLAIMED:
        return
    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise RunFolderError(f"{folder} is being written by another process: wait for it, or stop it") from error
    _CLAIMED[path] = stream


def release(folder: Path) -> None:
    """Let other processes write to a run that this one started or resumed, and is done with."""
    stream = _CLAIMED.pop((folder / ".lock").resolve(), None)
    if stream is not None:
        stream.close()


def _session() -> dict[str, Any]:
    """What this process's numbers depend on."""
    return {
        "command": sys.argv,
        "git_commit": _git_commit(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "PJRT_NPROC": os.environ.get("PJRT_NPROC"),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _read_run(folder: Path) -> dict[str, Any]:
    """``run.json``, which is written last: where it is, the run is whole."""
    if not (folder / "run.json").exists():
        raise RunFolderError(f"{folder} holds no run (no run.json)")
    return json.loads((folder / "run.json").read_text())


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    from omegaconf import OmegaConf

    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the library's own checkout, with ``-dirty`` where it was changed; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed inside somebody else's repository, it is not part of that one
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
