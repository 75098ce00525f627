"""SMAC's adapter on a stand-in for smacv2's Python API: deaths, ends, failures, seeds; and what needs no game."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pettingzoo.test import parallel_api_test, parallel_seed_test
from torchrl.envs.utils import check_env_specs

from marl_memory.training.collection import Collector
from marl_memory.training.config import config_dir
from marl_memory.training.evaluation import evaluate
from marl_memory.training.recording import record
from marl_memory.training.tasks import list_tasks, load_task
from marl_memory_envs import smac, smac_env, smac_install
from marl_memory_envs.smac_env import MEASURES, Smac, smacv2_capabilities, task_name
from marl_memory_envs.smac_rules import GameFailure
from marl_memory_envs.vector import VectorEnv

ALLIES, ENEMIES, LIMIT = 3, 2, 12
ACTIONS = 6 + ENEMIES
STOP, SHOOT = 1, 6


class Skirmish:
    """Three allies and two enemies, in smacv2's API: enemy i falls to three shots, ally i at a step drawn for it.

    ``faults`` maps a call, as in ``reset 0`` or ``step 7`` (counted since the game was made), to what happens there:
    ``raise``, ``nothing`` (what smacv2 returns when it lost the game), or ``peace`` (nobody falls in this episode).
    """

    def __init__(self, seed: int, faults: dict[str, str]) -> None:
        self.seed, self.faults, self.counts = seed, faults, {"reset": 0, "step": 0}
        self.draw = np.random.default_rng(seed)
        self.closed = False

    def get_env_info(self) -> dict[str, Any]:
        return {
            "n_agents": ALLIES, "n_actions": ACTIONS, "obs_shape": 4, "state_shape": 5, "episode_limit": LIMIT,
        }  # fmt: skip

    def _fault(self, call: str) -> str | None:
        fault = self.faults.get(f"{call} {self.counts[call]}")
        self.counts[call] += 1
        if fault == "raise":
            raise GameFailure(f"{call} was refused")
        return fault

    def reset(self) -> Any:
        if (fault := self._fault("reset")) == "nothing":
            return None
        self.time, self.shots = 0, [0] * ENEMIES
        peace = fault == "peace"
        self.falls = [99] * ALLIES if peace else self.draw.integers(3, LIMIT + 8, ALLIES).tolist()
        self.luck = self.draw.random(ALLIES)
        return self.get_obs(), self.get_state()

    @property
    def lives(self) -> list[bool]:
        return [self.time < fall for fall in self.falls]

    def step(self, actions: Sequence[int]) -> tuple[float, bool, dict[str, Any]]:
        if self._fault("step") == "nothing":
            return 0, True, {}
        for action, mask in zip(actions, self.get_avail_actions(), strict=True):
            assert mask[action], "smacv2 asserts this, and does not say more"
        before = sum(self.shots)
        for action in actions:
            if action >= SHOOT:
                self.shots[action - SHOOT] = min(3, self.shots[action - SHOOT] + 1)
        self.time += 1
        fallen = sum(shots >= 3 for shots in self.shots)
        info: dict[str, Any] = {"battle_won": False, "dead_allies": self.lives.count(False), "dead_enemies": fallen}
        over = fallen == ENEMIES or not any(self.lives)
        info["battle_won"] = fallen == ENEMIES
        if not over and self.time >= LIMIT:
            over = info["episode_limit"] = True
        return sum(self.shots) - before, over, info

    def get_obs(self) -> list[np.ndarray]:
        return [
            np.array([i, self.time / LIMIT, self.luck[i], 1.0]) * alive for i, alive in enumerate(self.lives)
        ]  # smacv2: dead allies see nothing

    def get_state(self) -> np.ndarray:
        return np.array([self.time, *self.shots, self.seed % 100, self.luck[0]])

    def get_avail_actions(self) -> list[list[int]]:
        attack = [int(shots < 3) for shots in self.shots]
        return [[0, 1, 1, 1, 1, 1, *attack] if alive else [1] + [0] * (ACTIONS - 1) for alive in self.lives]

    def render(self, mode: str) -> np.ndarray:
        return np.full((8, 8, 3), self.time, np.uint8)

    def replay(self) -> bytes:
        return b"replay of %d, %d resets" % (self.seed, self.counts["reset"])

    def close(self) -> None:
        self.closed = True


class Barracks:
    """Games, the n-th of which has the n-th of ``faults``; the one that tells its sizes does not count."""

    def __init__(self, *faults: dict[str, str]) -> None:
        self.faults = list(faults)
        self.made: list[Skirmish] = []
        self.killed = 0
        self.closed = False

    def make(self, seed: int) -> Skirmish:
        faults = self.faults[len(self.made) - 1] if 1 <= len(self.made) <= len(self.faults) else {}
        self.made.append(Skirmish(seed, faults))
        return self.made[-1]

    def kill(self) -> list[str]:
        self.killed += 1
        return ["loading the map", "out of ammunition"]

    def close(self) -> None:
        self.closed = True


def battle(*faults: dict[str, str], **options: Any) -> Smac:
    return Smac(Barracks(*faults), name="smac/test", **options)


def vector(*envs: Smac) -> VectorEnv:
    return VectorEnv(
        envs,
        name="smac/test",
        common_reward=True,
        success="battle_won",
        measures=MEASURES,
        dropped="dropped",
        max_episode_steps=LIMIT,
    )


def play(env: Smac, action: int = STOP, steps: int = 99) -> list[Any]:
    """The answers up to the end of an episode, everybody doing the same as long as it is allowed."""
    answers = []
    while env.agents and len(answers) < steps:
        masks = {agent: env._infos([agent])[agent]["action_mask"] for agent in env.agents}
        answers.append(env.step({agent: action if mask[action] else STOP for agent, mask in masks.items()}))
    return answers


class Lenient(Smac):
    """PettingZoo's tests send whatever they draw: what is forbidden becomes the first action that is not."""

    def step(self, actions: dict[str, int]) -> Any:
        masks = {agent: self._infos([agent])[agent]["action_mask"] for agent in self.agents}
        return super().step(
            {a: x if (x := int(actions[a])) and mask[x] else mask.argmax() for a, mask in masks.items()}
        )


