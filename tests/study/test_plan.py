"""A study's file and its command line become runs, and what does not fit is said before anything is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from marl_memory.study.plan import Plan, as_json, check_builds, make_plan, other_study
from marl_memory.training.config import config_dir, options
from marl_memory.training.hydra_errors import ConfigError
from tests.study.studies import TINY, write

Planner = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path) -> Planner:
    """Makes the plan of a study's text and words."""

    def made(*words: str, text: str = TINY) -> Plan:
        return make_plan(["study=tiny", "--config-dir", str(write(tmp_path, text)), *words])

    return made


def test_every_arm_plays_every_task_with_every_seed(plan: Planner) -> None:
    made = plan(
        text=TINY.replace("  meet: []", "  meet: []\n  far: [env.kwargs.max_steps=30, env.max_episode_steps=30]")
    )
    assert list(made.configs)[:4] == [
        *(("meet", arm, 0) for arm in ("no_memory", "strength_0", "shared")),
        ("far", "no_memory", 0),
    ]
    assert len(made.configs) == 2 * 3 * 2
    shared = made.configs["far", "shared", 1]
    assert (shared["seed"], shared["scope"], shared["memory"]["mnemo_region"]["scope"]) == (1, "shared", "shared")
    assert (shared["training"]["total_frames"], shared["env"]["kwargs"]["max_steps"]) == (256, 30)
    assert not made.configs["far", "no_memory", 0].get("memory")
    assert made.folder == Path("runs/study/tiny")
    assert made.study.baseline_of("shared") == "no_memory"


def test_arms_are_crossed(plan: Planner) -> None:
    made = plan("study.cross={local: [algorithm.centralised_critic=false], central: algorithm.centralised_critic=true}")
    assert list(made.study.arms)[:3] == ["no_memory+local", "no_memory+central", "strength_0+local"]
    assert made.study.equal == [["no_memory+local", "strength_0+local"], ["no_memory+central", "strength_0+central"]]
    assert made.study.baseline_of("shared+central") == "no_memory+central"
    assert made.configs["meet", "shared+local", 0]["algorithm"]["centralised_critic"] is False


def test_the_command_line_changes_the_file_and_all_runs(plan: Planner) -> None:
    made = plan(
        "study.arms=[shared,no_memory]", "study.equal=[]", "study.seeds=[7]", "algorithm.lr=0.5", "study.budget=512"
    )
    assert list(made.configs) == [("meet", "shared", 7), ("meet", "no_memory", 7)]
    assert made.study.baseline == "shared"
    for config in made.configs.values():
        assert (config["algorithm"]["lr"], config["training"]["total_frames"]) == (0.5, 512)


def test_keys_reach_the_parts_of_a_composed_memory(plan: Planner) -> None:
    keys = "[memory.reflection.capacity=64, memory.coarse_fine.latent=3, memory.cloning.coefficient=0.5]"
    arms = ("study.arms={none: ['memory=[]'], both: ['memory=[adamemento]'], one: ['memory=[coarse_fine]']}",)
    made = plan(
        *arms,
        "study.equal=[]",
        "study.budget=8192",
        "study.common=[env=toy/masked_duel,algorithm=mappo]",
        f"study.tasks={{meet: {keys}}}",
    )
    both, one = (made.configs["meet", arm, 0]["memory"] for arm in ("both", "one"))
    assert (both["reflection"]["capacity"], both["coarse_fine"]["latent"], both["cloning"]["coefficient"]) == (
        64,
        3,
        0.5,
    )
    assert list(one) == ["coarse_fine"] and one["coarse_fine"]["latent"] == 3


def test_an_operator_is_chosen_by_name(plan: Planner) -> None:
    text = TINY.replace("  - algorithm.minibatches=1\n  - algorithm.epochs=1\n", "").replace(
        "env=toy/rendezvous", "env=mpe/simple_spread"
    )
    made = plan("study.operator=mnemo_gradient", "algorithm=maddpg", text=text)
    assert list(made.configs["meet", "shared", 0]["memory"]) == ["mnemo_gradient"]
    assert made.configs["meet", "strength_0", 0]["memory"]["mnemo_gradient"]["strength"] == 0


