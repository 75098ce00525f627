"""Atari: Gymnasium's semantics, ale-py's vector environment byte for byte, PettingZoo's games, and bad input."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torchrl.envs.utils import check_env_specs

pytest.importorskip("ale_py", reason="needs the extra atari")
pytest.importorskip("multi_agent_ale_py", reason="needs the extra atari")

from marl_memory_envs import atari  # noqa: E402
from marl_memory_envs.vector import vector_env  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs" / "env" / "atari"
WITHOUT_NOOP = ("backgammon", "video_checkers")
BACKENDS = pytest.mark.parametrize("backend", atari.BACKENDS)


def make(game: str = "pong", n_envs: int = 2, seed: int = 0, backend: str = "gymnasium", **kwargs: Any) -> Any:
    return atari.vector_env(n_envs=n_envs, seed=seed, backend=backend, kwargs={"game": game, **kwargs})


def play(env: Any, steps: int, seed: int = 0) -> list[Any]:
    generator, td, found = torch.Generator().manual_seed(seed), env.reset(), []
    for _ in range(steps):
        td["agents", "action"] = torch.randint(env.task_spec.action_size, (env.n_envs, 1), generator=generator)
        td, following = env.step_and_maybe_reset(td)
        found.append(td)
        td = following
    return found


def test_both_backends_give_the_same_bytes() -> None:
    """Without random no-ops a game follows from its actions: pictures, rewards and ends of both backends are equal."""
    one, other = make("breakout", noop_max=0), make("breakout", noop_max=0, backend="ale_vector")
    assert one.task_spec == other.task_spec
    ends = 0
    for ours, theirs in zip(play(one, 250), play(other, 250), strict=True):
        for key in ours.keys(include_nested=True, leaves_only=True):
            assert ours[key].dtype == theirs[key].dtype, key
            assert torch.equal(ours[key], theirs[key]), key
        ends += int(ours["next", "done"].sum())
    assert ends >= 2


@BACKENDS
def test_time_limits_truncate_and_games_that_are_over_terminate(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atari, "FRAMES", 120)
    env = make(backend=backend, noop_max=0)
    assert env.task_spec.max_episode_steps == 30
    last = play(env, 30)[-1]["next"]
    assert last["truncated"].all() and not last["terminated"].any()
    assert last["agents", "alive"].all() and (last["agents", "discount"] == 1).all()
    assert last["agents", "action_mask"].all()


def test_what_is_seen_is_what_gymnasium_gives() -> None:
    """The newest picture, the reward and the end are those of `AtariPreprocessing` around ALE/Breakout-v5."""
    import ale_py
    import gymnasium as gym
    from gymnasium.wrappers import AtariPreprocessing

    gym.register_envs(ale_py)
    plain = AtariPreprocessing(gym.make("ALE/Breakout-v5", frameskip=1, repeat_action_probability=0.0), noop_max=0)
    env = make("breakout", n_envs=1, noop_max=0)
    seen, _ = plain.reset()
    for step in play(env, 120):
        newest = step["agents", "observation"][0, 0].view(4, 84, 84)[-1].numpy()
        assert np.array_equal(newest, seen)
        seen, reward, terminated, truncated, _ = plain.step(int(step["agents", "action"]))
        assert float(step["next", "agents", "reward"]) == reward
        assert bool(step["next", "terminated"]) == terminated
        if terminated or truncated:
            seen, _ = plain.reset()


@BACKENDS
def test_torchrls_contract(backend: str) -> None:
    check_env_specs(make("freeway", backend=backend), seed=0)


@BACKENDS
def test_a_seed_fixes_the_games_which_begin_differently(backend: str) -> None:
    first, again, other = (play(make(backend=backend, seed=seed), 20) for seed in (3, 3, 4))
    observations = [torch.stack([step["agents", "observation"] for step in steps]) for steps in (first, again, other)]
    assert torch.equal(observations[0], observations[1])
    assert not torch.equal(observations[0], observations[2])
    assert not torch.equal(observations[0][:, 0], observations[0][:, 1])


@BACKENDS
def test_options_reach_the_emulator(backend: str) -> None:
    assert make(backend=backend, screen_size=42, frame_stack=2).task_spec.picture == (2, 42, 42)
    assert make(backend=backend, full_action_space=True).task_spec.action_sizes == (18,)
    plain, sticky = (play(make(backend=backend, noop_max=0, sticky_actions=p), 60) for p in (0.0, 0.5))
    assert not torch.equal(*(torch.stack([step["agents", "observation"] for step in run]) for run in (plain, sticky)))


def test_an_episode_is_a_life_if_asked() -> None:
    env = make("breakout", n_envs=1, episodic_life=True, noop_max=0)
    lengths = [i for i, step in enumerate(play(env, 150)) if step["next", "terminated"].any()]
    whole = [
        i for i, step in enumerate(play(make("breakout", n_envs=1, noop_max=0), 150)) if step["next", "done"].any()
    ]
    assert len(lengths) > len(whole)


def test_ale_vector_says_what_it_can_not_do() -> None:
    env = make(backend="ale_vector")
    with pytest.raises(RuntimeError, match="before the first reset"):
        env._step(env.rand_action())
    td = env.reset()
    mask = torch.tensor([[True], [False]])
    with pytest.raises(RuntimeError, match=r"can not reset single games in mid-episode: \[0\]"):
        env.reset(td.set("_reset", mask))
    td = env.rand_action(env.reset())
    with pytest.raises(RuntimeError, match="steps all games or none"):
        env._step(td.clone().set("_step", mask))
    with pytest.raises(ValueError, match="6 exist"):
        env._step(td.clone().set(("agents", "action"), torch.tensor([[6], [0]])))


def test_games_can_be_drawn() -> None:
    env = make(n_envs=1)
    env.reset()
    assert [picture.shape for picture in env.frames()] == [(210, 160, 3)]
    env = make(n_envs=1, backend="ale_vector")
    env.reset()
    assert [picture.shape for picture in env.frames()] == [(168, 168, 3)]


# -------------------------------------------------------------------------------------------------- several players


def two_players(**kwargs: Any) -> Any:
    config = yaml.safe_load((CONFIGS / "pong_v3.yaml").read_text())
    for key in ("_target_", "defaults"):
        config.pop(key)
    config["kwargs"] |= kwargs
    return vector_env(**config, n_envs=2, seed=0)


def test_players_see_one_screen_and_get_rewards_of_their_own() -> None:
    env = two_players()
    spec = env.task_spec
    assert (spec.agents, spec.picture, spec.frame_stack) == (("first_0", "second_0"), (4, 84, 84), 4)
    td, rewards = env.reset(), []
    stack = td["agents", "observation"].view(2, 2, 4, 84, 84)
    assert torch.equal(stack[:, 0], stack[:, 1])
    assert not stack[:, :, :3].any() and stack[:, :, 3].any()
    for _ in range(60):
        td["agents", "action"] = torch.zeros(2, 2, dtype=torch.int64)
        td, following = env.step_and_maybe_reset(td)
        rewards.append(td["next", "agents", "reward"][0].flatten().tolist())
        td = following
    assert [sum(of) for of in zip(*rewards, strict=True)] in ([1.0, -1.0], [-1.0, 1.0])


def test_a_players_game_is_cut_by_its_time_limit() -> None:
    env = two_players(max_cycles=40)
    td = env.reset()
    for _ in range(10):
        td, following = env.step_and_maybe_reset(env.rand_action(td))
        last, td = td, following
    assert last["next", "truncated"].all() and last["next", "agents", "alive"].all()


@pytest.mark.parametrize(
    ("game", "frames"),
    [
        ("pong_v3", 150),
        *(pytest.param(game, 4000, marks=pytest.mark.slow) for game in ("boxing_v2", "mario_bros_v3", "warlords_v3")),
    ],
)
def test_players_get_what_pettingzoos_parallel_env_gives(game: str, frames: int) -> None:
    """Frame by frame, past ends by a time limit and by players who are out."""
    module = import_module(f"pettingzoo.atari.{game}")
    limit = {"max_cycles": max(100, frames // 3)}
    theirs = module.parallel_env(obs_type="grayscale_image", auto_rom_install_path=str(atari.rom_folder()), **limit)
    ours, generator, ends = atari.players(game=game, **limit), np.random.default_rng(0), 0
    assert (ours.possible_agents, ours.render_mode) == (theirs.possible_agents, theirs.render_mode)
    for frame in range(frames):
        if frame == 0 or not ours.agents:
            seed = int(generator.integers(1000))
            (one, infos), (other, their_infos) = ours.reset(seed=seed), theirs.reset(seed=seed)
            assert infos == their_infos
            assert [*one] == [*other] == ours.agents == theirs.agents
        actions = {name: int(generator.integers(ours.action_space(name).n)) for name in ours.agents}
        (one, *rest), (other, *their_rest) = ours.step(actions), theirs.step(actions)
        assert rest == their_rest
        assert ours.agents == theirs.agents
        assert all(np.array_equal(one[name], other[name][..., 0]) for name in one) and [*one] == [*other]
        ends += any((rest[1] | rest[2]).values())
    assert ends
    with pytest.raises(ValueError, match=r"action -1 of first_0 in .*: \d+ exist"):
        ours.step({"first_0": -1})


@pytest.mark.slow
@pytest.mark.parametrize("game", atari.players_games())
def test_every_game_of_pettingzoo_can_be_played(game: str) -> None:
    config = yaml.safe_load((CONFIGS / "pong_v3.yaml").read_text())
    env = vector_env(
        config["factory"], n_envs=1, seed=0, kwargs={"game": game}, wrappers=config["wrappers"], clip_rewards=1.0
    )
    td = env.reset()
    for _ in range(30):
        _, td = env.step_and_maybe_reset(env.rand_action(td))
    assert td["agents", "observation"].any()


@pytest.mark.slow
@pytest.mark.parametrize("game", atari.games())
def test_every_game_of_ale_can_be_played(game: str) -> None:
    env = make(game, n_envs=1, noop_max=0 if game in WITHOUT_NOOP else 30)
    td = env.reset()
    for _ in range(10):
        _, td = env.step_and_maybe_reset(env.rand_action(td))


# --------------------------------------------------------------------------------------------------------- bad input


def test_a_game_in_which_no_action_does_nothing_is_said() -> None:
    for game in WITHOUT_NOOP:
        with pytest.raises(
            ValueError, match=r"env\.kwargs\.noop_max=30: the first action of .* is FIRE, .*set it to 0"
        ):
            make(game, n_envs=1)
    assert make(WITHOUT_NOOP[0], n_envs=1, full_action_space=True).task_spec.action_sizes == (18,)


def test_all_games_are_known() -> None:
    assert len(atari.games()) > 100
    assert {"pong_v3", "boxing_v2", "tennis_v3"} <= set(atari.players_games())


@pytest.mark.parametrize(
    ("game", "said"),
    [
        ("pongg", r"env\.kwargs\.game='pongg' is none of ALE's games: did you mean pong"),
        ("ALE/MsPacman-v5", r"did you mean ms_pacman"),
        ("BreakoutNoFrameskip-v4", r"did you mean breakout"),
        ("warlords", r"is a game for several players: env=atari/players with warlords_v3"),
        ("combat", r"for several players: .* combat_plane_v\d or combat_tank_v\d"),
        ("qqqqqq", r"known are adventure, air_raid"),
    ],
)
def test_an_unknown_game_is_said_with_the_nearest(game: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(game)


@BACKENDS
def test_a_missing_rom_is_said_and_where_to_get_it(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALE_ROMS_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=rf"game=pong: there is no ROM {tmp_path}/pong\.bin; ale-py brings the ROMs"):
        make(backend=backend)
    with pytest.raises(ValueError, match=rf"looked for in {tmp_path}: ale-py brings the ROMs"):
        vector_env("marl_memory_envs.atari:players", n_envs=1, seed=0, kwargs={"game": "pong_v3"})


def test_other_values_that_do_not_fit_are_said() -> None:
    for options, said in (
        ({"backend": "envpool"}, r"env\.backend='envpool' must be one of gymnasium, ale_vector"),
        (
            {"backend": "ale_vector", "stepping": "processes"},
            r"env\.stepping='processes': env\.backend=ale_vector steps",
        ),
        ({"backend": "ale_vector", "wrappers": ["clip_reward"]}, r"env\.wrappers=\['clip_reward'\] do not reach"),
    ):
        with pytest.raises(ValueError, match=said):
            atari.vector_env(n_envs=1, seed=0, kwargs={"game": "pong"}, **options)
    with pytest.raises(ValueError, match=r"env\.kwargs\.episodic_life=true differs between backends"):
        make(backend="ale_vector", episodic_life=True)
    for option in (
        {"frame_skip": 0},
        {"screen_size": 0},
        {"frame_stack": 0},
        {"noop_max": -1},
        {"sticky_actions": 1.0},
    ):
        with pytest.raises(ValueError, match=rf"env\.kwargs\.{next(iter(option))}="):
            make(**option)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"game='pong_v2' is none of PettingZoo's Atari games: did you mean pong_v3"):
        vector_env("marl_memory_envs.atari:players", n_envs=1, seed=0, kwargs={"game": "pong_v2"})
