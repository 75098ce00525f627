"""SMAC through the real smacv2 and pysc2: on a stand-in for the game's binary, and on the game where there is one.

Every trouble of smacv2 that is dealt with from outside has a test; most also show that the trouble is there without.
"""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("smacv2", "pysc2", "s2clientprotocol", "portpicker", "websocket"):
    pytest.importorskip(package, reason=f"{package} is not installed: docs/smac.md says how")

import torch  # noqa: E402

from marl_memory_envs import smac_install  # noqa: E402
from marl_memory_envs.smac import vector_env  # noqa: E402
from marl_memory_envs.smac_env import Smac, parallel_env, task_name  # noqa: E402
from marl_memory_envs.smac_game import Game, GameProcess, starcraft2  # noqa: E402
from marl_memory_envs.smac_rules import GameFailure  # noqa: E402

STAND_IN = Path(__file__).parents[1] / "sc2_stub"
REAL = os.environ.get("SC2PATH", "")


def make_installation(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_sc2path", STAND_IN / "make_sc2path.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(folder)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The stand-in for the game is installed; called with variables of it (see `sc2_stub/server.py`), it obeys them."""
    make_installation(tmp_path / "sc2")
    monkeypatch.setenv("SC2PATH", str(tmp_path / "sc2"))
    for name in [name for name in os.environ if name.startswith("SC2_STUB_")]:
        monkeypatch.delenv(name)

    def obey(*, once: bool = False, **variables: Any) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(f"SC2_STUB_{name.upper()}", str(value))
        if once:
            monkeypatch.setenv("SC2_STUB_FAULT_LATCH", str(tmp_path / "latch"))

    return obey


@pytest.fixture(params=["stand-in", pytest.param("game", marks=pytest.mark.smac)])
def installation(request: pytest.FixtureRequest) -> str:
    """The stand-in, then the game itself where it is installed."""
    if request.param == "stand-in":
        request.getfixturevalue("stub")
    elif not list(Path(REAL or "nowhere").glob("Versions/Base*/SC2_x64")):
        pytest.skip("StarCraft II is not installed: SC2PATH names no folder that holds it")
    return request.param


@pytest.fixture
def open_env() -> Iterator[Callable[..., Smac]]:
    """`parallel_env`, closed in the end."""
    with ExitStack() as stack:

        def make(map: str, **options: Any) -> Smac:
            env = parallel_env(map, **options)
            stack.callback(env.close)
            return env

        yield make


@pytest.fixture
def game(stub: Any) -> Iterator[Callable[..., Game]]:
    """One `Game` in a process of its own."""
    process = GameProcess()

    def make(map_name: str = "3m", seed: int = 1, capabilities: Any = None, **options: Any) -> Game:
        timeouts = {"step_timeout": 20.0, "reset_timeout": 20.0} | options
        return Game(map_name=map_name, seed=seed, process=process, capabilities=capabilities or {}, **timeouts)

    yield make
    process.close()


def march(env: Smac, infos: Any, draw: np.random.Generator) -> dict[str, int]:
    return {agent: int(draw.choice(np.flatnonzero(infos[agent]["action_mask"]))) for agent in env.agents}


def episode(env: Smac, seed: int | None = None, draw: int = 0, stop: bool = False) -> list[Any]:
    """An episode of random actions, or of stopping; what was seen, and the last infos."""
    generator = np.random.default_rng(draw)
    seen, infos = env.reset(seed=seed)
    trace: list[Any] = [np.stack(list(seen.values())), env.state()]
    while env.agents:
        actions = dict.fromkeys(env.agents, 1) if stop else march(env, infos, generator)
        seen, rewards, _, _, infos = env.step(actions)
        trace += [np.stack(list(seen.values())), env.state(), np.array(list(rewards.values()))]
    return [*trace, infos]


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(map(np.array_equal, left[:-1], right[:-1]))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    limit = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(map(alive, pids))


def games_of(pid: int) -> list[int]:
    """The games that a process or its children run."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            words = Path(f"/proc/{child}/cmdline").read_text()
            found += [child] if "-listen" in words else games_of(child)
    return found


# ---- episodes, on the stand-in and on the game -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["3m", "2s3z", "MMM", "terran_5_vs_5"])
def test_full_episodes(name: str, installation: str, open_env: Callable[..., Smac]) -> None:
    env = open_env(name)
    for seed in (0, None, None):
        infos = episode(env, seed)[-1]
        last = next(iter(infos.values()))
        assert 0 <= last["dead_allies"] <= len(env.possible_agents)
        assert last["battle_won"] in (True, False)
    assert env.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*smac_install.SMAC_MAPS, *smac_install.SMACV2_MAPS])
