"""What Hydra and OmegaConf have to say of a command line or a config file, in one sentence with the nearest names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from marl_memory.training.config import config_dir, options, suggest

BY_US = "MARL_MEMORY_SET_HYDRA_FULL_ERROR"
"""The environment variable that says, in the processes of a sweep too, that `HYDRA_FULL_ERROR` is not the user's."""


class ConfigError(ValueError):
    """A configuration that can not be composed."""


@contextmanager
def raised_by_hydra() -> Iterator[None]:
    """Let Hydra raise its errors: unless this variable is set, it prints them and ends the process."""
    before = {key: os.environ.get(key) for key in ("HYDRA_FULL_ERROR", BY_US)}
    if not before["HYDRA_FULL_ERROR"]:
        os.environ[BY_US] = "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        for key, value in before.items():
            os.environ.pop(key, None)
            if value is not None:
                os.environ[key] = value


@contextmanager
def in_one_sentence(words: Sequence[str] = ()) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into a `ConfigError`; ``words`` are those of the command line."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(_explain(error, [config_dir(), *folders_of_the_user(words)])) from error


def _explain(error: Exception, folders: Sequence[Path]) -> str:
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _no_such_option(error.missing_cfg_file, folders, str(error))
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} can not be read ({error.message.splitlines()[0]}): right is key=value"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: give {error.full_key}=…"
    if isinstance(error, OmegaConfBaseException):
        return f"{error.full_key}: {_first_line(error)}" if error.full_key else _first_line(error)
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and str(error).startswith("Could not override"):
        return _no_such_key(cause, folders)
    said = str(error) if cause is None else f"{error}: {_first_line(cause)}"
    return " ".join(said.split())


def _no_such_option(missing: str, folders: Sequence[Path], said: str) -> str:
    """``missing`` is the path of a config that does not exist, as in ``env/smax/3mm``."""
    group, _, name = missing.partition("/")
    if not name:
        return " ".join(said.split())
    if group == "hydra":
        group, _, name = name.partition("/")
        if name.startswith("joblib"):
            return f'hydra/{group}=joblib is not installed: pip install "marl-memory[joblib]"'
        known = "; known are basic and joblib" if group == "launcher" else ""
        return f"hydra/{group}={name.removesuffix('.yaml')} does not exist{known}"
    return f"{group}={name.removesuffix('.yaml')} does not exist: {suggest(name, options(group, folders))}"


def _no_such_key(cause: Any, folders: Sequence[Path]) -> str:
    """An override of a key that the configuration lacks; OmegaConf tells where the key was looked for."""
    from omegaconf import OmegaConf

    key, known = str(cause.full_key), list(_dotted(OmegaConf.to_container(cause.parent_node)))
    name = key.rpartition(".")[2]
    if name == key:
        known += [path.name for folder in folders for path in folder.iterdir() if path.is_dir()]
    return f"{key} is unknown, nothing reads it: {suggest(name, dict.fromkeys(known))}"


def _dotted(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for name, value in node.items():
            if name != "hydra":
                yield str(name)
                yield from (f"{name}.{inner}" for inner in _dotted(value))


def folders_of_the_user(words: Sequence[str]) -> list[Path]:
    """The folder after ``--config-dir``, if there is one."""
    from argparse import ArgumentParser

    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", type=Path)
    folder = parser.parse_known_args(words)[0].config_dir
    return [folder] if folder is not None and folder.is_dir() else []


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
