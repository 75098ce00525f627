"""Each operator on each of its hosts, in the three scopes: it is used, and the exact seams hold in whole runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from marl_memory.cli import config_dir
from marl_memory.training.run import release, start

SCOPES = ["per_agent", "shared", "centralized"]
SMALL = ["network.hidden=[16,16]", "logger.quiet=true", "logger.tensorboard=false", "training.evaluation_episodes=2"]
ON_POLICY = [
    "training.n_envs=4",
    "training.steps=32",
    "training.total_frames=512",
    "training.checkpoint_every_frames=256",
    "training.evaluation_every_frames=512",
    "algorithm.minibatches=2",
    "algorithm.epochs=2",
]
OFF_POLICY = [
    "training.n_envs=2",
    "training.steps=64",
    "training.total_frames=512",
    "training.checkpoint_every_frames=256",
    "training.evaluation_every_frames=512",
    "algorithm.batch_size=32",
    "algorithm.warmup_frames=64",
    "algorithm.capacity=512",
    "algorithm.updates_per_frame=0.0625",
]
REGION = ["memory=[mnemo_region]", "memory.mnemo_region.min_rows=16"]
GRADIENT = ["memory=[mnemo_gradient]", "memory.mnemo_gradient.min_rows=16"]
SIL = ["memory=[sil]"]
RETURNS = ["memory=[return_memory]", "memory.return_memory.min_rows=16"]
NOVELTY = ["memory=[coarse_fine]", "memory.coarse_fine.hidden=[16]", "memory.coarse_fine.batches=4"]
REFLECTION = [
    "memory=[reflection]",
    "memory.reflection.least=1",
    "memory.reflection.kappa=0.3",
    "memory.reflection.hidden=[16]",
    "memory.reflection.batches=2",
    "memory.reflection.upper=0.6",
    "memory.reflection.lower=0.4",
]
STRENGTH = {
    "reflection": "effective_strength",
    "mnemo_region": "omega",
    "mnemo_gradient": "beta",
    "sil": "effective_strength",
    "return_memory": "effective_strength",
    "coarse_fine": "bonus",
}
USED = ("sil", "return_memory", "reflection", "coarse_fine")
"""Memories that report how many rows they used."""
OFF = ("ddpg", "iddpg", "maddpg", "td3", "itd3", "matd3", "dqn", "idqn")

TEAMS = ["mamujoco/half_cheetah_2x3", "mpe/simple_spread", "smax/3m"]
TABLE = [
    *(("ppo", env, REGION) for env in ("box2d/lunar_lander", "mujoco/half_cheetah")),
    *((algorithm, env, REGION) for algorithm in ("ippo", "mappo") for env in TEAMS),
    *(
        (algorithm, env, GRADIENT)
        for algorithm in ("ddpg", "td3")
        for env in ("mujoco/half_cheetah", "box2d/lunar_lander_continuous")
    ),
    *((algorithm, env, GRADIENT) for algorithm in ("maddpg", "matd3") for env in TEAMS),
    # Tasks whose episodes end within these few frames.
    *((algorithm, "smax/3m", SIL) for algorithm in ("ppo", "mappo")),
    *((algorithm, env, RETURNS) for algorithm in ("mappo", "maddpg") for env in ("mpe/simple_spread", "smax/3m")),
    *((algorithm, env, RETURNS) for algorithm, env in (("dqn", "box2d/lunar_lander"), ("idqn", "smax/3m"))),
    *(("ppo", env, NOVELTY) for env in ("box2d/lunar_lander", "mujoco/half_cheetah", "toy/four_rooms")),
    *((algorithm, env, NOVELTY) for algorithm in ("ippo", "mappo", "maddpg") for env in TEAMS),
    *((algorithm, "mujoco/half_cheetah", NOVELTY) for algorithm in ("ddpg", "td3")),
    *(
        (algorithm, env, NOVELTY)
        for algorithm in ("ppo", "dqn")
        for env in ("toy/cliff_walking", "toy/dark_chamber", "classic/cartpole", "classic/mountain_car")
    ),
    ("dqn", "box2d/lunar_lander", NOVELTY),
    ("idqn", "smax/3m", NOVELTY),
]
NEEDS = {
    "toy": "torch",
    "classic": "gymnasium",
    "box2d": "Box2D",
    "mujoco": "mujoco",
    "mamujoco": "gymnasium_robotics",
    "mpe": "mpe2",
    "smax": "jaxmarl",
}


def run(folder: Path, *overrides: str) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """The algorithm's parameters after a run, and the rows of its metrics."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", [*overrides, f"run_folder={folder}"]), resolve=True)
    del config["run_folder"]
    trainer = start(config, folder)
    try:
        trainer.run()
        parameters = {name: p.detach().clone() for name, p in trainer.algorithm.named_parameters()}
    finally:
        trainer.close()
        release(folder)
    with (folder / "metrics.csv").open(newline="") as stream:
        return parameters, list(csv.DictReader(stream))