# ---- the contract ----------------------------------------------------------------------------------------------------


def test_pettingzoo_and_torchrl_contracts(capsys: pytest.CaptureFixture[str]) -> None:
    parallel_api_test(Lenient(Barracks()), num_cycles=60)
    parallel_seed_test(lambda: Lenient(Barracks()), num_cycles=30)
    parallel_api_test(Lenient(Barracks(*[{"step 9": "raise"}] * 9)), num_cycles=60)
    check_env_specs(vector(battle(), battle()))


def test_an_ally_that_dies_is_terminated_and_leaves() -> None:
    env = battle()
    env.reset(seed=1)
    falls = env.games.made[-1].falls  # type: ignore[attr-defined]
    assert min(falls) < LIMIT <= max(falls), "this seed has deaths and survivors"
    for time, (seen, rewards, terminated, truncated, infos) in enumerate(play(env), 1):
        for i, fall in enumerate(falls):
            name = f"ally_{i}"
            assert (name in seen) == (time <= fall)
            if name in seen:
                assert terminated[name] == (time == fall)
                assert truncated[name] == (time == LIMIT < fall)
                assert (infos[name]["action_mask"][0] == 1) == (time == fall)
                assert seen[name].any() == (time < fall)
                assert rewards[name] == 0
    assert env.agents == []


@pytest.mark.parametrize("timeouts", ["truncate", "terminate"])
def test_a_time_limit_truncates_or_terminates(timeouts: str) -> None:
    env = battle({"reset 0": "peace"}, timeouts=timeouts)
    env.reset(seed=0)
    answers = play(env)
    assert len(answers) == LIMIT
    _, _, terminated, truncated, infos = answers[-1]
    assert set(terminated.values()) == {timeouts == "terminate"}
    assert set(truncated.values()) == {timeouts == "truncate"}
    assert infos["ally_0"]["dead_allies"] == 0 and infos["ally_0"]["battle_won"] is False
    assert "battle_won" not in answers[-2][4]["ally_0"]


