"""Curves of several runs: which runs are one line, what the line says, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from marl_memory.cli import main
from marl_memory.spec import TaskSpec
from marl_memory.training.logging import MetricsFile
from marl_memory.training.plot import find_runs, group_runs, mean_line, plot
from marl_memory.training.run import RunFolderError, make_env

DUEL = {
    "_target_": "marl_memory_envs.vector.vector_env",
    "factory": "marl_memory_envs.toy:MaskedDuel",
    "common_reward": True,
    "success": "won",
    "max_episode_steps": 20,
}


@pytest.fixture(scope="module")
def spec() -> TaskSpec:
    env = make_env({"env": DUEL}, n_envs=1, seed=0)
    env.close()
    return env.task_spec


def make_run(
    folder: Path,
    spec: TaskSpec,
    rows: list[dict[str, float]],
    *,
    task: str = "toy/masked_duel",
    seed: int = 0,
    env: dict[str, Any] | None = None,
    lr: float = 0.001,
    memory: dict[str, Any] | None = None,
    **training: Any,
) -> Path:
    """What a run leaves, as far as a plot reads it."""
    config = {
        "env": {**DUEL, **(env or {})},
        "algorithm": {"lr": lr, "name": "mappo"},
        "training": {"total_frames": 300, "threads": 1, **training},
        "memory": memory or {},
        "logger": {"quiet": bool(seed)},
        "seed": seed,
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"config": config, "task": {**spec.to_dict(), "name": task}}))
    metrics = MetricsFile(folder / "metrics.csv")
    for row in rows:
        metrics.append(row)
    return folder


def curve(*values: float, every: int = 100, name: str = "evaluation/return") -> list[dict[str, float]]:
    return [{"frames": every * i, "iteration": i, name: value} for i, value in enumerate(values)]


def test_runs_that_differ_in_seed_only_are_one_group(tmp_path: Path, spec: TaskSpec) -> None:
    runs = [
        make_run(tmp_path / f"{lr}_{seed}", spec, curve(1.0), seed=seed, lr=lr, threads=seed + 1)
        for lr in (0.001, 0.01)
        for seed in (0, 1, 2)
    ]
    notes: list[str] = []
    found = group_runs([runs[i] for i in (0, 3, 1, 4, 2, 5)], notes.append)
    assert found == {"algorithm.lr=0.001": runs[:3], "algorithm.lr=0.01": runs[3:]}
    assert not notes
    assert list(group_runs(runs[:3], notes.append)) == ["toy/masked_duel"]


def test_the_task_stands_for_its_keys_unless_it_does_not_tell_groups_apart(tmp_path: Path, spec: TaskSpec) -> None:
    a = make_run(tmp_path / "a", spec, curve(1.0))
    b = make_run(tmp_path / "b", spec, curve(1.0), env={"factory": "my:make", "kwargs": {"n": 3}}, task="mine", lr=1.0)
    c = make_run(tmp_path / "c", spec, curve(1.0), env={"kwargs": {"dragon": 3}})
    assert group_runs([a, b], print) == {"toy/masked_duel, algorithm.lr=0.001": [a], "mine, algorithm.lr=1.0": [b]}
    assert group_runs([a, c], print) == {"env.kwargs.dragon=nothing": [a], "env.kwargs.dragon=3": [c]}
    three = group_runs([a, b, c], print)
    assert [members for members in three.values()] == [[a], [b], [c]]


def test_operators_that_only_some_runs_have_are_named_and_not_spelt_out(tmp_path: Path, spec: TaskSpec) -> None:
    operators = ({}, {"gem": {"alpha": 0.25, "capacity": 9}}, {"gem": {"alpha": 1.0, "capacity": 9}}, {"sil": {"c": 1}})
    runs = [make_run(tmp_path / str(i), spec, curve(1.0), memory=memory) for i, memory in enumerate(operators)]
    labels = [
        "memory=[]",
        "memory=[gem], memory.gem.alpha=0.25",
        "memory=[gem], memory.gem.alpha=1.0",
        "memory=[sil]",
    ]
    assert group_runs(runs, print) == {label: [run] for label, run in zip(labels, runs, strict=True)}
    assert list(group_runs(runs[:2], print)) == ["memory=[]", "memory=[gem]"]
    assert list(group_runs(runs[1:3], print)) == ["memory.gem.alpha=0.25", "memory.gem.alpha=1.0"]


def test_the_same_experiment_and_seed_twice_is_said(tmp_path: Path, spec: TaskSpec) -> None:
    runs = [make_run(tmp_path / name, spec, curve(1.0)) for name in "ab"]
    notes: list[str] = []
    assert group_runs(runs, notes.append) == {"toy/masked_duel": runs}
    assert notes == [f"note: {runs[1]} is the same experiment and seed as {runs[0]}; both are counted"]


def test_a_line_is_the_mean_in_a_band_of_all_values(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    line = mean_line(
        "x", {a: ([0, 100, 200], [0.0, 1.0, 5.0]), b: ([0, 100, 200], [0.0, 4.0, 6.0]), c: ([0, 200], [3, 7])}
    )
    np.testing.assert_allclose(line.x, [0, 100, 200])
    np.testing.assert_allclose(line.y, [1.0, (1 + 4 + 5) / 3, 6.0])
    assert line.band is not None
    np.testing.assert_allclose(line.band, [[0.0, 1.0, 5.0], [3.0, 5.0, 7.0]])
    assert mean_line("x", {a: ([0, 100], [0.0, 1.0])}).band is None


def test_a_line_ends_with_the_shortest_run_and_says_so(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    notes: list[str] = []
    line = mean_line("x", {a: ([64, 100], [1.0, 1.0]), b: ([0, 64, 100, 200], [9.0, 3.0, 3.0, 9.0])}, notes.append)
    np.testing.assert_allclose(line.x, [64, 100])
    np.testing.assert_allclose(line.y, [2.0, 2.0])
    assert notes == [f"note: x is drawn to 100 frames, where {a} ends; {b} has 200"]


def test_runs_are_found_in_folders_once_each(tmp_path: Path, spec: TaskSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / f"runs/task/mappo/seed_{i}", spec, curve(1.0), seed=i) for i in range(3)]
    monkeypatch.chdir(tmp_path)
    assert find_runs([tmp_path]) == runs
    assert find_runs([runs[1], Path("runs")]) == [
        runs[1],
        Path("runs/task/mappo/seed_0"),
        Path("runs/task/mappo/seed_2"),
    ]
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "nowhere"):
        with pytest.raises(RunFolderError, match=f"{nothing} holds no run"):
            find_runs([runs[0], Path(nothing)])


def legend_and_labels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved from now on."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])
    return figures


def test_the_picture_has_a_line_a_band_and_a_label_for_each_group(
    tmp_path: Path, spec: TaskSpec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = legend_and_labels(monkeypatch)
    for lr, seeds in ((0.001, (0, 1)), (0.01, (0,))):
        for seed in seeds:
            make_run(tmp_path / f"runs/{lr}_{seed}", spec, curve(0.0, lr + seed, 1.0), seed=seed, lr=lr)
    main(["plot", str(tmp_path / "runs"), "--out", str(tmp_path / "x.png"), "--metric", "evaluation/return"])
    assert capsys.readouterr().out == f"{tmp_path / 'x.png'}\n"
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    assert [line.get_label() for line in axes.lines] == ["algorithm.lr=0.001 (n = 2)", "algorithm.lr=0.01 (n = 1)"]
    assert len(axes.collections) == 1  # one band: a single run has none
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0, 0], [100, 0.501], [200, 1.0]])
    assert axes.get_ylabel() == "return (greedy)"
    assert [text.get_text() for text in figures[0].legends[0].texts] == [line.get_label() for line in axes.lines]


def test_success_is_shown_where_every_run_has_it(
    tmp_path: Path, spec: TaskSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = legend_and_labels(monkeypatch)
    both = [row | {"evaluation/success": 0.5} for row in curve(1.0, 2.0)]
    a, b = make_run(tmp_path / "a", spec, both), make_run(tmp_path / "b", spec, curve(3.0, 4.0), seed=1)
    for runs in ([a], [a, b]):
        plot(runs, tmp_path / "x.svg")
    assert [figure.axes[0].get_ylabel() for figure in figures] == ["win rate (greedy)", "return (greedy)"]
    plot([a], tmp_path / "x.svg", metrics=["evaluation/return", "evaluation/success"])
    assert len(figures[2].axes) == 2


def test_overestimation_stands_beside_the_return(
    tmp_path: Path, spec: TaskSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, names = legend_and_labels(monkeypatch), ["evaluation/return", "evaluation/overestimation"]
    run = make_run(tmp_path / "a", spec, [row | {names[1]: -0.5} for row in curve(1.0, 2.0)])
    plot([run], tmp_path / "x.png", metrics=names)
    one, other = figures[0].axes
    assert [axes.get_ylabel() for axes in (one, other)] == ["return (greedy)", "estimated − true return"]
    assert [len(axes.lines) for axes in (one, other)] == [1, 2] and set(other.lines[1].get_ydata()) == {0.0}


def test_an_unknown_metric_names_the_known_ones_nearest_first(tmp_path: Path, spec: TaskSpec) -> None:
    rows = [row | {"train/success": 0.5, "loss/policy": 1.0} for row in curve(1.0)]
    run = make_run(tmp_path / "run", spec, rows)
    for metric in ("evaluation/retrun", "frames"):
        with pytest.raises(ValueError, match=f"{run} has no metric '{metric}'; it has, nearest first: ") as error:
            plot([run], tmp_path / "x.png", metrics=[metric])
        names = str(error.value).partition("first: ")[2].split(", ")
        assert set(names) == {"evaluation/return", "train/success", "loss/policy", "iteration"}
    with pytest.raises(ValueError, match="nearest first: evaluation/return, "):
        plot([run], tmp_path / "x.png", metrics=["evaluation/retrun"])
    assert not (tmp_path / "x.png").exists()


def test_a_run_without_numbers_is_left_out_and_named(tmp_path: Path, spec: TaskSpec) -> None:
    young = make_run(tmp_path / "young", spec, [])
    notes: list[str] = []
    with pytest.raises(RunFolderError, match="young: no run has numbers yet"):
        plot([young], tmp_path / "x.png", say=notes.append)
    plot([young, make_run(tmp_path / "old", spec, curve(1.0))], tmp_path / "x.png", say=notes.append)
    assert notes == [f"note: {young} has no numbers yet and is left out"] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plot", "nowhere"], "nowhere holds no run"),
        (["plot", "run", "--out", "x.gif"], "--out=x.gif must end in .png, .pdf or .svg"),
        (["plot", "run", "--out", "no/x.png"], "no/x.png could not be written: No such file or directory"),
        (["plot", "run", "--metric", "x"], "run has no metric 'x'"),
    ],
)
def test_what_can_not_be_drawn_is_one_error(
    words: list[str], message: str, tmp_path: Path, spec: TaskSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run", spec, curve(1.0))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(words)
    assert str(left.value.code).startswith(f"marl-memory: {message}")
    assert "\n" not in str(left.value.code)
