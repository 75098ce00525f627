"""Studies run, survive what happens to them, and repeat nothing that is finished."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from marl_memory.study.executors import make_executor
from marl_memory.study.plan import make_plan
from marl_memory.study.progress import Progress, last_frames
from marl_memory.study.results import DamagedRecordError, Record, StudyError, read_results, run_folder
from marl_memory.study.runner import Outcome, check_folder, run_study, slots
from tests import fresh
from tests.study.studies import TINY, kill_after, learnt, run, write

ALL = [("meet", arm, seed) for arm in ("no_memory", "strength_0", "shared") for seed in (0, 1)]


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``configs`` and a finished study ``whole``."""
    where = tmp_path_factory.mktemp("study")
    write(where / "configs")
    said = run(where / "configs", "study.folder=whole", cwd=where).stdout
    assert "runs       6 = 3 arms × 1 task × 2 seeds, 0 of them finished" in said
    assert "[6/6]" in said and "finished   6 of 6 runs" in said
    return where


def test_every_run_leaves_a_record(where: Path) -> None:
    results = read_results(where / "whole")
    assert sorted(results.records) == sorted(ALL) and not results.missing
    for (_, arm, _), record in results.records.items():
        assert record.frames == 256
        assert [len(values) for values in record.curves["evaluation/return"]] == [3, 3]
        assert len(record.absolute["return"]) == len(record.absolute["success"]) == 40
        assert record.costs["peak_bytes"] > 1e8 and record.costs["wall_seconds"] > 0
        assert (record.costs["rows"] > 0) == (record.costs["payloads"] > 0) == (arm != "no_memory")
        assert record.costs["memory_parameters"] == 0


def test_strength_0_is_no_memory_and_other_arms_are_not(where: Path) -> None:
    records = read_results(where / "whole").records
    for seed in (0, 1):
        assert records["meet", "no_memory", seed].digest == records["meet", "strength_0", seed].digest
        assert records["meet", "no_memory", seed].digest != records["meet", "shared", seed].digest


def test_what_is_finished_is_not_repeated(where: Path) -> None:
    files = {file: file.stat().st_mtime_ns for file in (where / "whole/runs").rglob("*") if file.is_file()}
    assert "6 of them finished" in run(where / "configs", "study.folder=whole", cwd=where).stdout
    assert files == {file: file.stat().st_mtime_ns for file in (where / "whole/runs").rglob("*") if file.is_file()}


def test_killed_at_random_it_ends_in_the_same_bits(where: Path) -> None:
    words, moment = ("study.folder=killed", "study.seeds=[0]"), random.Random(time.time()).uniform(4, 8)
    kill_after(moment, where / "configs", *words, cwd=where, number=signal.SIGKILL)
    run(where / "configs", *words, cwd=where)
    whole = learnt(where / "whole")
    assert learnt(where / "killed") == {key: whole[key] for key in ALL if key[2] == 0}


@pytest.mark.slow
def test_killed_often_it_ends_in_the_same_tables(where: Path) -> None:
    draw = random.Random(time.time())
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        kill_after(draw.uniform(4, 9), where / "configs", "study.folder=often", cwd=where, number=number)
    run(where / "configs", "study.folder=often", cwd=where)
    assert learnt(where / "often") == learnt(where / "whole")
    for table in ("results.csv", "runs.csv"):
        assert (where / "often/report" / table).read_bytes() == (where / "whole/report" / table).read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["study.executor=ray", "study.executor_options={num_cpus: 2}"], id="ray"),
        pytest.param(["study.executor=submitit", "study.executor_options={cluster: local}"], id="submitit"),
    ],
)
@pytest.mark.slow
def test_other_executors_give_the_same_bits(where: Path, words: list[str]) -> None:
    folder = words[0].partition("=")[2]
    arms = ("study.arms=[no_memory,shared]", "study.equal=[]", "study.seeds=[0]")
    run(where / "configs", f"study.folder={folder}", *arms, *words, cwd=where)
    found, expected = learnt(where / folder), learnt(where / "whole")
    assert len(found) == 2
    assert found == {key: expected[key] for key in found}


