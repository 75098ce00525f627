"""How the N environments of a `VectorEnv` are stepped: one after another, on threads, or in worker processes.

All three give the same numbers: every environment gets the same calls in the same order, whoever makes them.  Worker
processes are plain subprocesses that import this module and what makes the environments, no torch, and never the
program's own ``__main__``; a vector step costs one message to and one from each.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import accumulate, pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import cloudpickle
import numpy as np
from gymnasium import Space
from pettingzoo import AECEnv, ParallelEnv

from marl_memory_envs.spaces import spaces_of

Start = tuple[dict[str, Any], dict[str, Any]]
"""What a ParallelEnv's reset returns: observations, infos."""

Answer = tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any], dict[str, dict[str, Any]]]
"""What a ParallelEnv's step returns: observations, rewards, terminations, truncations, infos."""

Team = ParallelEnv[str, Any, Any]

KINDS = ("serial", "threads", "processes")

PATIENCE = 5.0
"""Seconds that a worker process has to close its environments before it is killed."""


class EnvironmentFailure(RuntimeError):
    """An environment raised an error; the message says which one, in which call, the error's type and its words."""


class WholeTeams:
    """The rows of one vector step in which every agent acted and goes on acting: the usual case, written together.

    ``observations`` and ``rewards`` hold one entry per agent, row after row.
    """

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.observations: list[np.ndarray] = []
        self.rewards: list[float] = []


Played = tuple[WholeTeams, list[tuple[int, Answer]]]
"""The rows of whole teams, and the answers of all other rows; both sorted by row."""


class Stepping(Protocol):
    """Who makes the calls of a vector's environments; ``rows`` are their numbers, in rising order."""

    def reset(self, rows: Sequence[int], seeds: Sequence[int | None]) -> list[Start]:
        """Reset each with its seed, or without where that is None."""
        ...

    def step(self, rows: Sequence[int], sent: Sequence[Mapping[str, Any]], usual: Sequence[bool]) -> Played:
        """Step each with its agents' actions; ``usual`` says whether all of its team act in this step."""
        ...

    def close(self) -> None:
        """Close all environments, and end what stepped them."""
        ...


def check_stepping(stepping: str, workers: int | None) -> None:
    """Raise ValueError, which names the key, unless the two are values that fit each other."""
    if stepping not in KINDS:
        raise ValueError(f"env.stepping={stepping!r} must be one of {', '.join(KINDS)}")
    if workers is None:
        return
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(f"env.workers={workers!r} must be a whole number of at least 1, or null for one per core")
    if stepping == "serial":
        raise ValueError(
            f"env.workers={workers} has no effect with env.stepping='serial'; set env.stepping=threads or processes, "
            "or leave env.workers=null"
        )


def worker_count(n_envs: int, workers: int | None) -> int:
    """How many workers step ``n_envs`` environments: as many as asked for, or as the cores open to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(n_envs, workers or cores)


def _shares(count: int, workers: int) -> list[slice]:
    """``count`` things in a row divided among workers, as evenly as can be."""
    return [slice(a, b) for a, b in pairwise(count * i // workers for i in range(workers + 1)) if a < b]


# ---- in this process -------------------------------------------------------------------------------------------------


def play(
    envs: Sequence[Team] | Mapping[int, Team],
    team: list[str],
    rows: Sequence[int],
    sent: Sequence[Mapping[str, Any]],
    usual: Sequence[bool],
) -> Played:
    """Step the environments ``rows`` one after another and sort their answers; see `Stepping.step`.

    Raises:
        EnvironmentFailure: if an environment raises an error.
    """
    whole, others, row = WholeTeams(), [], -1
    try:
        for row, actions, acts in zip(rows, sent, usual, strict=True):
            env = envs[row]
            answer = env.step(actions)  # type: ignore[arg-type]
            observations, rewards, terminations, truncations, infos = answer
            if (
                acts
                and not (True in terminations.values() or True in truncations.values())
                and len(observations) == len(team)
                and not (any(infos.values()) and any(map(_speaks, infos.values())))
                and env.agents == team
            ):
                whole.rows.append(row)
                whole.observations.extend(map(observations.__getitem__, team))
                whole.rewards.extend(map(rewards.__getitem__, team))
            else:
                others.append((row, answer))
    except ChildProcessError as error:  # a game that can not be kept alive: it says all there is to say
        raise ChildProcessError(f"environment {row}: {error}") from error
    except Exception as error:  # whatever a simulator raises
        raise _failure(row, "step", error) from error
    return whole, others


def _speaks(info: Mapping[str, Any]) -> bool:
    """Whether an agent's info says something that is written: its life or its mask."""
    return "alive" in info or "action_mask" in info


