"""From a study's file and the words of a command line to the runs that are to be made."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marl_memory.study.definition import Study
from marl_memory.study.file import StudyFile, read_file, sort_words, words_of
from marl_memory.training.config import config_dir, differences
from marl_memory.training.hydra_errors import ConfigError, folders_of_the_user, in_one_sentence
from marl_memory.training.run import check_config, make_env, make_learner
from marl_memory.training.trainer import check_stages

QUIET = ("logger.quiet=true", "logger.tensorboard=false")
"""What all runs of a study begin with: the study has a display of its own."""

MAY_CHANGE = ("logger.", "training.keep_checkpoints")
"""Keys that change nothing in what a run learns."""

Run = tuple[str, str, int]
"""Task, arm and seed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A study, how it is to be run, and the resolved configuration of every run.

    Args:
        study: what is asked.
        file: how it is run.
        folder: where.
        configs: by run, seeds outermost, so that every arm has a first result early.
    """

    study: Study
    file: StudyFile
    folder: Path
    configs: Mapping[Run, dict[str, Any]]


def make_plan(words: Sequence[str]) -> Plan:
    """The plan that the command line ``words`` ask for: ``study=NAME``, ``study.KEY=VALUE`` and overrides of all runs.

    Raises:
        ConfigError: for a study, a key or a value that does not fit, naming the arm where it is one's; nothing has been
            written then.
    """
    name, of_study, of_runs = sort_words(words)
    file = read_file(name, of_study, words)
    arms = {arm: words_of(f"arms.{arm}", found) for arm, found in file.arms.items()}
    cross = {level: words_of(f"cross.{level}", found) for level, found in file.cross.items()}
    if cross:
        pairs = itertools.product(arms.items(), cross.items())
        arms = {f"{arm}+{level}": [*own, *more] for (arm, own), (level, more) in pairs}
    study = Study(
        name=name,
        question=file.question,
        arms=arms,
        tasks={
            task: [*QUIET, *file.common, *words_of(f"tasks.{task}", found), *of_runs]
            for task, found in file.tasks.items()
        },
        seeds=list(file.seeds),
        baseline=file.baseline or next(iter(file.arms)),
        metric=file.metric,
        budget=file.budget,
        equal=[[f"{arm}+{level}" for arm in group] for group in file.equal for level in cross]
        if cross
        else [list(group) for group in file.equal],
        levels=list(cross),
    )
    _check_overridden(of_runs, arms)
    configs = _compose(study, words)
    _check_same(study, configs)
    _check_frames(study, configs)
    seeds_first = {
        (task, arm, seed): configs[task, arm][seed]
        for seed in study.seeds
        for task in study.tasks
        for arm in study.arms
    }
    return Plan(study=study, file=file, folder=Path(file.folder or f"runs/study/{name}"), configs=seeds_first)


def _check_overridden(of_runs: Sequence[str], arms: Mapping[str, Sequence[str]]) -> None:
    """Raise ConfigError for a word of the command line that every arm sets otherwise."""
    for word in of_runs:
        key = _key(word)
        if all(key in map(_key, own) for own in arms.values()):
            raise ConfigError(f"{word} has no effect: every arm of the study sets {key}")


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _compose(study: Study, words: Sequence[str]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """The resolved configuration of each run: one composition for each task and arm, resolved for each seed."""
    from hydra import compose, initialize_config_dir
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    folders = [f"file://{folder.resolve()}" for folder in folders_of_the_user(words)]
    configs: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for task, arm in itertools.product(study.tasks, study.arms):
            own = _merged(study.tasks[task], study.arms[arm], [config_dir(), *folders_of_the_user(words)])
            if study.budget is not None:
                if (word := own.get("training.total_frames")) is not None:
                    raise ConfigError(
                        f"task {task}, arm {arm}: {word} has no effect beside study.budget={study.budget}"
                    )
                own["training.total_frames"] = f"training.total_frames={study.budget}"
            try:
                with in_one_sentence(words):
                    overrides = [f"hydra.searchpath={folders}", *own.values()]
                    config = compose("config", overrides, return_hydra_config=True)
                    HydraConfig.instance().set_config(config)
                    sections: Any = [key for key in config if key not in ("hydra", "run_folder")]
                    node = OmegaConf.masked_copy(config, sections)
                    configs[task, arm] = {seed: _resolve(node, seed) for seed in study.seeds}
                check_config(configs[task, arm][study.seeds[0]])
            except ValueError as error:
                raise ConfigError(f"task {task}, arm {arm}: {error}") from error
    return configs


def _merged(common: Sequence[str], arm: Sequence[str], folders: Sequence[Path]) -> dict[str, str]:
    """Overrides by key, an arm's last; without those that ``common`` has of operators that the arm does not."""
    words, own = {_key(word): word for word in (*common, *arm)}, {_key(word) for word in arm}
    chosen = _with_parts(re.findall(r"[\w.-]+", words.get("memory", "").partition("=")[2]), folders)
    return {
        key: word
        for key, word in words.items()
        if key in own or not key.startswith("memory.") or key.split(".")[1] in chosen
    }