@pytest.mark.parametrize(
    ("words", "text", "said"),
    [
        (["study.arms.shared=[scopes=shared]"], TINY, "task meet, arm shared: scopes is unknown"),
        (["study.arms.shared=[memory.mnemo_region.capacitty=3]"], TINY, "arm shared: memory.mnemo_region.capacitty"),
        (["study.arms.twin=[scope=shared]"], TINY, "arms shared and twin are the same configuration on task meet"),
        (["study.arms.slow=[training.n_envs=3]"], TINY, "arm no_memory ends at 256 frames, arm slow at 288"),
        (["study.arms=[no_memory,shraed]"], TINY, "there is no 'shraed': did you mean shared?"),
        (["study.baseline=no_memry"], TINY, "there is no 'no_memry': did you mean no_memory?"),
        (["study.seeds=[0,0]"], TINY, "study.seeds=[0, 0] must be different whole numbers"),
        (["study.seeds=[]"], TINY, "study.seeds is empty"),
        (["study.seeds=3"], TINY, "study.seeds=3 must be a list of whole numbers"),
        (["study.workers=0"], TINY, "study.workers=0 must be a whole number of at least 1"),
        (["study.budgett=3"], TINY, "study.budgett=3 is unknown, nothing reads it: did you mean budget?"),
        (["study.arms.shared=3"], TINY, "study.arms.shared=3 must be a list of overrides"),
        (["study.seeds=1,2"], TINY, "study.seeds='1,2' must be a list of whole numbers"),
        (["study.arms.shared=[scope"], TINY, "while parsing a flow sequence"),
        (["training.total_frames=512"], TINY, "training.total_frames=512 has no effect beside study.budget=256"),
        (["seed=3"], TINY, "seed=3: a study sets seed itself; give study.seeds"),
        (["run_folder=x"], TINY, "give study.folder"),
        (["training.stop_at_frames=64"], TINY, "give study.budget"),
        (["study.arms.shared=[seed=3]"], TINY, "a study sets seed itself"),
        (["algorithm.lr=-1"], TINY, None),
        ([], TINY.replace("no_memory:", "off:"), "stand in quotes"),
        ([], TINY.replace("question: Does the machinery work?", ""), "study.question is missing"),
        ([], "[1, 2]", "must hold a mapping"),
        ([], TINY + "\nbad: [", "while parsing a flow node"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said(plan: Planner, words: list[str], text: str, said: str | None) -> None:
    with pytest.raises(ConfigError) as caught:  # noqa: PT012
        check_builds(plan(*words, text=text))
    assert (said or "task meet, arm no_memory: algorithm.lr=-1") in str(caught.value).replace("\n", " ")


def test_a_word_that_every_arm_sets_otherwise_is_refused(plan: Planner) -> None:
    text = TINY.replace("[scope=shared]", "[scope=shared, algorithm.lr=0.1]")
    plan("algorithm.lr=0.2", text=text)
    for arm in (
        'no_memory: ["memory=[]"',
        'strength_0: ["memory.${operator}.strength=0.0"',
    ):
        text = text.replace(arm, f"{arm}, algorithm.lr=0.1")
    with pytest.raises(ConfigError, match="algorithm.lr=0.2 has no effect: every arm of the study sets algorithm.lr"):
        plan("algorithm.lr=0.2", text=text)


def test_studies_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quick"):
        make_plan([])
    with pytest.raises(ConfigError, match="study=quik does not exist: did you mean quick"):
        make_plan(["study=quik"])


def test_a_capacity_that_cannot_be_shared_equally(plan: Planner) -> None:
    made = plan(
        "study.arms.odd=[scope=per_agent,memory.mnemo_region.capacity=65]",
        "study.arms=[no_memory,shared]",
        "study.equal=[]",
    )
    check_builds(made)
    with pytest.raises(ConfigError, match=r"capacity=65 can not be an equal budget.*room for 64 payloads"):
        check_builds(plan("study.arms.odd=[scope=per_agent,memory.mnemo_region.capacity=65]"))


def test_what_only_a_constructor_can_judge(plan: Planner) -> None:
    with pytest.raises(ConfigError, match="arm few: neighbours=100 are more than the 64 rows"):
        check_builds(plan("study.arms.few=[memory.mnemo_region.neighbours=100]"))
    text = TINY.replace("  - algorithm.minibatches=1\n  - algorithm.epochs=1\n", "")
    with pytest.raises(ConfigError, match="task meet, arm strength_0: memory=mnemo_region acts at the stage 'region'"):
        check_builds(plan("algorithm=maddpg", text=text))


def test_hosts_may_leave_out_a_companion_of_an_operator(plan: Planner) -> None:
    """`Cloning` comes with reflection, and a host with a replay has no stage for it."""
    text = TINY.replace("  - algorithm.minibatches=1\n  - algorithm.epochs=1\n", "").replace("mappo", "matd3")
    text = text.replace("mnemo_region", "reflection").replace("  - memory.${operator}.neighbours=4\n", "")
    check_builds(plan(text=text))


def test_a_folder_is_one_studys(plan: Planner) -> None:
    before = as_json(plan())
    assert other_study(before, plan("study.seeds=[0,1,2]")) is None
    assert other_study(before, plan("logger.quiet=false")) is None
    assert other_study(before, plan("study.arms=[no_memory,shared]", "study.equal=[]")) is None
    assert other_study(before, plan("algorithm.gamma=0.5")) == (
        "task meet, arm no_memory, seed 0 has algorithm.gamma=0.99 there, and 0.5 now"
    )
    before["study"]["name"] = "another"
    assert other_study(before, plan()) == "it holds study=another"


MANY_TASKS = {"adamemento_tasks", "operators_ppo", "scopes_gradient", "scopes_region"}
"""Studies that take seconds to plan."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in MANY_TASKS)) for name in options("study", [config_dir()])],
)
def test_the_studies_that_come_ready_can_be_planned(name: str) -> None:
    made = make_plan([f"study={name}"])
    assert len(made.study.seeds) >= 3
    assert len(made.configs) == len(made.study.arms) * len(made.study.tasks) * len(made.study.seeds)


@pytest.mark.slow
def test_a_thousand_runs_are_planned_in_ten_seconds(plan: Planner) -> None:
    arms = "".join(f"  arm_{i}: [algorithm.lr={i + 1}e-4]\n" for i in range(20))
    tasks = "".join(f"  task_{i}: [env.kwargs.max_steps={20 + i}, env.max_episode_steps={20 + i}]\n" for i in range(5))
    text = TINY.replace("  meet: []\n", tasks)
    text = text[: text.index("arms:")] + f"arms:\n{arms}seeds: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\nbudget: 256\n"
    began = time.process_time()
    assert len(plan(text=text).configs) == 1000
    assert time.process_time() - began <= 10
