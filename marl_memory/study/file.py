"""A study's file in ``configs/study`` and the words of a command line that change it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from marl_memory.training.config import check_arguments, config_dir, options, suggest
from marl_memory.training.hydra_errors import ConfigError, folders_of_the_user, in_one_sentence
from marl_memory.training.trainer import check_count

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Of arms and tasks: they are folders."""

OF_THE_STUDY = {
    "seed": "study.seeds=[…]",
    "run_folder": "study.folder=…",
    "training.stop_at_frames": "study.budget=…, to which all runs go",
}
"""Keys of a run that are not to be overridden, and what is."""


@dataclass(frozen=True, kw_only=True)
class StudyFile:
    """What may stand in a file of ``configs/study``, and after ``study.`` on the command line.

    Args:
        question: one sentence, the title of the report.
        arms: overrides by name.
        tasks: overrides by name.
        seeds: of the runs of every arm and task.
        common: overrides of all runs; a task's own and those of the command line come after them, an arm's last.
        cross: more overrides by name; every arm is run with each of them, as ARM+NAME.
        baseline: the arm that others are compared with; None: the first.
        equal: groups of arms that must end in the same bits.
        metric: a column of metrics.csv; greater is better.
        budget: frames of every run; None: as tasks say.
        operator: of memory; a name that overrides may stand for, as in ``memory=[${operator}]``.
        folder: of the study.
        executor: ``local``, ``ray`` or ``submitit``.
        executor_options: keywords of ``ray.init`` or of submitit's ``update_parameters``, and ``cluster`` for submitit.
        workers: runs at a time; None: as many as there are cores for, and with ``ray`` as many as it has room for.
        probe: how many arms of each task are tried out for some seconds to estimate time and memory.
    """

    question: str
    arms: Mapping[str, Any]
    tasks: Mapping[str, Any]
    seeds: Sequence[int]
    common: Sequence[str] = ()
    cross: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    equal: Sequence[Sequence[str]] = ()
    metric: str = "evaluation/return"
    budget: int | None = None
    operator: str | None = None
    folder: str | None = None
    executor: str = "local"
    executor_options: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None
    probe: int = 2


def sort_words(words: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The study's name, the overrides of its file without ``study.``, and those of the runs."""
    overrides = [word for word in words if not word.startswith("-") and ("=" in word or word.startswith("~"))]
    names = [word.removeprefix("study=") for word in overrides if word.startswith("study=")]
    known = suggest("", options("study", [config_dir(), *folders_of_the_user(words)]))
    if len(names) != 1:
        raise ConfigError(f"{len(names)} studies are named: give one study=NAME; {known}")
    of_study = [word.removeprefix("study.") for word in overrides if word.startswith("study.")]
    of_runs = [word for word in overrides if not word.startswith(("study=", "study."))]
    for word in of_runs:
        key = word.lstrip("+~").partition("=")[0]
        if key in OF_THE_STUDY:
            raise ConfigError(f"{word}: a study sets {key} itself; give {OF_THE_STUDY[key]}")
    return names[0], of_study, of_runs


def read_file(name: str, overrides: Sequence[str], words: Sequence[str]) -> StudyFile:
    """The study's file, with the ``overrides`` of the command line ``words``.

    Raises:
        ConfigError: if there is none of this name, or a key or value in it does not fit.
    """
    from omegaconf import OmegaConf

    folders = [*folders_of_the_user(words), config_dir()]
    found = [folder / f"study/{name}.yaml" for folder in folders if (folder / f"study/{name}.yaml").exists()]
    if not found:
        raise ConfigError(f"study={name} does not exist: {suggest(name, options('study', folders))}")
    with in_one_sentence(words):
        node: Any = OmegaConf.load(found[0])
        if not OmegaConf.is_dict(node):
            raise ConfigError(f"{found[0]} must hold a mapping of keys")
        for key, value in _values(overrides):
            if key in ("arms", "tasks", "cross") and isinstance(value, list):
                value = _chosen(key, value, OmegaConf.to_container(node.get(key, OmegaConf.create({}))))
                node.pop(key, None)
            OmegaConf.update(node, key, value, merge=False, force_add=True)
        given: Any = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    try:
        check_arguments("study", StudyFile, given)
        _check_file(file := StudyFile(**given))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return file


def _values(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Keys and values, which are YAML: in Hydra's grammar a list could not hold overrides."""
    from omegaconf import OmegaConf

    for word in overrides:
        key, separator, _ = word.partition("=")
        if not separator:
            raise ConfigError(f"study.{word} must read study.KEY=VALUE")
        yield key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value{word[len(key) :]}"]))["value"]  # pyright: ignore


def _chosen(key: str, names: Sequence[str], known: Any) -> dict[str, Any]:
    """``study.arms=[a,b]`` picks some of the file's."""
    for name in names:
        if name not in known:
            raise ConfigError(f"study.{key}={list(names)}: there is no {name!r}: {suggest(str(name), list(known))}")
    return {name: known[name] for name in names}


def _check_file(file: StudyFile) -> None:
    """Raise ValueError for what the kinds of `StudyFile`'s annotations do not tell."""
    for key in ("arms", "tasks", "cross"):
        for name in getattr(file, key):
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(
                    f"study.{key} has {name!r}: names are made of letters, digits, '_', '.' and '-', and words that "
                    f"YAML reads as something else, as off, stand in quotes"
                )
    for key in ("arms", "tasks", "seeds"):
        if not getattr(file, key):
            raise ValueError(f"study.{key} is empty: name at least one")
    if len(set(file.seeds)) < len(file.seeds) or min(file.seeds) < 0:
        raise ValueError(f"study.seeds={list(file.seeds)} must be different whole numbers, 0 or more")
    for arm in [file.baseline or next(iter(file.arms)), *itertools.chain.from_iterable(file.equal)]:
        if arm not in file.arms:
            raise ValueError(
                f"study.baseline and study.equal name arms; there is no {arm!r}: {suggest(arm, file.arms)}"
            )
    for key in ("workers", "budget"):
        if getattr(file, key) is not None:
            check_count(f"study.{key}", getattr(file, key))
    if file.probe < 0:
        raise ValueError(f"study.probe={file.probe} must not be negative")


def words_of(key: str, found: Any) -> list[str]:
    """An arm's overrides; one may stand without a list."""
    words = [found] if isinstance(found, str) else [] if found is None else found
    if not isinstance(words, list) or not all(
        isinstance(word, str) and ("=" in word or word[:1] == "~") for word in words
    ):
        raise ConfigError(f"study.{key}={found!r} must be a list of overrides, as in [scope=shared, algorithm.lr=1e-3]")
    for word in words:
        if (own := word.lstrip("+~").partition("=")[0]) in OF_THE_STUDY:
            raise ConfigError(f"study.{key}: {word}: a study sets {own} itself; give {OF_THE_STUDY[own]}")
    return words
