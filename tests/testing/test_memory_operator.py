"""The contract of memory operators: every operator of the library keeps it, and it catches those that do not."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import get_object
from omegaconf import OmegaConf
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from marl_memory.cli import config_dir
from marl_memory.memory.barycenter_region import BarycenterRegion
from marl_memory.memory.coarse_fine import CoarseFineNovelty
from marl_memory.memory.gradient_field import GradientField
from marl_memory.memory.operator import MemoryOperator, Stage, put
from marl_memory.memory.return_memory import ReturnMemory
from marl_memory.memory.scope import SCOPES
from marl_memory.memory.self_imitation import SelfImitation
from marl_memory.memory.store import POLICIES
from marl_memory.spec import TaskSpec
from marl_memory.testing import check_memory_operator
from marl_memory.testing.batches import CRITICS, SPECS
from tests.memory.tasks import FIRST

CAPACITY = 48
SMALL = {"capacity": CAPACITY, "neighbours": 4, "min_rows": 1}
SMALL_NETWORKS = {"hidden": (8,), "latent": 4, "batches": 2, "batch_size": 16}
# Of an operator that learns to act: it does so after the first episodes, however little it knows.
EAGER = {"least": 1, "alike": 10, "kappa": 0.05}

# ----------------------------------------------------------------------------------------------- operators of the house


def configured() -> list[Any]:
    """Each operator that a config names, in every scope and with every policy that it takes.

    Fast are every scope with the first policy, and every policy in the first scope.
    """
    found = []
    for file in sorted((config_dir() / "memory").glob("*.yaml")):
        node: Any = OmegaConf.load(file)
        if "_target_" not in node:
            continue  # several operators, each with a file of its own
        target = get_object(node["_target_"])
        assert issubclass(target, MemoryOperator), file
        if target.companion:
            continue  # it remembers nothing: its test stands beside that of the operator that it belongs to
        takes = inspect.signature(target).parameters
        sizes = {**SMALL, **SMALL_NETWORKS, **EAGER, "n_critics": CRITICS}
        small = {key: value for key, value in sizes.items() if key in takes}
        policies = getattr(inspect.getmodule(target), "POLICIES", POLICIES)
        for scope in SCOPES if "scope" in takes else (None,):
            for policy in policies if "policy" in takes else (None,):
                options = {key: value for key, value in (("scope", scope), ("policy", policy)) if value is not None}
                slow = scope not in (None, SCOPES[0]) and policy not in (None, policies[0])
                make, name = partial(target, **small, **options), "-".join([file.stem, *options.values()])
                found.append(pytest.param(make, id=name, marks=[pytest.mark.slow] * slow))
    return found


@pytest.mark.parametrize("make", configured())
def test_an_operator_keeps_the_contract(make: Any) -> None:
    check_memory_operator(make, capacity=CAPACITY, trainable="lr" in inspect.signature(make.func).parameters)


def test_the_defaults_keep_the_contract_too() -> None:
    check_memory_operator(GradientField, specs=SPECS[:1], capacity=4096)


@pytest.mark.parametrize("scope", FIRST)
@pytest.mark.parametrize(
    "options", [{"projection": 3}, {"keep_neighbours": 5, "keep_rows": 512}, {"payloads": "shuffled"}], ids=str
)
def test_options_keep_the_contract(options: dict[str, Any], scope: str) -> None:
    check_memory_operator(partial(GradientField, **SMALL, **options, scope=scope), capacity=CAPACITY)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("target", [GradientField, BarycenterRegion], ids=["gradient", "region"])
def test_rows_found_by_features_keep_the_contract(target: Any, scope: str) -> None:
    options = {"keys": "features", "feature_size": 6}
    check_memory_operator(partial(target, **SMALL, **options, scope=scope), capacity=CAPACITY)


# ----------------------------------------------------------------------------------------------- broken operators


class WritesInForward(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        self.write(td)
        return td


class RecallsItsOwnRow(GradientField):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.trace._numbers = lambda td: None  # type: ignore[method-assign]


class LeaksAgents(GradientField):
    """Says that agents are private, and is not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "scope": "shared"})


