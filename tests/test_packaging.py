"""What leaves the checkout: the wheel, the lock, the version, and what an import drags in."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import marl_memory

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKED_EXTRAS = "smax mpe mujoco mamujoco box2d wandb video joblib study ray submitit rliable dev docs".split()

HEAVY = set(
    "hydra omegaconf jax gymnasium matplotlib tensorboard pettingzoo supersuit "
    "jaxmarl mpe2 pygame Box2D mujoco gymnasium_robotics ale_py smacv2".split()
)

IMPORT_ALL = """
import importlib, pkgutil, sys
for name in {names}:
    module = importlib.import_module(name)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), name + "."):
        importlib.import_module(found.name)
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


def run(*command: str | Path, cwd: Path, timeout: float = 600) -> str:
    """Output of a command that must succeed, in an environment that says nothing of this checkout."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "names",
    [
        ("marl_memory",),
        tuple(f"marl_memory.{part}" for part in ("keys", "spec", "functional", "networks", "memory", "algorithms")),
    ],
    ids=["package", "modules-for-scripts"],
)
def test_import_is_light(names: tuple[str, ...], tmp_path: Path) -> None:
    if len(names) == 1:
        code = f"import {names[0]}, sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    else:
        code = IMPORT_ALL.format(names=names)
    loaded = set(run(sys.executable, "-c", code, cwd=tmp_path).split())
    assert "marl_memory" in loaded
    assert not loaded & HEAVY


def test_version_has_one_source() -> None:
    assert "version" not in PROJECT
    assert "version" in PROJECT["dynamic"]
    installed = importlib.metadata.version("marl-memory")
    assert installed == marl_memory.__version__, "stale metadata: run `touch pyproject.toml && make install`"


def test_lock_holds_what_pyproject_asks() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in lines), "name==version, nothing else"
    locked = dict(line.split("==") for line in lines)
    assert "pygame" not in locked, "pygame and pygame-ce provide the same folder: only pygame-ce is ours"

    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *(text for extra in LOCKED_EXTRAS for text in extras[extra])]:
        wanted = Requirement(text)
        assert wanted.specifier.contains(locked[canonicalize_name(wanted.name)], prereleases=True), text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_contents(wheel: Path) -> None:
    assert wheel.name == f"marl_memory-{marl_memory.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"marl_memory", "marl_memory_envs"}
    assert {"marl_memory/py.typed", "marl_memory_envs/py.typed"} <= set(names)

    carried = {name.removeprefix("marl_memory/configs/") for name in names if name.startswith("marl_memory/configs/")}
    assert "config.yaml" in carried
    assert carried >= {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_trains_from_an_unrelated_folder(wheel: Path, tmp_path: Path) -> None:
    """A new environment with the wheel in it; its dependencies are read from the environment that runs this test.

    A path named in a ``.pth`` file joins ``sys.path`` without its own ``.pth`` files being read: the editable install
    of this checkout stays out.
    """
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # Build backends and pip see only the new environment; the wheel is installed before its dependencies are shown.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import marl_memory as a, marl_memory_envs as b; print(a.__file__); print(b.__file__)"
    for line in run(python, "-c", where, cwd=elsewhere).splitlines():
        assert Path(line).is_relative_to(site)

    command = tmp_path / "venv" / "bin" / "marl-memory"
    sizes = ("training.total_frames=2048", "training.n_envs=8", "training.steps=128")
    overrides = ("env=toy/masked_duel", "algorithm=ippo", *sizes)
    run(command, "train", *overrides, cwd=elsewhere)
    assert list(elsewhere.rglob("metrics.csv")), "no run was written where the command was given"