def test_every_map_plays(name: str, installation: str, open_env: Callable[..., Smac]) -> None:
    env = open_env(name)
    for seed in (0, None):
        trace = episode(env, seed)
        assert all(np.isfinite(array).all() for array in trace[:-1])
        returned = sum(float(rewards[0]) for rewards in trace[4:-1:3])
        assert 0 <= returned <= 21
    assert env.restarts == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", smac_install.SMAC_MAPS)
def test_every_map_plays_as_the_real_maps_are(name: str, stub: Any, open_env: Callable[..., Smac]) -> None:
    """With types of their own for allies, and dead teams that are replaced at once."""
    stub(real_maps=1)
    env = open_env(name, reset_timeout=20)
    for seed in (0, None):
        episode(env, seed)
    assert env.restarts == 0


@pytest.mark.parametrize("name", ["3m", "zerg_5_vs_5"])
def test_seeds_reproduce_whole_episodes(name: str, installation: str, open_env: Callable[..., Smac]) -> None:
    def two(env: Smac, seed: int) -> list[Any]:
        return [*episode(env, seed)[:-1], *episode(env)]

    first, used = open_env(name), open_env(name)
    episode(used, 9)
    random.seed(5)
    once = two(first, 3)
    random.seed(6)
    assert same(two(used, 3), once), "a game that was used before, and other numbers drawn outside"
    assert same(two(first, 3), once)
    assert not same(two(first, 4), once)


def test_smacv2_draws_apart_from_the_program(stub: Any, open_env: Callable[..., Smac]) -> None:
    def outside() -> tuple[float, float]:
        return random.random(), float(np.random.random())  # noqa: NPY002

    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = [outside(), outside()]
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    env = open_env("protoss_5_vs_5")
    found = [outside()]
    episode(env, 0)
    assert [*found, outside()] == expected


def test_the_tables_are_those_of_smacv2() -> None:
    from smacv2.env.starcraft2.maps.smac_maps import get_smac_map_registry

    registry = get_smac_map_registry()
    assert [name for name in registry if not name.startswith("10gen_")] == list(smac_install.SMAC_MAPS)
    assert {f"10gen_{race}" for race in smac_install.RACES} == {name for name in registry if name.startswith("10gen_")}
    assert {registry[f"10gen_{race}"]["map_name"] for race in smac_install.RACES} == {smac_install.FLAT}


# ---- the troubles of smacv2, one by one ------------------------------------------------------------------------------