def assert_used(rows: list[dict[str, str]], memory: str) -> None:
    """Rows were held, and memory acted, at two checkpoints; of episodes it has to see some first."""
    for frames in ("512",) if memory == "reflection" else ("256", "512"):
        row = next(row for row in rows if row["frames"] == frames)
        assert float(row[f"memory/{memory}/rows"]) > 0
        assert float(row[f"memory/{memory}/{STRENGTH[memory]}"]) > 0, row
        assert memory not in USED or float(row[f"memory/{memory}/used"]) > 0, row


@pytest.mark.slow
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("algorithm", "env", "memory"), TABLE, ids=lambda x: x if isinstance(x, str) else "")
def test_memory_is_used(algorithm: str, env: str, memory: list[str], scope: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[env.partition("/")[0]])
    frames = OFF_POLICY if algorithm in OFF else ON_POLICY
    _, rows = run(tmp_path / "run", f"env={env}", f"algorithm={algorithm}", *SMALL, *frames, *memory, f"scope={scope}")
    assert_used(rows, memory[0][8:-1])


TOYS = [
    ("mappo", "toy/masked_duel", REGION),
    ("ippo", "toy/rendezvous", REGION),
    ("maddpg", "toy/masked_duel", GRADIENT),
    ("matd3", "toy/rendezvous", GRADIENT),
    ("ppo", "toy/masked_duel", SIL),
    ("mappo", "toy/masked_duel", SIL),
    ("ppo", "toy/rendezvous", RETURNS),
    ("mappo", "toy/masked_duel", RETURNS),
    ("td3", "toy/rendezvous", RETURNS),
    ("maddpg", "toy/masked_duel", RETURNS),
    ("idqn", "toy/masked_duel", RETURNS),
    ("ppo", "toy/masked_duel", NOVELTY),
    ("mappo", "toy/rendezvous", NOVELTY),
    ("td3", "toy/rendezvous", NOVELTY),
    ("mappo", "toy/masked_duel", REFLECTION),
    pytest.param("ippo", "toy/rendezvous", REFLECTION, marks=pytest.mark.slow),
    pytest.param("idqn", "toy/masked_duel", REFLECTION, marks=pytest.mark.slow),
    ("matd3", "toy/rendezvous", REFLECTION),
]


@pytest.mark.parametrize(("algorithm", "env", "memory"), TOYS, ids=lambda x: x if isinstance(x, str) else "")
def test_memory_acts_in_every_scope_and_not_at_strength_0(
    algorithm: str, env: str, memory: list[str], tmp_path: Path
) -> None:
    name = memory[0][8:-1]
    options = [f"env={env}", f"algorithm={algorithm}", *SMALL, *(OFF_POLICY if algorithm in OFF else ON_POLICY)]
    host, _ = run(tmp_path / "host", *options)
    for scope in SCOPES:
        with_memory, rows = run(tmp_path / scope, *options, *memory, f"scope={scope}")
        assert_used(rows, name)
        assert any(not torch.equal(p, with_memory[key]) for key, p in host.items())
        idle, rows = run(tmp_path / f"{scope}_0", *options, *memory, f"scope={scope}", f"memory.{name}.strength=0")
        assert float(rows[-1][f"memory/{name}/rows"]) > 0
        assert all(torch.equal(p, idle[key]) for key, p in host.items())


FEATURES = [("mappo", REGION), ("ppo", REGION), ("maddpg", GRADIENT), ("itd3", GRADIENT)]


@pytest.mark.parametrize(("algorithm", "memory"), FEATURES, ids=lambda x: x if isinstance(x, str) else "")
def test_rows_are_found_by_what_the_hosts_actor_sees(algorithm: str, memory: list[str], tmp_path: Path) -> None:
    """The features of unequal agents, of one network or one each, are theirs; at strength 0 nothing changes."""
    name = memory[0][8:-1]
    options = ["env=toy/masked_duel", f"algorithm={algorithm}", *SMALL]
    options += OFF_POLICY if algorithm in OFF else ON_POLICY
    host, _ = run(tmp_path / "host", *options)
    for scope in SCOPES[1:]:
        found = [*memory, f"memory.{name}.keys=features", f"scope={scope}"]
        with_memory, rows = run(tmp_path / scope, *options, *found)
        assert_used(rows, name)
        assert any(not torch.equal(p, with_memory[key]) for key, p in host.items())
    idle, _ = run(tmp_path / "idle", *options, *found, f"memory.{name}.strength=0")
    assert all(torch.equal(p, idle[key]) for key, p in host.items())


