"""New processes without the seconds of importing: forks of one that has imported the library and done nothing else.

Tests of importing itself, and of what is killed or signalled from outside, start interpreters of their own.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVE = """
import gc, json, os, sys
import matplotlib.pyplot, torch.utils.tensorboard
import marl_memory.cli, marl_memory.study.command, marl_memory.training.run, marl_memory.training.video
import marl_memory.algorithms.ppo, marl_memory_envs.vector

def become(job):
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    sys.argv = ["-c", *job["words"]]
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), *(open(path, "w") for path in job["printed"])
    for number, file in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        os.dup2(file.fileno(), number)
    exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
    sys.exit()

sys.path.insert(0, "")
gc.collect()
gc.freeze()  # else a child that ends looks through all that was imported, and so gets a copy of it
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        become(json.loads(line))  # and end as an interpreter ends
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """The process that forks: one for all tests of a worker."""
    process = subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    return process


def python(
    code: str, *words: object, cwd: Path | str = ".", env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)``."""
    process, arguments = server(), [str(word) for word in words]
    assert process.stdin is not None and process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        printed = [Path(folder, name) for name in ("out", "err")]
        job = {
            "code": code,
            "words": arguments,
            "cwd": os.path.abspath(cwd),
            "env": dict(os.environ if env is None else env),
            "printed": list(map(str, printed)),
        }
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        code_of_exit = int(process.stdout.readline())
        done = subprocess.CompletedProcess(arguments, code_of_exit, *(path.read_text() for path in printed))
    if check and code_of_exit:
        error = subprocess.CalledProcessError(code_of_exit, arguments, done.stdout, done.stderr)
        error.add_note(done.stdout + done.stderr)
        raise error
    return done


def command(
    *words: object, cwd: Path | str = ".", env: Mapping[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command ``marl-memory *words``."""
    return python("from marl_memory.cli import main; main()", *words, cwd=cwd, env=env, check=check)