def test_1_the_protocol_is_imported_with_the_fast_parser(stub: Any) -> None:
    code = """
from marl_memory_envs.smac_protos import ensure
how = ensure()
from google.protobuf.internal import api_implementation
from s2clientprotocol import sc2api_pb2 as pb, common_pb2, raw_pb2
request = pb.RequestCreateGame(random_seed=7)
request.player_setup.add(type=pb.Computer, race=common_pb2.Terran, difficulty=pb.VeryHard)
again = pb.RequestCreateGame.FromString(request.SerializeToString())
assert again == request and pb.Status.Name(again.player_setup[0].type) and ensure() == "native"
print(how, api_implementation.Type(), raw_pb2.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    how, parser, name = done.stdout.split()
    assert how in ("native", "rebuilt") and parser != "python" and name == "s2clientprotocol.raw_pb2"


@pytest.mark.parametrize("capability", ["attack", "health"])
def test_2_attack_and_health_can_be_drawn(capability: str, game: Callable[..., Game], stub: Any) -> None:
    drawn = {"dist_type": "per_agent_uniform", "lower_bound": [0.2], "upper_bound": [0.8], "observe": True}

    def play(seed: int) -> list[Any]:
        one = game("3m", seed, {"n_units": 3, "n_enemies": 3, capability: drawn})
        one.reset()
        level = one.agent_attack_probabilities if capability == "attack" else one.agent_health_levels
        assert level.shape == (3,)
        seen: list[Any] = [level]
        for _ in range(30):
            masks = one.get_avail_actions()
            _, over, _ = one.step([int(np.flatnonzero(mask)[-1]) for mask in masks])
            seen.append(np.stack(one.get_obs()))
            if over:
                break
        return seen

    first, again = play(1), play(1)
    assert len(first) == len(again) and all(map(np.array_equal, first, again)), "failing attacks follow from the seed"
    assert not np.array_equal(first[0], play(2)[0])


def test_3_it_renders(installation: str, open_env: Callable[..., Smac]) -> None:
    env = open_env("3m")
    env.reset(seed=0)
    before = random.shuffle
    first = env.render()
    assert first.dtype == np.uint8 and first.ndim == 3 and first.shape[2] == 3 and first.any()
    assert random.shuffle is before and "skvideo" not in sys.modules
    for _ in range(8):
        env.step(dict.fromkeys(env.agents, 4))
    assert not np.array_equal(env.render(), first)


def test_4_a_second_reset_on_maps_that_replace_dead_teams_at_once(
    stub: Any, game: Callable[..., Game], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(respawn="instant")
    one = game(reset_timeout=3.0)
    for _ in range(3):
        one.reset()
        while not one.step([1, 1, 1] if all(m[1] for m in one.get_avail_actions()) else _any(one))[1]:
            pass
    monkeypatch.delattr(Game, "_kill_all_units")
    began = time.monotonic()
    with pytest.raises(GameFailure, match="a reset took longer than 3 s"):
        one.reset()
    assert time.monotonic() - began < 8


def _any(one: Game) -> list[int]:
    return [int(np.flatnonzero(mask)[0]) for mask in one.get_avail_actions()]


def test_5_types_of_allies_on_maps_with_types_of_their_own(
    stub: Any, game: Callable[..., Game], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(ids="rl")
    counts = {"2s3z": [2, 3], "3s5z": [3, 5], "MMM": [2, 7, 1], "1c3s5z": [1, 3, 5], "bane_vs_bane": [4, 20]}
    for name, wanted in counts.items():
        one = game(name)
        one.reset()
        types = [one.get_unit_type_id(unit, True) for unit in one.agents.values()]
        assert np.bincount(types).tolist() == wanted, name
        enemies = [one.get_unit_type_id(unit, False) for unit in one.enemies.values()]
        assert sorted(np.bincount(enemies).tolist()) == sorted(wanted), name
    monkeypatch.delattr(Game, "get_unit_type_id")
    with pytest.raises(IndexError):
        game("2s3z").reset()


def test_6_unit_ranges_on_maps_of_marines(
    stub: Any, game: Callable[..., Game], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub(ids="rl")
    one = game("3m", use_unit_ranges=True)
    one.reset()
    assert (one.unit_shoot_range(0), one.unit_sight_range(0)) == (5, 9)
    monkeypatch.delattr(Game, "_init_ally_unit_types")
    with pytest.raises(KeyError):
        game("3m", use_unit_ranges=True).reset()


def test_7_an_early_reset_starts_no_game_and_leaves_rewards_as_they_are(game: Callable[..., Game]) -> None:
    one = game()
    one.reset()
    pid = one._process.child.pid  # type: ignore[union-attr]
    for _ in range(3):
        one.step([1, 1, 1])
        one.reset()
        assert one.max_reward == 3 * 10 + 200 + 3 * 45
    assert one._process.child.pid == pid and one.force_restarts == 0  # type: ignore[union-attr]


def test_7_rewards_of_a_won_battle_sum_to_20_whatever_the_teams(stub: Any, open_env: Callable[..., Smac]) -> None:
    """smacv2 would divide by what the first episode's enemies are worth."""
    env = open_env("protoss_5_vs_5")
    worths = set()
    for seed in (0, None, None, None, 1):
        env.reset(seed=seed)
        one = env._game
        assert isinstance(one, Game)
        worths.add(one.max_reward)
        assert one.max_reward == 5 * 10 + 200 + sum(u.health_max + u.shield_max for u in one.enemies.values())
    assert len(worths) > 1


@pytest.mark.parametrize("fault", ["crash_after", "error_after"])
@pytest.mark.parametrize("name", ["3m", "terran_5_vs_5"])
def test_8_a_crash_or_an_error_costs_only_the_partial_episode(
    fault: str, name: str, stub: Any, open_env: Callable[..., Smac], capfd: pytest.CaptureFixture[str]
) -> None:
    stub(once=True, **{fault: 10})
    env = open_env(name)
    ends = [episode(env, 0 if i == 0 else None, stop=True)[-1] for i in range(6)]
    dropped = ["dropped" in next(iter(infos.values())) for infos in ends]
    assert sum(dropped) == env.restarts == 1
    assert not dropped[-1] and all("battle_won" in next(iter(ends[i].values())) for i in range(6) if not dropped[i])
    said = "ConnectionError: " if fault == "crash_after" else "injected error"
    assert said in capfd.readouterr().err


