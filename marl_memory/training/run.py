"""A run folder: built from a resolved config, described, resumed, and read back as a policy."""

from __future__ import annotations

import fcntl
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch

from marl_memory.algorithms.algorithm import Algorithm, OffPolicyAlgorithm, derive_seed
from marl_memory.memory.operator import Memory, Stage
from marl_memory.networks.actor import Body
from marl_memory.networks.policy import Policy
from marl_memory.spec import TaskSpec
from marl_memory.training.checkpoint import (
    Checkpoint,
    CheckpointFolder,
    DamagedCheckpointError,
    NoCheckpointError,
    check_state,
    write_atomically,
)
from marl_memory.training.collection import Episodes, TaskEnv
from marl_memory.training.config import (
    check_arguments,
    check_node,
    check_sections,
    config_dir,
    differences,
    instantiate,
    locate,
    options,
)
from marl_memory.training.evaluation import evaluate
from marl_memory.training.logging import Logger
from marl_memory.training.recording import record
from marl_memory.training.trainer import Schedule, Trainer, check_count
from marl_memory.training.video import asking_for_pictures, check_file, film

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
    "supersuit",
    "ale-py",
    "multi-agent-ale-py",
    "opencv-python-headless",
)
"""What a run's numbers may depend on."""

SURROUNDINGS = ("threads", "git_commit", "platform", "python", "XLA_FLAGS", "PJRT_NPROC")
"""And what else they may depend on."""


TRAINING = ("threads", "n_envs", "keep_checkpoints")
"""Keys of the section ``training`` that are not the schedule's."""

HANDED_TO_BODY = tuple(name for name in inspect.signature(Body.__call__).parameters if name != "self")

BUILT = {
    "env": ("n_envs", "seed"),
    "algorithm": ("spec", "network", "seed"),
    "network": (*HANDED_TO_BODY, "picture"),  # the picture's size, to bodies that take it
}
"""Parameters of a section's target that the run hands over."""

BUILT_FOR_MEMORY = ("spec", "seed", "n_envs", "batch_steps", "off_policy", "feature_size", "n_critics", "reach")
"""Parameters of operators that the run hands over to those that take them: the task, a seed, N and the vector steps of
the batches they are written from, whether the host learns Q(s, a) from a replay, the width of its features, how many
critics it has and what they read (`Algorithm.reach`)."""

MAY_CHANGE = (
    "logger.",
    "training.stop_at_frames",
    "training.total_frames",
    "training.threads",
    "training.keep_checkpoints",
)
"""Where the configuration of a run may be edited: nothing that is saved depends on it."""


class RunFolderError(ValueError):
    """A folder is not what was asked for: not a run, or already another run's."""


class RunFolderBusyError(RunFolderError):
    """Another process writes to the folder."""


def make_env(config: Mapping[str, Any], n_envs: int, seed: int) -> TaskEnv:
    """The environments that ``config["env"]`` names."""
    return instantiate("env", config["env"], n_envs=n_envs, seed=seed)


def make_algorithm(config: Mapping[str, Any], spec: TaskSpec) -> Algorithm:
    """The learner that ``config["algorithm"]`` names, with bodies as in ``config["network"]``.

    Raises:
        ValueError: if it is no `Algorithm`, or cannot learn the task's kind of actions.
    """
    target, kind = _algorithm_class(config), "continuous" if spec.continuous else "discrete"
    if kind not in target.actions:
        raise ValueError(
            f"algorithm: {target.__name__} learns {' and '.join(sorted(target.actions))} actions, those of "
            f"{spec.name} are {kind}: choose algorithm={' or '.join(algorithms_for(kind)) or 'another'}"
        )
    body = _make_body(config["network"], spec)
    return instantiate("algorithm", config["algorithm"], spec=spec, network=body, seed=config["seed"])