def test_a_won_battle_is_terminated_and_told_with_the_dead() -> None:
    env = battle({"reset 0": "peace"})
    env.reset(seed=0)
    first, second = play(env, SHOOT, 1), play(env, SHOOT + 1)
    assert first[0][1]["ally_0"] == 3, "a common reward"
    _, _, terminated, truncated, infos = second[-1]
    assert all(terminated.values()) and not any(truncated.values())
    assert infos["ally_2"] | {"action_mask": None} == {
        "action_mask": None, "battle_won": True, "dead_allies": 0, "dead_enemies": 2,
    }  # fmt: skip


def test_a_forbidden_action_is_one_clear_error() -> None:
    env = battle({"reset 0": "peace"})
    env.reset(seed=0)
    everybody = dict.fromkeys(env.agents, STOP)
    for wrong in (0, ACTIONS, -1, None):
        with pytest.raises(
            ValueError, match=rf"action {wrong} of ally_1 is not allowed now; .* \[1, 2, 3, 4, 5, 6, 7\]"
        ):
            env.step(everybody | {"ally_1": wrong})  # type: ignore[dict-item]


# ---- seeds -----------------------------------------------------------------------------------------------------------


def test_a_seed_begins_a_new_game_and_no_seed_goes_on() -> None:
    env = battle()
    env.reset(seed=5)
    games = env.games
    assert isinstance(games, Barracks)
    assert [game.seed for game in games.made] == [0, 5]
    play(env)
    env.reset()
    assert len(games.made) == 2 and games.made[-1].counts["reset"] == 2
    env.reset(seed=5)
    assert [game.seed for game in games.made] == [0, 5, 5]
    assert games.killed == 0, "a new game does not need a new process"


def test_a_seeded_reset_forgets_what_was_before() -> None:
    def run(env: VectorEnv) -> Any:
        torch.manual_seed(0)
        env.set_seed(3)
        return env.rollout(40, break_when_any_done=False)

    used = vector(battle({"step 5": "raise"}), battle())
    used.set_seed(1)
    used.rollout(50, break_when_any_done=False)
    assert (run(used) == run(vector(battle(), battle()))).all()


def test_without_a_seed_one_is_drawn_from_the_system() -> None:
    starts = {battle().reset()[0]["ally_0"].tobytes() for _ in range(3)}
    assert len(starts) == 3


# ---- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["raise", "nothing"])
def test_a_game_that_breaks_off_costs_its_partial_episode(fault: str, capsys: pytest.CaptureFixture[str]) -> None:
    env = battle({"reset 0": "peace", "step 4": fault})
    env.reset(seed=7)
    answers = play(env)
    assert len(answers) == 5
    seen, rewards, terminated, truncated, infos = answers[-1]
    assert set(rewards.values()) == {0.0} and not any(terminated.values()) and all(truncated.values())
    assert all(info["dropped"] for info in infos.values()) and "battle_won" not in infos["ally_0"]
    assert all(np.array_equal(seen[agent], answers[-2][0][agent]) for agent in seen), "what was last seen"
    assert (env.restarts, env.agents) == (1, [])
    assert "warning: smac/test: an episode is dropped: " in capsys.readouterr().err
    games = env.games
    assert isinstance(games, Barracks) and games.killed == 1
    env.reset()
    assert len(games.made) == 3 and games.made[-1].seed not in (0, 7), "another game, with a seed of its own"
    assert not any("dropped" in info for info in play(env)[-1][4].values())


def test_the_games_after_a_failure_follow_from_the_seed() -> None:
    def seeds() -> list[int]:
        env = battle({"step 2": "raise"}, {"step 2": "raise"})
        env.reset(seed=7)
        for _ in range(2):
            play(env)
            env.reset()
        return [game.seed for game in env.games.made]  # type: ignore[attr-defined]

    assert seeds() == seeds()
    assert len(set(seeds())) == 4


@pytest.mark.parametrize("fault", ["raise", "nothing"])
def test_a_reset_that_is_refused_is_tried_again(fault: str) -> None:
    env = battle({"reset 0": fault}, {"reset 0": fault})
    observations, _ = env.reset(seed=0)
    assert len(observations) == ALLIES and env.restarts == 2
    assert play(env)