def _with_parts(names: Sequence[str], folders: Sequence[Path]) -> set[str]:
    """Memories by name, and those that their files put beside them: adamemento is reflection and coarse_fine."""
    from omegaconf import OmegaConf

    found: set[str] = set()
    for name in names:
        found.add(name)
        for file in (folder / "memory" / f"{name}.yaml" for folder in folders):
            if file.exists():
                node: Any = OmegaConf.load(file)
                parts = [part for part in node.get("defaults", []) if isinstance(part, str) and part != "_self_"]
                found |= _with_parts(parts, folders)
    return found


def _resolve(node: Any, seed: int) -> dict[str, Any]:
    from omegaconf import OmegaConf

    node.seed = seed
    resolved: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    return resolved


def _check_same(study: Study, configs: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> None:
    """Raise ConfigError if two arms are one."""
    seed = study.seeds[0]
    for task in study.tasks:
        for one, other in itertools.combinations(study.arms, 2):
            if configs[task, one][seed] == configs[task, other][seed]:
                raise ConfigError(
                    f"arms {one} and {other} are the same configuration on task {task}: leave one of them out, or let "
                    f"them differ"
                )


def _check_frames(study: Study, configs: Mapping[tuple[str, str], Mapping[int, Mapping[str, Any]]]) -> None:
    """Raise ConfigError if arms of a task would be trained for unequal numbers of frames."""
    for task in study.tasks:
        ends = {arm: _frames(configs[task, arm][study.seeds[0]]["training"]) for arm in study.arms}
        (first, expected), *others = ends.items()
        for arm, frames in others:
            if frames != expected:
                raise ConfigError(
                    f"the budget of task {task} can not be equal: arm {first} ends at {expected:,} frames, arm {arm} "
                    f"at {frames:,}; choose training.total_frames (or study.budget) as a multiple of "
                    f"training.n_envs × training.steps of both"
                )


def _frames(training: Mapping[str, Any]) -> int:
    """Where a run ends: whole iterations."""
    iteration = training["n_envs"] * training["steps"]
    return -(-training["total_frames"] // iteration) * iteration


def frames_of(plan: Plan) -> dict[str, int]:
    """The frames of every run, by task."""
    arm, seed = next(iter(plan.study.arms)), plan.study.seeds[0]
    return {task: _frames(plan.configs[task, arm, seed]["training"]) for task in plan.study.tasks}


def check_builds(plan: Plan) -> None:
    """Build what every task and arm needs, once, and let it go: what only a constructor can judge is judged here.

    Raises:
        ConfigError: naming task and arm; also where memories of equal capacity cannot hold equally much.
    """
    seed, specs = plan.study.seeds[0], {}
    for task, arm in itertools.product(plan.study.tasks, plan.study.arms):
        config = plan.configs[task, arm, seed]
        try:
            key = repr(config["env"])
            if key not in specs:
                env = make_env(config, 1, seed)
                specs[key] = env.task_spec
                env.close()
            algorithm, memory = make_learner(config, specs[key])
            check_stages(algorithm, memory)
            _check_payloads(config.get("memory") or {}, memory)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"task {task}, arm {arm}: {error}") from error


def _check_payloads(nodes: Mapping[str, Any], memory: Any) -> None:
    """Raise ValueError if a bounded memory cannot hold exactly the payloads that its capacity names."""
    for name, operator in memory.operators.items():  # a host may have left out a companion that it has no stage for
        node, payloads = nodes[name], operator.payloads
        if payloads is not None and node.get("budget") == "total" and payloads.most != node["capacity"]:
            raise ValueError(
                f"memory.{name}.capacity={node['capacity']} can not be an equal budget: with scope={node.get('scope')} "
                f"there is room for {payloads.most} payloads; choose a multiple of the number of agents"
            )


def other_study(before: Mapping[str, Any], plan: Plan) -> str | None:
    """In what the study that a folder holds differs from ``plan``, if the two cannot share it.

    Arms, tasks and seeds may come and go; a run that both have must be the same.

    Args:
        before: what `as_json` gave for the one in the folder.
        plan: the one that is to be run.
    """
    if before["study"]["name"] != plan.study.name:
        return f"it holds study={before['study']['name']}"
    for (task, arm, seed), now in plan.configs.items():
        then = before["configs"].get(task, {}).get(arm, {}).get(str(seed))
        for key, value_then, value_now in differences(then, now) if then else ():
            if not key.startswith(MAY_CHANGE):
                return f"task {task}, arm {arm}, seed {seed} has {key}={value_then} there, and {value_now} now"
    return None


def as_json(plan: Plan) -> dict[str, Any]:
    """The definition, and every run's configuration by task, arm and seed."""
    configs: dict[str, Any] = {}
    for (task, arm, seed), config in plan.configs.items():
        configs.setdefault(task, {}).setdefault(arm, {})[str(seed)] = config
    return {"study": plan.study.to_dict(), "configs": configs}