class RecallsTheDead(GradientField):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scope.living = lambda alive: self.scope.to_banks(torch.ones_like(alive), trailing=0)  # type: ignore[method-assign]


class ActsOnTheDead(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        gradient = td.get(self.spec.keys.action_gradient).clone()
        super().forward(td)
        dead = ~td.get(self.spec.keys.alive).unsqueeze(-1)
        put(td, self.spec.keys.action_gradient, torch.where(dead, 2 * gradient, td.get(self.spec.keys.action_gradient)))
        return td


class ForgetsAfterTheWrap(GradientField):
    """Takes in no row any more once it is full."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        write = self.trace.write
        self.trace.write = lambda td, payload: write(td, payload) if len(self) < CAPACITY else None  # type: ignore[method-assign]


class KeepsTheOldest(GradientField):
    """Says that it keeps the newest rows, and keeps the heaviest."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "policy": "merge"})


class LosesState(GradientField):
    """Holds what it knows in no buffer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.writes = 0

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        put(td, self.spec.keys.action_gradient, td.get(self.spec.keys.action_gradient) * (1 + 0.1 * self.writes))
        return td

    def write(self, td: TensorDictBase) -> None:
        super().write(td)
        self.writes += 1


class UsesPadding(GradientField):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scope.valid.fill_(True)


class GivesMaskedMass(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        before = td.get(self.spec.keys.action_gradient).clone()
        super().forward(td)
        after = td.get(self.spec.keys.action_gradient)
        acted = (after != before).any(-1, keepdim=True)
        put(td, self.spec.keys.action_gradient, torch.where(acted & ~self._allowed(td), 1.0, after))
        return td


class Grows(GradientField):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(0))

    def write(self, td: TensorDictBase) -> None:
        super().write(td)
        self.seen: Tensor = torch.cat([self.seen, td.get(self.fresh).flatten()])


class GrowsInLength(GradientField):
    def __len__(self) -> int:
        return int(self.trace.store.written.sum())


class ReadsAnUndeclaredKey(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        reward = td.get(("next", *self.spec.keys.reward))
        changed = td.get(self.report)[..., 2:3] > 0
        gradient = td.get(self.spec.keys.action_gradient)
        put(td, self.spec.keys.action_gradient, torch.where(changed, gradient * reward, gradient))
        return td


class ReadsAnUndeclaredKeyIfItIsThere(GradientField):
    def write(self, td: TensorDictBase) -> None:
        super().write(td)
        if (action := td.get(self.spec.keys.action, None)) is not None:
            self.pairs += action.float().mean().abs()


class SetsAnUndeclaredKey(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        td.get(self.spec.keys.learn_reward).add_(1.0)
        return td


class WritesIntoTheBatch(GradientField):
    def write(self, td: TensorDictBase) -> None:
        super().write(td)
        td.get(self.fresh).mul_(2.0)


class KeepsAView(GradientField):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("last", torch.zeros(()))

    def write(self, td: TensorDictBase) -> None:
        super().write(td)
        self.last = td.get(self.spec.keys.learn_reward).view(-1)[0]


class DrawsFromTheGlobalGenerator(GradientField):
    def write(self, td: TensorDictBase) -> None:
        super().write(td)
        self.pairs += 1e-9 * torch.rand(())


class AddsAParameter(GradientField):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.temperature = torch.nn.Parameter(torch.ones(()))


class ActsWhenEmpty(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        gradient = td.get(self.spec.keys.action_gradient)
        put(td, self.spec.keys.action_gradient, gradient * (1 + 1e-6))
        return td


class ActsAtStrength0(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        strength, self.strength = self.strength, max(self.strength, 0.1)
        super().forward(td)
        self.strength = strength
        return td


class TakesFlatBatchesOnly(GradientField):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        assert td.ndim == 1
        return super().forward(td)


class ForgetsHalf(GradientField):
    def clear(self) -> None:
        self.pairs.zero_()


class NeverActs(GradientField):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "beta": 0.0})


class WritesBeforeItReads(MemoryOperator):
    """A running mean of the value targets, into which a row's own goes first."""

    stage = Stage.TARGET
    writes_on = "collection"

    def __init__(self, *, spec: TaskSpec, seed: int) -> None:
        super().__init__()
        self.keys = spec.keys
        self.in_keys, self.out_keys = [self.keys.value_target, self.keys.alive], [self.keys.value_target]
        self.write_keys = self.in_keys
        self.register_buffer("sum", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    sum: Tensor
    count: Tensor

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        target = td.get(self.keys.value_target)
        share = 0.5 * self.strength * (td.get(self.keys.alive).unsqueeze(-1) & (self.count > 0))
        mean = self.sum / self.count.clamp(min=1)
        put(td, self.keys.value_target, torch.where(share > 0, torch.lerp(target, mean, share), target))
        return td

    def write(self, td: TensorDictBase) -> None:
        alive = td.get(self.keys.alive)
        self.sum += td.get(self.keys.value_target)[alive][:, 0].sum()
        self.count += alive.sum()

    def clear(self) -> None:
        self.sum.zero_()
        self.count.zero_()

    def __len__(self) -> int:
        return int(self.count > 0)


class DrawsInForward(SelfImitation):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        self.offset.uniform_(generator=self.generator)
        return super().forward(td)


class ReplaysMaskedActions(SelfImitation):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        k, rows = self.spec.keys, (*self.spec.keys.replay, "self_imitation")
        put(td, (*rows, *k.action), td.get((*rows, *k.action_mask)).int().argmin(-1))
        return td


class ReplaysBesideTheDead(SelfImitation):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        alive = {self.spec.keys.alive: torch.ones_like(td.get(self.spec.keys.alive))}
        lively = super().forward(TensorDict(alive, batch_size=td.batch_size))
        for key in self.entries:
            put(td, key, lively.get(key))
        return td


class RemembersRunningEpisodes(SelfImitation):
    def write(self, td: TensorDictBase) -> None:
        ended = td.clone()
        ended.get(("next", self.spec.keys.done)).fill_(True)
        super().write(ended)


class RecallsItsOwnReturn(ReturnMemory):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.trace._numbers = lambda td: None  # type: ignore[method-assign]


class OverwritesTheEnvironmentsReward(CoarseFineNovelty):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.in_keys = [*self.in_keys, ("next", *self.spec.keys.reward)]
        self.out_keys = [*self.out_keys, ("next", *self.spec.keys.reward)]

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        put(td, ("next", *self.spec.keys.reward), td.get(self.spec.keys.learn_reward))
        return td


class RewardsInsteadOfTheEnvironment(CoarseFineNovelty):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        known = td.get(self.report)[..., :1] > 0
        key = self.spec.keys.learn_reward
        put(td, key, torch.where(known, td.get(self.report)[..., -1:], td.get(key)))
        return td


class RewardsTheDead(CoarseFineNovelty):
    """Of a team whose rewards are not common."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "scope": "centralized"})
        self.everybodys = True


class LearnsFromPadding(CoarseFineNovelty):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.scope.padded = False
        self.model.valid.fill_(True)


class LosesItsOptimiser(CoarseFineNovelty):
    """Goes on from a checkpoint with slots of 0."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model.optimiser.named_state = lambda named: {}  # type: ignore[method-assign]


class LearnsInForward(CoarseFineNovelty):
    def forward(self, td: TensorDictBase) -> TensorDictBase:
        super().forward(td)
        self.learn()
        return td


CONTINUOUS, MASKED = SPECS[0], SPECS[1]

BROKEN: list[tuple[type[MemoryOperator], str]] = [
    (AddsAParameter, "No trainable parameter.*temperature"),
    (DrawsFromTheGlobalGenerator, "own generator only.*forward or write draws.*torch"),
    (ActsWhenEmpty, "An empty memory"),
    (Grows, "Capacity is never exceeded.*shapes of .'seen"),
    (GrowsInLength, "Capacity is never exceeded.*more than capacity=48"),
    (LosesState, "round trip.*something is in no buffer"),
    (WritesInForward, "Forward changes nothing but out_keys.*forward changes the operator's"),
    (SetsAnUndeclaredKey, "Forward changes nothing but out_keys.*'reward'.*not in out_keys"),
    (WritesIntoTheBatch, "Write changes only the operator.*'fresh'"),
    (KeepsAView, "share memory with the batch"),
    (ReadsAnUndeclaredKey, "Only declared keys are read.*not in in_keys"),
    (ReadsAnUndeclaredKeyIfItIsThere, "Only declared keys are read.*not in write_keys"),
    (ActsAtStrength0, "Strength 0"),
    (TakesFlatBatchesOnly, "Any batch shape"),
    (ForgetsHalf, "After clear"),
    (ForgetsAfterTheWrap, "A full memory remembers"),
    (KeepsTheOldest, "exactly the newest"),
    (RecallsItsOwnRow, "A row never recalls itself"),
    (WritesBeforeItReads, "A row never recalls itself.*writes_on='collection'"),
    (LeaksAgents, "No agent recalls another's rows.*first agent"),
    (RecallsTheDead, "Rows of dead agents.*is written"),
    (ActsOnTheDead, "Rows of dead agents.*acts on agents that are dead"),
    (NeverActs, "nothing that a host reads is changed"),
    (UsesPadding, "Padding enters nothing"),
    (GivesMaskedMass, "Masked actions stay at zero"),
    (DrawsInForward, "Forward changes nothing.*forward changes the operator's"),
    (ReplaysMaskedActions, "Masked actions stay at zero.*was masked where it was taken"),
    (ReplaysBesideTheDead, "Rows of dead agents.*acts on agents that are dead"),
    (RemembersRunningEpisodes, "Nothing is remembered of an episode before it ends.*still runs"),
    (RecallsItsOwnReturn, "A row never recalls itself"),
    (OverwritesTheEnvironmentsReward, "never overwritten.*'next', 'agents', 'reward'"),
    (RewardsInsteadOfTheEnvironment, "does not depend on what is there.*lost or scaled"),
    (RewardsTheDead, "Rows of dead agents.*acts on agents that are dead"),
    (LearnsFromPadding, "Padding enters nothing"),
    (LosesItsOptimiser, "as if it had never stopped.*autoencoder"),
    (LearnsInForward, "Forward changes nothing but out_keys.*forward changes the operator's"),
]


@pytest.mark.parametrize(("broken", "message"), BROKEN, ids=lambda x: getattr(x, "__name__", ""))
def test_a_broken_operator_is_caught(broken: type[MemoryOperator], message: str) -> None:
    options: dict[str, Any] = {}
    if issubclass(broken, GradientField):
        options = {**SMALL, "scope": "per_agent", "policy": "fifo"}
    elif issubclass(broken, ReturnMemory):
        options = {**SMALL, "scope": "per_agent"}
    elif issubclass(broken, SelfImitation):
        options = {"scope": "per_agent", "capacity": CAPACITY}
    elif issubclass(broken, CoarseFineNovelty):
        options = {"scope": "per_agent", "capacity": CAPACITY, **SMALL_NETWORKS}
    masked = (UsesPadding, GivesMaskedMass, ReplaysMaskedActions, RewardsTheDead, LearnsFromPadding)
    specs = (MASKED,) if broken in masked else (CONTINUOUS,)
    promises: dict[str, Any] = {"private": True} if broken is LeaksAgents else {}
    promises |= {"holds": "newest"} if broken is KeepsTheOldest else {}
    with pytest.raises(AssertionError, match=f"^{broken.__name__}, {specs[0].name}: .*{message}"):
        check_memory_operator(partial(broken, **options), specs=specs, capacity=CAPACITY, **promises)


def test_an_operator_that_admits_no_task_is_named_as_such() -> None:
    with pytest.raises(ValueError, match=r"(?s)admits none of the tasks.*scope='nobody'"):
        check_memory_operator(partial(GradientField, scope="nobody"))