def test_a_failure_is_named_and_only_it_is_tried_again(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of one arm fails until a file is there."""
    (where / "own_task.py").write_text(
        "from pathlib import Path\n"
        "from marl_memory_envs.toy import Rendezvous\n"
        "class Faulty(Rendezvous):\n"
        "    steps = 0\n"
        "    def step(self, actions):\n"
        "        Faulty.steps += 1\n"
        "        if self.max_steps == 24 and Faulty.steps > 300 and not Path('mended').exists():\n"
        "            raise RuntimeError('the arm is broken')\n"
        "        return super().step(actions)\n"
        "def make(max_steps=25):\n"
        "    env = Faulty(max_steps=max_steps)\n"
        "    env.max_steps = max_steps\n"
        "    return env\n"
    )
    env = "env=pettingzoo, env.factory=own_task:make, env.common_reward=true"
    text = TINY.replace("  - env=toy/rendezvous\n", "").replace("  meet: []", f"  meet: [{env}]")
    text = text[: text.index("arms:")] + (
        "arms:\n  no_memory: ['memory=[]']\n  faulty: [+env.kwargs.max_steps=24]\nseeds: [0]\nbudget: 256\n"
    )
    configs = write(where / "faulty_configs", text)
    done = run(configs, "study.folder=faulty", cwd=where, ok=False)
    assert "[2/2]" in done.stdout and "finished   1 of 2 runs" in done.stdout
    assert "failed     meet faulty seed 0" in done.stdout and "the arm is broken" in done.stdout
    results = read_results(where / "faulty")
    assert "the arm is broken" in results.missing["meet", "faulty", 0]
    written = (run_folder(where / "faulty", "meet", "no_memory", 0) / "result.json").stat().st_mtime_ns
    (where / "mended").touch()
    assert "1 of them finished" in run(configs, "study.folder=faulty", cwd=where).stdout
    results = read_results(where / "faulty")
    assert not results.missing
    assert (run_folder(where / "faulty", "meet", "no_memory", 0) / "result.json").stat().st_mtime_ns == written


def test_a_changed_record_is_noticed_and_its_run_repeated(where: Path) -> None:
    before = learnt(where / "whole")
    edited, truncated, metrics = (run_folder(where / "whole", *run) for run in ALL[:3])
    (edited / "result.json").write_text((edited / "result.json").read_text().replace('"frames": 256', '"frames": 512'))
    (truncated / "result.json").write_text((truncated / "result.json").read_text()[:200])
    (metrics / "metrics.csv").write_text((metrics / "metrics.csv").read_text().replace("256", "255"))
    for folder, named in ((edited, "result.json"), (truncated, "result.json"), (metrics, "metrics.csv")):
        with pytest.raises(DamagedRecordError, match=named):
            Record.read(folder)
    assert set(read_results(where / "whole").missing) == set(ALL[:3])
    said = run(where / "configs", "study.folder=whole", cwd=where).stdout
    assert said.count("the run is repeated") == 3 and "3 of them finished" in said
    assert edited.with_name("seed_0.damaged").is_dir()
    assert learnt(where / "whole") == before


def test_the_folder_of_another_study(where: Path, tmp_path: Path) -> None:
    configs = str(where / "configs")
    plan = make_plan(["study=tiny", "--config-dir", configs, f"study.folder={where / 'whole'}", "algorithm.gamma=0.5"])
    with pytest.raises(StudyError, match="has algorithm.gamma=0.99 there, and 0.5 now; choose another study.folder"):
        check_folder(plan)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(StudyError, match="holds no study, but notes.txt"):
        check_folder(make_plan(["study=tiny", "--config-dir", configs, f"study.folder={tmp_path}"]))
    with pytest.raises(StudyError, match="holds no study"):
        read_results(tmp_path)


def test_two_at_once_are_refused(where: Path) -> None:
    import fcntl

    words = ["study=tiny", "--config-dir", str(where / "configs"), f"study.folder={where / 'whole'}"]
    with (where / "whole/.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(StudyError, match="is being run by another process"):
            run_study(make_plan(words), words=words)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("local", {"cluster": "x"}, "have no effect with study.executor=local"),
        ("slurm", {}, "study.executor='slurm' must be one of local, ray, submitit"),
        ("ray", {"cpus": 2}, "ray.init says"),
        ("submitit", {"cluster": "local", "minutes": 3}, "submitit says"),
    ],
)
def test_executors_refuse_what_they_do_not_know(tmp_path: Path, name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_executor(name, options, folder=tmp_path, threads=1)


def test_the_plan_alone(where: Path) -> None:
    said = run(where / "configs", "study.folder=only_planned", "--plan", "study.probe=1", cwd=where).stdout
    assert "estimate   0:0" in said and "GB at a time" in said
    assert not (where / "only_planned").exists()


def test_the_display_counts(where: Path) -> None:
    words = ["study=tiny", "--config-dir", str(where / "configs"), f"study.folder={where / 'whole'}"]
    plan, outcome, said = make_plan(words), Outcome(), []
    with Progress(plan, outcome, said.append) as progress:
        assert progress.lines([])[1] == "runs 6  finished 0  running 0  failed 0"
        outcome.finished.append(ALL[0])
        progress.ended(ALL[0])
        outcome.failed[ALL[1]] = "it broke"
        progress.ended(ALL[1])
        head, counts, *running = progress.lines([ALL[2]])
    assert "50%" in head and counts == "runs 6  finished 1  running 1  failed 1"  # three of six runs, 256 frames each
    assert running == ["  meet strength_0 seed 0  256 / 256 frames"]
    assert said[0].startswith("[1/6] meet no_memory seed 0 finished in 0:00:") and "evaluation/return" in said[0]
    assert said[1] == "[2/6] meet no_memory seed 1 failed: it broke"


def test_frames_of_a_file_that_is_being_written(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    assert last_frames(file) == 0
    file.write_text("frames,iteration\n")
    assert last_frames(file) == 0
    file.write_text("frames,iteration\n64,1\n128,2\n19")
    assert last_frames(file) == 128


def test_the_quick_study_and_its_report(tmp_path: Path) -> None:
    """As the documentation gives them, with one seed."""
    for words in (["study", "study=quick", "study.seeds=[0]"], ["report", "runs/study/quick"]):
        done = fresh.command(*words, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "runs/study/quick/report/index.html" in done.stdout
    assert len(read_results(tmp_path / "runs/study/quick").records) == 4


def test_study_json_tells_the_command(where: Path) -> None:
    stored = json.loads((where / "whole/study.json").read_text())
    assert stored["command"][:2] == ["marl-memory study", "study=tiny"]
    assert stored["study"]["seeds"] == [0, 1]


@pytest.mark.slow
def test_the_cores_are_kept_busy(tmp_path: Path) -> None:
    """Processor time of 16 short runs beside wall time × cores; on a machine that does nothing else."""
    configs = write(tmp_path / "configs", TINY.replace("budget: 256", "budget: 20_480"))
    words = ["study=tiny", "--config-dir", str(configs), f"study.folder={tmp_path / 'busy'}"]
    more = ["study.arms=[no_memory,shared]", "study.equal=[]", "study.seeds=[0,1,2,3,4,5,6,7]"]
    plan = make_plan(
        [*words, *more, "training.evaluation_every_frames=20480", "training.checkpoint_every_frames=20480"]
    )
    before, began = os.times(), time.monotonic()
    outcome = run_study(plan, words=words)
    wall, after = time.monotonic() - began, os.times()
    assert len(outcome.finished) == 16
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used >= 0.9 * wall * slots(plan), f"{used:.1f} s of {wall:.1f} s × {slots(plan)} cores"