def _start(envs: Sequence[Team] | Mapping[int, Team], rows: Sequence[int], seeds: Sequence[int | None]) -> list[Start]:
    """Reset the environments ``rows`` one after another; see `Stepping.reset`."""
    starts, row = [], -1
    try:
        for row, seed in zip(rows, seeds, strict=True):
            starts.append(envs[row].reset() if seed is None else envs[row].reset(seed=seed))
    except ChildProcessError as error:
        raise ChildProcessError(f"environment {row}: {error}") from error
    except Exception as error:  # whatever a simulator raises
        raise _failure(row, "reset", error) from error
    return starts


def _failure(row: int, call: str, error: Exception) -> EnvironmentFailure:
    return EnvironmentFailure(f"environment {row} failed in {call}(): {type(error).__name__}: {error}")


class Serial:
    """One environment after another, in the thread that asks."""

    def __init__(self, envs: Sequence[Team], team: list[str]) -> None:
        self.envs, self.team = envs, team

    def reset(self, rows: Sequence[int], seeds: Sequence[int | None]) -> list[Start]:
        """See `Stepping`."""
        return _start(self.envs, rows, seeds)

    def step(self, rows: Sequence[int], sent: Sequence[Mapping[str, Any]], usual: Sequence[bool]) -> Played:
        """See `Stepping`."""
        return play(self.envs, self.team, rows, sent, usual)

    def close(self) -> None:
        """See `Stepping`."""
        for env in self.envs:
            env.close()


class Threads:
    """Some environments on each of ``workers`` threads, one of which is the thread that asks.

    It helps simulators that let go of Python's global lock while they compute, as MuJoCo does.
    """

    def __init__(self, envs: Sequence[Team], team: list[str], workers: int) -> None:
        self.envs, self.team, self.workers = envs, team, workers
        self._pool = ThreadPoolExecutor(max(1, workers - 1), thread_name_prefix="stepping")

    def reset(self, rows: Sequence[int], seeds: Sequence[int | None]) -> list[Start]:
        """See `Stepping`."""
        parts = self._all(lambda part: _start(self.envs, rows[part], seeds[part]), len(rows))
        return [start for part in parts for start in part]

    def step(self, rows: Sequence[int], sent: Sequence[Mapping[str, Any]], usual: Sequence[bool]) -> Played:
        """See `Stepping`."""
        return _merge(
            self._all(lambda part: play(self.envs, self.team, rows[part], sent[part], usual[part]), len(rows))
        )

    def close(self) -> None:
        """See `Stepping`."""
        self._pool.shutdown()
        for env in self.envs:
            env.close()

    def _all(self, work: Callable[[slice], Any], count: int) -> list[Any]:
        """``work`` of every share; where several fail, the first failure is raised, once none is at work any more."""
        own, *others = _shares(count, self.workers) or [slice(0)]
        futures = [self._pool.submit(work, part) for part in others]
        try:
            first = work(own)
        finally:
            wait(futures)
        return [first, *(future.result() for future in futures)]


def _merge(parts: Sequence[Played]) -> Played:
    whole, others = parts[0]
    for more, rest in parts[1:]:
        whole.rows += more.rows
        whole.observations += more.observations
        whole.rewards += more.rewards
        others += rest
    return whole, others


# ---- worker processes, seen from here --------------------------------------------------------------------------------


class Portrait(NamedTuple):
    """What does not change about an environment in a worker process."""

    text: str
    possible_agents: list[str]
    spaces: dict[str, tuple[Space[Any], Space[Any]]]
    metadata: dict[str, Any]
    render_mode: str | None
    state_space: Space[Any] | None


