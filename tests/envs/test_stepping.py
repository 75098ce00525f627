"""Stepping on threads and in processes: the same numbers as one after another, clear errors, and nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tensordict import TensorDict

from marl_memory.cli import config_dir
from marl_memory.training.checkpoint import CheckpointFolder
from marl_memory.training.run import release, resume, start
from marl_memory_envs.stepping import EnvironmentFailure, Processes, Threads, _pack, _shares, _unpack
from marl_memory_envs.toy import MaskedDuel, Rendezvous
from marl_memory_envs.vector import VectorEnv, vector_env

TASKS: dict[str, dict[str, Any]] = {
    "deaths, masks and states": {
        "factory": "marl_memory_envs.toy:MaskedDuel",
        "common_reward": True,
        "success": "won",
        "kwargs": {"unequal": True},
    },
    "continuous and unequal": {
        "factory": "marl_memory_envs.toy:Rendezvous",
        "common_reward": True,
        "success": "met",
        "kwargs": {"n_agents": 3, "unequal": True, "max_steps": 7},
    },
    "one agent, truncated": {
        "factory": "marl_memory_envs.one_agent:gym_env",
        "kwargs": {"id": "CartPole-v1", "max_episode_steps": 12},
    },
}

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # pytest's name of this module is not for other processes

BOTH = pytest.mark.parametrize("stepping", ["threads", "processes"])


class Moody(Rendezvous):
    """Rendezvous that does not always do as it should, as ``mood`` says, from its third step on."""

    def __init__(self, mood: str, row_seed: int = 0) -> None:
        super().__init__()
        self.mood, self.row_seed, self.t = mood, row_seed, 0
        self.metadata = {"name": "moody", "render_fps": 7}
        self.render_mode = "rgb_array"

    def reset(self, seed=None, options=None):
        if self.mood == "new spaces" and self.t:
            self._observation_spaces = dict.fromkeys(self.possible_agents, spaces.Box(-3.0, 3.0, (4,), np.float32))
        return super().reset(seed, options)

    def step(self, actions):
        self.t += 1
        if self.t == 3 and self.mood == "error":
            raise ZeroDivisionError("no more steps")
        if self.t == 3 and self.mood == "exit":
            os._exit(3)
        if self.mood == "asleep":
            time.sleep(1000)
        observations, rewards, terminations, truncations, infos = super().step(actions)
        if self.t == 3 and self.mood == "unspeakable":
            infos = {agent: {"alive": True, "why": lambda: None} for agent in infos}
        return observations, rewards, terminations, truncations, infos

    def render(self):
        if self.mood == "invisible":
            raise OSError("no screen")
        return np.full((2, 3, 3), self.t, np.uint8)


def moody(mood: str = "fine") -> Moody:
    return Moody(mood)


def build(task: str, **options: Any) -> VectorEnv:
    return vector_env(**TASKS[task], **{"n_envs": 5, "seed": 3, **options})


def play(env: VectorEnv, steps: int = 100) -> tuple[TensorDict, TensorDict]:
    """Random steps, with a reset of every second environment and a wait of every third now and then; closes it."""
    torch.manual_seed(0)
    td, rows, following = env.reset(), [], []
    for t in range(steps):
        if t % 40 == 30:
            mask = torch.arange(env.n_envs).unsqueeze(-1) % 2 == 0
            td = env.reset(TensorDict({"_reset": mask, **td}, batch_size=[env.n_envs]))
        if t % 40 == 35:
            td["_step"] = torch.arange(env.n_envs).unsqueeze(-1) % 3 > 0
        done, td = env.step_and_maybe_reset(env.rand_action(td))
        rows.append(done.exclude("_step").clone())
        following.append(td.clone())
    env.close()
    return torch.stack(rows), torch.stack(following)


def pids(env: VectorEnv) -> list[int]:
    return processes(env).process_ids


def processes(env: VectorEnv) -> Processes:
    assert isinstance(env._stepping, Processes)
    return env._stepping


def runs(pid: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_for(done: Any, seconds: float = 20.0) -> bool:
    limit = time.monotonic() + seconds
    while not done() and time.monotonic() < limit:
        time.sleep(0.02)
    return done()


def act(env: VectorEnv, steps: int) -> None:
    td = env.reset()
    for _ in range(steps):
        _, td = env.step_and_maybe_reset(env.rand_action(td))


# ---- the same numbers


@pytest.mark.parametrize("task", TASKS)
def test_all_three_give_the_same_numbers(task: str) -> None:
    expected, expected_following = play(build(task))
    assert expected["next", "done"].sum() > 15
    assert len({*map(tuple, expected["agents", "observation"][0].flatten(1).tolist())}) == 5, "seeds are alike"
    for stepping, workers in (("threads", 3), ("processes", 2)):
        data, following = play(build(task, stepping=stepping, workers=workers))
        assert (data == expected).all(), stepping
        assert (following == expected_following).all(), stepping


def test_what_is_known_of_an_environment_is_known_of_one_in_a_process() -> None:
    here, there = (build("deaths, masks and states", stepping=kind) for kind in ("serial", "processes"))
    assert here.task_spec == there.task_spec
    for env, proxy in zip(here.envs, there.envs, strict=True):
        assert str(env) == str(proxy)
        assert (env.metadata, env.render_mode, env.possible_agents) == (
            proxy.metadata,
            proxy.render_mode,
            proxy.possible_agents,
        )
        assert all(env.observation_space(agent) == proxy.observation_space(agent) for agent in env.possible_agents)
        first, second = env.reset(seed=5), proxy.reset(seed=5)
        assert str(first) == str(second)
        assert np.array_equal(env.state(), proxy.state())
        assert str(env.step({"first": 0, "second": 2})) == str(proxy.step({"first": 0, "second": 2}))
        assert env.agents == proxy.agents
    with pytest.raises(ValueError, match="options="):
        there.envs[0].reset(options={"x": 1})
    there.close()


def test_render_reaches_the_process_of_the_first_environment() -> None:
    env = vector_env(moody, n_envs=3, seed=0, stepping="processes")
    act(env, 2)
    (picture,) = env.frames()
    assert (picture == 2).all() and picture.shape == (2, 3, 3)
    assert env.frames_per_second == 7
    env.close()
    env = vector_env(moody, n_envs=2, seed=0, stepping="processes", kwargs={"mood": "invisible"})
    with pytest.raises(ValueError, match=r"can not be drawn: .*environment 0 failed in render\(\): OSError: no screen"):
        env.frames()
    env.close()


def test_one_environment_is_stepped_here() -> None:
    for stepping in ("threads", "processes"):
        env = vector_env(MaskedDuel, n_envs=1, seed=0, stepping=stepping, workers=4)
        assert isinstance(env.envs[0], MaskedDuel)
        env.close()


@pytest.mark.parametrize(
    ("count", "workers", "sizes"), [(8, 2, [4, 4]), (5, 2, [2, 3]), (3, 3, [1] * 3), (2, 4, [1, 1]), (0, 2, [])]
)
def test_shares(count: int, workers: int, sizes: list[int]) -> None:
    shares = _shares(count, workers)
    assert [share.stop - share.start for share in shares] == sizes
    assert [i for share in shares for i in range(count)[share]] == list(range(count))


def test_arrays_arrive_as_they_were_sent() -> None:
    whole = [np.arange(3.0), np.arange(2.0), np.zeros(0)]
    for arrays in (whole, [], [np.arange(3.0), np.arange(2, dtype=np.float32)], [np.zeros((2, 2))], [1, 2], [None]):
        packed = _pack(arrays)
        assert (packed[1] is not None) == (arrays is whole)
        for sent, got in zip(arrays, _unpack(packed), strict=True):
            assert np.array_equal(sent, got) and getattr(sent, "dtype", None) == getattr(got, "dtype", None)


# ---- errors


@BOTH
def test_an_error_in_an_environment_arrives_with_its_number_type_and_words(stepping: str) -> None:
    env = vector_env(moody, n_envs=4, seed=0, stepping=stepping, workers=2, kwargs={"mood": "error"})
    with pytest.raises(
        EnvironmentFailure, match=r"^environment 0 failed in step\(\): ZeroDivisionError: no more steps"
    ) as caught:
        act(env, 5)
    if stepping == "processes":
        assert 'raise ZeroDivisionError("no more steps")' in caught.value.__notes__[0]
    else:
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    env.reset()  # all were heard: nobody is out of turn
    env.close()


@BOTH
def test_the_checks_of_the_vector_hold(stepping: str) -> None:
    env = vector_env(moody, n_envs=3, seed=0, stepping=stepping, kwargs={"mood": "new spaces"})
    act(env, 2)
    with pytest.raises(ValueError, match=r"observation_space of agent 'agent_0' changed from Box\(-2.0"):
        env.reset()
    env.close()
    with pytest.raises(ValueError, match="the agents' rewards differ"):
        act(vector_env(**TASKS["deaths, masks and states"] | {"kwargs": {"common_reward": False}},
                       n_envs=4, seed=0, stepping=stepping), 50)  # fmt: skip


def test_an_answer_that_can_not_be_sent_is_named() -> None:
    env = vector_env(moody, n_envs=2, seed=0, stepping="processes", kwargs={"mood": "unspeakable"})
    with pytest.raises(RuntimeError, match=r"a worker process failed in step\(\): .*lambda"):
        act(env, 5)
    env.close()


@pytest.mark.parametrize("mood", ["exit", "killed"])
def test_a_worker_that_ends_is_told_with_its_environments(mood: str) -> None:
    env = vector_env(moody, n_envs=5, seed=0, stepping="processes", workers=2, kwargs={"mood": mood})
    ended = pids(env)
    env.reset()
    if mood == "killed":
        os.kill(ended[1], signal.SIGKILL)
    numbers = "0 to 1" if mood == "exit" else "2 to 4"
    how = "ended with exit code 3" if mood == "exit" else "was killed by SIGKILL; did the memory run out"
    with pytest.raises(ChildProcessError, match=f"the worker process [0-9]+ of environments {numbers} {how}"):
        act(env, 4)
    assert not any(map(exists, ended))
    with pytest.raises(RuntimeError, match="the worker processes have ended"):
        env.reset()
    env.close()


def test_an_interrupted_step_does_not_answer_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    env = vector_env(moody, n_envs=2, seed=0, stepping="processes", kwargs={"mood": "asleep"})
    monkeypatch.setattr("marl_memory_envs.stepping.PATIENCE", 0.2)
    td = env.rand_action(env.reset())
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    with pytest.raises(KeyboardInterrupt):
        env.step(td)
    with pytest.raises(RuntimeError, match="an interrupted step"):
        env.step(td)
    ended = pids(env)
    env.close()
    assert not any(map(exists, ended)), "a worker that did not stop by itself is left"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stepping": "thread"}, "env.stepping='thread' must be one of serial, threads, processes"),
        ({"stepping": "threads", "workers": 0}, "env.workers=0 must be a whole number of at least 1"),
        ({"stepping": "processes", "workers": 1.5}, "env.workers=1.5 must be a whole number"),
        ({"workers": 2}, "env.workers=2 has no effect with env.stepping='serial'"),
    ],
)
def test_values_that_do_not_fit(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        vector_env(MaskedDuel, n_envs=2, seed=0, **options)
    with pytest.raises(ValueError, match=said):
        VectorEnv([MaskedDuel(), MaskedDuel()], **options)


def test_factories_that_do_not_fit() -> None:
    def make(factory: Any, **kwargs: Any) -> VectorEnv:
        return vector_env(factory, n_envs=2, seed=0, stepping="processes", kwargs=kwargs)

    with pytest.raises(ValueError, match="needs environments that were made in worker processes: use vector_env"):
        VectorEnv([MaskedDuel(), MaskedDuel()], stepping="processes")
    with pytest.raises(ValueError, match=r"MaskedDuel failed with kwargs=.*danger=3 must lie in"):
        make(MaskedDuel, danger=3)
    with pytest.raises(ValueError, match="made a int; it must return a PettingZoo ParallelEnv"):
        make(lambda: 3)
    with pytest.raises(ImportError, match="no module named 'no_such_suite'"):
        make(lambda: __import__("no_such_suite"))
    with pytest.raises(ValueError, match="can not be sent to a worker process"):
        make(lambda lock=__import__("threading").Lock(): lock)  # noqa: B008


# ---- nothing is left


def test_workers_end_at_close_and_twice_is_no_error() -> None:
    env = build("one agent, truncated", stepping="processes")
    ended = pids(env)
    assert all(map(runs, ended))
    env.close()
    env.close(raise_if_closed=False)
    processes(env).close()
    assert not any(map(exists, ended))


def test_workers_end_when_the_vector_is_collected() -> None:
    env = build("one agent, truncated", stepping="processes")
    ended = pids(env)
    del env
    gc.collect()
    assert not any(map(exists, ended))


def test_workers_end_when_the_vector_can_not_be_built() -> None:
    def children() -> str:
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    before = children()
    with pytest.raises(ValueError, match="max_episode_steps=-1 must be at least 1"):
        vector_env(MaskedDuel, n_envs=2, seed=0, stepping="processes", max_episode_steps=-1)
    assert children() == before


def test_threads_end_at_close() -> None:
    env = build("one agent, truncated", stepping="threads", workers=3)
    act(env, 2)
    assert isinstance(env._stepping, Threads)
    started = env._stepping._pool._threads
    assert len(started) == 2
    env.close()
    assert not any(thread.is_alive() for thread in started)


PROGRAM = """
import sys, time
from marl_memory_envs.stepping import Processes
from marl_memory_envs.toy import MaskedDuel

