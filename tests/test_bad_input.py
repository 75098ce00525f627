"""Bad input: one message that names key, value and what would be right; exit status not 0; no traceback; no work done.

What a user types is typed here too, most of it in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import ParallelEnv

from marl_memory import load_policy
from marl_memory.algorithms.ppo import PPO
from marl_memory.cli import main
from marl_memory.training.checkpoint import CheckpointFolder, IncompatibleCheckpointError, NotWrittenError
from marl_memory.training.logging import MetricsFile
from marl_memory.training.run import release
from tests import fresh

SMALL = [
    "training.n_envs=2",
    "training.steps=8",
    "training.total_frames=64",
    "training.checkpoint_every_frames=16",
    "training.evaluation_every_frames=32",
    "training.evaluation_episodes=2",
    "network.hidden=[8]",
    "algorithm.minibatches=2",
    "algorithm.epochs=2",
    "logger.quiet=true",
    "logger.tensorboard=false",
    "hydra/job_logging=none",  # Hydra's other settings close the streams of handlers that belong to pytest
    "hydra/hydra_logging=none",
]
DUEL = "env=toy/masked_duel"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["marl-memory"])  # `train` writes it


def refused(*words: str) -> str:
    """What the command says when it refuses, which is all it says."""
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert isinstance(left.value.code, str), "a message is what exits with status 1"
    assert left.value.code.startswith("marl-memory: ")
    assert "Traceback" not in left.value.code
    return left.value.code.removeprefix("marl-memory: ")


def refused_before_work(*words: str) -> str:
    replayed = {"algorithm=maddpg", "algorithm=dqn", "algorithm=idqn"} & {*words}
    small = [word for word in SMALL if not (word.startswith("algorithm.") and replayed)]
    said = refused("train", *small, "run_folder=run", *words)
    assert "\n" not in said
    assert not Path("run").exists()
    return said


# ------------------------------------------------------------------------------------------------------------- keys

KEYS = [
    (["env=smax/3mm"], "env=smax/3mm does not exist: did you mean smax/3m"),
    (["env=3m"], "env=3m does not exist: did you mean smac/3m or smax/3m?"),
    (["env=Toy/Masked_Duel"], "env=Toy/Masked_Duel does not exist: did you mean toy/masked_duel?"),
    (["algorithm=mapo"], "algorithm=mapo does not exist: did you mean mappo?"),
    (["experiment=quickstar"], "experiment=quickstar does not exist: did you mean quickstart?"),
    (["network=lstm"], "network=lstm does not exist: known are mlp"),
    (["network=nature_cnn"], "reads pictures, but toy/masked_duel shows no pictures: choose network=mlp"),
    (
        ["env=atari/pong", "network=mlp"],
        "reads vectors, but atari/pong shows pictures [4, 84, 84] (channels, height, width): choose network=nature_cnn",
    ),
    (
        ["env=atari/pong", "algorithm=ppo", "algorithm.normalise_observations=true"],
        "does not fit atari/pong, whose obs",
    ),
    (["env=atari/game", "env.kwargs.game=ALE/MsPacman-v5"], "is none of ALE's games: did you mean ms_pacman"),
    (["algorithm=mappo", "algorithm.share_body=true"], "share_body=true needs algorithm.centralised_critic=false"),
    (["env=atari/pong", "env.backend=envpool"], "env.backend='envpool' must be one of gymnasium, ale_vector"),
    (["env.wrappers=[frame_stak]"], "env.wrappers[0]='frame_stak' is no wrapper of SuperSuit"),
    (["memory=[mnemo]"], "memory=mnemo does not exist"),
    (["algoritm=mappo"], "algoritm is unknown, nothing reads it: did you mean algorithm?"),
    (["experimnt=quickstart"], "experimnt is unknown, nothing reads it: did you mean experiment?"),
    (["memori=[x]"], "memori is unknown, nothing reads it: did you mean memory?"),
    (["lr=0.1"], "lr is unknown, nothing reads it: did you mean algorithm.lr?"),
    (["trainning.steps=3"], "trainning is unknown, nothing reads it: did you mean training?"),
    (
        ["algorithm.entropy_coeff=0.1"],
        "algorithm.entropy_coeff is unknown, nothing reads it: did you mean entropy_coef",
    ),
    (["training.total_frame=9"], "training.total_frame is unknown, nothing reads it: did you mean total_frames"),
    (["+foo=1"], "foo=1 is unknown, nothing reads it: known are algorithm, env"),
    (["+foo.bar=1"], "foo={'bar': 1} is unknown, nothing reads it"),
    (
        ["+algorithm.entropy_coeff=1"],
        "algorithm.entropy_coeff=1 is unknown, nothing reads it: did you mean entropy_coef",
    ),
    (["+training.n_env=1"], "training.n_env=1 is unknown, nothing reads it: did you mean n_envs?"),
    (["+logger.quite=true"], "logger.quite=True is unknown, nothing reads it: did you mean quiet?"),
    (["logger.wandb=ofline"], "logger.wandb='ofline' must be null, offline or online"),
    (["logger.wandb=true"], "logger.wandb=True must be text or null"),
    (["+network.hiden=[8]"], "network.hiden=[8] is unknown, nothing reads it: did you mean hidden?"),
    (["+env.maps=3m"], "env.maps='3m' is unknown, nothing reads it: known are"),
    (["+env.kwargs.wings=2"], "'wings'"),
    (
        ["env=classic/cartpole", "+env.kwargs.wings=2"],
        "factory=marl_memory_envs.classic:cartpole failed with kwargs={'wi",
    ),
    (["+algorithm.seed=3"], "algorithm.seed=3 is set by the run itself: leave it out"),
    (["+env.n_envs=3"], "env.n_envs=3 is set by the run itself: leave it out"),
    (["+network.in_features=3"], "network.in_features=3 is set by the run itself: leave it out"),
    (["~training.steps"], "training.steps is missing: give training.steps="),
    (["~seed"], "seed is missing"),
    (["~algorithm._target_"], "algorithm._target_=None must name a class or function"),
    (["algorithm._target_=a.b.C"], "algorithm._target_=a.b.C can not be imported: "),
    (["algorithm._target_=json.loads"], "algorithm._target_=json.loads must name a subclass of Algorithm"),
    (["+memory.x.y=1"], "memory.x._target_=None must name a class or function"),
    (["scope=shared"], "scope=shared has no effect without a memory"),
    (["scope=shared", "memory=[cloning]"], "scope=shared has no effect without a memory"),
    (["env=pettingzoo"], "env.factory is missing: give env.factory="),
    (["seed=[1"], "'seed=[1' can not be read"),
    (["seed=1,2"], "Ambiguous value for argument 'seed=1,2'"),
    (["training.steps=${nope}"], "training.steps: Interpolation key 'nope' not found"),
    (["-m", "algorithm=mappo,mapo"], "algorithm=mapo does not exist: did you mean mappo?"),
    (["-m", "seed=0,1", "algorithm.clipp=0.1"], "algorithm.clipp is unknown, nothing reads it: did you mean clip"),
    (["--config-dir", "nowhere"], "nowhere' not found"),
]


@pytest.mark.parametrize(("words", "said"), KEYS, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_keys(words: list[str], said: str) -> None:
    assert said in refused_before_work(DUEL, *words)


GRADIENT = ["algorithm=maddpg", "memory=[mnemo_gradient]"]
REGION = ["algorithm=mappo", "memory=[mnemo_region]"]
SIL = ["algorithm=mappo", "memory=[sil]"]
RETURNS = ["algorithm=maddpg", "memory=[return_memory]"]
NOVELTY = ["algorithm=mappo", "memory=[adamemento]"]
GEM = ["algorithm=maddpg", "memory=[gem]"]
MEMORY = [
    (
        ["algorithm=mappo", "memory=[mnemo_gradient]"],
        "memory=mnemo_gradient acts at the stage 'gradient', which PPO does not have; it has act, region, replay, "
        "reward, target. Hosts with that stage: ddpg, td3 and their team forms",
    ),
    (
        ["algorithm=maddpg", "memory=[mnemo_region]"],
        "memory=mnemo_region acts at the stage 'region', which DDPG does not have; it has act, gradient, reward, "
        "target. Hosts with that stage: ppo, ippo and mappo",
    ),
    (
        ["algorithm=idqn", "memory=[mnemo_gradient]"],
        "memory=mnemo_gradient acts at the stage 'gradient', which DQN does not have; it has act, reward, target. "
        "Hosts with that stage: ddpg, td3 and their team forms",
    ),
    ([*REGION, "memory.mnemo_region.cost=value"], "memory=mnemo_region reads learn.action_values, which PPO does not"),
    ([*REGION, "memory.mnemo_region.cost=structured"], "cost='structured' needs an embedding of the actions"),
    ([*REGION, "memory.mnemo_region.cost=far"], "cost='far' must be one of one_hot, ordinal, structured, value"),
    ([*REGION, "memory.mnemo_region.divergence=w2"], "divergence='w2' is one between Gaussians"),
    ([*REGION, "memory.mnemo_region.policy=fourier"], "policy='fourier' reads means, and a mean of categorical"),
    ([*REGION, "memory.mnemo_region.policy=lifo"], "policy='lifo' must be one of merge, fifo, simhash, fourier"),
    ([*REGION, "memory.mnemo_region.capacity=8"], "neighbours=16 are more than the 8 rows that capacity and budget"),
    ([*REGION, "memory.mnemo_region.capacity=0"], "capacity=0 must be positive"),
    ([*REGION, "memory.mnemo_region.budget=half"], "budget='half' must be 'total' or 'per_bank'"),
    ([*REGION, "memory.mnemo_region.half_life=0"], "half_life=0 must be positive"),
    ([*REGION, "memory.mnemo_region.search=ivf"], "search='ivf' must be one of exact, lists"),
    ([*REGION, "memory.mnemo_region.search=lists", "memory.mnemo_region.capacity=512"], "use search='exact' below"),
    ([*REGION, "memory.mnemo_region.strength=2"], "strength=2 must lie in [0, 1]"),
    ([*REGION, "memory.mnemo_region.keys=state"], "keys='state' must be 'observation' or 'features'"),
    ([*REGION, "memory.mnemo_region.payloads=none"], "payloads='none' must be 'own' or 'shuffled'"),
    ([*REGION, "memory.mnemo_region.gate_slope=0"], "gate_slope=0 must lie in (0, 1]"),
    ([*REGION, "scope=all"], "scope='all' must be one of per_agent, shared, centralized"),
    ([*GRADIENT, "memory.mnemo_gradient.beta=2"], "beta=2 must lie in [0, 1]"),
    ([*GRADIENT, "memory.mnemo_gradient.action_bandwidth=0"], "action_bandwidth=0 must be positive"),
    ([*GRADIENT, "memory.mnemo_gradient.neighbours=0"], "neighbours=0 must be positive"),
    ([*GRADIENT, "memory.mnemo_gradient.policy=fourier"], "policy='fourier' keeps sums and no single gradient"),
    ([*GRADIENT, "memory.mnemo_gradient.betta=1"], "memory.mnemo_gradient.betta is unknown, nothing reads it"),
    (
        ["algorithm=maddpg", "memory=[sil]"],
        "memory=sil acts at the stage 'replay', which DDPG does not have; it has act, gradient, reward, target. "
        "Hosts with that stage: ppo, ippo and mappo",
    ),
    ([*SIL, "+memory.sil.n_envs=3"], "memory.sil.n_envs=3 is set by the run itself: leave it out"),
    ([*SIL, "memory.sil.priority=2"], "priority=2 must lie in [0, 1]"),
    ([*SIL, "memory.sil.capacity=0"], "capacity=0 must be positive"),
    ([*GEM, "memory.gem.max_rollout=0"], "max_rollout=0 must be at least 1, or null"),
    ([*GEM, "memory.gem.under_weight=0"], "under_weight=0 must lie in (0, 1]"),
    ([*GEM, "memory.gem.under_weight=1.5"], "under_weight=1.5 must lie in (0, 1]"),
    (
        [*GEM, "scope=shared"],
        "scope='shared' is not what the host's critic reads, which is 'centralized', and returns are made of",
    ),
    ([*GEM, "memory.gem.estimator=min"], "estimator='min' must be one of twin, max, lambda"),
    ([*GEM, "memory.gem.estimator=lambda"], "max_rollout=5 has no effect with estimator='lambda': set it to null"),
    ([*GEM, "memory.gem.coefficient=1"], "coefficient=1 has no effect on a host with a replay: leave it null"),
    ([*GEM, "algorithm.critics=3"], "algorithm.critics=3 must be 1 or 2"),
    ([*GEM, "+memory.gem.n_critics=2"], "memory.gem.n_critics=2 is set by the run itself: leave it out"),
    (
        ["algorithm=mappo", "memory=[gem]", "memory.gem.under_weight=0.5"],
        "under_weight=0.5 has no effect on a host without a replay: leave it null",
    ),
    (
        ["experiment=gem_paper", "algorithm=mappo"],
        "algorithm.actor_lr=0.0003 is unknown, nothing reads it",
    ),
    (
        ["experiment=gem_official", "algorithm=mappo"],
        "experiment=gem_official is made for another algorithm: leave algorithm=mappo out",
    ),
    (
        [*RETURNS, "+memory.return_memory.off_policy=true"],
        "memory.return_memory.off_policy=True is set by the run itself",
    ),
    ([*RETURNS, "memory.return_memory.policy=merge"], "policy='merge' must be one of best, fifo"),
    ([*RETURNS, "memory.return_memory.coefficient=2"], "coefficient=2 must lie in [0, 1]"),
    ([*RETURNS, "memory.return_memory.horizon=0"], "horizon=0 must be positive"),
    ([*NOVELTY, "memory.coarse_fine.latent=1"], "latent=1 must be at least 2"),
    ([*NOVELTY, "memory.coarse_fine.fine_sign=0"], "fine_sign=0 must be 1 (dense codes are new) or -1"),
    ([*NOVELTY, "memory.coarse_fine.combine=max"], "combine='max' must be one of add, mul"),
    ([*NOVELTY, "memory.coarse_fine.eta=-1"], "eta=-1 must not be negative"),
    ([*NOVELTY, "memory.coarse_fine.batches=2.5"], "memory.coarse_fine.batches=2.5 must be a whole number"),
    ([*NOVELTY, "memory.coarse_fine.hidden=[16,0]"], "hidden=[16, 0] must hold positive widths"),
    ([*NOVELTY, "memory.adamemento.eta=1"], "memory.adamemento"),
    ([*NOVELTY, "memory.reflection.kappa=0"], "kappa=0 must lie in (0, 1]"),
    ([*NOVELTY, "memory.reflection.kappa=1.5"], "kappa=1.5 must lie in (0, 1]"),
    ([*NOVELTY, "memory.reflection.lower=0.9"], "lower=0.9"),
    ([*NOVELTY, "scope=centralized", "memory.reflection.execution=centralized"], "execution='centralized'"),
]


@pytest.mark.parametrize(("words", "said"), MEMORY, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_memory(words: list[str], said: str) -> None:
    assert said in refused_before_work(DUEL, *words)


def test_a_section_that_was_taken_out() -> None:
    said = refused("train", DUEL, "~network", "run_folder=run", "hydra/job_logging=none", "hydra/hydra_logging=none")
    assert said == "network=None must be a mapping of keys: choose one of the group network"


def test_keys_in_the_users_own_configs() -> None:
    for name, text in {
        "algorithm/mine": "_target_: marl_memory.algorithms.ppo.PPO\nclipp: 0.1\nepochs: 4\nminibatches: 4\n",
        "experiment/mine": "# @package _global_\nalgorithm:\n  entropy_coeff: 0.1\n",
        "experiment/top": "# @package _global_\ntrainning:\n  steps: 3\n",
        "experiment/torn": "a: [1\n",
    }.items():
        file = Path("configs", f"{name}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    own = ["--config-dir", "configs", DUEL]  # before an override, as people type it
    assert "algorithm=mne does not exist: did you mean mine?" in refused_before_work(*own, "algorithm=mne")
    assert "algorithm.clipp=0.1 is unknown, nothing reads it: did you mean clip" in refused_before_work(
        *own, "algorithm=mine"
    )
    assert "algorithm.entropy_coeff=0.1 is unknown, nothing reads it: did you mean entropy_coef" in refused_before_work(
        *own, "experiment=mine"
    )
    assert "trainning={'steps': 3} is unknown, nothing reads it: did you mean training?" in refused_before_work(
        *own, "experiment=top"
    )
    assert "torn.yaml" in refused_before_work(*own, "experiment=torn")


# ----------------------------------------------------------------------------------------------------------- values

WRONG = {"whole": ["abc", "true", "null", "2.5", "-1"], "number": ["abc", "true", "null", "nan", "inf", "-1"]}
NUMBERS = {
    "seed": "whole",
    "training.total_frames": "whole",
    "training.n_envs": "whole",
    "training.threads": "whole",
    "training.evaluation_episodes": "whole",
    "algorithm.epochs": "whole",
    "algorithm.lr": "number",
    "algorithm.gamma": "number",
}
SHOWN = {"abc": "'abc'", "true": "True", "null": "None"}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers(key: str) -> None:
    for value in WRONG[NUMBERS[key]]:
        assert refused_before_work(DUEL, f"{key}={value}").startswith(f"{key}={SHOWN.get(value, value)} must ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["training.stop_at_frames=2.5"], "training.stop_at_frames=2.5 must be a whole number or null"),
        (["training.stop_at_frames=65"], "training.stop_at_frames=65 must not lie beyond training.total_frames=64"),
        (["training.total_frames=15"], "training.total_frames=15 must be at least the frames of one iteration"),
        (["training.evaluation_every_frames=15"], "training.n_envs=2 × training.steps=8 = 16"),
        (["algorithm.minibatches=17"], "algorithm.minibatches=17 must not exceed the 16 rows of a batch"),
        (["algorithm.value_clip=-1"], "algorithm.value_clip=-1 must be positive"),
        (["algorithm.value_norm=no"], "algorithm.value_norm='no' must be true or false"),
        (["algorithm.share_parameters=1"], "algorithm.share_parameters=1 must be true or false"),
        (["network.hidden=8"], "network.hidden=8 must be a list of whole numbers"),
        (["network.hidden=[8,x]"], "network.hidden=[8, 'x'] must be a list of whole numbers"),
        (["network.hidden=[-8]"], "network.hidden=[-8] must hold positive widths"),
        (["network.activation=swish"], "network.activation='swish' must be one of"),
        (["network.layer_norm=off"], "network.layer_norm='off' must be true or false"),
        (["logger.tensorboard=no"], "logger.tensorboard='no' must be true or false"),
        (["env.common_reward=maybe"], "env.common_reward='maybe' must be true or false"),
        (["env.max_episode_steps=-1"], "max_episode_steps=-1 must be at least 1"),
        (["env.max_episode_steps=many"], "env.max_episode_steps='many' must be a whole number or null"),
        (["env.stepping=x"], "env.stepping='x' must be one of serial, threads, processes"),
        (["env.stepping=threads", "env.workers=0"], "env.workers=0 must be a whole number of at least 1"),
        (["env.workers=2"], "env.workers=2 has no effect with env.stepping='serial'"),
        (["env.kwargs=3"], "env.kwargs=3 must be a mapping"),
        (["env.kwargs.danger=2"], "danger=2 must lie in [0, 1]"),
        (["env.kwargs.max_steps=abc"], "marl_memory_envs.toy:MaskedDuel failed with kwargs="),
        (["env.factory=marl_memory_envs.toy.MaskedDuel"], "must be 'package.module:function', with a colon"),
        (["env.factory=no_such:make"], "no module named 'no_such'"),
        (["run_folder=null"], "run_folder=None must name a folder"),
        (["algorithm=dqn", "algorithm.critics=3"], "algorithm.critics=3 must be 1 or 2"),
        (["algorithm=dqn", "algorithm.critics=true"], "algorithm.critics=True must be a whole number"),
        (["algorithm=dqn", "algorithm.dueling=1"], "algorithm.dueling=1 must be true or false"),
        (["algorithm=dqn", "algorithm.double=no"], "algorithm.double='no' must be true or false"),
        (["algorithm=dqn", "algorithm.loss=l1"], "algorithm.loss='l1' must be 'huber' or 'mse'"),
        (["algorithm=dqn", "algorithm.epsilon_final=2"], "algorithm.epsilon_final=2 must lie in [0, 1]"),
        (["algorithm=dqn", "algorithm.exploration=ou"], "algorithm.exploration is unknown, nothing reads it"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_values(words: list[str], said: str) -> None:
    assert said in refused_before_work(DUEL, *words)


def test_maps() -> None:
    said = refused_before_work("env=smax/3m", "env.map=3mm")
    assert "map='3mm' is unknown; near it: 3m" in said
    assert "env.max_steps='abc' must be a whole number" in refused_before_work("env=smax/3m", "env.max_steps=abc")


@pytest.mark.parametrize(
    ("task", "package", "extra"),
    [("smax/3m", "jaxmarl", "smax"), ("mpe/simple_tag", "mpe2", "mpe"), ("box2d/lunar_lander", "Box2D", "box2d")],
)
def test_a_suite_that_is_not_installed(task: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # what `import` takes for missing
    assert f"marl-memory[{extra}]" in refused_before_work(f"env={task}")


# ------------------------------------------------------------------------------------------------ tasks and learners


class Lamp(ParallelEnv[str, np.ndarray, int]):
    """One agent in the light for five steps, with whatever is wrong with it set from outside."""

    def __init__(self, **wrong: Any) -> None:
        self.wrong, self.metadata, self.render_mode = wrong, {"name": "lamp"}, None
        self.possible_agents, self.agents = ["a", "b"], []
        self._spaces = spaces.Box(-1, 1, (3,)), wrong.get("actions", spaces.Discrete(2))
        self.episode = 0

    def observation_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Box(-1, 1, (4,)) if self.wrong.get("grows") and self.episode > 2 else self._spaces[0]

    def action_space(self, agent: str) -> spaces.Space[Any]:
        return spaces.Discrete(3) if self.wrong.get("more") and self.episode > 2 else self._spaces[1]

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.agents, self.t = list(self.possible_agents), 0
        self.episode += 1
        return {a: np.zeros(3, np.float32) for a in self.agents}, {a: {} for a in self.agents}

    def step(self, actions: dict[str, int]) -> Any:
        self.t += 1
        seen = {a: np.zeros(3, np.float32) for a in self.agents}
        rewards = dict.fromkeys(self.agents, 0.0)
        if self.t == 3:
            if "key" in self.wrong:
                (seen["b"] if self.wrong["key"] == "observation" else rewards)[
                    1 if self.wrong["key"] == "observation" else "b"
                ] = self.wrong["value"]
            seen["b"] = seen["b"][: self.wrong.get("size", 3)].reshape(self.wrong.get("shape", -1))
        ended = dict.fromkeys(self.agents, self.t == 5)
        acting, self.agents = self.agents, [] if self.t == 5 else [*self.agents, *self.wrong.get("strangers", ())]
        return seen, rewards, ended, dict.fromkeys(acting, False), {a: {} for a in acting}


class OnlyContinuous(PPO):
    actions = frozenset({"continuous"})


class OnlyDiscrete(PPO):
    actions = frozenset({"discrete"})


@pytest.fixture
def lamp(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Words for the command line that train on a lamp with something wrong."""
    module: Any = types.ModuleType("lamps")

    def words(**wrong: Any) -> list[str]:
        module.make = lambda: Lamp(**wrong)
        return ["env=pettingzoo", "env.factory=lamps:make", "env.name=lamp", "algorithm=ippo"]

    monkeypatch.setitem(sys.modules, "lamps", module)
    return words


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"actions": spaces.MultiDiscrete([2, 2])},
            "agent 'a' acts in MultiDiscrete([2 2]); right is Discrete, or a Box",
        ),
        ({"actions": spaces.Dict({"x": spaces.Discrete(2)})}, "agent 'a' acts in Dict('x': Discrete(2)); right is"),
        ({"actions": spaces.Box(-np.inf, 1, (2,))}, "right are finite bounds"),
    ],
    ids=["MultiDiscrete", "dictionary", "unbounded"],
)
def test_spaces_that_are_not_supported(wrong: dict[str, Any], said: str, lamp: Callable[..., list[str]]) -> None:
    assert said in refused_before_work(*lamp(**wrong))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"key": "observation", "value": np.nan}, "environment 0 of lamp, step 3: observation of agent 'b' is nan"),
        ({"key": "reward", "value": np.inf}, "environment 0 of lamp, step 3: reward of agent 'b' is inf"),
        ({"size": 2}, "environment 0 of lamp, step 3: agent 'b' observes 2 numbers, not 3"),
        ({"shape": (3, 1)}, "environment 0 of lamp, step 3: agent 'b' observes an array of shape (3, 1), not 3"),
        ({"grows": True}, "environment 0 of lamp, step 0: observation_space of agent 'a' changed from Box("),
        ({"more": True}, "action_space of agent 'a' changed from Discrete(2) to Discrete(3)"),
        ({"strangers": ["c"]}, "environment 0 of lamp, step 1: agent 'c' is in env.agents, but not in possible_agents"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else None,
)
def test_an_environment_that_breaks_its_word(wrong: dict[str, Any], said: str, lamp: Callable[..., list[str]]) -> None:
    assert said in refused("train", *SMALL, "run_folder=run", *lamp(**wrong))


