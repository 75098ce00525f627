"""The doctor: what it finds is what is there, and everything that is missing comes with the way to get it."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from marl_memory import cli, doctor
from marl_memory.doctor import Row, examine, report
from marl_memory.training import tasks
from marl_memory_envs import smac_install
from tests import fresh


def rows(section: str, folder: Path = Path()) -> dict[str, Row]:
    return {row.name: row for row in examine(folder)[section]}


def test_the_command_tells_all_and_fits_a_terminal(tmp_path: Path) -> None:
    environment = {**os.environ, "SC2PATH": "nowhere"}
    done = fresh.command("doctor", cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "core", "machine", "tasks", "extras", "StarCraft II",
    ]  # fmt: skip
    assert f"  ok  {'torch':<22} {torch.__version__}" in lines
    assert any(line.startswith(f"  ok  {'smax':<22} ") and line.endswith("tasks ready") for line in lines)
    assert "--  SC2PATH                nowhere: no such folder" in done.stdout
    for line in lines:
        assert len(line) <= 80 or str(tmp_path) in line, line
    assert not list(tmp_path.iterdir())


def test_packages_are_those_of_the_metadata() -> None:
    core = rows("core")
    assert {"marl-memory", "python", "torch", "torchrl", "tensordict", "hydra-core", "pettingzoo"} <= set(core)
    assert core["torchrl"].found == metadata.version("torchrl")
    assert not {"jaxmarl", "pytest", "mpe2"} & set(core)
    extras = rows("extras")
    assert {"smax", "mpe", "box2d", "mujoco", "mamujoco", "smac", "video", "joblib", "dev"} <= set(extras)
    assert "all" not in extras
    assert f"jaxmarl {metadata.version('jaxmarl')}" in extras["smax"].found


def test_what_is_missing_comes_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def without_mpe2(name: str) -> str:
        if name == "mpe2":
            raise metadata.PackageNotFoundError(name)
        return "3.11.0" if name == "mujoco" else version(name)

    monkeypatch.setattr(metadata, "version", without_mpe2)
    extras = rows("extras")
    assert extras["mpe"] == Row("mpe", "mpe2 not installed", False, 'pip install "marl-memory[mpe]"')
    assert extras["mujoco"].there
    assert extras["mamujoco"] == Row(
        "mamujoco", "mujoco 3.11.0, not <3.6,>=3.2", False, 'pip install "marl-memory[mamujoco]"'
    )
    monkeypatch.setattr(tasks, "find_spec", lambda package: None if package == "mpe2" else package)
    suites = rows("tasks")
    assert suites["mpe"] == Row("mpe", "4 tasks", False, 'missing: pip install "marl-memory[mpe]"')
    assert suites["toy"] == Row("toy", "20 tasks ready")
    assert "pettingzoo" not in suites


@pytest.mark.parametrize(
    ("version", "found"), [(None, "torchrl                not installed"), ("0.9.0", "0.9.0, not <0.15,>=0.14.1")]
)
def test_a_missing_part_of_the_core_is_an_error(
    version: str | None, found: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    true_version = metadata.version

    def other_torchrl(name: str) -> str:
        if name != "torchrl":
            return true_version(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(metadata, "version", other_torchrl)
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor"])
    assert left.value.code == 1
    printed = capsys.readouterr().out
    assert found in printed
    assert "      pip install 'torchrl<0.15,>=0.14.1'" in printed
    assert "machine" not in printed, "nothing is asked of what can not be imported"


def test_without_the_library_itself_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "marl-memory-of-nobody")
    assert examine(Path()) == {
        "core": [Row("marl-memory-of-nobody", "not installed", False, "in its checkout: pip install .")]
    }


@pytest.fixture
def game(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the game's package leaves it, but for its content."""
    for file in ("Versions/Base75689/SC2_x64", "Maps/SMAC_Maps/3m.SC2Map", "Maps/SMAC_Maps/10gen_terran.SC2Map"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    return tmp_path


def test_starcraft_is_looked_for_where_pysc2_does(game: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows("StarCraft II")
    assert found["SC2PATH"] == Row("SC2PATH", str(game))
    assert found["game"] == Row("game", "4.10 (Base75689)")
    assert found["maps"].found == "1 of 24 in Maps/SMAC_Maps, not 8m"
    for name in (*smac_install.SMAC_MAPS, smac_install.FLAT):
        (game / "Maps" / "SMAC_Maps" / f"{name}.SC2Map").touch()
    assert rows("StarCraft II")["maps"] == Row("maps", "24 of 24 in Maps/SMAC_Maps")
    (game / "Versions" / "Base75689").rename(game / "Versions" / "Base80000")
    for file in (game / "Maps" / "SMAC_Maps").iterdir():
        file.unlink()
    found = rows("StarCraft II")
    assert found["game"].found == "Base80000 in Versions, not Base75689 (4.10)"
    assert "s2client-proto" in found["game"].hint
    assert (found["maps"].there, found["maps"].found) == (False, "0 of 24 in Maps/SMAC_Maps")
    assert "smacv2/releases/download/maps/SMAC_Maps.zip" in found["maps"].hint
    monkeypatch.delenv("SC2PATH")
    monkeypatch.setenv("HOME", str(game))
    found = rows("StarCraft II")
    assert found["SC2PATH"].found == f"{game}/StarCraftII (not set): no such folder"
    assert found["SC2PATH"].hint.endswith("export SC2PATH=FOLDER/StarCraftII")


def test_smacv2_is_installed_from_its_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smac_install, "find_spec", lambda name: None if name == "smacv2" else SimpleNamespace())
    found = rows("StarCraft II")
    assert found["smacv2"].hint == "pip install --no-deps pysc2==4.0.0 git+https://github.com/oxwhirl/smacv2"
    assert found["pysc2"] == Row("pysc2", "installed")
    monkeypatch.setattr(smac_install, "find_spec", lambda name: None if name == "websocket" else SimpleNamespace())
    found = rows("StarCraft II")
    assert found["smacv2"] == Row("smacv2", "installed")
    lacking = Row("smac packages", "websocket missing", False, 'pip install "marl-memory[smac]"')
    assert found["smac packages"] == lacking


def test_devices_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that this machine may not have; `torch.cuda` is asked as on one that has them."""
    monkeypatch.setattr(torch.version, "cuda", None)
    assert rows("machine")["CUDA"].found == "none: torch is built without it"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert rows("machine")["CUDA"].found == "12.8, but torch finds no device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    card = SimpleNamespace(name="A card", total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    machine = rows("machine")
    assert machine["cuda:1"].found == "A card, 24 GiB (training is on the CPU)"
    assert "CUDA" not in machine


def test_the_disk_is_that_of_the_runs(tmp_path: Path) -> None:
    assert rows("machine", tmp_path)["disk of runs/"].found.endswith(f"GiB free in {tmp_path}")
    (tmp_path / "runs").mkdir()
    assert rows("machine", tmp_path)["disk of runs/"].found.endswith(f"GiB free in {tmp_path}/runs")


def test_long_lists_are_cut_at_a_name() -> None:
    text = doctor._shortened([f"package-{i} 1.0" for i in range(9)])
    assert text == "package-0 1.0, package-1 1.0, package-2 1.0, …"
    assert report({"a": [Row("b", "c", False, "d\ne")]}) == "a\n  --  b                      c\n      d\n      e"