class Mine(MaskedDuel):
    def __init__(self, mood):
        super().__init__(danger=0, dragon=10**9, max_steps=10**9)
        self.mood = mood

    def step(self, actions):
        if self.mood == "asleep":
            time.sleep(1000)
        return super().step(actions)

# No guard around it: this file is not run a second time.
processes = Processes(Mine, {"mood": sys.argv[1]}, 2, workers=2, label="Mine")
processes.reset([0, 1], [0, 1])
print(*processes.process_ids, flush=True)
while True:
    processes.step([0, 1], [{"first": 0, "second": 0}] * 2, [True] * 2)
"""


def test_workers_end_with_a_parent_that_is_killed_and_ignore_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    commands = [[sys.executable, str(tmp_path / "program.py"), mood] for mood in ("awake", "asleep")]
    parents = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    said = [parent.stdout.readline() for parent in parents if parent.stdout is not None]
    ended = [int(word) for line in said for word in line.split()]
    assert len(ended) == 4
    for pid in ended:
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert all(map(runs, ended))
    for parent in parents:
        parent.kill()
        parent.communicate()
    assert wait_for(lambda: not any(map(runs, ended)))


# ---- in a run


def test_a_run_in_processes_equals_a_serial_one_and_resumes(tmp_path: Path) -> None:
    small = [
        "env=toy/masked_duel", "algorithm=mappo", "training.n_envs=4", "training.steps=16", "training.total_frames=256",
        "training.checkpoint_every_frames=128", "training.evaluation_every_frames=128",
        "training.evaluation_episodes=4", "network.hidden=[16,16]", "logger.tensorboard=false", "logger.quiet=true",
        "algorithm.epochs=2", "algorithm.minibatches=2",
    ]  # fmt: skip

    def state(name: str) -> Any:
        return CheckpointFolder(tmp_path / name / "checkpoints").newest(pytest.fail)[0]

    def finish(trainer: Any, name: str) -> None:
        trainer.run()
        trainer.close()
        release(tmp_path / name)

    halved = [*small, "env.stepping=processes", "training.stop_at_frames=128", f"run_folder={tmp_path / 'processes'}"]
    command = [sys.executable, "-m", "marl_memory.cli", "train", *halved]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state("processes")["frames"] == 128
    finish(resume(tmp_path / "processes", {}, say=lambda text: None), "processes")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", [*small, "run_folder=x"]), resolve=True)
    del config["run_folder"]
    finish(start(config, tmp_path / "serial"), "serial")
    assert_same(state("serial"), state("processes"))


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