def test_dqn_names_who_learns_continuous_actions() -> None:
    said = refused_before_work("env=toy/rendezvous", "algorithm=dqn")
    assert said.startswith("algorithm: DQN learns discrete actions, those of toy/rendezvous are continuous: choose ")
    named = set(said.partition("algorithm=")[2].split(" or "))
    assert {"ddpg", "td3", "ppo"} <= named and not {"dqn", "idqn"} & named


@pytest.mark.parametrize(
    ("algorithm", "task", "said"),
    [
        (OnlyContinuous, "toy/masked_duel", "learns continuous actions, those of toy/masked_duel are discrete"),
        (OnlyDiscrete, "toy/rendezvous", "learns discrete actions, those of toy/rendezvous are continuous"),
    ],
)
def test_an_algorithm_for_another_kind_of_action(
    algorithm: type, task: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "learners", module := types.ModuleType("learners"))
    setattr(module, algorithm.__name__, algorithm)
    Path("configs/algorithm").mkdir(parents=True)
    Path("configs/algorithm/picky.yaml").write_text(
        f"_target_: learners.{algorithm.__name__}\nepochs: 2\nminibatches: 2\n"
    )
    refusal = refused_before_work(f"env={task}", "--config-dir", "configs", "algorithm=picky")
    assert f"algorithm: {algorithm.__name__} {said}: choose algorithm=" in refusal
    assert {"ippo", "mappo", "ppo"} <= set(refusal.partition("algorithm=")[2].split(" or "))


