"""The code in README and on the pages of the site runs; a line that nobody knows how to check is an error.

Python blocks of a page are executed one after the other; a ``text`` block is what the block before it prints.  Shell
blocks are executed by ``sh`` with stand-ins that note the commands, which are then checked: a ``marl-memory`` command
is run on a small budget, a ``make`` target must exist, an extra in a ``pip`` command too.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from marl_memory import cli
from marl_memory.study.plan import make_plan
from marl_memory.training.run import make_env, read_config, release
from marl_memory_envs.smac_install import GET_MAPS
from tests.study.synthetic import make_study, write_study

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if page.name != "report.md"  # written by `marl-memory report`
)
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INCLUDED = re.compile(r"<!-- file: (.*?) -->")
FOLDERS = {"task": "own_environment", "operator": "operator", "algorithm": "algorithm", "parts": "operator"}
"""The example that a page of docs/howto is about: its commands are given there."""

TINY = (
    "training.n_envs=4 training.steps=16 training.total_frames=64 training.evaluation_episodes=4 training.threads=1 "
    "network.hidden=[16,16] logger.quiet=true logger.tensorboard=false"
).split()

PIP_KNOWN = {
    "install": "the only command",
    "torch": "a dependency",
    "--index-url": "its value is the next word",
    "https://download.pytorch.org/whl/cpu": "PyTorch's own index; also the Makefile's",
    "--no-deps": "an option",
    "git+https://github.com/oxwhirl/smacv2": "not on PyPI, and not fetched here",
    "pysc2==4.0.0": "installed beside smacv2",
}
SYSTEM = ("sudo", "wget", "unzip", "mkdir")
"""Programs of the system; they fetch and unpack StarCraft II and its maps, which is not done here."""
FETCHED = ("https://blzdistsc2-a.akamaihd.net/Linux/SC2.4.10.zip", GET_MAPS.splitlines()[-1])
NOT_CODE = {"docs/decisions.md": ["## N. Title"]}
"""Blocks that show a form to fill in, by how they begin."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of every fenced block."""
    return BLOCK.findall((ROOT / page).read_text())


def with_language(*languages: str) -> list[str]:
    return [page for page in PAGES if any(language in languages for language, _ in blocks(page))]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_kind_that_is_checked(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(re.findall(r"^ *```", text, re.MULTILINE)) == 2 * len(blocks(page)), "a block is indented or left open"
    before = ""
    for language, content in blocks(page):
        if language == "text":
            assert before == "python", "a text block is what the Python block before it prints"
        elif language == "":
            assert content.splitlines()[0] in NOT_CODE.get(page, [])
        else:
            assert language in ("python", "sh"), f"{language}: include it from examples/, where it is tested"
        before = language
    for path in INCLUDED.findall(text):
        assert path.startswith("examples/"), "only what test_examples.py runs is included"


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after the first of three iterations."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    later = ["training.total_frames=192", "training.checkpoint_every_frames=128", "training.stop_at_frames=64"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", sys.argv)
        cli.main(["train", "env=toy/masked_duel", *TINY, *later, f"run_folder={folder}"])
    release(folder)
    return folder


@pytest.fixture
def user_folder(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the repository, with the files of the page's example, as the current one."""
    example = FOLDERS.get(Path(page).stem, "") if "howto" in page else ""
    folder = tmp_path / "user"
    if example:
        shutil.copytree(ROOT / "examples" / example, folder)
    else:
        folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    return folder


@pytest.mark.parametrize("page", with_language("python"))
def test_python_blocks_run(page: str, stopped_run: Path, user_folder: Path) -> None:
    names: dict[str, Any] = {"env": make_env(read_config(stopped_run), n_envs=2, seed=0)}
    study = write_study(user_folder / "study", make_study(("no_memory", "shared")), lambda task, arm, seed: [0.0, seed])
    printed = ""
    for language, content in blocks(page):
        if language == "text":
            assert printed == content
        if language == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(
                    compile(
                        content.replace('"RUN"', repr(str(stopped_run))).replace('"STUDY"', repr(str(study))),
                        page,
                        "exec",
                    ),
                    names,
                )
            printed = output.getvalue()


LONG = {"docs/cli.md", "docs/results/README.md"}
"""Pages of many commands: slow tests."""


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] * (page in LONG)) for page in with_language("sh")]
)
def test_shell_blocks_run(page: str, stopped_run: Path, user_folder: Path, tmp_path: Path) -> None:
    shell = "".join(content for language, content in blocks(page) if language == "sh")
    noted = note_commands(shell, tmp_path / "stand-ins")
    assert noted
    done: set[tuple[str, ...]] = set()
    for number, (program, *arguments) in enumerate(noted):
        if program == "make":
            check_make(arguments)
        elif program == "pip":
            check_pip(arguments)
        elif program in SYSTEM:
            check_system(program, arguments)
        else:
            distinct = tuple(word for word in arguments if not word.startswith("seed="))
            if distinct not in done:  # one seed shows that the line works
                run_marl_memory(arguments, stopped_run, tmp_path / str(number))
            done.add(distinct)