GEM = ["memory=[gem]", "memory.gem.refresh_every=40", "memory.gem.capacity=300"]
GEM_HOSTS = [
    pytest.param(*("td3", "toy/rendezvous", "per_agent", []), marks=pytest.mark.slow),
    ("matd3", "toy/rendezvous", "centralized", ["env.kwargs={unequal: true}"]),
    pytest.param(*("itd3", "toy/rendezvous", "shared", ["memory.gem.estimator=max"]), marks=pytest.mark.slow),
    pytest.param(*("ddpg", "toy/rendezvous", "per_agent", []), marks=pytest.mark.slow),
    pytest.param(*("ddpg", "toy/masked_duel", "per_agent", ["algorithm.critics=2"]), marks=pytest.mark.slow),
    ("maddpg", "toy/masked_duel", "centralized", ["memory.gem.max_rollout=3"]),
    pytest.param(
        *("maddpg", "toy/rendezvous", "centralized"),
        ["algorithm.critics=2", "memory.gem.estimator=lambda", "memory.gem.max_rollout=null"],
        marks=pytest.mark.slow,
    ),
    pytest.param(*("dqn", "toy/masked_duel", "per_agent", []), marks=pytest.mark.slow),
    ("idqn", "toy/masked_duel", "shared", ["algorithm.critics=2", "algorithm.target_every=8"]),
    pytest.param(*("ppo", "toy/rendezvous", "per_agent", []), marks=pytest.mark.slow),
    pytest.param(
        *("ippo", "toy/rendezvous", "shared", ["memory.gem.coefficient=1e-6", "memory.gem.value_coefficient=1"]),
        marks=pytest.mark.slow,
    ),
    ("mappo", "toy/masked_duel", "centralized", ["algorithm.normalise_observations=true"]),
]


@pytest.mark.parametrize(("algorithm", "env", "reach", "more"), GEM_HOSTS, ids=lambda x: str(x))
def test_returns_of_the_replay_are_learnt_and_not_at_strength_0(
    algorithm: str, env: str, reach: str, more: list[str], tmp_path: Path
) -> None:
    options = [f"env={env}", f"algorithm={algorithm}", *SMALL, *(OFF_POLICY if algorithm in OFF else ON_POLICY)]
    host, _ = run(tmp_path / "host", *options, *(key for key in more if not key.startswith("memory")))
    mine, rows = run(tmp_path / "run", *options, *GEM, *more, f"scope={reach}")
    for frames in ("256", "512"):
        row = {key[11:]: float(x) for key, x in next(row for row in rows if row["frames"] == frames).items()
               if key.startswith("memory/gem/")}  # fmt: skip
        assert min(row["rows"], row["used"], row["effective_strength"]) > 0, row
        assert "lead" not in row or abs(row["lead"]) > 1e-3, "the targets are those of one step"
    assert any(not torch.equal(p, mine[key]) for key, p in host.items())
    idle, rows = run(tmp_path / "idle", *options, *GEM, *more, "memory.gem.strength=0")
    assert float(rows[-1]["memory/gem/rows"]) > 0
    assert all(torch.equal(p, idle[key]) for key, p in host.items())


def test_states_are_replayed_for_a_memory_whose_host_reads_observations_only(tmp_path: Path) -> None:
    options = ["env=toy/rendezvous", "algorithm=itd3", "scope=centralized", *SMALL, *OFF_POLICY, *GRADIENT]
    _, rows = run(tmp_path / "run", *options)
    assert_used(rows, "mnemo_gradient")


@pytest.mark.parametrize("algorithm", ["iddpg", "itd3"])
def test_returns_are_remembered_beside_critics_of_observations_in_the_state(algorithm: str, tmp_path: Path) -> None:
    """The replay keeps the state for what is recalled, and nothing for what is written of the collection."""
    options = ["env=toy/rendezvous", f"algorithm={algorithm}", "scope=centralized", *SMALL, *OFF_POLICY, *RETURNS]
    _, rows = run(tmp_path / "run", *options)
    assert_used(rows, "return_memory")