# -------------------------------------------------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint() -> None:
    said = refused("train", *SMALL, DUEL, "run_folder=run", "algorithm.lr=1e30")
    assert "training diverged: loss/" in said
    assert "in minibatch 2 of 4, in iteration 1, frames 0 to 16" in said
    assert "kept: run/checkpoints/frames_000000000000" in said
    assert [checkpoint.frames for checkpoint in CheckpointFolder(Path("run/checkpoints")).scheduled()] == [0]
    for checkpoint in ("best", "last"):
        assert all(parameter.isfinite().all() for parameter in load_policy("run", checkpoint=checkpoint).parameters())


def test_a_parameter_that_is_not_finite_after_the_last_step_is_found_before_it_is_saved() -> None:
    once = ["algorithm.epochs=1", "algorithm.minibatches=1", "algorithm.lr=3e38"]
    said = refused("train", *SMALL, DUEL, "run_folder=run", *once)
    assert "the parameter " in said
    assert "is not finite after minibatch 1 of 1, in iteration 1" in said
    assert [checkpoint.frames for checkpoint in CheckpointFolder(Path("run/checkpoints")).scheduled()] == [0]


# --------------------------------------------------------------------------------------------- run folders and resume


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with four scheduled checkpoints made and three kept: at 32, 48 and 64 frames."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["marl-memory"])
        main(["train", *SMALL, DUEL, "algorithm=mappo", f"run_folder={folder}"])
    release(folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of it, to be spoilt."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    yield folder
    release(folder)


MORE = "training.total_frames=96"


def test_a_folder_that_holds_something_else(run: Path) -> None:
    assert f"run_folder={run} already holds a run: choose another, or `marl-memory resume {run}`" in refused(
        "train", *SMALL, DUEL, f"run_folder={run}"
    )
    (run / "run.json").unlink()
    assert "holds no run, but curve.png, metrics.csv: choose a folder that is empty or new" in refused(
        "train", *SMALL, DUEL, f"run_folder={run}"
    )
    assert (run / "metrics.csv").read_text().count("\n") == 6  # nothing of it was touched
    assert f"{run} holds no run (no run.json)" in refused("resume", str(run))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("- 8\n", "- 16\n", "network.hidden=[16], but the run was made with [8]"),
        ("clip: 0.2", "clip: 0.3", "algorithm.clip=0.3, but the run was made with 0.2"),
        ("centralised_critic: true", "centralised_critic: false", "algorithm.centralised_critic=False"),
        (
            "name: toy/masked_duel",
            "name: toy/other",
            "env.name='toy/other', but the run was made with 'toy/masked_duel'",
        ),
        ("n_envs: 2", "n_envs: 4", "training.n_envs=4, but the run was made with 2"),
        ("  clip: 0.2\n", "", "algorithm.clip=nothing, but the run was made with 0.2"),
        ("seed: 0", "seed: 0\nfoo: 1", "foo=1, but the run was made with nothing"),
        ("seed: 0", "seed: [", "config.yaml can not be read"),
    ],
)
def test_a_run_whose_configuration_was_edited(before: str, after: str, said: str, run: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert before in text
    (run / "config.yaml").write_text(text.replace(before, after))
    for words in (["resume", str(run), MORE], ["evaluate", str(run), "--episodes", "1"]):
        assert said in refused(*words)
    with pytest.raises(ValueError, match="config.yaml"):
        load_policy(run)


def test_what_may_be_edited(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("keep_checkpoints: 3", "keep_checkpoints: 1"))
    main(["resume", str(run), MORE])
    assert "finished at 96 frames" in capsys.readouterr().out
    assert [checkpoint.frames for checkpoint in CheckpointFolder(run / "checkpoints").scheduled()] == [96]


def test_a_description_that_was_spoilt(run: Path) -> None:
    description = json.loads((run / "run.json").read_text())
    description["task"]["observation_sizes"] = [7, 7]
    (run / "run.json").write_text(json.dumps(description))
    assert "a task of observation_sizes=(7, 7), which is (5, 5) now" in refused("resume", str(run), MORE)
    (run / "run.json").write_text('{"task": ')
    assert "run.json can not be read" in refused("resume", str(run), MORE)


def rewrite(checkpoint: Path, change: Callable[[dict[str, Any]], object], **meta: Any) -> None:
    """Change a checkpoint's state, and whatever else its description says, with a checksum that is right again."""
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    change(state)
    torch.save(state, checkpoint / "state.pt")
    described = json.loads((checkpoint / "meta.json").read_text()) | meta
    described["sha256"] = hashlib.sha256((checkpoint / "state.pt").read_bytes()).hexdigest()
    (checkpoint / "meta.json").write_text(json.dumps(described))


WEIGHT = "actor.body.layers.0.weight"


@pytest.mark.parametrize(
    ("change", "meta", "said"),
    [
        (lambda s: None, {"format": 99, "version": "7.0"}, "format=99 in meta.json, right is 2 for marl-memory"),
        (
            lambda s: s["algorithm"].update({WEIGHT: torch.zeros(16, 7)}),
            {"version": "7.0"},
            f"the entry algorithm.{WEIGHT} has shape [16, 7] in the checkpoint and [8, 7] in this run; it was "
            "written by marl-memory 7.0",
        ),
        (lambda s: s["algorithm"].pop(WEIGHT), {}, f"algorithm.{WEIGHT} is in this run's, not in the checkpoint's"),
        (lambda s: s["algorithm"].update(x=torch.ones(1)), {}, "algorithm.x is in the checkpoint's, not in this run's"),
        (lambda s: s["algorithm"]["_extra_state"].pop("generators"), {}, "'generators' is missing"),
        (lambda s: s["algorithm"]["_extra_state"]["optimiser"].update(x={}), {}, "unknown parameters ['x']"),
    ],
    ids=["format", "shape", "missing", "surplus", "no generators", "optimiser"],
)
def test_a_checkpoint_of_another_version(
    change: Callable[[dict[str, Any]], object], meta: dict[str, Any], said: str, run: Path
) -> None:
    for name in ("frames_000000000064", "best"):
        rewrite(run / "checkpoints" / name, change, **meta)
    refusals = [refused("resume", str(run), MORE), refused("evaluate", str(run), "--episodes", "1")]
    assert all(said in refusal and "size mismatch" not in refusal for refusal in refusals)
    with pytest.raises(IncompatibleCheckpointError):
        load_policy(run, checkpoint="last")


def test_a_state_of_before_formats_were_numbered_is_refused(run: Path) -> None:
    file = run / "checkpoints" / "frames_000000000064" / "meta.json"
    meta = json.loads(file.read_text())
    assert (meta.pop("format"), meta.pop("version").split(".")[0]) == (2, "0")
    file.write_text(json.dumps(meta))
    with pytest.raises(IncompatibleCheckpointError, match="format=1 in meta.json, right is 2"):
        load_policy(run, checkpoint="last")


def test_damaged_checkpoints_are_passed_over_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints"
    (folder / "frames_000000000064" / "state.pt").write_bytes(b"half")
    (folder / "best" / "meta.json").write_text("{")
    (folder / "signal").mkdir()
    (folder / "frames_000000000064_my_copy").mkdir()  # the user's: no checkpoint
    main(["resume", str(run), "training.stop_at_frames=64"])
    said = capsys.readouterr().out
    assert f"damaged checkpoint passed over: {folder}/frames_000000000064: state.pt has SHA-256" in said
    assert f"damaged checkpoint left where it is: {folder}/best" in said
    assert f"damaged checkpoint passed over: {folder}/signal: meta.json can not be read" in said
    assert "at 48 frames" in said
    release(run)
    for checkpoint in CheckpointFolder(folder).scheduled():
        (checkpoint.path / "state.pt").unlink()
    assert f"{folder} holds no checkpoint that can be read: start anew in another folder" in refused("resume", str(run))


# ---------------------------------------------------------------------------------------------------------- full disks


LIMITED = """
import resource, sys
limit = int(sys.argv.pop(1)) or resource.RLIM_INFINITY
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from marl_memory.cli import main
main()
"""


def command(*words: str, limit: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, whose files may have ``limit`` bytes each at most (0: any number)."""
    return fresh.python(LIMITED, limit, *words, env={**os.environ, **variables})


def test_a_file_that_does_not_fit_while_training() -> None:
    """The state at 16 frames has twice the bytes of the first, which has no optimiser slots yet."""
    done = command("train", *SMALL, DUEL, "run_folder=run", limit=25_000)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    first, kept, again = done.stderr.splitlines()
    assert first.startswith(
        "marl-memory: run/checkpoints/frames_000000000016 could not be written: File too large; it "
    )
    assert int(first.split("it needs ")[1].split()[0].replace(",", "")) > 25_000
    assert kept == "kept: run/checkpoints/frames_000000000000"
    assert again.endswith("marl-memory resume run")
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"best", "frames_000000000000"}
    main(["resume", "run"])  # now there is room
    assert CheckpointFolder(Path("run/checkpoints")).newest_frames() == 64
    release(Path("run"))


def test_a_description_that_does_not_fit() -> None:
    done = command("train", *SMALL, DUEL, "run_folder=run", limit=1500)
    assert done.returncode == 1
    assert done.stderr.strip() == "marl-memory: run/run.json could not be written: File too large"
    main(["train", *SMALL, DUEL, "run_folder=run"])  # what the start left is no run
    release(Path("run"))


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", disk]).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        loud = [word for word in SMALL if not word.startswith("logger.tensorboard")]
        done = command("train", *loud, DUEL, f"run_folder={disk}/run")
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "could not be written: No space left on device" in done.stderr
        left = CheckpointFolder(disk / "run" / "checkpoints")
        assert f"kept: {left.scheduled()[0].path}\n" in done.stderr
        left.newest(pytest.fail)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_metrics_that_do_not_fit(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.append({"frames": 0})
    metrics.path = Path("/dev/full")
    with pytest.raises(NotWrittenError, match="/dev/full could not be written: No space left on device"):
        metrics.append({"frames": 1})


# --------------------------------------------------------------------------------------------------- as a user sees it


def test_in_a_process_of_its_own() -> None:
    done = command("train", *SMALL, "run_folder=run", DUEL, "algorithm.clip=-1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("marl-memory: ")
    assert list(Path().iterdir()) == []


def test_where_it_came_from_is_shown_on_demand() -> None:
    words = [sys.executable, "-m", "marl_memory", "train", "algoritm=mappo"]  # the variable is read by the import
    done = subprocess.run(words, env={**os.environ, "HYDRA_FULL_ERROR": "1"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ConfigError: algoritm is unknown" in done.stderr