class View(NamedTuple):
    """What an environment in a worker process says of itself after a call."""

    agents: list[str]
    state: np.ndarray | None
    spaces: dict[str, tuple[Space[Any], Space[Any]]] | None = None  # only where they changed


class ProcessEnv(ParallelEnv[str, Any, Any]):
    """Environment ``row`` of `Processes`, as if it were here; what is not a ParallelEnv's stays in its process."""

    def __init__(self, processes: Processes, row: int, portrait: Portrait) -> None:
        self.processes, self.row = processes, row
        self._text, self.possible_agents, self._spaces, self.metadata, self.render_mode, space = portrait
        if space is not None:
            self.state_space = space

    @property
    def agents(self) -> list[str]:  # type: ignore[override]
        """Who is left."""
        return self.processes.views[self.row].agents

    def observation_space(self, agent: str) -> Space[Any]:
        """As the environment's own, at its last reset."""
        return (self.processes.views[self.row].spaces or self._spaces)[agent][0]

    def action_space(self, agent: str) -> Space[Any]:
        """As the environment's own, at its last reset."""
        return (self.processes.views[self.row].spaces or self._spaces)[agent][1]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Start:
        """Start an episode.

        Raises:
            ValueError: for ``options``, which do not reach the environment.
        """
        if options:
            raise ValueError(f"options={options!r} do not reach an environment in a process of its own")
        return self.processes.reset([self.row], [seed])[0]

    def step(self, actions: dict[str, Any]) -> Answer:
        """One step."""
        return self.processes.step([self.row], [actions], [False])[1][0][1]

    def state(self) -> np.ndarray:
        """The state after the last step or reset.

        Raises:
            NotImplementedError: if the environment has none.
        """
        if (state := self.processes.views[self.row].state) is None:
            raise NotImplementedError(f"{self} has no state()")
        return state

    def render(self) -> Any:
        """What the environment renders in its ``render_mode``."""
        return self.processes.render(self.row)

    def save_replay(self, file: str) -> None:
        """As the environment's own; ValueError if it has none."""
        self.processes.save_replay(self.row, file)

    def close(self) -> None:
        """Nothing: all environments are closed together, by `Processes.close`."""

    def __str__(self) -> str:
        return self._text