def _make_body(node: Mapping[str, Any], spec: TaskSpec) -> Body:
    """The maker of bodies that ``config["network"]`` names.

    Raises:
        ValueError: if it does not read what the task's agents observe: pictures, or vectors.
    """
    if _reads_pictures(node) == (spec.picture is not None):
        return instantiate("network", node, later=HANDED_TO_BODY, **({"picture": spec.picture} if spec.picture else {}))
    from omegaconf import OmegaConf

    nodes: dict[str, Any] = {f.stem: OmegaConf.load(f) for f in sorted((config_dir() / "network").glob("*.yaml"))}
    fit = [name for name, other in nodes.items() if _reads_pictures(other) == (spec.picture is not None)]
    seen = f"pictures {list(spec.picture)} (channels, height, width)" if spec.picture else "no pictures"
    raise ValueError(
        f"network._target_={node['_target_']} reads {'vectors' if spec.picture else 'pictures'}, but {spec.name} shows "
        f"{seen}: choose network={' or '.join(fit)}"
    )


def _reads_pictures(node: Mapping[str, Any]) -> bool:
    return "picture" in inspect.signature(locate("network", node)).parameters


def _algorithm_class(config: Mapping[str, Any]) -> type[Algorithm]:
    target = locate("algorithm", config["algorithm"])
    if not (isinstance(target, type) and issubclass(target, Algorithm)):
        raise ValueError(f"algorithm._target_={config['algorithm']['_target_']} must name a subclass of Algorithm")
    return target


def algorithms_for(kind: str) -> list[str]:
    """The names in the group ``algorithm`` that learn actions of this ``kind``."""
    from omegaconf import OmegaConf

    names = options("algorithm", [config_dir()])
    nodes: dict[str, Any] = {name: OmegaConf.load(config_dir() / f"algorithm/{name}.yaml") for name in names}
    return [name for name, node in nodes.items() if kind in getattr(locate("algorithm", node), "actions", ())]


def make_memory(
    nodes: Mapping[str, Any], spec: TaskSpec, seed: int, host: Mapping[str, Any], stages: Collection[str]
) -> Memory:
    """The operators of ``config["memory"]``, each handed the task, a seed derived from the run's and its name, and
    what else of `BUILT_FOR_MEMORY` it takes from ``host``; without companions of other stages than the host's
    ``stages``.
    """

    def operator(name: str, node: Mapping[str, Any]) -> Any:
        takes = inspect.signature(locate(f"memory.{name}", node)).parameters
        more = {key: value for key, value in host.items() if key in takes}
        return instantiate(f"memory.{name}", node, spec=spec, seed=derive_seed(seed, "memory", name), **more)

    made = ((name, operator(name, node)) for name, node in nodes.items())
    return Memory((name, one) for name, one in made if not one.companion or one.stage.value in stages)