def test_after_failures_in_a_row_it_gives_up_with_the_last_lines() -> None:
    env = battle(*[{"reset 0": "raise"}] * 9, attempts=3)
    with pytest.raises(ChildProcessError) as error:
        env.reset(seed=0)
    said = str(error.value)
    assert said.startswith("smac/test: the game failed 3 times in a row without an episode that ended, at last: reset")
    assert said.endswith("the last it wrote:\n    loading the map\n    out of ammunition")
    assert env.restarts == 3


def test_a_game_that_never_ends_an_episode_counts_too_and_one_that_does_not() -> None:
    env = battle(*[{"step 2": "raise"}] * 9, attempts=3)
    env.reset(seed=0)
    for _ in range(2):
        play(env)
        env.reset()
    play(env)
    with pytest.raises(ChildProcessError, match="failed 3 times in a row"):
        env.reset()
    fine = battle(*[{"reset 0": "peace", "reset 1": "peace", f"step {LIMIT + 2}": "raise"}] * 9, attempts=2)
    fine.reset(seed=0)
    for _ in range(8):  # every second episode breaks off, never two in a row
        play(fine)
        fine.reset()
    assert fine.restarts == 4


def test_in_a_vector_only_the_failure_itself_is_truncated_and_marked() -> None:
    env = vector(battle({"reset 0": "peace", "step 3": "raise"}), battle({"reset 0": "peace"}))
    env.set_seed(0)
    data = env.rollout(LIMIT, break_when_any_done=False)
    after = data["next"]
    assert after["dropped"].nonzero().tolist() == [[0, 3, 0]]
    assert after["truncated"][0, 3, 0]
    assert after["done"][1].sum() >= 1 and not after["dropped"][1].any()
    assert not after["terminated"][0, 3] and after["agents", "discount"][0, 3].eq(1).all()
    assert torch.equal(after["agents", "observation"][0, 3], data["agents", "observation"][0, 3])
    assert after["agents", "alive"][0, 3].all(), "whoever is cut can be bootstrapped from"


def test_dropped_episodes_enter_no_statistic_and_are_counted() -> None:
    env = vector(battle({"reset 0": "peace", "step 3": "raise"}), battle({"reset 0": "peace"}))
    keys = env.task_spec.keys

    def stop(td: Any) -> Any:
        mask = td.get(keys.action_mask)
        return td.set(keys.action, mask[..., STOP].long())

    collector = Collector(env, stop, lambda td: None, steps=LIMIT, learn_entries={}, seed=0)
    batch, episodes = collector.collect()
    row = episodes.metrics("train")
    ended = batch["next", "done"].sum().item()
    assert row["train/dropped"] == 1
    assert row["train/episodes"] == ended - 1
    assert row["train/dead_enemies"] == 0
    assert LIMIT in episodes.lengths.tolist()
    told = batch["next", "measures"][batch["next", "done"][..., 0] & ~batch["next", "dropped"][..., 0]]
    assert row["train/dead_allies"] == pytest.approx(told[:, 0].mean().item())


class Stop:
    """A policy that stops, as far as `evaluate` looks at one."""

    greedy = False

    def __call__(self, td: Any) -> Any:
        return td.set(("agents", "action"), td["agents", "action_mask"][..., STOP].long())


def test_an_evaluation_plays_dropped_episodes_anew() -> None:
    env = vector(battle({"step 3": "raise"}, {"step 20": "raise"}), battle())
    played = evaluate(env, Stop(), episodes=6, seed=0)  # type: ignore[arg-type]
    assert len(played.returns) == len(played.lengths) == len(played.measures["dead_allies"]) == 6
    assert played.dropped == 2
    row = played.metrics("evaluation")
    assert row["evaluation/episodes"] == 6 and row["evaluation/dropped"] == 2


# ---- replays and pictures --------------------------------------------------------------------------------------------


def test_every_episode_that_ended_has_a_replay_of_its_own(tmp_path: Path) -> None:
    env = vector(battle({}, {"step 2": "raise"}))
    said: list[str] = []
    played = record(env, Stop(), tmp_path / "new", episodes=3, seed=0, say=said.append)  # type: ignore[arg-type]
    texts = [(tmp_path / "new" / f"episode_{i}.SC2Replay").read_bytes() for i in range(3)]
    assert len(set(texts)) == 3 and all(text.endswith(b", 1 resets") for text in texts)
    assert len(list((tmp_path / "new").iterdir())) == 3 and played.dropped == 1
    assert said == [f"3 replays: {tmp_path / 'new'}"]