def test_9_a_game_that_hangs_is_killed(stub: Any, open_env: Callable[..., Smac]) -> None:
    stub(once=True, hang_after=10)
    env = open_env("3m", step_timeout=1.5)
    began = time.monotonic()
    infos = episode(env, 0, stop=True)[-1]
    assert infos["ally_0"]["dropped"]
    assert time.monotonic() - began < 15
    assert "battle_won" in next(iter(episode(env).__getitem__(-1).values()))
    assert env.restarts == 1


def test_9_a_game_that_hangs_in_a_reset_is_killed(
    stub: Any, open_env: Callable[..., Smac], capfd: pytest.CaptureFixture[str]
) -> None:
    stub(once=True, hang_after=1)
    env = open_env("terran_5_vs_5", reset_timeout=4)  # its reset steps the game
    assert len(env.reset(seed=0)[0]) == 5
    assert "a reset took longer than 4 s; the game is started anew" in capfd.readouterr().err


def test_10_units_that_do_not_appear_are_placed_anew(stub: Any, open_env: Callable[..., Smac]) -> None:
    """smacv2's own wrapper returns None here."""
    stub(once=True, drop_creates=1)
    env = open_env("terran_5_vs_5", reset_timeout=60)
    observations, _ = env.reset(seed=0)
    assert len(observations) == 5 and env.restarts == 0


@pytest.mark.parametrize("timeouts", ["truncate", "terminate"])
def test_10_a_time_limit_is_told_apart(timeouts: str, stub: Any, open_env: Callable[..., Smac]) -> None:
    stub(enemy="idle")
    env = open_env("3m", timeouts=timeouts)
    env.reset(seed=0)
    for _ in range(59):
        env.step(dict.fromkeys(env.agents, 1))
    _, _, terminated, truncated, infos = env.step(dict.fromkeys(env.agents, 1))
    assert set(terminated.values()) == {timeouts == "terminate"} != set(truncated.values())
    assert infos["ally_0"]["dead_allies"] == infos["ally_0"]["dead_enemies"] == 0


def test_10_what_fails_before_or_beside_an_episode(game: Callable[..., Game]) -> None:
    assert game().get_stats()["win_rate"] == 0
    one = game(obs_instead_of_state=True)
    one.reset()
    assert one.get_state().shape == (one.get_state_size(),) == (len(one.get_state_feature_names()),)


def test_objects_of_past_games_are_freed(game: Callable[..., Game]) -> None:
    """smacv2 registers a function at exit for each, that would hold it."""
    import gc
    import weakref

    one = game()
    one.reset()
    watched = weakref.ref(one)
    del one
    gc.collect()
    assert watched() is None


def test_smacv2_is_left_as_it_was(game: Callable[..., Game]) -> None:
    before = {name: id(value) for name, value in vars(starcraft2).items()}
    one = game()
    one.reset()
    one.step(_any(one))
    one.render()
    assert {name: id(value) for name, value in vars(starcraft2).items()} == before


# ---- options and errors ----------------------------------------------------------------------------------------------


def test_options_reach_smacv2_and_unknown_ones_are_named(stub: Any, open_env: Callable[..., Smac]) -> None:
    env = open_env("3m", options={"conic_fov": True, "num_fov_actions": 8, "obs_last_action": True})
    assert env.n_actions == 6 + 8 + 3
    assert len(env.reset(seed=0)[0]) == 3
    with pytest.raises(ValueError, match="env.options.conic_fow is unknown; near it: conic_fov; smacv2 has step_mul,"):
        open_env("3m", options={"conic_fow": True})
    with pytest.raises(ValueError, match="env.options.seed is unknown"):
        open_env("3m", options={"seed": 1})
    with pytest.raises(ValueError, match="env.step_timeout=0 must be a positive number of seconds"):
        open_env("3m", step_timeout=0)


def test_a_game_that_can_not_start_is_told_with_its_last_words(stub: Any, open_env: Callable[..., Smac]) -> None:
    stub(launch_fail=1)
    env = open_env("3m", attempts=2)
    with pytest.raises(ChildProcessError) as error:
        env.reset(seed=0)
    said = str(error.value)
    assert "smac/3m: the game failed 2 times in a row" in said and "SC2PATH=" in said
    assert "    SC2_STUB_LAUNCH_FAIL is set" in said and "(it ended with exit code 1)" in said


# ---- N games -------------------------------------------------------------------------------------------------------


