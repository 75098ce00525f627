"""What `import marl_memory` costs beside importing the libraries it is built on."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.measure import Row

PROGRAM = """
import json, resource, sys, time
started = time.perf_counter()
{imports}
seconds = time.perf_counter() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def measure(imports: str) -> tuple[float, float]:
    """Seconds and peak MB of a new process that imports these."""
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(imports=imports)], capture_output=True, check=True)
    seconds, megabytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes


def imports(repeats: int) -> Iterator[Row]:
    """Ours / torch with tensordict, in seconds and in peak memory; and the trainer with all it needs."""
    libraries = "import torch, tensordict.nn"
    for name, ours in (
        ("import marl_memory", "import marl_memory"),
        ("import the trainer", "import marl_memory.training.run, marl_memory.algorithms.ppo"),
    ):
        measure(ours), measure(libraries)
        pairs = [(measure(ours), measure(libraries)) for _ in range(max(repeats // 2, 3))]
        for index, unit in enumerate(("seconds", "MB")):
            details = {
                unit: round(statistics.median(a[index] for a, _ in pairs), 2),
                f"{unit} of torch and tensordict": round(statistics.median(b[index] for _, b in pairs), 2),
            }
            what = "time" if index == 0 else "memory"
            yield Row(f"{name}, {what}", [a[index] / b[index] for a, b in pairs], details=details)