class Processes:
    """Environments in worker processes, each of which owns a row of neighbours.

    Workers end with `close`, when this object is collected, and when the process that made it ends, in whatever way.
    They ignore SIGINT and SIGTERM, which are that process's to handle.

    Args:
        make: what makes an environment; it is sent by cloudpickle, by reference where it can be imported.
        kwargs: what it is called with.
        n_envs: how many environments.
        workers: how many processes, at most ``n_envs``.
        label: what errors call ``make``.

    Raises:
        ValueError: if an environment can not be made, or not in another process.
        ImportError: if a module is missing.
    """

    def __init__(
        self, make: Callable[..., Any], kwargs: Mapping[str, Any], n_envs: int, *, workers: int, label: str
    ) -> None:
        shares = _shares(n_envs, workers)
        self.views = [View([], None)] * n_envs
        self._rows = [range(share.start, share.stop) for share in shares]
        self._asked = False  # whether replies are due
        order = _pickle_factory(make, kwargs, label)
        started = [_launch() for _ in shares]
        self._links = [link for link, _ in started]
        self._children = [child for _, child in started]
        self._end = weakref.finalize(self, _end, os.getpid(), self._links, self._children)
        try:
            replies = self._ask({i: ("make", label, order, rows) for i, rows in enumerate(self._rows)})
        except BaseException:
            self.close()
            raise
        self._portraits: list[Portrait] = [portrait for reply in replies for portrait in reply]

    @property
    def process_ids(self) -> list[int]:
        """The workers', in the order of their environments."""
        return [child.pid for child in self._children]

    def environments(self) -> list[ProcessEnv]:
        """The environments, as they are seen from here."""
        return [ProcessEnv(self, row, portrait) for row, portrait in enumerate(self._portraits)]

    def reset(self, rows: Sequence[int], seeds: Sequence[int | None]) -> list[Start]:
        """See `Stepping`."""
        parts = self._parts(rows)
        replies = self._ask({i: ("reset", rows[part], seeds[part]) for i, part in parts.items()})
        self._look(rows, [view for _, views in replies for view in views])
        return [start for starts, _ in replies for start in starts]

    def step(self, rows: Sequence[int], sent: Sequence[Mapping[str, Any]], usual: Sequence[bool]) -> Played:
        """See `Stepping`."""
        parts = self._parts(rows)
        replies = self._ask(
            {i: ("step", rows[part], _pack_actions(sent[part]), usual[part]) for i, part in parts.items()}
        )
        for part, (_, listed, states) in zip(parts.values(), replies, strict=True):
            self._look(rows[part], list(map(View, listed, _unpack(states))))
        return _merge([_unpack_played(played) for played, _, _ in replies])

    def render(self, row: int) -> Any:
        """What environment ``row`` renders."""
        (worker,) = self._parts([row])
        return self._ask({worker: ("render", row)})[0]

    def save_replay(self, row: int, file: str) -> None:
        """Have environment ``row`` write a replay to ``file``."""
        (worker,) = self._parts([row])
        self._ask({worker: ("save_replay", row, file)})

    def close(self) -> None:
        """End the workers, which close their environments first; once is enough."""
        self._end()

    def _parts(self, rows: Sequence[int]) -> dict[int, slice]:
        """Which of ``rows`` each worker has, for workers that have some."""
        cuts = [*(bisect_left(rows, own.start) for own in self._rows), len(rows)]
        return {i: slice(a, b) for i, (a, b) in enumerate(pairwise(cuts)) if a < b}

    def _look(self, rows: Sequence[int], views: Sequence[View]) -> None:
        for row, view in zip(rows, views, strict=True):
            self.views[row] = view

    def _ask(self, messages: Mapping[int, tuple[Any, ...]]) -> list[Any]:
        """Send each worker its message and wait for all replies, in the workers' order.

        Raises:
            EnvironmentFailure, ValueError, ImportError: what a worker reports; the first, once all have replied.
            ChildProcessError: if a worker has ended.
            RuntimeError: after `close`, or after an interruption that left replies waiting.
        """
        if not self._end.alive:
            raise RuntimeError("the worker processes have ended; make the environments anew")
        if self._asked:
            raise RuntimeError("an interrupted step left the worker processes out of turn; make the environments anew")
        self._asked, worker, replies = True, -1, []
        try:
            for worker, message in messages.items():
                self._links[worker].send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
            for worker in messages:
                replies.append(pickle.loads(self._links[worker].recv_bytes()))
        except (EOFError, ConnectionError) as error:
            raise ChildProcessError(self._obituary(worker)) from error
        self._asked = False
        for worked, reply, lines in replies:
            if not worked:
                if isinstance(reply, RuntimeError):
                    reply.add_note(f"In the worker process:\n{lines}")
                raise reply
        return [reply for _, reply, _ in replies]

    def _obituary(self, worker: int) -> str:
        """What to say of a worker that is gone; the others end too."""
        child, rows = self._children[worker], self._rows[worker]
        self.close()  # it also waits for the one that is gone, and so learns how it ended
        code = child.returncode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; did the memory run out?" if -code == signal.SIGKILL else ""
        return f"the worker process {child.pid} of environments {rows[0]} to {rows[-1]} {how}{hint}"


def _pickle_factory(make: Callable[..., Any], kwargs: Mapping[str, Any], label: str) -> bytes:
    try:
        return cloudpickle.dumps((make, dict(kwargs)))
    except Exception as error:  # whatever an object's own pickling raises
        raise ValueError(
            f"factory={label} can not be sent to a worker process: {type(error).__name__}: {error}; "
            "define it in a module, or set env.stepping to serial or threads"
        ) from error