def test_sil_learns_continuous_actions_with_everything_normalised(tmp_path: Path) -> None:
    options = ["env=toy/rendezvous", "algorithm=mappo", "env.kwargs={unequal: true}", *SMALL, *ON_POLICY, *SIL]
    options += ["algorithm.normalise_observations=true", "algorithm.value_norm=true", "memory.sil.coefficient=1"]
    options += ["memory.sil.clip=null"]
    host, _ = run(tmp_path / "host", *[option for option in options if "sil" not in option])
    mine, rows = run(tmp_path / "run", *options)
    assert float(rows[-1]["memory/sil/rows"]) > 0 and float(rows[-1]["memory/sil/used"]) > 0
    assert any(not torch.equal(p, mine[key]) for key, p in host.items())


@pytest.mark.parametrize(("algorithm", "frames"), [("mappo", ON_POLICY), ("ddpg", OFF_POLICY)], ids=["mappo", "ddpg"])
def test_reported_returns_are_the_environments(algorithm: str, frames: list[str], tmp_path: Path) -> None:
    """Learning is paid some thousands for novelty; what is reported of episodes knows nothing of it."""
    options = ["env=toy/rendezvous", f"algorithm={algorithm}", *SMALL, *frames]
    _, plain = run(tmp_path / "plain", *options)
    _, rows = run(tmp_path / "run", *options, *NOVELTY, "memory.coarse_fine.eta=1000")
    assert float(rows[-1]["memory/coarse_fine/bonus"]) > 100
    for name in ("train/return", "evaluation/return"):
        for mine, theirs in zip(rows, plain, strict=True):
            assert not mine[name] or abs(float(mine[name]) - float(theirs[name])) < 100


@pytest.mark.parametrize(("algorithm", "frames"), [("mappo", ON_POLICY), ("idqn", OFF_POLICY)], ids=["mappo", "idqn"])
def test_adamemento_is_both_its_operators_and_the_host_without_either(
    algorithm: str, frames: list[str], tmp_path: Path
) -> None:
    options = ["env=toy/masked_duel", f"algorithm={algorithm}", *SMALL, *frames]
    parts = ("reflection", "coarse_fine")
    both = ["memory=[adamemento]", *(f"memory.{part}.{key}" for part in parts for key in ("hidden=[16]", "batches=4"))]
    host, _ = run(tmp_path / "host", *options)
    mine, rows = run(tmp_path / "both", *options, *both, "memory.coarse_fine.eta=0.1")
    assert float(rows[-1]["memory/coarse_fine/bonus"]) != 0
    assert all(float(rows[-1][f"memory/{part}/rows"]) > 0 for part in parts)
    assert any(not torch.equal(p, mine[key]) for key, p in host.items())
    idle, rows = run(tmp_path / "idle", *options, *both, *(f"memory.{part}.strength=0" for part in parts))
    assert all(float(rows[-1][f"memory/{part}/rows"]) > 0 for part in parts)
    assert all(torch.equal(p, idle[key]) for key, p in host.items())


SPARSE = [
    *(("ppo", env) for env in ("toy/dark_chamber", "toy/four_rooms", "classic/cartpole")),
    *(("ppo", env) for env in ("box2d/lunar_lander", "mujoco/hopper")),
    *((algorithm, "smax/3m") for algorithm in ("ippo", "mappo", "idqn")),
    *(("dqn", env) for env in ("classic/cartpole", "box2d/lunar_lander")),
    ("td3", "mujoco/hopper"),
]
"""Where some of the first episodes are successes, or at least better than others."""


@pytest.mark.slow
@pytest.mark.parametrize(("algorithm", "env"), SPARSE)
def test_adamemento_acts_where_there_are_successes(algorithm: str, env: str, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS[env.partition("/")[0]])
    options = [f"env={env}", f"algorithm={algorithm}", *SMALL, *(OFF_POLICY if algorithm in OFF else ON_POLICY)]
    options += ["training.total_frames=8192", "training.checkpoint_every_frames=8192"]
    options += ["training.evaluation_every_frames=8192", "memory=[adamemento]", "memory.coarse_fine.batches=4"]
    if algorithm in OFF:
        options.append("algorithm.capacity=8192")
    _, rows = run(tmp_path / "run", *options, *REFLECTION[1:])
    assert float(rows[-1]["memory/reflection/rows"]) > 0
    assert max(float(row["memory/reflection/used"] or 0) for row in rows) > 0, "memory never acted"
    assert float(rows[-1]["memory/coarse_fine/bonus"]) != 0


def test_two_memories_of_one_host_compose(tmp_path: Path) -> None:
    options = ["env=toy/masked_duel", "algorithm=mappo", *SMALL, *ON_POLICY, "memory=[return_memory,sil,mnemo_region]"]
    _, rows = run(tmp_path / "run", *options, *RETURNS[1:], *REGION[1:])
    for memory in ("return_memory", "sil", "mnemo_region"):
        assert_used(rows, memory)