def rollout(env: Any, steps: int) -> Any:
    torch.manual_seed(0)
    return env.rollout(steps, break_when_any_done=False)


def test_a_vector_has_one_game_each_and_leaves_nothing(installation: str) -> None:
    env = vector_env(map="3m", n_envs=2, seed=0)
    data = rollout(env, 70)
    assert data["next", "done"].sum() >= 2
    spec = env.task_spec
    assert (spec.name, spec.n_agents, spec.action_size, spec.max_episode_steps) == ("smac/3m", 3, 9, 60)
    assert spec.measures == ("dead_allies", "dead_enemies") and spec.has_dropped and spec.has_success
    assert len(spec.action_embedding or ()) == 9
    dead = ~data["agents", "alive"]
    assert dead.any() and data["agents", "action"][dead].eq(0).all()
    assert not data["agents", "observation"][dead].any()
    games = games_of(os.getpid())
    assert len(games) == 2
    env.set_seed(0)
    assert (rollout(env, 70) == data).all()
    assert games_of(os.getpid()) == games, "a seeded reset keeps the processes"
    env.close()
    assert env.is_closed and gone(games)
    other = vector_env(map="3m", n_envs=2, seed=1)
    assert not torch.equal(rollout(other, 10)["agents", "observation"], data["agents", "observation"][:, :10])
    other.close()


def test_one_environment_too_has_a_process_of_its_own(stub: Any) -> None:
    env = vector_env(map="zerg_5_vs_5", n_envs=1, seed=0)
    assert rollout(env, 5).shape == (1, 5) and env.task_spec.name == "smacv2/zerg_5_vs_5"
    games = games_of(os.getpid())
    assert len(games) == 1
    env.close()
    assert gone(games)


def test_failures_in_a_vector_cost_only_partial_episodes(stub: Any) -> None:
    stub(crash_after=100)  # every game, at its hundredth step
    env = vector_env(map="3m", n_envs=2, seed=0)
    data = rollout(env, 150)
    after = data["next"]
    assert after["dropped"].sum() >= 2
    assert (after["done"] & ~after["dropped"]).sum() >= 4
    assert not (after["dropped"] & ~after["truncated"]).any()
    env.close()


def test_a_game_that_ignores_requests_to_end_is_ended(stub: Any) -> None:
    stub(ignore_term=1)
    env = vector_env(map="3m", n_envs=1, seed=0)
    env.reset()
    games, began = games_of(os.getpid()), time.monotonic()
    env.close()
    assert gone(games, 1.0) and time.monotonic() - began < 5


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
@pytest.mark.parametrize("victim", ["trainer", "worker"])
def test_nothing_is_left_when_a_process_is_killed(victim: str, stub: Any) -> None:
    code = """
from marl_memory_envs.smac import vector_env
env = vector_env(map="3m", n_envs=2, seed=0)
env.reset()
print(*env.envs[0].processes.process_ids, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as trainer:
        assert trainer.stdout is not None
        workers = list(map(int, trainer.stdout.readline().split()))
        games = games_of(trainer.pid)
        assert len(workers) == len(games) == 2
        assert {os.getsid(pid) for pid in games} == set(games), "what is typed at the terminal is not for them"
        if victim == "trainer":
            trainer.kill()
            assert gone([*workers, *games])
        else:
            os.kill(workers[0], signal.SIGKILL)
            assert gone([workers[0], games[0]])
            assert alive(games[1])
            trainer.kill()
            assert gone([*workers, *games])


@pytest.mark.slow
def test_memory_does_not_grow(stub: Any) -> None:
    def resident() -> int:
        pids = env.envs[0].processes.process_ids  # type: ignore[attr-defined]
        return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)

    env = vector_env(map="3m", n_envs=2, seed=0)
    rollout(env, 1000)
    before = resident()
    for seed in range(5):
        env.set_seed(seed)
        rollout(env, 1000)
    assert resident() < 1.05 * before
    env.close()


def test_a_replay_holds_what_was_played(installation: str, tmp_path: Path) -> None:
    env = vector_env(map="3m", n_envs=1, seed=0)
    rollout(env, 20)
    file = tmp_path / "replay.SC2Replay"
    env.save_replay(file)
    assert file.stat().st_size > 100 and env.replay_suffix == ".SC2Replay"
    env.close()


def test_names_of_suites() -> None:
    assert task_name("3m") == "smac/3m" and task_name("terran_7_vs_9") == "smacv2/terran_7_vs_9"
