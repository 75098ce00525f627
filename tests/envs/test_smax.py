"""SMAX: N battles in JAX equal N single ones; deaths, time limit, seeds, snapshots, compilations, configs."""

from __future__ import annotations

import hashlib
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tensordict import TensorDict, TensorDictBase
from torchrl.envs.utils import check_env_specs

pytest.importorskip("jaxmarl")

from pettingzoo.test import parallel_api_test, parallel_seed_test  # noqa: E402

from marl_memory_envs import smax  # noqa: E402
from marl_memory_envs.base import environment_seeds  # noqa: E402
from marl_memory_envs.vector import VectorEnv  # noqa: E402

CONFIGS = Path(__file__).parents[2] / "configs" / "env" / "smax"
N = 4
OBSERVED = ("observation", "action_mask", "alive", "discount")


def battles(seed: int = 3, n_envs: int = N, **options) -> smax.SmaxVector:
    return smax.vector_env(map="3m", n_envs=n_envs, seed=seed, **options)


def actions(mask: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``[N, A, P]`` -> ``[N, A]``: even environments attack what is in reach or go east; odd ones are random."""
    drawn = torch.multinomial(mask.reshape(-1, mask.shape[-1]).float(), 1, generator=generator).view(mask.shape[:-1])
    attack = mask[..., 5:].int().argmax(-1) + 5
    march = torch.where(mask[..., 5:].any(-1), attack, torch.where(mask[..., 1], 1, 0))
    even = (torch.arange(len(mask)) % 2 == 0)[:, None]
    return torch.where(even, march, drawn)


def play(env, td: TensorDictBase, steps: int, seed: int = 0) -> tuple[list[TensorDictBase], TensorDictBase]:
    """The steps ``("next", …)`` of ``steps`` vector steps, and what to act on after them."""
    generator, seen = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        td["agents", "action"] = actions(td["agents", "action_mask"], generator)
        td, following = env.step_and_maybe_reset(td)
        seen.append(td["next"])
        td = following
    return seen, td


def assert_equal(left: TensorDictBase, right: TensorDictBase) -> None:
    for key in left.keys(include_nested=True, leaves_only=True):
        assert torch.equal(left[key], right[key]), key


@pytest.fixture(scope="module")
def played() -> tuple[list[TensorDictBase], TensorDictBase]:
    env = battles()
    return play(env, env.reset(), 120)


def test_vector_equals_single_battles_bit_by_bit(played):
    """Through deaths, wins, losses and resets; the single ones go through `VectorEnv`."""
    single = VectorEnv(
        [smax.parallel_env("3m") for _ in range(N)],
        name="smax/3m",
        common_reward=True,
        success="won",
        max_episode_steps=101,
    )
    single.set_seed(3)
    seen, last = play(single, single.reset(), 120)
    for left, right in zip(played[0], seen, strict=True):
        assert_equal(left, right)
    assert_equal(played[1], last)
    entries = torch.stack(seen)
    won, done, alive = entries["success"], entries["done"], entries["agents", "alive"]
    assert won.any() and (done & ~won).any(), "the comparison must see wins and losses"
    assert ((~alive).any(-1, keepdim=True) & ~done).any(), "and deaths within an episode"
    task, other = battles().task_spec.to_dict(), single.task_spec.to_dict()
    assert {key for key in task if task[key] != other[key]} == {"action_embedding"}


def test_meaning_of_the_entries(played):
    entries = torch.stack(played[0])
    alive, mask = entries["agents", "alive"], entries["agents", "action_mask"]
    assert mask.any(-1).all()
    assert (mask[~alive] == (torch.arange(8) == 0)).all()
    assert (entries["agents", "observation"].abs().sum(-1)[alive] > 0).all()
    assert (entries["agents", "reward"] == entries["agents", "reward"][..., :1, :]).all(), "a common reward"
    assert torch.equal(entries["done"], entries["terminated"] | entries["truncated"])
    assert not (entries["terminated"] & entries["truncated"]).any()
    ends = entries["terminated"][..., None, :].expand_as(entries["agents", "discount"])
    assert torch.equal(entries["agents", "discount"], 1.0 - ends.float())
    assert not alive[entries["terminated"][..., 0]].any()
    assert entries["terminated"][entries["success"]].all()
    won = entries["agents", "reward"][..., 0, :][entries["success"]]
    assert (won >= 1.0).all(), "the bonus"


def test_a_dead_agent_does_nothing_whatever_it_is_told():
    env = battles()
    _, td = play(env, env.reset(), 6)
    while td["agents", "alive"].all():
        _, td = play(env, td, 1)
    snapshot, dead = env.snapshot(), ~td["agents", "alive"]
    after = []
    for told in (0, 1, 7):
        td["agents", "action"] = torch.where(dead, told, 4)
        after.append(env._step(td))
        env.restore(snapshot)
    assert_equal(after[0], after[1])
    assert_equal(after[0], after[2])


def test_actions_outside_the_space_are_named():
    env = battles()
    td = env.reset()
    td["agents", "action"] = torch.full((N, 3), 8)
    with pytest.raises(ValueError, match="there are 8"):
        env.step_and_maybe_reset(td)
    one = smax.parallel_env("3m")
    one.reset(seed=0)
    with pytest.raises(ValueError, match="ally_1"):
        one.step({"ally_0": 0, "ally_1": 8, "ally_2": 0})


def test_time_limit_truncates_after_max_steps_plus_one():
    env = battles(n_envs=2, max_steps=2)
    td = env.reset()
    for step in range(1, 4):
        td["agents", "action"] = torch.full((2, 3), smax.STOP)
        td, following = env.step_and_maybe_reset(td)
        assert td["next", "truncated"].all() == td["next", "done"].all() == (step == env.task_spec.max_episode_steps)
        last, td = td["next"], following
    assert not last["terminated"].any() and not last["success"].any()
    assert last["agents", "alive"].all() and (last["agents", "discount"] == 1).all()
    assert last["agents", "action_mask"].sum(-1).min() >= 5, "a learner bootstraps from here"
    assert not torch.equal(last["agents", "observation"], td["agents", "observation"]) and not td["done"].any()


def test_seeds():
    env, again, other = battles(seed=1), battles(seed=1), battles(seed=2)
    first = env.reset()
    assert_equal(first, again.reset())
    assert not torch.equal(first["state"], other.reset()["state"])
    assert len({tuple(row.tolist()) for row in first["state"]}) == N, "each battle starts in its own way"
    assert not torch.equal(env.reset()["state"], first["state"]), "a reset without a seed goes on"
    env.set_seed(1)
    assert_equal(first, env.reset())
    one = smax.parallel_env("3m")
    one.reset(seed=environment_seeds(1, N)[2])
    assert np.array_equal(one.state(), first["state"][2].numpy())


def test_partial_reset_leaves_the_others():
    env = battles()
    _, td = play(env, env.reset(), 5)
    mask = torch.tensor([[True], [False], [False], [True]])
    new = env.reset(td.clone().set("_reset", mask))
    for key in ("state", ("agents", "observation"), ("agents", "action_mask")):
        same = (new[key] == td[key]).flatten(1).all(1)
        assert same[1] and same[2], key
    assert not torch.equal(new["state"][0], td["state"][0]) and not torch.equal(new["state"][3], td["state"][3])


def test_fused_equals_step_then_reset():
    fused, plain = battles(), battles()
    left, right, generator, resets = fused.reset(), plain.reset(), torch.Generator().manual_seed(0), 0
    for _ in range(60):
        left["agents", "action"] = actions(left["agents", "action_mask"], generator)
        right["agents", "action"] = left["agents", "action"].clone()
        left, following = fused.step_and_maybe_reset(left)
        stepped = plain._step(right)
        assert_equal(left["next"], stepped)
        done = stepped["done"]
        resets += int(done.sum())
        right = plain._reset(TensorDict({"_reset": done}, batch_size=[N])) if done.any() else stepped.copy()
        assert_equal(following, right)
        assert "reward" not in following["agents"].keys()
        left = following
    assert resets > 0


def test_handed_out_tensors_are_never_overwritten():
    env = battles()
    seen, td = play(env, env.reset(), 3)
    copies = [entry.clone() for entry in seen]
    play(env, td, 30)
    for entry, copy in zip(seen, copies, strict=True):
        assert_equal(copy, entry)


def test_snapshot_continues_exactly_elsewhere():
    env = battles()
    _, td = play(env, env.reset(), 15)
    snapshot = {key: tensor.clone() for key, tensor in env.snapshot().items()}
    straight, _ = play(env, td.clone(), 40)
    other = battles(seed=99)
    restored = other.restore(snapshot)
    assert_equal(restored, td)
    resumed, _ = play(other, restored, 40)
    for left, right in zip(straight, resumed, strict=True):
        assert_equal(left, right)


def test_snapshot_of_another_size_is_refused():
    with pytest.raises(ValueError, match="n_envs=4"):
        battles().restore(battles(n_envs=2).snapshot())


def test_each_function_is_compiled_once_for_each_size():
    options = {"max_steps": 2}  # the task of the time limit's test, so nothing new is compiled if that has run
    for seed in (0, 1):
        env = battles(seed=seed, n_envs=2, **options)
        _, td = play(env, env.reset(), 4)
        play(env, env.restore(env.snapshot()), 2)
        env.reset()
    shared = env.simulator
    assert shared is battles(n_envs=2, **options).simulator
    sizes = {name: getattr(shared, name)._cache_size() for name in ("reset", "step_and_reset", "observe")}
    assert sizes == {"reset": 1, "step_and_reset": 1, "observe": 1}


def test_torchrl_specs():
    check_env_specs(battles())


def test_pettingzoo_contracts():
    parallel_api_test(smax.parallel_env("3m"), num_cycles=60)
    parallel_seed_test(lambda: smax.parallel_env("3m"), num_cycles=20)


def test_embedding_is_where_the_moves_go():
    """The first four actions move as embedded; stop stays."""
    one = smax.parallel_env("3m")
    embedding = np.array(one.task_spec.action_embedding)
    for action in range(5):
        one.reset(seed=0)
        before = one.state()[1:3]
        one.step({agent: action for agent in one.agents})
        moved = one.state()[1:3] - before
        length = np.linalg.norm(moved)
        assert np.allclose(moved / max(length, 1e-6), embedding[action, :2], atol=1e-3)
    assert embedding.shape == (8, 5) and np.array_equal(embedding[5:, 2:], np.eye(3))


def test_unknown_map_names_the_near_ones():
    with pytest.raises(ValueError, match=r"map='3mm' is unknown; near it: 3m.*all maps: .*smacv2_5_units"):
        smax.vector_env(map="3mm", n_envs=1, seed=0)
    with pytest.raises(ValueError, match="attack_mode='nearest' must be one of closest, random"):
        smax.vector_env(map="3m", n_envs=1, seed=0, attack_mode="nearest")


def test_every_map_has_its_config_and_every_config_its_map():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(smax.MAPS)
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(smax.vector_env).parameters.items()
        if name not in ("map", "n_envs", "seed")
    }
    for path in CONFIGS.glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert config == {"_target_": "marl_memory_envs.smax.vector_env", "map": path.stem, **defaults}


@pytest.mark.parametrize("name", ["5m_vs_6m", "smacv2_5_units", pytest.param("27m_vs_30m", marks=pytest.mark.slow)])
def test_other_maps_agree_with_their_spec(name):
    """Shapes only (nothing is compiled): a map's step returns what it was given, packed entries as long as declared."""
    import jax

    battle = smax.simulator(smax.Options(map=name))
    spec, carry = battle.spec, battle.blank([0, 1])
    after, floats, bools = jax.eval_shape(battle._step, carry, np.zeros((2, spec.n_agents), np.int32))
    again = jax.eval_shape(battle._reset, carry, np.ones(2, bool))[0]
    for left, middle, right in zip(*map(jax.tree.leaves, (carry, after, again)), strict=True):
        assert left.shape == middle.shape == right.shape and left.dtype == middle.dtype == right.dtype
        assert not middle.weak_type and not right.weak_type
    a = spec.n_agents
    assert floats.shape == (2 * (a * spec.observation_size + spec.state_size + 2 * a),)
    assert bools.shape == (2 * (a * spec.action_size + a + 4),)


def test_missing_jaxmarl_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxmarl", None)
    with pytest.raises(ImportError, match=r'pip install "marl-memory\[smax\]"'):
        smax.vector_env(map="3m", n_envs=1, seed=0)


def test_stepping_and_partial_reset_need_a_full_reset_first():
    env = battles()
    with pytest.raises(RuntimeError, match="before the first reset"):
        env._step(TensorDict({"agents": {"action": torch.zeros(N, 3, dtype=torch.int64)}}, batch_size=[N]))
    with pytest.raises(RuntimeError, match="must reset all"):
        env._reset(TensorDict({"_reset": torch.tensor([[True], [False], [False], [False]])}, batch_size=[N]))


def test_importing_the_module_does_not_import_jax():
    code = "import sys, marl_memory_envs.smax; assert not {'jax', 'jaxmarl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_processes_agree_bit_by_bit(played):
    code = "import test_smax as t; env = t.battles(); print(t.digest(t.play(env, env.reset(), 120)[0]))"
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    assert out.split()[-1] == digest(played[0])


def test_importing_jaxmarl_leaves_redirected_output_alone() -> None:
    code = (
        "import io, sys; sys.stdout = out = io.StringIO(); from marl_memory_envs.smax import MAPS; "
        "assert '3m' in MAPS and sys.stdout is out and sys.stderr is sys.__stderr__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def digest(entries: list[TensorDictBase]) -> str:
    sha = hashlib.sha256()
    for entry in entries:
        for key in sorted(entry.keys(include_nested=True, leaves_only=True), key=str):
            sha.update(entry[key].contiguous().numpy().tobytes())
    return sha.hexdigest()
