"""Every config lists exactly the keywords of what it names, with the same defaults where the family agrees."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import OmegaConf

from marl_memory.cli import config_dir
from marl_memory.training.logging import Logger
from marl_memory.training.tasks import load_task
from marl_memory.training.trainer import Schedule

FOLDER = config_dir()
FILES = sorted(f for group in ("env", "algorithm", "network", "memory") for f in (FOLDER / group).rglob("*.yaml"))
COMPOSED = [FOLDER / "memory" / "adamemento.yaml"]
"""Memories that are several operators, each with a file of its own."""
TARGETED = [file for file in FILES if file not in COMPOSED]
HANDED_OVER = {
    "spec",
    "network",
    "seed",
    "n_envs",
    "batch_steps",
    "off_policy",
    "n_critics",
    "reach",
    "feature_size",
    "generator",
    "banks",
    "in_features",
    "out_features",
    "output_gain",
    "picture",
    "again",
}


def load(file: Path) -> dict[str, Any]:
    """A config as it is, but a task's with what it shares with its family."""
    node: Any = load_task(FOLDER / "env", task) if (task := in_env(file)) else OmegaConf.load(file)
    config = OmegaConf.to_container(node)
    assert isinstance(config, dict)
    return config  # type: ignore[return-value]


def in_env(file: Path) -> str:
    folder = FOLDER / "env"
    return str(file.relative_to(folder).with_suffix("")) if file.is_relative_to(folder) else ""


def name(file: Path) -> str:
    return str(file.relative_to(FOLDER).with_suffix(""))


def parameters(target: Any) -> dict[str, inspect.Parameter]:
    found = inspect.signature(target).parameters
    return {key: parameter for key, parameter in found.items() if key not in HANDED_OVER}


@pytest.mark.parametrize("file", TARGETED, ids=name)
def test_a_config_lists_every_keyword_and_no_other(file: Path) -> None:
    config = load(file)
    listed = {key for key in config if not str(key).startswith("_") and key != "defaults"}
    assert listed == set(parameters(get_object(config["_target_"])))


@pytest.mark.parametrize("file", sorted((FOLDER / "network").glob("*.yaml")), ids=name)
def test_a_network_config_has_the_defaults_of_the_code(file: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(config, dict)
    for key, parameter in parameters(get_object(config["_target_"])).items():
        value = config[key]
        assert (tuple(value) if isinstance(value, list) else value) == parameter.default, key


@pytest.mark.parametrize("file", sorted((FOLDER / "algorithm").glob("*.yaml")), ids=name)
def test_an_algorithm_config_has_the_defaults_of_the_code_but_for_its_switches(file: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(config, dict)
    for key, parameter in parameters(get_object(config["_target_"])).items():
        if key not in ("centralised_critic", "share_parameters", "share_actor", "share_critic"):
            assert config[key] == parameter.default, key


def test_the_training_and_logger_configs_list_every_key() -> None:
    training = OmegaConf.load(FOLDER / "training" / "default.yaml")
    assert set(training) == set(inspect.signature(Schedule).parameters) | {"n_envs", "keep_checkpoints", "threads"}
    logger = OmegaConf.load(FOLDER / "logger" / "default.yaml")
    assert set(logger) == set(inspect.signature(Logger).parameters) - {"folder", "total_frames", "config"}


@pytest.mark.parametrize("file", sorted((FOLDER / "experiment").rglob("*.yaml")), ids=name)
def test_an_experiment_composes(file: Path) -> None:
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={name(file).partition('/')[2]}", "run_folder=somewhere"])
    assert config.training.total_frames > 0


@pytest.mark.parametrize("file", COMPOSED, ids=name)
def test_a_composed_memory_is_its_operators_as_they_are_alone(file: Path) -> None:
    node: Any = OmegaConf.load(file)
    parts = [part for part in node["defaults"] if part != "_self_"]
    assert len(parts) > 1
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        whole, several = (
            compose("config", overrides=[f"memory=[{names}]", "scope=shared", "run_folder=somewhere"]).memory
            for names in (file.stem, ",".join(parts))
        )
    assert whole == several


def test_memory_is_a_list_that_may_be_empty() -> None:
    with initialize_config_dir(str(FOLDER), version_base="1.3"):
        config = compose("config", overrides=["memory=[]", "run_folder=somewhere"])
    assert not config.get("memory")
