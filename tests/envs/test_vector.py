"""VectorEnv against scripted environments: deaths, flags, masks, padding, rewards, resets, and every error."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv
from pettingzoo.utils import parallel_to_aec
from tensordict import TensorDict
from torchrl.envs import EnvBase

from marl_memory_envs.base import environment_seeds
from marl_memory_envs.toy import MaskedDuel, Rendezvous
from marl_memory_envs.vector import VectorEnv, vector_env

RUN, TERM, TRUNC, BOTH = (False, False), (True, False), (False, True), (True, True)


class Scripted(ParallelEnv[str, Any, Any]):
    """Plays ``script``: one dict a step, agent -> flags (or None: gone).  Agent i observes [10·t + i, 1, 1, …]."""

    metadata = {"name": "scripted"}

    def __init__(self, *script: dict[str, Any], sizes=(2, 2), actions=None, rewards=None, **options: Any) -> None:
        self.script, self.sizes, self.options = script, sizes, options
        self.possible_agents = [f"a{i}" for i in range(len(sizes))]
        self.actions = actions or [spaces.Discrete(3) for _ in sizes]
        self.rewards = rewards or [[1.0 + i for i in range(len(sizes))]] * len(script)
        self.sent: list[dict[str, Any]] = []
        self.seeds: list[int | None] = []

    def observation_space(self, agent):
        return self.options.get("space") or spaces.Box(-100, 100, (self.sizes[int(agent[1:])],))

    def action_space(self, agent):
        return self.actions[int(agent[1:])]

    def _see(self, agents):
        seen = {}
        for agent in agents:
            i = int(agent[1:])
            seen[agent] = np.ones(self.sizes[i], np.float32)
            seen[agent][0] = 10 * self.t + i
        return seen

    def _infos(self, agents):
        given = self.options.get("infos", lambda t, agent: {})
        return {agent: given(self.t, agent) for agent in agents}

    def reset(self, seed=None, options=None):
        self.seeds.append(seed)
        self.t, self.agents = 0, list(self.options.get("start", self.possible_agents))
        return self._see(self.agents), self._infos(self.agents)

    def step(self, actions):
        self.sent.append(dict(actions))
        flags, rewards = self.script[self.t], self.rewards[self.t]
        acting, self.t = self.agents, self.t + 1
        self.agents = [a for a in acting if flags.get(a, RUN) == RUN] + self.options.get("arrivals", {}).get(self.t, [])
        if self.t in self.options.get("vanish", {}):
            self.agents.remove(self.options["vanish"][self.t])
        return (
            self._see([*acting, *[a for a in self.agents if a not in acting]]),
            {a: rewards[int(a[1:])] for a in acting},
            {a: flags.get(a, RUN)[0] for a in acting},
            {a: flags.get(a, RUN)[1] for a in acting},
            self._infos([*acting, *[a for a in self.agents if a not in acting]]),
        )


def step(env: VectorEnv, td=None, action=0):
    """One fused step with the same action for all; returns (``next``, what to act on)."""
    td = env.reset() if td is None else td
    td[env.task_spec.keys.action] = env.full_action_spec.zero()[env.task_spec.keys.action] + action
    done, following = env.step_and_maybe_reset(td)
    return done["next"], following


def play(env: VectorEnv, steps: int):
    out, td = [], env.reset()
    for _ in range(steps):
        after, td = step(env, td)
        out.append(after)
    return out


def flags(td) -> tuple[list[bool], ...]:
    return tuple(td[key].flatten().tolist() for key in ("done", "terminated", "truncated"))


# ---- deaths and ends


def test_death_before_the_end_is_not_done_and_leaves_a_blank_row() -> None:
    env = VectorEnv([Scripted({"a0": TERM}, {}, {"a1": TERM})])
    first, second, last = play(env, 3)
    assert flags(first) == ([False], [False], [False])
    assert first["agents", "alive"].tolist() == [[False, True]]
    assert first["agents", "observation"].tolist() == [[[0, 0], [11, 1]]]
    assert first["agents", "action_mask"].tolist() == [[[True, False, False], [True, True, True]]]
    assert first["agents", "reward"].flatten().tolist() == [1, 2]
    assert second["agents", "reward"].flatten().tolist() == [0, 2]
    assert flags(last) == ([True], [True], [False])
    assert [set(sent) for sent in env.envs[0].sent] == [{"a0", "a1"}, {"a1"}, {"a1"}]


@pytest.mark.parametrize(
    ("script", "terminated"),
    [
        ([{"a0": TERM}, {"a1": TRUNC}], False),
        ([{"a0": TRUNC}, {"a1": TERM}], False),
        ([{"a0": TERM, "a1": TRUNC}], False),
        ([{"a0": TRUNC, "a1": TRUNC}], False),
        ([{"a0": TERM, "a1": TERM}], True),
        ([{"a0": BOTH, "a1": TERM}], True),
        ([{"a0": BOTH, "a1": TRUNC}], False),
    ],
)
def test_root_flags_of_mixed_ends(script, terminated) -> None:
    last = play(VectorEnv([Scripted(*script)]), len(script))[-1]
    assert flags(last) == ([True], [terminated], [not terminated])


def test_a_new_episode_forgets_an_old_truncation() -> None:
    script = [{"a0": TRUNC}, {"a1": TERM}]
    env = VectorEnv([Scripted(*script)])
    assert flags(play(env, 2)[-1])[2] == [True]
    env.envs[0].script = [{"a0": TERM}, {"a1": TERM}]
    assert flags(play(env, 2)[-1])[2] == [False]


def test_truncation_has_the_true_last_observation_mask_and_life() -> None:
    env = VectorEnv([Scripted({"a0": TERM, "a1": TRUNC}, infos=lambda t, a: {"action_mask": [t == 0, 1, 0]})])
    last, following = step(env)
    assert last["agents", "observation"].tolist() == [[[10, 1], [11, 1]]]
    assert last["state"].tolist() == [[10, 1, 11, 1]]
    assert last["agents", "alive"].tolist() == [[False, True]]
    assert last["agents", "action_mask"].tolist() == [[[True, False, False], [False, True, False]]]
    assert following["agents", "observation"].tolist() == [[[0, 1], [1, 1]]]
    assert flags(following) == ([False], [False], [False])


def test_an_agent_cut_in_mid_episode_is_seen_once_more_but_does_not_act() -> None:
    after, later = play(VectorEnv([Scripted({"a0": TRUNC}, {}, {"a1": TERM})]), 2)
    assert after["agents", "observation"][0, 0].tolist() == [10, 1]
    assert after["agents", "alive"].tolist() == [[False, True]]
    assert after["agents", "discount"].flatten().tolist() == [1, 1]
    assert later["agents", "observation"][0, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("common", "discounts"), [(False, [[0, 1, 1], [1, 1, 1], [0, 0, 0]]), (True, [[1, 1, 1], [1, 1, 1], [0, 0, 0]])]
)
def test_discount_of_deaths(common, discounts) -> None:
    script = [{"a0": TERM}, {}, {"a1": BOTH, "a2": TERM}]
    env = VectorEnv([Scripted(*script, sizes=(2, 2, 2), rewards=[[1.0] * 3] * 3)], common_reward=common)
    assert [td["agents", "discount"].flatten().tolist() for td in play(env, 3)] == discounts


def test_discount_of_a_mixed_end() -> None:
    for common, expected in ((False, [0, 1]), (True, [1, 1])):
        env = VectorEnv([Scripted({"a0": TERM, "a1": TRUNC}, rewards=[[1.0, 1.0]])], common_reward=common)
        assert play(env, 1)[0]["agents", "discount"].flatten().tolist() == expected


def test_common_reward_counts_for_the_dead() -> None:
    env = VectorEnv([Scripted({"a0": TERM}, {}, {"a1": TERM}, rewards=[[3, 3], [0, 5], [0, 7]])], common_reward=True)
    assert [td["agents", "reward"].flatten().tolist() for td in play(env, 3)] == [[3, 3], [5, 5], [7, 7]]
    assert env.task_spec.common_reward


def test_an_agent_listed_but_dead_is_sent_action_0() -> None:
    infos = lambda t, agent: {"alive": not (agent == "a0" and t == 1)}  # noqa: E731
    env = VectorEnv([Scripted({}, {}, {}, infos=infos, actions=[spaces.Discrete(3, start=4), spaces.Discrete(3)])])
    after, td = step(env, action=2)
    assert after["agents", "alive"].tolist() == [[False, True]]
    assert after["agents", "observation"][0, 0].tolist() == [0, 0]
    assert after["agents", "action_mask"][0, 0].tolist() == [True, False, False]
    assert after["agents", "discount"].flatten().tolist() == [0, 1]  # its return ends with it
    again, _ = step(env, td, action=2)
    assert env.envs[0].sent == [{"a0": 6, "a1": 2}, {"a0": 4, "a1": 2}]
    assert again["agents", "reward"].flatten().tolist() == [0, 2]
    assert again["agents", "alive"].tolist() == [[True, True]]


def test_an_agent_that_arrives_later() -> None:
    env = VectorEnv([Scripted({}, {}, start=["a1"], arrivals={1: ["a0"]})])
    td = env.reset()
    assert td["agents", "alive"].tolist() == [[False, True]]
    after, td = step(env, td)
    assert after["agents", "alive"].tolist() == [[True, True]]
    assert after["agents", "reward"].flatten().tolist() == [0, 2]
    assert step(env, td)[0]["agents", "reward"].flatten().tolist() == [1, 2]


def test_the_last_state_of_a_cut_duel_shows_who_lives() -> None:
    env = vector_env("marl_memory_envs.toy:MaskedDuel", n_envs=8, seed=0, kwargs={"danger": 0.02, "dragon": 99})
    td, cut = env.reset(), 0
    for _ in range(60):
        td, following = env.step_and_maybe_reset(env.rand_action(td))
        after = td["next"]
        rows = after["truncated"].squeeze(-1)
        assert torch.equal(after["state"][rows][:, [2, 4]].bool(), after["agents", "alive"][rows])
        cut, td = cut + int(rows.sum()), following
    assert cut > 5


def test_success_is_read_at_the_end() -> None:
    env = VectorEnv([Scripted({}, {"a0": TERM, "a1": TERM}, infos=lambda t, a: {"won": t > 0})], success="won")
    first, last = play(env, 2)
    assert env.task_spec.has_success
    assert (first["success"].item(), last["success"].item()) == (False, True)


# ---- padding, masks, actions, state


def test_unequal_agents_are_padded() -> None:
    env = VectorEnv([Scripted({}, {}, sizes=(1, 3), actions=[spaces.Discrete(2), spaces.Discrete(4)])])
    td = env.reset()
    assert td["agents", "observation"].tolist() == [[[0, 0, 0], [1, 1, 1]]]
    assert td["agents", "action_mask"].tolist() == [[[True, True, False, False], [True] * 4]]
    assert td["state"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert env.task_spec.observation_valid == ((True, False, False), (True, True, True))
    td["agents", "action"] = torch.tensor([[2, 0]])
    with pytest.raises(ValueError, match=r"environment 0 .* action 2 of agent 'a0' is not one of its 2"):
        env.step(td)


def test_continuous_padding_is_ignored_and_bounds_are_kept() -> None:
    boxes = [spaces.Box(-1, 2, (1,)), spaces.Box(np.array([0.5, -3], np.float32), np.array([1, 3], np.float32))]
    env = VectorEnv([Scripted({"a1": TERM}, {}, actions=boxes)])
    assert env.task_spec.action_low == ((-1, 0), (0.5, -3))
    assert env.task_spec.action_high == ((2, 0), (1, 3))
    td = env.reset()
    assert ("agents", "action_mask") not in td.keys(True)
    td["agents", "action"] = torch.tensor([[[1.5, 9.0], [0.75, 2.0]]])
    env.step(td)
    sent = env.envs[0].sent[0]
    assert sent["a0"].tolist() == [1.5]
    assert sent["a1"].tolist() == [0.75, 2.0]
    sent["a1"][0] = 99  # the environment owns what it was sent
    assert td["agents", "action"][0, 1, 0] == 0.75


def test_random_actions_respect_masks() -> None:
    env = vector_env(MaskedDuel, n_envs=8, seed=0, common_reward=True, success="won", kwargs={"common_reward": True})
    data = env.rollout(60, break_when_any_done=False)
    taken = data["agents", "action_mask"].gather(-1, data["agents", "action"].unsqueeze(-1))
    assert taken.all()
    assert sum(duel.illegal for duel in env.envs) == 0
    assert (~data["agents", "action_mask"]).any()
    assert data["next", "success"].any()
    assert data["next", "done"].any()
    assert not data["next", "done"][data["next", "success"]].logical_not().any()


def test_state_of_its_own() -> None:
    duel = VectorEnv([MaskedDuel()])
    assert duel.task_spec.own_state
    assert duel.task_spec.state_size == 6
    assert torch.equal(duel.reset()["state"][0], torch.from_numpy(duel.envs[0].state()))
    assert not VectorEnv([Rendezvous()]).task_spec.own_state


# ---- seeds, resets, memory


def test_every_environment_has_its_own_seed_and_only_the_next_full_reset_uses_it() -> None:
    env = VectorEnv([Scripted({}) for _ in range(3)])
    env.set_seed(7)
    seeds = environment_seeds(7, 3)
    assert len(set(seeds)) == 3
    assert environment_seeds(7, 300) == list(dict.fromkeys(environment_seeds(7, 300)))
    before = [len(e.seeds) for e in env.envs]
    env.reset()
    env.reset()
    assert [e.seeds[n:] for e, n in zip(env.envs, before, strict=True)] == [[seed, None] for seed in seeds]


def test_partial_reset_touches_only_its_rows() -> None:
    env = VectorEnv([Scripted({}, {}, {}) for _ in range(3)])
    _, td = step(env)
    resets = [len(e.seeds) for e in env.envs]
    mask = torch.tensor([[False], [True], [False]])
    after = env.reset(TensorDict({"_reset": mask, **td}, batch_size=[3]))
    assert after["agents", "observation"][:, :, 0].tolist() == [[10, 11], [0, 1], [10, 11]]
    assert [len(e.seeds) - n for e, n in zip(env.envs, resets, strict=True)] == [0, 1, 0]
    assert step(env, after)[0]["agents", "observation"][:, 0, 0].tolist() == [20, 10, 20]


def test_environments_end_and_restart_independently() -> None:
    end = {"a0": TERM, "a1": TERM}
    env = VectorEnv([Scripted({}, {}, end), Scripted({}, end)])
    seen = [td["agents", "observation"][:, 0, 0].tolist() for td in play(env, 6)]
    assert seen == [[10, 10], [20, 20], [30, 10], [10, 20], [20, 10], [30, 20]]


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize("common", [False, True])
def test_fused_step_equals_torchrl(unequal, common) -> None:
    def run(fused: bool):
        kwargs = {"unequal": unequal, "common_reward": common, "max_steps": 12}
        env = vector_env(MaskedDuel, n_envs=5, seed=3, common_reward=common, success="won", kwargs=kwargs)
        generator, td, rows = torch.Generator().manual_seed(0), env.reset(), []
        for _ in range(60):
            mask = td["agents", "action_mask"].float()
            action = torch.multinomial(mask.flatten(0, 1), 1, generator=generator).view(5, 2)
            td["agents", "action"] = action
            done, td = env.step_and_maybe_reset(td) if fused else EnvBase.step_and_maybe_reset(env, td)
            rows.append(done.copy())
        return torch.stack([row.select(*env.full_observation_spec.keys(True, True), "next") for row in rows]), td

    (ours, last), (theirs, last_theirs) = run(True), run(False)
    assert ours["next", "done"].sum() > 10
    assert set(ours.keys(True, True)) == set(theirs.keys(True, True))
    assert (ours == theirs).all()
    assert (last == last_theirs.select(*last.keys(True, True))).all()
    assert set(last_theirs.keys(True, True)) - set(last.keys(True, True)) == {("agents", "action")}


def test_returned_tensors_are_never_written_again() -> None:
    env = vector_env(MaskedDuel, n_envs=4, seed=0, kwargs={"max_steps": 5})
    td, kept = env.reset(), []
    for _ in range(25):
        env.rand_action(td)
        done, following = env.step_and_maybe_reset(td)
        kept += [(done, done.clone()), (following, following.clone())]
        td = following.copy()
    assert all((a == b).all() for a, b in kept)


def test_torchrl_rollout_until_all_are_done() -> None:
    end = {"a0": TERM, "a1": TERM}
    data = VectorEnv([Scripted({}, end), Scripted({}, {}, {}, end)]).rollout(9, break_when_all_done=True)
    assert data["next", "agents", "observation"][:, :, 0, 0].tolist() == [[10, 20, 20, 20], [10, 20, 30, 40]]


def test_a_row_that_waits_stays_as_it_was() -> None:
    env = VectorEnv([Scripted({}, {}, {}), Scripted({}, {}, {})])
    _, td = step(env)
    td["_step"] = torch.tensor([[True], [False]])
    after, td = step(env, td)
    assert after["agents", "observation"][:, 0, 0].tolist() == [20, 10]
    assert after["agents", "alive"].all()
    assert after["agents", "reward"][:, 0, 0].tolist() == [1, 0]
    after, _ = step(env, td, action=2)
    assert after["agents", "observation"][:, 0, 0].tolist() == [30, 20]
    assert env.envs[1].sent == [{"a0": 0, "a1": 0}, {"a0": 2, "a1": 2}]


def test_bounds_in_float64_are_rounded_inwards() -> None:
    box = spaces.Box(np.array([-0.1, -1.0]), np.array([0.1, 0.7]), dtype=np.float64)
    spec = VectorEnv([Scripted({}, actions=[box, box])]).task_spec
    for bound in (spec.action_low[0], spec.action_high[0]):
        assert box.contains(np.array(bound, np.float32))
    assert not box.contains(box.high.astype(np.float32))
    assert np.allclose(spec.action_high, box.high)


def test_close_closes_all() -> None:
    closed = []
    envs = [Scripted({}), Scripted({})]
    for env in envs:
        env.close = lambda: closed.append(1)
    VectorEnv(envs).close()
    assert len(closed) == 2


# ---- errors


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (spaces.MultiDiscrete([2, 2]), "MultiDiscrete"),
        (spaces.MultiBinary(2), "MultiBinary"),
        (spaces.Dict({"x": spaces.Discrete(2)}), "Dict"),
        (spaces.Box(-1, 1, (2, 2)), "one dimension"),
        (spaces.Box(0, 3, (2,), np.int64), "real numbers"),
        (spaces.Box(-np.inf, 1, (2,)), "finite bounds"),
    ],
)
def test_action_spaces_that_do_not_fit(action, words) -> None:
    with pytest.raises(ValueError, match=f"agent 'a1' acts in .*{words}"):
        VectorEnv([Scripted({}, actions=[spaces.Discrete(2), action])])


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 1, (4, 4)),
        spaces.Discrete(3),
        spaces.Dict({"observation": spaces.Box(0, 1, (2,))}),
        spaces.Dict({"observation": spaces.Box(0, 1, (2, 2)), "action_mask": spaces.Box(0, 1, (2,))}),
    ],
)
def test_observation_spaces_that_do_not_fit(space) -> None:
    with pytest.raises(ValueError, match=r"agent 'a0' observes .* right is a Box of one dimension"):
        VectorEnv([Scripted({}, space=space)])


def test_teams_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="mix discrete and continuous"):
        VectorEnv([Scripted({}, actions=[spaces.Discrete(2), spaces.Box(-1, 1, (2,))])])
    with pytest.raises(ValueError, match="environment 1 has other agents or spaces"):
        VectorEnv([Scripted({}), Scripted({}, sizes=(2, 3))])
    with pytest.raises(ValueError, match="given twice"):
        VectorEnv([Scripted({})] * 2)
    with pytest.raises(ValueError, match="empty"):
        VectorEnv([])


def test_masks_that_do_not_fit() -> None:
    def nothing(t, agent):
        return {"action_mask": [0, 0, 0] if (t, agent) == (1, "a1") else [1, 1, 1]}

    good, bad = Scripted({}, {}), Scripted({}, {}, infos=nothing)
    with pytest.raises(ValueError, match=r"environment 1 .*step 1: the action_mask of living agent 'a1'"):
        step(VectorEnv([good, bad]))
    with pytest.raises(ValueError, match="agent 'a0' has an action_mask of 1, not 3"):
        VectorEnv([Scripted({}, infos=lambda t, a: {"action_mask": [1]})]).reset()


def test_numbers_that_are_not_finite() -> None:
    env = VectorEnv([Scripted({}), Scripted({}, rewards=[[1.0, np.nan]])])
    with pytest.raises(ValueError, match=r"environment 1 .*step 1: reward of agent 'a1' is nan"):
        step(env)
    broken = Scripted({}, sizes=(2, 2))
    broken._see = lambda agents: {a: np.array([0, np.inf], np.float32) for a in agents}
    with pytest.raises(ValueError, match=r"environment 0 .*step 0: observation of agent 'a0' is inf"):
        VectorEnv([broken]).reset()


def test_steps_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"step 1: common_reward=True, but the agents' rewards differ: \[1.0, 2.0\]"):
        step(VectorEnv([Scripted({})], common_reward=True))
    with pytest.raises(ValueError, match="success='won' is in no agent's info"):
        step(VectorEnv([Scripted({"a0": TERM, "a1": TERM})], success="won"))
    with pytest.raises(ValueError, match="agent 'a0' left env.agents neither terminated nor truncated"):
        step(VectorEnv([Scripted({}, vanish={1: "a0"})]))
    with pytest.raises(ValueError, match="goes on after max_episode_steps=1"):
        step(VectorEnv([Scripted({}, {})], max_episode_steps=1))
    wrong = Scripted({})
    wrong._see = lambda agents: {a: np.zeros(1, np.float32) for a in agents}
    with pytest.raises(ValueError, match="agent 'a0' observes 1 numbers, not 2"):
        VectorEnv([wrong]).reset()


def test_calls_out_of_order() -> None:
    env = VectorEnv([Scripted({"a0": TERM, "a1": TERM}), Scripted({}, {})])
    with pytest.raises(RuntimeError, match="before the first reset"):
        env._step(env.fake_tensordict())
    with pytest.raises(RuntimeError, match="the first reset must reset all"):
        env._reset(TensorDict({"_reset": torch.tensor([[True], [False]])}, batch_size=[2]))
    td = env.rand_action(env.reset())
    td = env.rand_action(env._step_mdp(env.step(td)))
    with pytest.raises(RuntimeError, match="environment 0 is done: reset it"):
        env.step(td)


def not_an_env() -> int:
    return 3


def an_aec() -> Any:
    return parallel_to_aec(MaskedDuel())


def test_factories_that_do_not_fit(monkeypatch) -> None:
    def make(factory, n_envs=1):
        return vector_env(factory, n_envs=n_envs, seed=0)

    with pytest.raises(ValueError, match="with a colon"):
        make("marl_memory_envs.toy.MaskedDuel")
    with pytest.raises(ImportError, match="no module named 'no_such_package'"):
        make("no_such_package.module:make")
    with pytest.raises(ValueError, match="module marl_memory_envs.toy has no 'Nothing'"):
        make("marl_memory_envs.toy:Nothing")
    with pytest.raises(ValueError, match="made a int; it must return a PettingZoo ParallelEnv"):
        make(not_an_env)
    with pytest.raises(ValueError, match="aec_to_parallel"):
        make(an_aec)
    with pytest.raises(ValueError, match="n_envs=0"):
        make(MaskedDuel, n_envs=0)
    monkeypatch.setitem(sys.modules, "family", module := types.ModuleType("family"))
    exec("REQUIRES = {'no_such_suite': 'suite'}\ndef make():\n    import no_such_suite.part", module.__dict__)
    with pytest.raises(ImportError, match=r"family:make needs 'no_such_suite': pip install 'marl-memory\[suite\]'"):
        make("family:make")


def test_vector_env_by_name() -> None:
    kwargs = {"n_agents": 3}
    env = vector_env("marl_memory_envs.toy:Rendezvous", n_envs=2, seed=1, name="x", group="team", kwargs=kwargs)
    assert env.task_spec.name == "x"
    assert env.reset()["team", "observation"].shape == (2, 3, 4)
    assert vector_env("marl_memory_envs.toy:Rendezvous", n_envs=1, seed=1).task_spec.name.endswith("toy:Rendezvous")
