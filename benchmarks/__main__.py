"""The table of speeds: ``python -m benchmarks`` (``make bench``); the exit code is 1 if a bound is missed.

    python -m benchmarks collection update --repeats 7 --json build/bench.json

Bounds are in ``bounds.toml``.  One torch thread.  A busy machine disturbs even ratios: the load is printed beside them,
and what misses its bound is measured again at the end.  The last figure counts; the JSON holds all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Row

Bounds = dict[str, dict[str, float]]


def groups() -> dict[str, list[Callable[[int], Iterator[Row]]]]:
    """The rows by the name one asks for them."""
    from benchmarks import (
        adamemento,
        atari,
        cartpole,
        collection,
        end_to_end,
        half_cheetah,
        memory,
        neighbours,
        off_policy,
        reflection,
        returns,
        spread,
        startup,
        transport,
        update,
    )

    return {
        "collection": [collection.overheads, collection.fractions, collection.toy, collection.smax],
        "atari": [atari.rows, atari.players, atari.replay],
        "update": [update.minibatches, update.advantages],
        "off_policy": [off_policy.updates, off_policy.value_updates, off_policy.replay],
        "neighbours": [neighbours.exact, neighbours.approximate],
        "transport": [transport.gaussians, transport.categoricals],
        "memory": [memory.gradient_field, memory.barycenter_region, memory.barycenter_region_smax],
        "adamemento": [adamemento.iterations],
        "reflection": [reflection.acting, reflection.sizes],
        "returns": [returns.scan, returns.refresh, returns.td3],
        "end_to_end": [end_to_end.smax, end_to_end.peak_memory, spread.rows, half_cheetah.rows, cartpole.rows],
        "startup": [startup.imports],
    }


def bounds() -> Bounds:
    """What each row must reach."""
    return tomllib.loads(Path(__file__).with_name("bounds.toml").read_text())


def missed(row: Row, limits: dict[str, float]) -> bool:
    """Whether a row lies outside its bound."""
    return row.value > limits.get("most", float("inf")) or row.value < limits.get("least", -float("inf"))


def line(row: Row, limits: dict[str, float]) -> str:
    """One line of the table."""
    bound = ", ".join(f"{'≤' if kind == 'most' else '≥'} {limit:g}" for kind, limit in limits.items())
    figure = f"{row.value:.0f}" if row.unit == "µs" else f"{row.value:.2f}"
    details = "  ".join(f"{key} {value}" for key, value in row.details.items())
    verdict = "MISSED" if missed(row, limits) else "ok"
    return f"{row.name:<46} {figure:>6} {row.unit:<2} {bound:<8} {verdict:<7} load {row.load:.1f}  {details}"


def record(rows: list[Row], limits: Bounds) -> dict[str, Any]:
    """Everything about this run of the table, for JSON."""
    versions = {name: metadata.version(name) for name in ("torch", "tensordict", "torchrl", "numpy")}
    return {
        "command": " ".join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "machine": {"cores": os.cpu_count(), "processor": processor(), "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "versions": versions,
        "rows": [
            {**vars(row), "value": row.value, "bound": limits[row.name], "missed": missed(row, limits[row.name])}
            for row in rows
        ],
    }


def take(
    measure: Callable[[int], Iterator[Row]],
    repeats: int,
    limits: Bounds,
    rows: dict[str, Row],
    keep: Callable[[], None],
) -> bool:
    """Measure, print, and put into ``rows`` what is new there or had missed its bound; whether a bound is missed.

    ``keep`` is called after each row: who stops a long run has what it measured.
    """
    names = []
    for row in measure(repeats):
        names.append(row.name)
        if (before := rows.get(row.name)) is not None:
            if not missed(before, limits[row.name]):
                continue
            row.earlier = [*before.earlier, before.value]
        rows[row.name] = row
        print(line(row, limits[row.name]), flush=True)
        keep()
    return any(missed(rows[name], limits[name]) for name in names)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), "unknown")


def main() -> int:
    """Measure, print, and compare with the bounds."""
    known, limits = groups(), bounds()
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="speed, as ratios")
    parser.add_argument("groups", nargs="*", help=f"any of {', '.join(known)}; all by default")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--again", type=int, default=3, help="how often what misses its bound is measured again")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args()
    if unknown := set(options.groups) - set(known):
        parser.error(f"unknown groups {sorted(unknown)}; known are {', '.join(known)}")
    torch.set_num_threads(1)
    print(f"torch threads 1, cores {os.cpu_count()}, load average {os.getloadavg()}", flush=True)
    measures = [measure for name in options.groups or known for measure in known[name]]
    rows: dict[str, Row] = {}

    def keep() -> None:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            found = record(list(rows.values()), limits)
            options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

    for attempt in range(1 + options.again):
        measures = [measure for measure in measures if take(measure, options.repeats, limits, rows, keep)]
        if measures and attempt < options.again:
            print(f"measured again: {', '.join(name for name, row in rows.items() if missed(row, limits[name]))}")
    failed = [name for name, row in rows.items() if missed(row, limits[name])]
    print(f"{len(failed)} of {len(rows)} bounds missed" + "".join(f"\n  {name}" for name in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