def check_config(config: Mapping[str, Any]) -> Schedule:
    """Check what can be checked of a resolved config before anything is built; returns its schedule.

    Raises:
        ValueError: for a key or a value that does not fit.
    """
    check_sections(config)
    check_arguments("logger", Logger, config["logger"], built=("folder", "total_frames", "config"))
    check_arguments("training", Schedule, config["training"], others=TRAINING)
    memory, seed = config.get("memory") or {}, config["seed"]
    if config.get("scope") is not None and not any("scope" in node for node in memory.values()):
        raise ValueError(
            f"scope={config['scope']} has no effect without a memory of agents' experience: leave it out, or name one "
            "in memory=[…]"
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a whole number, 0 or more")
    training = dict(config["training"])
    counts = {name: check_count(f"training.{name}", training.pop(name, None)) for name in TRAINING}
    schedule = Schedule(**training)
    schedule.check_iteration(counts["n_envs"])
    _algorithm_class(config)
    for name, built in BUILT.items():
        check_node(name, config[name], built=built)
    for name, node in memory.items():
        check_node(f"memory.{name}", node, built=BUILT_FOR_MEMORY)
    return schedule


def make_learner(config: Mapping[str, Any], spec: TaskSpec) -> tuple[Algorithm, Memory]:
    """The learner of a run and its memory.

    Raises:
        ValueError: see `make_algorithm`; also if an operator cannot be made.
    """
    algorithm, training = make_algorithm(config, spec), config["training"]
    replay = algorithm.replay if isinstance(algorithm, OffPolicyAlgorithm) else None
    host = {
        "n_envs": training["n_envs"],
        "batch_steps": training["steps"] if replay is None else replay.train_every,
        "off_policy": replay is not None,
        "feature_size": getattr(getattr(algorithm.actor, "body", None), "hidden_size", None),
        "n_critics": algorithm.learn_entries[spec.keys.value_target].shape[-1],
        "reach": algorithm.reach,
    }
    return algorithm, make_memory(config.get("memory") or {}, spec, config["seed"], host, algorithm.stages)


def make_trainer(config: Mapping[str, Any], folder: Path) -> Trainer:
    """Everything a run needs, from its resolved config; ``folder`` is where it writes.

    Raises:
        ValueError: for a key or a value that does not fit.
    """
    schedule, seed = check_config(config), config["seed"]
    threads, n_envs, keep = (config["training"][name] for name in TRAINING)
    torch.set_num_threads(threads)
    logger = Logger(folder, total_frames=schedule.total_frames, config=config, **config["logger"])
    env = make_env(config, n_envs, derive_seed(seed, "env", 0))
    algorithm, memory = make_learner(config, env.task_spec)
    return Trainer(
        algorithm=algorithm,
        memory=memory,
        env=env,
        evaluation_env=make_env(config, min(n_envs, schedule.evaluation_episodes), derive_seed(seed, "evaluation")),
        schedule=schedule,
        checkpoints=CheckpointFolder(folder / "checkpoints", keep=keep),
        logger=logger,
        seed=seed,
    )


def start(config: Mapping[str, Any], folder: Path) -> Trainer:
    """A new run in ``folder``, described there before any work starts.

    Raises:
        RunFolderError: if the folder holds a run already, or what does not belong to one.
        ValueError: for a configuration that does not fit.
    """
    if (folder / "run.json").exists():
        raise RunFolderError(
            f"run_folder={folder} already holds a run: choose another, or `marl-memory resume {folder}`"
        )
    _check_free(folder)
    trainer = make_trainer(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder)
    trainer.checkpoints.recover()
    _write_config(config, folder)
    description = {**_session(), "task": trainer.algorithm.spec.to_dict(), "config": config}
    write_atomically(folder / "run.json", json.dumps(description, indent=1))
    return trainer


def _check_free(folder: Path) -> None:
    """Raise RunFolderError if ``folder`` holds anything else than a start that was killed left."""
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    killed = {".lock", "checkpoints", "config.yaml"} if ".lock" in found else set()
    if foreign := sorted(name for name in found - killed if not name.startswith(".writing-")):
        raise RunFolderError(
            f"run_folder={folder} holds no run, but {', '.join(foreign[:5])}: choose a folder that is empty or new"
        )


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
        IncompatibleCheckpointError: if the checkpoint is another configuration's or version's.
    """
    config, run = read_config(folder), read_run(folder)
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
    _check_task(folder, run, trainer.algorithm.spec)
    trainer.checkpoints.recover()
    _restore(trainer, folder, from_signal, say)
    end = trainer.schedule.end
    if overrides and end <= trainer.frames:
        raise RunFolderError(f"{overrides} ends at {end:,} frames, but {folder} is at {trainer.frames:,} already")
    trainer.checkpoints.drop_after(trainer.frames, say)
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
        state = left.load()
        with left.fitting():
            trainer.load_state_dict(state, left.parts())
    elif trainer.checkpoints.scheduled():
        state, checkpoint = trainer.checkpoints.newest(say)
        with checkpoint.fitting():
            trainer.load_state_dict(state, checkpoint.parts())
        if left is not None:
            _say_what_is_redone(trainer.frames, left, say)


def _say_what_is_redone(frames: int, left: Checkpoint, say: Callable[[str], None]) -> None:
    try:
        there = left.frames
    except DamagedCheckpointError as error:
        say(f"damaged checkpoint passed over: {error}")
        return
    say(
        f"{there - frames:,} frames since the last scheduled checkpoint are done again, bit-equal; "
        f"--from-signal would go on from {there:,} instead"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The resolved config of a run.

    Raises:
        RunFolderError: if ``folder`` holds no run, or its configuration is not the one that the run was made with.
    """
    from omegaconf import OmegaConf
    from yaml import YAMLError

    run = read_run(folder)
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
    except (OSError, YAMLError) as error:
        raise RunFolderError(f"{folder}/config.yaml can not be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise RunFolderError(f"{folder}/config.yaml holds a {type(config).__name__}; right is what the run wrote there")
    for key, now, then in differences(config, run.get("config", config)):
        if not key.startswith(MAY_CHANGE):
            raise RunFolderError(
                f"{folder}/config.yaml has {key}={now}, but the run was made with {then}: put it back, or start anew"
            )
    return config


def load_policy(folder: str | Path, *, checkpoint: str = "best") -> Policy:
    """The greedy policy of a run: ``policy(td)`` sets the action for the observations in ``td``.

    Args:
        folder: the run.
        checkpoint: ``best``, or ``last`` for the newest scheduled one.

    Raises:
        RunFolderError: if there is no such run.
        CheckpointError: if there is no such checkpoint, or it is damaged, or another configuration's or version's.
        ValueError: for another value of ``checkpoint``.
    """
    return _load(Path(folder), checkpoint)[0]


def load_acting(folder: str | Path, *, checkpoint: str = "best") -> tuple[Policy, Memory]:
    """As `load_policy`, and the memory of the run with what it knew then: `Memory.greedily` lets it act."""
    return _load(Path(folder), checkpoint)


def _load(folder: Path, checkpoint: str) -> tuple[Policy, Memory]:
    """See `load_policy`; the memory is restored where it takes actions, and is empty else."""
    if checkpoint not in ("best", "last"):
        raise ValueError(f"checkpoint={checkpoint!r} must be 'best' or 'last'")
    config = read_config(folder)
    spec = TaskSpec.from_dict(read_run(folder)["task"])
    algorithm, memory = make_learner(config, spec)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    if checkpoint == "best":
        found = checkpoints.named("best")
        if found is None:
            raise NoCheckpointError(f"{folder} has no best checkpoint yet; checkpoint='last' takes the newest")
        state = found.load()
    else:
        state, found = checkpoints.newest(print)
    with found.fitting():
        check_state("algorithm", algorithm.state_dict(), state["algorithm"])
        algorithm.load_state_dict(state["algorithm"])
        if memory.acts:
            memory.load_state_dict(state["memory"])
            memory.set_progress(state["frames"], state["frames"] / config["training"]["total_frames"])
    algorithm.actor.greedy = True
    return algorithm.actor, memory


def evaluate_run(
    folder: Path,
    *,
    episodes: int,
    checkpoint: str = "best",
    seed: int | None = None,
    video: Path | None = None,
    replay: Path | None = None,
    with_memory: bool = False,
) -> Episodes:
    """Play ``episodes`` greedy episodes with a run's policy, on seeds of their own.

    Args:
        folder: the run.
        episodes: how many.
        checkpoint: ``best`` or ``last``.
        seed: of the environments; None for one derived from the run's, different from training and its evaluations.
        video: an .mp4 or .gif to film them to; they are then played one after the other in a single environment.
        replay: a folder to write replays to, in the game's own form; played one after the other too.
        with_memory: let the run's memory act too, at the stage ACT; else the policy plays alone, and is filmed alone.

    Raises:
        ValueError: if there is no such run or checkpoint, the task can not be drawn or keeps no replays, a film and
            replays are asked for at once, or no memory of the run acts.
        ImportError: if the film needs what is not installed.
        NotWrittenError: if the film can not be written.
    """
    config = read_config(folder)
    if video is not None and replay is not None:
        raise ValueError(f"--video={video} and --replay={replay} can not be made at once: leave one of them out")
    if video is not None:
        check_file(video)
    torch.set_num_threads(config["training"]["threads"])
    actor, memory = load_acting(folder, checkpoint=checkpoint)
    if with_memory and not memory.acts:
        raise ValueError(f"with_memory=True: {folder} has no memory that acts (stage ACT, as memory=[reflection])")
    seed = derive_seed(config["seed"], "evaluate") if seed is None else seed
    n_envs = min(episodes, config["training"]["n_envs"]) if replay is None else 1
    env: Any = make_env(config, n_envs, seed) if video is None else _make_drawable_env(config, seed)
    try:
        _check_task(folder, read_run(folder), env.task_spec)
        if video is not None:
            return film(env, actor, video, episodes=episodes, seed=seed)
        if replay is not None:
            return record(env, actor, replay, episodes=episodes, seed=seed)
        if not with_memory:
            return evaluate(env, actor, episodes=episodes, seed=seed)
        with memory.greedily() as act:
            return evaluate(env, actor, episodes=episodes, seed=seed, act=act)
    finally:
        env.close()


def memory_acts(folder: Path) -> bool:
    """Whether a run's memory takes actions in the policy's place: then there are two ways to play."""
    nodes = (read_config(folder).get("memory") or {}).items()
    return any(locate(f"memory.{name}", node).stage is Stage.ACT for name, node in nodes)


def _make_drawable_env(config: Mapping[str, Any], seed: int) -> Any:
    """One environment of the run's task, made to be drawn."""
    try:
        return make_env({**config, "env": asking_for_pictures(config["env"])}, 1, seed)
    except ValueError as error:
        raise ValueError(
            f"the task can not be drawn: {error}. For a film the factory is given render_mode='rgb_array' too"
        ) from error


def _claim(folder: Path) -> None:
    """Make sure that this is the only process writing to ``folder``, until it ends.

    Raises:
        RunFolderBusyError: if another process is at it.
    """
    path = (folder / ".lock").resolve()
    if path in _CLAIMED:
        return
    stream = path.open("w")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise RunFolderBusyError(f"{folder} is being written by another process: wait for it, or stop it") from error
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
        "git_commit": git_commit(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
        "PJRT_NPROC": os.environ.get("PJRT_NPROC"),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def read_run(folder: Path) -> dict[str, Any]:
    """``run.json``, which is written last: where it is, the run is whole.

    Raises:
        RunFolderError: if ``folder`` holds no run, or the file can not be read.
    """
    file = folder / "run.json"
    if not file.exists():
        raise RunFolderError(f"{folder} holds no run (no run.json)")
    try:
        run = json.loads(file.read_text())
        TaskSpec.from_dict(run["task"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{file} can not be read: {error!r}; right is what the run wrote there") from error
    return run


def _check_task(folder: Path, run: Mapping[str, Any], spec: TaskSpec) -> None:
    """Raise RunFolderError if the environment is no longer the one that the run was made with."""
    now = spec.to_dict()
    for key, then in TaskSpec.from_dict(run["task"]).to_dict().items():
        if now[key] != then:
            raise RunFolderError(
                f"{folder} was made with a task of {key}={then}, which is {now[key]} now: the environment has changed "
                f"(another version? run.json names those of the run)"
            )


def _write_config(config: Mapping[str, Any], folder: Path) -> None:
    from omegaconf import OmegaConf

    write_atomically(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dict(config))))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """The commit of the library's own checkout, with ``-dirty`` where it was changed; None if it is installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # installed inside somebody else's repository, it is not part of that one
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