def test_it_can_be_drawn() -> None:
    env = battle()
    vectors = vector(env)
    vectors.set_seed(0)
    vectors.reset()
    (picture,) = vectors.frames()
    assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
    assert vectors.frames_per_second == pytest.approx(2.8)
    game = env._game
    env.close()
    assert env.games.closed and game.closed  # type: ignore[attr-defined, union-attr]
    with pytest.raises(RuntimeError, match="before the first reset"):
        env.render()
    with pytest.raises(ValueError, match="smac/test: nothing was played"):
        env.save_replay("nowhere")


# ---- what needs no game: names, configs, what is missing -------------------------------------------------------------

CONFIGS = config_dir() / "env"


def test_every_map_has_a_config_of_its_name() -> None:
    for suite, maps in (("smac", smac_install.SMAC_MAPS), ("smacv2", smac_install.SMACV2_MAPS)):
        names = {file.stem for file in (CONFIGS / suite).glob("*.yaml")}
        assert names == {*maps, *(["task"] if suite == "smac" else [])}
        for name in maps:
            config = load_task(CONFIGS, f"{suite}/{name}")
            assert config["map"] == name
            assert task_name(name) == f"{suite}/{name}"
            smac_install.check_map(name)


def test_the_defaults_of_the_code_are_those_of_the_configs() -> None:
    import inspect

    config = load_task(CONFIGS, "smac/3m")
    for function in (smac.vector_env, smac_env.parallel_env):
        for key, parameter in inspect.signature(function).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                assert config[key] == parameter.default, key


@pytest.mark.parametrize("suite", ["mappo_smac", "mappo_smacv2"])
def test_every_map_has_the_published_protocol(suite: str) -> None:
    from hydra import compose, initialize_config_dir

    env = suite.removeprefix("mappo_")
    maps = smac_install.SMAC_MAPS if env == "smac" else smac_install.SMACV2_MAPS
    files = {file.stem for file in (config_dir() / "experiment" / suite).glob("*.yaml")} - {"protocol"}
    assert files == set(maps)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for name in maps[::6]:
            config = compose("config", overrides=[f"experiment={suite}/{name}", "run_folder=somewhere"])
            assert (config.env.map, config.env.game_version, config.training.total_frames) == (name, "4.10", 10_000_000)
            assert config.algorithm.epochs in (5, 10, 15) and config.algorithm.centralised_critic


@pytest.mark.parametrize("name", ["3s5z_vs_3s7z", "terran_5vs5", "3M", "terran_0_vs_5", "zerg"])
def test_an_unknown_map_is_named_with_those_near_it(name: str) -> None:
    with pytest.raises(ValueError, match=f"^env.map='{name}' is unknown; near it: ") as error:
        smac.vector_env(map=name, n_envs=1, seed=0)
    if name.startswith("3s5z"):
        assert "near it: 3s5z_vs_3s6z" in str(error.value)
    if name == "terran_5vs5":
        assert "near it: terran_5_vs_5" in str(error.value)