def _launch() -> tuple[Connection, subprocess.Popen[bytes]]:
    """A new worker process, and our end of the link to it.

    It is started as a program of its own: a fork would copy torch's and JAX's threads in mid-work, and
    `multiprocessing`'s other ways run the user's script again, which needs a guard there.
    """
    ours, theirs = Pipe()
    code = (
        "import json, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.path[:] = json.loads(sys.argv[1])\n"
        f"from {__name__} import serve; serve(int(sys.argv[2]), int(sys.argv[3]))"
    )
    arguments = [json.dumps(sys.path), str(theirs.fileno()), str(os.getpid())]
    # One core each, unless the user says otherwise: the others are busy with environments too.
    variables = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **os.environ}
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        env=variables,
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    return ours, child


def _end(owner: int, links: Sequence[Connection], children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Close the links, which workers take for their end, and wait for them: none is left behind, not even as a zombie.

    In a process forked from the owner it does nothing.
    """
    if os.getpid() != owner:
        return
    for link in links:
        link.close()
    limit = time.monotonic() + PATIENCE
    for child in children:
        try:
            child.wait(max(0.0, limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


# ---- worker processes, seen from inside ------------------------------------------------------------------------------


class Worker:
    """The environments ``rows`` in their own process; each method answers one kind of message."""

    def __init__(self) -> None:
        self.envs: dict[int, Team] = {}
        self.team: list[str] = []
        self.spaces: dict[int, dict[str, Any]] = {}
        self.stateless: set[int] = set()

    def make(self, label: str, order: bytes, rows: Sequence[int]) -> list[Portrait]:
        """Make the environments; what does not change about them."""
        try:
            make, kwargs = pickle.loads(order)
        except Exception as error:  # whatever an import raises
            raise ValueError(
                f"factory={label} can not be loaded in a worker process: {type(error).__name__}: {error}; "
                "define it in a module that can be imported, or set env.stepping to serial or threads"
            ) from error
        for row in rows:
            env = self.envs[row] = make_env(make, kwargs, label)
            self.spaces[row] = {name: spaces_of(env, name) for name in env.possible_agents}
        self.team = list(self.envs[rows[0]].possible_agents)
        return [
            Portrait(
                str(env),
                list(env.possible_agents),
                self.spaces[row],
                env.metadata,
                getattr(env, "render_mode", None),
                getattr(env, "state_space", None),
            )
            for row, env in self.envs.items()
        ]

    def reset(self, rows: Sequence[int], seeds: Sequence[int | None]) -> tuple[list[Start], list[View]]:
        """Reset environments; what they answer, and how they look then."""
        starts = _start(self.envs, rows, seeds)
        return starts, [View(list(self.envs[row].agents), self._state(row), self._changed(row)) for row in rows]

    def step(self, rows: Sequence[int], sent: Any, usual: Sequence[bool]) -> tuple[Any, list[list[str]], Any]:
        """Step environments; what they answer, who is left in each, and their states."""
        played = play(self.envs, self.team, rows, _unpack_actions(sent), usual)
        listed = [list(self.envs[row].agents) for row in rows]
        return _pack_played(played), listed, _pack([self._state(row) for row in rows])

    def render(self, row: int) -> Any:
        """What an environment renders."""
        try:
            return self.envs[row].render()
        except Exception as error:  # whatever keeps a simulator from drawing
            raise _failure(row, "render", error) from error

    def save_replay(self, row: int, file: str) -> None:
        """Have an environment write a replay."""
        save = getattr(self.envs[row], "save_replay", None)
        if save is None:
            raise ValueError(f"{self.envs[row]} keeps no replays")
        save(file)

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs.values():
            env.close()

    def _state(self, row: int) -> Any:
        """An environment's state, or None if it has none."""
        if row in self.stateless:
            return None
        try:
            return np.asarray(self.envs[row].state())
        except NotImplementedError:
            self.stateless.add(row)
            return None
        except Exception as error:  # whatever a simulator raises
            raise _failure(row, "state", error) from error

    def _changed(self, row: int) -> dict[str, Any] | None:
        """An environment's spaces, if they are others than at first."""
        now = {name: spaces_of(self.envs[row], name) for name in self.spaces[row]}
        same = all(a is b or a == b for name in now for a, b in zip(now[name], self.spaces[row][name], strict=True))
        return None if same else now


def serve(handle: int, parent: int) -> None:
    """A worker process's whole life: it answers messages that come through ``handle`` until the link is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which programs that a simulator starts would inherit
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    link, worker = Connection(handle), Worker()
    try:
        while True:
            call, *arguments = pickle.loads(link.recv_bytes())
            link.send_bytes(_reply(getattr(worker, call), arguments))
    except (EOFError, ConnectionError):
        worker.close()


def _reply(call: Callable[..., Any], arguments: Sequence[Any]) -> bytes:
    """Whether a call worked, its result or error, and where in the code the error arose."""
    try:
        return pickle.dumps((True, call(*arguments), ""), pickle.HIGHEST_PROTOCOL)
    except (EnvironmentFailure, ValueError, ImportError, OSError) as error:
        return pickle.dumps((False, error, traceback.format_exc()))
    except Exception as error:
        told = RuntimeError(f"a worker process failed in {call.__name__}(): {type(error).__name__}: {error}")
        return pickle.dumps((False, told, traceback.format_exc()))


def _end_with(parent: int) -> None:
    """End this process, also in mid-step, when its parent is gone."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


# ---- messages --------------------------------------------------------------------------------------------------------


def _pack(arrays: Sequence[Any]) -> Any:
    """Arrays of one dimension and type as one, with their lengths: many small ones are slow to send."""
    first = arrays[0] if arrays else None
    if isinstance(first, np.ndarray) and all(
        type(array) is np.ndarray and array.ndim == 1 and array.dtype == first.dtype for array in arrays
    ):
        return np.concatenate(arrays), list(map(len, arrays))
    return arrays, None


def _unpack(packed: Any) -> list[Any]:
    together, lengths = packed
    if lengths is None:
        return list(together)
    return [together[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def _pack_actions(sent: Sequence[Mapping[str, Any]]) -> Any:
    return [list(actions) for actions in sent], _pack([action for actions in sent for action in actions.values()])


def _unpack_actions(packed: Any) -> list[dict[str, Any]]:
    names, actions = packed[0], iter(_unpack(packed[1]))
    return [dict(zip(listed, actions, strict=False)) for listed in names]


def _pack_played(played: Played) -> Any:
    whole, others = played
    return whole.rows, _pack(whole.observations), np.array(whole.rewards, dtype=np.float64), others


def _unpack_played(packed: Any) -> Played:
    whole, others = WholeTeams(), packed[3]
    whole.rows, whole.observations, whole.rewards = packed[0], _unpack(packed[1]), packed[2].tolist()
    return whole, others


# ---- making one ------------------------------------------------------------------------------------------------------


def make_env(make: Callable[..., Any], kwargs: Mapping[str, Any], label: str) -> Team:
    """A new environment made by ``make(**kwargs)``, which errors call ``label``.

    Raises:
        ValueError: if the factory fails, or makes no ParallelEnv.
        ImportError: if a module is missing; the message names the extra to install, where one has it.
    """
    try:
        env = make(**kwargs)
    except ModuleNotFoundError as error:
        raise missing(error, label, getattr(make, "__module__", "")) from error
    except Exception as error:  # whatever a factory finds wrong with its arguments
        raise ValueError(
            f"factory={label} failed with kwargs={dict(kwargs)}: {type(error).__name__}: {error}"
        ) from error
    if isinstance(env, AECEnv):
        raise ValueError(f"factory={label} made an AECEnv; wrap it with pettingzoo.utils.aec_to_parallel")
    if not isinstance(env, ParallelEnv):
        raise ValueError(f"factory={label} made a {type(env).__name__}; it must return a PettingZoo ParallelEnv")
    return env


def missing(error: ModuleNotFoundError, factory: str, module_name: str) -> ImportError:
    """The error to raise for a missing module: it names the extra that installs it, if the family declares one."""
    requires: dict[str, str] = getattr(sys.modules.get(module_name), "REQUIRES", {})
    name = (error.name or "").partition(".")[0]
    if name in requires:
        return ImportError(f"factory={factory} needs {name!r}: pip install 'marl-memory[{requires[name]}]'", name=name)
    return ImportError(f"factory={factory}: no module named {error.name!r}; installed, or misspelled?", name=name)