def note_commands(shell: str, folder: Path) -> list[list[str]]:
    """Execute ``shell`` where only stand-ins can be found; the commands that were called, word by word."""
    folder.mkdir()
    for program in ("marl-memory", "make", "pip", *SYSTEM):
        (folder / program).write_text('#!/bin/sh\nprintf "%s\\037" "${0##*/}" "$@" >&2\necho >&2\n')
        (folder / program).chmod(0o755)
    environment = {"PATH": str(folder), "HOME": "/home/user"}
    done = subprocess.run(["/bin/sh", "-eu"], input=shell, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.rstrip("\037").split("\037") for line in done.stderr.splitlines()]


def check_make(arguments: list[str]) -> None:
    target = next(word for word in arguments if "=" not in word)
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make {target}: no such target"
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_pip(arguments: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        if found := re.fullmatch(r"\.\[([\w,]+)\]", word):
            assert set(found[1].split(",")) <= set(extras), word
        else:
            assert word in PIP_KNOWN, f"pip {word}: what is it?"


def check_system(program: str, arguments: list[str]) -> None:
    if program == "wget":
        assert arguments in ([url] for url in FETCHED), arguments
    if program == "sudo":
        assert arguments[:3] == ["apt-get", "install", "-y"]
    if program == "unzip":
        assert any(url.endswith(f"/{word}") for url in FETCHED for word in arguments), arguments


def run_marl_memory(arguments: list[str], stopped_run: Path, folder: Path) -> None:
    """Run one command on a small budget; what it should leave behind is there."""
    command, *rest = arguments
    if command == "study":
        assert make_plan(rest).configs
        return
    if command == "report":
        write_study(folder, make_study(("no_memory", "shared")), lambda task, arm, seed: [0.0, seed])
        assert len(rest) == 1
        cli.main([command, str(folder)])
        assert (folder / "report/index.html").exists()
        return
    run = Path(shutil.copytree(stopped_run, folder / "run"))
    if "-m" in rest:  # of a small task: a sweep has many runs
        words = [word for word in rest if not word.startswith("env=")]
        cli.main([command, *words, "env=toy/masked_duel", *TINY, f"run_folder={folder / 'new'}"])
        assert (folder / "new_job_0" / "curve.png").exists()
        return
    if command == "train" and any("smac/" in word for word in rest):  # the game may not be here: it is composed
        cli.main([command, *rest, "--cfg", "job"])
        return
    if "--replay" in rest:
        with pytest.raises(SystemExit, match="toy/masked_duel keeps no replays"):
            cli.main([command, *(scaled(word, run) for word in rest)])
        return
    if command == "train":
        last = max(i for i, word in enumerate(rest) if "=" in word) + 1  # options may follow: argparse wants one row
        cli.main([command, *rest[:last], *TINY, f"run_folder={folder / 'new'}", *rest[last:]])
        assert (folder / "new" / "curve.png").exists() or "--cfg" in rest
        return
    if "--video" in rest:  # of a task that can be drawn
        run = folder / "drawable"
        cli.main(["train", "env=classic/cartpole", "algorithm=ppo", *TINY, f"run_folder={run}"])
    assert command in ("resume", "evaluate", "plot", "tasks", "doctor"), f"marl-memory {command}: how is it checked?"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        cli.main([command, *(scaled(word, run) for word in rest)])
    ends = {"resume": "stopped at 128 frames" if "stop_at_frames" in " ".join(rest) else "finished at 192 frames"}
    ends["evaluate"] = "greedy episodes" if "--video" in rest else "return"
    expected = {**ends, "plot": ".png", "tasks": "smax/3m", "doctor": "StarCraft II"}[command]
    assert expected in output.getvalue()


def scaled(word: str, run: Path) -> str:
    """A word of a command as it reads for the small run: the page's run is longer."""
    folders = {"RUN": str(run), "runs/smax/3m": str(run.parent)}
    return {**folders, "training.stop_at_frames=1000000": "training.stop_at_frames=128"}.get(word, word)