def test_scenarios_of_other_sizes_are_read() -> None:
    assert smac_install.scenario("terran_7_vs_9") == ("terran", 7, 9)
    assert smac_install.scenario("5m_vs_6m") is None
    assert smacv2_capabilities("zerg", 7, 9)["team_gen"]["unit_types"] == ["zergling", "hydralisk", "baneling"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The game's folder as its package leaves it, but for its content; all Python packages are there."""
    maps = [f"Maps/SMAC_Maps/{name}.SC2Map" for name in (*smac_install.SMAC_MAPS, smac_install.FLAT)]
    for file in ("Versions/Base75689/SC2_x64", *maps):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    monkeypatch.setenv("SC2PATH", str(tmp_path))
    monkeypatch.setattr(smac_install, "find_spec", lambda name: SimpleNamespace())
    return tmp_path


def test_a_whole_installation_is_found(installed: Path) -> None:
    assert all(row.there for row in smac_install.examine())
    assert smac.lacking() == ""
    for name in ("3m", "27m_vs_30m", "protoss_10_vs_11"):
        smac_install.check(name, "4.10")


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        ("websocket", r"env.map=3m needs smac packages: websocket missing.  pip install \"marl-memory\[smac\]\""),
        ("pysc2", r"env.map=3m needs pysc2: not installed.  pip install --no-deps pysc2==4.0.0 git\+https"),
        ("smacv2", r"env.map=3m needs smacv2: not installed.  pip install --no-deps .*oxwhirl/smacv2"),
    ],
)
def test_a_missing_package_is_one_clear_error(
    absent: str, said: str, installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smac_install, "find_spec", lambda name: None if name == absent else SimpleNamespace())
    with pytest.raises(ImportError, match=said):
        smac.vector_env(map="3m", n_envs=1, seed=0)
    assert smac.lacking() == f"{absent if absent != 'websocket' else 'smac packages'} (marl-memory doctor)"


def test_a_missing_game_or_map_is_one_clear_error(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(smac.vector_env, n_envs=1, seed=0)
    (installed / "Maps/SMAC_Maps/3m.SC2Map").unlink()
    with pytest.raises(ValueError, match=r"env.map=3m needs the file .*3m.SC2Map, which is not there.\nunpack its"):
        make(map="3m")
    (installed / "Maps/SMAC_Maps/32x32_flat.SC2Map").unlink()
    with pytest.raises(ValueError, match=r"env.map=zerg_5_vs_5 needs the file .*32x32_flat.SC2Map"):
        make(map="zerg_5_vs_5")
    assert {row.name: row.found for row in smac_install.examine()}["maps"] == "22 of 24 in Maps/SMAC_Maps, not 3m"
    (installed / "Versions/Base75689").rename(installed / "Versions/Base80000")
    with pytest.raises(ValueError, match=r"holds no StarCraft II 4.10: Base80000 in Versions, not Base75689"):
        make(map="8m")
    smac_install.check("8m", "5.0.0")  # a version of one's own choice is pysc2's to find
    monkeypatch.setenv("SC2PATH", str(installed / "nowhere"))
    with pytest.raises(ValueError, match=r"^SC2PATH=.*nowhere: no such folder.  It must name the folder of StarCraft"):
        make(map="8m")
    monkeypatch.delenv("SC2PATH")
    monkeypatch.setenv("HOME", str(installed))
    with pytest.raises(ValueError, match=r"^SC2PATH=.*StarCraftII \(not set\): no such folder"):
        make(map="8m")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"timeouts": "ignore"}, "timeouts='ignore' must be one of truncate, terminate"),
        ({"attempts": 0}, "attempts=0 must be a whole number of at least 1"),
        ({"attempts": True}, "attempts=True must be a whole number"),
    ],
)
def test_a_value_that_does_not_exist_is_one_clear_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        battle(**options)


def test_other_tasks_keep_no_replays(tmp_path: Path) -> None:
    from marl_memory_envs.toy import MaskedDuel
    from marl_memory_envs.vector import vector_env

    env = vector_env(MaskedDuel, n_envs=1, seed=0, name="toy/masked_duel")
    with pytest.raises(ValueError, match="toy/masked_duel keeps no replays; --video films"):
        record(env, Stop(), tmp_path / "new", episodes=1, seed=0)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="toy/masked_duel keeps no replays"):
        env.save_replay(tmp_path / "file")


def test_the_tasks_are_listed_with_what_is_missing(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from marl_memory.training import tasks

    def listed() -> dict[str, Any]:
        return {task.name: task for task in list_tasks(CONFIGS)}

    monkeypatch.setattr(tasks, "find_spec", lambda name: SimpleNamespace())
    found = listed()
    assert found["smac/MMM2"].hint == found["smacv2/zerg_20_vs_23"].hint == "ready"
    assert found["smac/task"].hint == "ready, given env.map=…"
    monkeypatch.setenv("SC2PATH", str(installed / "nowhere"))
    assert listed()["smac/3m"] == tasks.Task("smac/3m", "smac", False, "missing: SC2PATH (marl-memory doctor)")
