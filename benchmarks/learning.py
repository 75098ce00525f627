"""Turn finished runs into a figure, a table and small CSV files: what docs/results/learning holds.

    python benchmarks/learning.py docs/results/learning runs/smax/3m/mappo/* runs/smax/3m/ippo/* …

Runs are grouped by task and algorithm.  Every number comes from the runs' own files; ``--episodes N`` plays N more
greedy episodes with each run's *last* policy, on seeds used nowhere else.  A peer's results may stand beside them as
CSV files ``mujoco+half_cheetah-NAME-SEED.csv`` (as `sb3_peer.py` writes them), whose last row is the final result.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import evaluate_run, read_config

COLOURS = {
    "mappo": "#12476b", "ippo": "#b5541c", "ppo": "#3b7a3b", "maddpg": "#7a3b74", "iddpg": "#c98bb9", "ddpg": "#7a3b74",
    "matd3": "#8a6d1a", "itd3": "#c9b45b", "td3": "#8a6d1a",
    "dqn": "#2c7f8c", "idqn": "#2c7f8c",
}  # fmt: skip
PEERS = "#888888"
KEPT = ("frames", "train/return", "train/success", "evaluation/episodes", "evaluation/return", "evaluation/success")


def describe(run: Path) -> tuple[str, str, int]:
    """Task, algorithm and seed of a run."""
    if run.suffix == ".csv":
        task, name, seed = run.stem.split("-")
        return task.replace("+", "/"), name, int(seed)
    config, task = read_config(run), json.loads((run / "run.json").read_text())["task"]
    base = config["algorithm"]["_target_"].rsplit(".", 1)[-1].lower()  # ppo, ddpg, td3 or dqn
    independent = base if len(task["agents"]) == 1 else f"i{base}"
    centralised = {"ppo": "mappo", "ddpg": "maddpg", "td3": "matd3", "dqn": independent}[base]
    name = centralised if config["algorithm"].get("centralised_critic") else independent
    return task["name"], name, config["seed"]


def metrics(run: Path) -> MetricsFile:
    """The table of numbers of a run, or of a peer's."""
    return MetricsFile(run if run.suffix == ".csv" else run / "metrics.csv")


def final(run: Path, episodes: int) -> dict[str, float]:
    """Greedy results of the last policy over fresh episodes."""
    if run.suffix == ".csv":
        return {"final/return": metrics(run).column("evaluation/return")[1][-1]}
    return evaluate_run(run, episodes=episodes, checkpoint="last").metrics("final")


def commit(run: Path) -> str:
    """What made it."""
    return "its own" if run.suffix == ".csv" else str(json.loads((run / "run.json").read_text())["git_commit"])[:7]


def draw(groups: dict[tuple[str, str], list[Path]], file: Path) -> None:
    """One panel per task, one thin line per seed and a thick one for their mean, greedy evaluations."""
    tasks = sorted({task for task, _ in groups})
    figure = Figure(figsize=(4.6 * len(tasks), 3.4), layout="constrained")
    for i, task in enumerate(tasks):
        axes = figure.add_subplot(1, len(tasks), i + 1)
        for (of_task, algorithm), folders in sorted(groups.items()):
            if of_task != task:
                continue
            files = [metrics(folder) for folder in folders]
            name = "success" if files[0].column("evaluation/success")[0] else "return"
            curves = [file.column(f"evaluation/{name}") for file in files]
            for frames, values in curves:
                axes.plot(frames, values, color=COLOURS.get(algorithm, PEERS), alpha=0.35, linewidth=1)
            middle = [mean(column) for column in zip(*(values for _, values in curves), strict=False)]
            label = f"{algorithm.upper() if algorithm in COLOURS else algorithm} ({len(curves)} seeds)"
            axes.plot(
                curves[0][0][: len(middle)], middle, color=COLOURS.get(algorithm, PEERS), linewidth=2.2, label=label
            )
            axes.set_ylabel("greedy win rate" if name == "success" else "greedy return")
            if name == "success":
                axes.set_ylim(-0.02, 1.02)
        axes.set(title=task, xlabel="environment steps")
        axes.ticklabel_format(axis="x", style="sci", scilimits=(3, 6))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="best")
    figure.savefig(file, dpi=130)


def table(groups: dict[tuple[str, str], list[Path]], finals: dict[Path, dict[str, float]]) -> str:
    """Markdown: one row per task and algorithm, every seed named."""
    lines = [
        "| task | algorithm | steps | measure | each seed | mean ± sd | seeds | frames/s | library commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, algorithm), folders in sorted(groups.items()):
        seeds = [str(describe(folder)[2]) for folder in folders]
        measure = "success" if "final/success" in finals[folders[0]] else "return"
        values = [finals[folder][f"final/{measure}"] for folder in folders]
        files = [metrics(folder) for folder in folders]
        frames = max(int(file.rows[-1]["frames"]) for file in files)
        speeds = [mean(column) for file in files if (column := file.column("time/frames_per_second")[1])]
        commits = {commit(folder) for folder in folders}
        spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
        digits = 3 if measure == "success" else 1
        lines.append(
            f"| {task} | {algorithm} | {frames:,} | greedy {'win rate' if measure == 'success' else 'return'} | "
            f"{', '.join(f'{v:.{digits}f}' for v in values)} | {mean(values):.{digits}f}{spread} | "
            f"{', '.join(seeds)} | {f'{mean(speeds):,.0f}' if speeds else '–'} | {', '.join(sorted(commits))} |"
        )
    return "\n".join(lines)


def keep(folder: Path, target: Path) -> None:
    """The columns a reader wants of metrics.csv, every row."""
    rows = metrics(folder).rows
    with target.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, KEPT, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows({key: text[:9] if "/" in key else text for key, text in row.items()} for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--episodes", type=int, default=128)
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for folder in sorted(options.runs):
        task, algorithm, seed = describe(folder)
        groups[task, algorithm].append(folder)
        keep(folder, options.target / f"{task.replace('/', '_')}_{algorithm}_seed{seed}.csv")
    finals = {folder: final(folder, options.episodes) for folders in groups.values() for folder in folders}
    draw(groups, options.target / "curves.png")
    (options.target / "table.md").write_text(table(groups, finals) + "\n")
    print(table(groups, finals))


if __name__ == "__main__":
    main()
