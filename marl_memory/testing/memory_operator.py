"""What a `MemoryOperator` promises, property by property, checked on made-up batches of small tasks."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from marl_memory.memory.operator import MemoryOperator, Stage
from marl_memory.memory.policies import Best, Fifo, Merge
from marl_memory.memory.scope import Scope
from marl_memory.memory.store import RingStore
from marl_memory.spec import TaskSpec
from marl_memory.testing.batches import SPECS
from marl_memory.testing.case import (
    AWAY,
    MOST,
    ROWS,
    Case,
    Holds,
    changed,
    cloned,
    copy_of,
    leaves,
    path_of,
    state_of,
    step,
)


def check_memory_operator(
    make: Callable[..., MemoryOperator],
    *,
    specs: Sequence[TaskSpec] = SPECS,
    capacity: int | None = None,
    private: bool | None = None,
    holds: Holds | None = None,
    trainable: bool | None = None,
    seed: int = 0,
) -> None:
    """Raise AssertionError, with the property and how it is broken, if an operator does not keep the contract.

    ``check_memory_operator(partial(GradientField, scope="per_agent", policy="fifo", capacity=64, neighbours=4))``

    Args:
        make: builds the operator, as ``make(spec=TaskSpec, seed=int)``; small memories are checked faster.  A
            ValueError says that the operator does not admit that task.
        specs: the tasks; each is left out that the operator does not admit.
        capacity: the most that ``len`` may be; None: anything, but it must stop growing.
        private: whether no agent recalls another's rows; None: where a `Scope` ``per_agent`` is part of the operator.
        holds: ``newest``: exactly the newest rows, as they came; ``rows``: single rows until it is full; ``means``:
            sums of rows, of which none is known any more.  None: what its `RingStore` does; without one, ``means``.
        trainable: whether it has parameters; None: where it has a ``learn`` of its own.
        seed: of operators and batches.

    Raises:
        AssertionError: see above.
        ValueError: if the operator admits none of the tasks.
    """
    refused: list[str] = []
    for spec in specs:
        try:
            operator = make(spec=spec, seed=seed)
        except ValueError as error:
            refused.append(f"{spec.name}: {error}")
            continue
        parts = list(operator.modules())
        private_here = any(isinstance(part, Scope) and part.name == "per_agent" for part in parts)
        case = Case(
            make,
            spec,
            seed,
            capacity=capacity,
            private=private_here if private is None else private,
            holds=_holds(parts) if holds is None else holds,
            trainable=type(operator).learn is not MemoryOperator.learn if trainable is None else trainable,
        )
        for property_ in PROPERTIES:
            title = (property_.__doc__ or "").strip().rstrip(".")
            try:
                property_(case)
            except Exception as error:
                how = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
                raise AssertionError(f"{type(operator).__name__}, {spec.name}: {title!r} is broken: {how}") from error
    if len(refused) == len(specs):
        raise ValueError("the operator admits none of the tasks:\n" + "\n".join(refused))


def _holds(parts: list[nn.Module]) -> Holds:
    policies = [part.policy for part in parts if isinstance(part, RingStore)]
    if not policies:
        return "means"
    return "newest" if isinstance(policies[0], Fifo) else "rows" if isinstance(policies[0], Merge | Best) else "means"


# ----------------------------------------------------------------------------------------------------------- properties


def promises_its_parameters(case: Case) -> None:
    """No trainable parameter where none is promised."""
    found = [name for name, _ in case.build().named_parameters()]
    assert bool(found) == case.trainable, f"trainable={case.trainable}, and it has the parameters {found}"


def generator_states() -> dict[str, Any]:
    """Of the global generators."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    numpy = (legacy[1].tobytes(), legacy[2:])
    return {"torch": torch.get_rng_state(), "random": random.getstate(), "numpy": numpy}


def draws_from_its_own_generator(case: Case) -> None:
    """It draws from its own generator only."""

    before = generator_states()
    first, second = case.build(), case.build()
    assert not (drawn := changed(before, generator_states())), (
        f"the constructor draws from the global generator of {drawn}"
    )
    for turn in range(4):
        td = case.batch(turn)
        step(first, copy_of(td))
        step(second, td)
    assert not (drawn := changed(before, generator_states())), (
        f"forward or write draws from the global generator of {drawn}"
    )
    differing = changed(state_of(first), state_of(second))
    assert not differing, f"two operators of one seed that saw the same rows differ in {differing}"


def empty_is_absent(case: Case) -> None:
    """An empty memory leaves learning exactly unchanged."""
    operator = case.build()
    assert len(operator) == 0, f"len(operator) is {len(operator)} before anything was written"
    for room in (True, False):
        assert not case.recall(operator, case.batch(0, room=room)).acted.any(), "what the host reads is changed"


def stays_bounded(case: Case) -> None:
    """Capacity is never exceeded, and no buffer changes its shape."""
    operator, held = case.build(), [0]
    size, shapes, limit = operator.bytes, _shapes(operator), case.capacity
    while len(held) < 6 or len(set(held[-3:])) > 1:
        assert len(held) <= MOST, f"len(operator) still grows after {MOST} batches of {ROWS} team rows: {held[-1]}"
        step(operator, case.batch(len(held)))
        held.append(len(operator))
        different = changed(shapes, _shapes(operator))
        assert not different, f"writing changes the shapes of {different}"
        assert operator.bytes == size, f"bytes was {size}, and is {operator.bytes}"
        assert held[-1] > 0, "len(operator) is 0 after a write"
        assert limit is None or held[-1] <= limit, f"len(operator) is {held[-1]}, more than capacity={limit}"


def _shapes(operator: MemoryOperator) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in state_of(operator).items() if isinstance(x, torch.Tensor)}


def survives_a_checkpoint(case: Case) -> None:
    """A strict state_dict round trip keeps everything."""
    stream = io.BytesIO()
    torch.save(case.original.state_dict(), stream)
    stream.seek(0)
    other, probe = case.build(), case.batch(500)
    other.load_state_dict(torch.load(stream, weights_only=True), strict=True)
    other.set_progress(0, 0.0)
    differing = changed(state_of(case.original), state_of(other))
    assert not differing, f"after loading these differ: {differing}"
    assert len(other) == len(case.original), f"len was {len(case.original)}, and is {len(other)} after loading"
    differing = changed(case.recall(case.original, probe).read, case.recall(other, probe).read)
    assert not differing, f"what is recalled after loading differs in {differing}: something is in no buffer"


def goes_on_from_a_checkpoint(case: Case) -> None:
    """Loaded from a state_dict it goes on as if it had never stopped."""
    whole, other = case.build(), case.build()
    for turn in range(3):
        step(whole, case.batch(turn))
    other.load_state_dict(cloned(whole.state_dict()), strict=True)
    for operator in (whole, other):
        operator.set_progress(0, 0.0)
        for turn in (3, 4):
            step(operator, case.batch(turn))
    differing = changed(state_of(whole), state_of(other))
    assert not differing, f"two writes after loading these differ: {differing}"


def forward_changes_nothing(case: Case) -> None:
    """Forward changes nothing but out_keys."""
    operator, td = case.filled(), case.batch(501)
    before, entries = state_of(operator), leaves(td)
    first = case.recall(operator, td)
    assert not (differing := changed(before, state_of(operator))), f"forward changes the operator's {differing}"
    assert not (differing := changed(first.read, case.recall(operator, td).read)), f"a second forward gives {differing}"
    operator(td)
    declared = {path_of(key) for key in operator.out_keys}
    surplus = [key for key in changed(entries, leaves(td)) if key not in declared]
    assert not surplus, f"forward sets {surplus}, which are not in out_keys"


def leaves_the_environments_entries_alone(case: Case) -> None:
    """What environment and policy wrote is never overwritten, the environment's reward above all."""
    operator = case.template
    foreign = [path_of(key) for key in operator.out_keys if path_of(key)[0] != case.keys.learn]
    assert operator.stage is Stage.ACT or not foreign, f"out_keys holds {foreign}, which is not under 'learn'"


def adds_to_the_reward(case: Case) -> None:
    """What a REWARD operator adds to learn_reward does not depend on what is there."""
    if case.template.stage is not Stage.REWARD:
        return
    k, operator, more = case.keys, case.filled(), case.batch(519)
    less = copy_of(more)
    less.get(k.learn_reward).sub_(8.0)
    own = {path_of(key) for key in operator.out_keys} - {k.learn_reward, *operator.entries}
    assert not own, f"it sets {sorted(own)}; a REWARD operator adds to learn_reward"
    high, low = (case.recall(operator, td).read[k.learn_reward] for td in (more, less))
    assert torch.allclose(high - low, torch.tensor(8.0), atol=1e-3), "the reward that was there is lost or scaled"


def write_changes_only_itself(case: Case) -> None:
    """Write changes only the operator."""
    operator, td = case.filled(), case.batch(502)
    operator(td)
    entries, before = leaves(td), state_of(operator)
    operator.write(td)
    assert not (differing := changed(entries, leaves(td))), f"write changes the batch's {differing}"
    written = state_of(operator)
    assert changed(before, written), "write changes nothing"
    for key in leaves(td):
        td.get(key).zero_()
    assert not (differing := changed(written, state_of(operator))), f"{differing} share memory with the batch"


def declares_what_it_reads(case: Case) -> None:
    """Only declared keys are read."""
    whole, part, td = case.filled(), case.filled(), case.batch(503, room=False)
    less = td.select(*whole.in_keys, strict=False)
    try:
        read = case.recall(part, less).read
    except Exception as error:  # whatever comes of a missing entry
        raise AssertionError(f"forward fails without the entries that are not in in_keys: {error!r}") from error
    differing = changed(case.recall(whole, td).read, read)
    assert not differing, f"forward gives another {differing} without the entries that are not in in_keys"
    whole(td)
    whole.write(td)
    try:
        part.write(td.select(*whole.write_keys, strict=False))
    except Exception as error:
        raise AssertionError(f"write fails without the entries that are not in write_keys: {error!r}") from error
    differing = changed(state_of(whole), state_of(part))
    assert not differing, f"write leaves another {differing} without the entries that are not in write_keys"


def strength_0_is_absent(case: Case) -> None:
    """Strength 0 leaves learning exactly unchanged."""
    operator = case.filled()
    operator.strength = 0.0
    assert not case.recall(operator, case.batch(504)).acted.any(), "a filled memory of strength 0 changes what is read"


def takes_any_batch_shape(case: Case) -> None:
    """Any batch shape is taken, [12] as [3, 4] or [2, 3, 2]."""
    for shape in ((3, 4), (2, 3, 2)):
        flat, other = case.filled(), case.filled()
        td = case.batch(505, 12)
        shaped = td.reshape(*shape).clone().lock_()
        expected = {key: x.reshape(*shape, *x.shape[1:]) for key, x in case.recall(flat, td).read.items()}
        differing = changed(expected, case.recall(other, shaped).read, close=True)
        assert not differing, f"rows {shape} are told another {differing} than the same rows [12]"
        step(flat, td)
        step(other, shaped)
        differing = changed(state_of(flat), state_of(other), close=True)
        assert not differing, f"writing rows {shape} leaves another {differing} than the same rows [12]"
    step(case.filled(), case.batch(506, 1))


def waits_for_episodes_to_end(case: Case) -> None:
    """Nothing is remembered of an episode before it ends, wherever batches are cut."""
    if not hasattr(case.template, "n_envs"):
        return  # it knows of no episodes
    k, whole, parts = case.keys, case.build(), case.build()
    td = case.batch(517, 12).unlock_()
    ends = {k.terminated: torch.arange(12) == 5, k.truncated: torch.arange(12) == 9}
    ends[k.done] = ends[k.terminated] | ends[k.truncated]
    for name, at in ends.items():
        td.get(("next", name)).copy_(at.unsqueeze(-1))
    alive = ~ends[k.terminated].unsqueeze(-1).expand(12, case.spec.n_agents)
    td.get(("next", *k.alive)).copy_(alive)
    td.get(("next", *k.discount)).copy_(alive.unsqueeze(-1))
    lengths = []
    for piece in td.split(4):
        step(parts, piece.clone().lock_())
        lengths.append(len(parts))
    step(whole, td.lock_())
    assert lengths[0] == 0, f"it holds {lengths[0]} rows of an episode that still runs"
    assert 0 < lengths[1] <= lengths[2], f"after episodes ended it holds {lengths[1:]} rows"
    equal = len(set(zip(case.spec.observation_sizes, case.spec.action_sizes, strict=True))) == 1
    # Among agents of several kinds a control that shuffles payloads may drop some rows.
    assert lengths[2] == len(whole) or not equal, f"in three batches it took in {lengths[2]} rows, in one {len(whole)}"
    whole.cut_episodes()
    held = len(whole)
    step(whole, case.batch(518, 1))
    assert len(whole) <= held + max(case.spec.n_agents, 1), "it remembers steps of an episode that a reset cut"


def remembers_after_the_wrap(case: Case) -> None:
    """A full memory remembers what is written now."""
    operator = case.full()
    away = 0.0 if case.holds == "means" else AWAY
    probe = case.batch(508, away=away)
    before = case.recall(operator, probe)
    assert away == 0.0 or not before.acted.any(), "memory acts where nothing was ever written"
    step(operator, case.batch(507, away=away))
    after = case.recall(operator, probe)
    assert after.acted.any(0).all(), "after more rows than it holds, what was just written is not recalled"
    assert changed(before.read, after.read), "after more rows than it holds, a write changes nothing that is recalled"


def holds_exactly_the_newest(case: Case) -> None:
    """With the policy fifo exactly the newest rows are recalled."""
    if case.holds != "newest" or len(set(case.spec.observation_sizes)) > 1:
        return  # unequal agents may have rings of unequal length in steps
    operator, held = case.build(), [0]
    while len(held) < 3 or held[-1] > held[-2]:
        step(operator, case.batch(len(held), 1, away=AWAY))
        held.append(len(operator))
    length = len(held) - 2  # team steps that fit into the ring: the last one added no row
    old, new = case.batch(5000, away=AWAY), case.batch(5001, away=-AWAY)
    step(operator, case.batch(5002, 7, away=AWAY))
    for seed, rows, expected in ((5003, length - 1, (True, True)), (5004, 1, (False, True))):
        step(operator, case.batch(seed, rows, away=-AWAY))
        found = tuple(bool(case.recall(operator, td).acted.any()) for td in (old, new))
        assert found == expected, (
            f"of {length} team steps that fit, {length - 1 if expected[0] else length} were written after others: "
            f"(older, newer) rows are recalled {found}, not {expected}"
        )


def does_not_recall_itself(case: Case) -> None:
    """A row never recalls itself."""
    operator = case.filled()
    acts_on_what_it_learns = operator.stage in (Stage.TARGET, Stage.GRADIENT, Stage.REGION)
    by_number = case.keys.row in operator.in_keys and (case.keys.row,) in leaves(case.batch(0))
    if case.holds == "means" or not by_number:
        late = operator.writes_on == "update"
        assert late or not acts_on_what_it_learns, (
            "rows are not told apart by their numbers, and writes_on='collection' writes them before they are recalled"
        )
        return
    td, again = case.batch(509), case.batch(516)
    for rows in (td, again):
        case.put_at(rows, torch.arange(1.0, ROWS * case.spec.n_agents + 1).view(ROWS, -1) * AWAY)
    again.get(case.keys.row).copy_(td.get(case.keys.row))  # the same rows, drawn again when the critic has moved on
    assert not case.recall(operator, td).acted.any(), "memory acts where nothing was ever written"
    step(operator, td)
    assert not case.recall(operator, again).acted.any(), "rows are changed by what was written of them"


def keeps_agents_apart(case: Case) -> None:
    """No agent recalls another's rows."""
    if not case.private or case.spec.n_agents == 1:
        return
    operator, probe = case.build(), case.batch(510)
    for turn in range(MOST):
        td = case.batch(turn)
        td.get(case.keys.alive)[..., 0] = False
        step(operator, td)
        acted = case.recall(operator, probe).acted
        assert not acted[..., 0].any(), "the first agent, which wrote nothing, recalls what the others wrote"
        if acted[..., 1:].any():
            return
    raise AssertionError("the others recall nothing of their own")


def ignores_the_dead(case: Case) -> None:
    """Rows of dead agents are neither written nor recalled."""
    reads, states = [], []
    for garbage in (1.0, 7.0):
        operator, td = case.filled(), case.batch(511)
        dead = torch.zeros(ROWS, case.spec.n_agents, dtype=torch.bool)
        dead[::2, 0], dead[:5] = True, True
        td.get(case.keys.alive).logical_and_(~dead)
        for key, x in td.items(include_nested=True, leaves_only=True):
            if x.is_floating_point() and x.shape[:2] == dead.shape and path_of(key) not in operator.entries:
                x[dead] = garbage
        if not case.spec.own_state:
            td.get(case.keys.state).copy_(td.get(case.keys.observation).flatten(-2))
        else:
            td.get(case.keys.state)[dead.all(-1)] = garbage
        recalled = case.recall(operator, td)
        # A common reward counts for the dead too, while somebody lives.
        shared_out = operator.stage is Stage.REWARD and case.spec.common_reward
        untouched = dead.all(-1, keepdim=True).expand_as(dead) if shared_out else dead
        assert not recalled.acted[untouched].any(), "memory acts on agents that are dead"
        reads.append({key: x[~dead] for key, x in recalled.read.items() if x.shape[:2] == dead.shape})
        step(operator, td)
        states.append(state_of(operator))
    assert not (differing := changed(*reads)), f"what the dead leave in the batch reaches the living's {differing}"
    assert not (differing := changed(*states)), f"what the dead leave in the batch is written, into {differing}"


def ignores_padding(case: Case) -> None:
    """Padding enters nothing."""
    k, reads, states = case.keys, [], []
    features, actions = case.valid, torch.tensor(case.spec.action_valid)
    for garbage in (0.0, 50.0):
        operator, td = case.filled(), case.batch(512)
        padded = {k.observation: features, ("next", *k.observation): features, k.action_gradient: actions}
        for key, valid in (*padded.items(), (k.policy("loc"), actions)):
            if (x := td.get(key, None)) is not None:
                x.copy_(torch.where(valid, x, garbage))
        for prefix in ((), ("next",)) if not case.spec.own_state else ():
            td.get((*prefix, k.state)).copy_(td.get((*prefix, *k.observation)).flatten(-2))
        read = case.recall(operator, td).read
        for key, x in read.items():
            if x.shape[1:] == actions.shape and key != k.value_target and key[:2] != k.replay:
                read[key] = torch.where(actions, x, 0)
        reads.append(read)
        step(operator, td)
        states.append(state_of(operator))
    assert not (differing := changed(*reads)), f"padding of the batch reaches {differing}"
    assert not (differing := changed(*states)), f"padding of the batch is written, into {differing}"


def leaves_masked_actions_alone(case: Case) -> None:
    """Masked actions stay at zero."""
    k, td = case.keys, case.batch(513)
    allowed = torch.tensor(case.spec.action_valid).expand(ROWS, -1, -1)
    allowed = allowed if case.spec.continuous else td.get(k.action_mask)
    read = case.recall(case.filled(), td).read
    if k.action in read and not case.spec.continuous:
        assert allowed.gather(-1, read[k.action].unsqueeze(-1)).all(), "an action is taken that is masked"
    for key, x in read.items():
        if key[:2] == k.replay and key[3:] == k.action and not case.spec.continuous:
            own, used = read[(*key[:3], *k.action_mask)], read[(*key[:3], "policy_weight")] != 0
            assert own.gather(-1, x.unsqueeze(-1)).squeeze(-1)[used].all(), f"{key} was masked where it was taken"
        if x.shape != allowed.shape or key == k.value_target or (key[:2] == k.replay and key[3:] != k.action):
            continue  # not about actions
        if key[-1] == "log_probs":
            assert not x.exp()[~allowed].any(), f"{key} gives probability to actions that are masked"
            assert torch.allclose(x.exp().sum(-1), torch.ones(1), atol=1e-4), f"{key} does not add up to 1"
        elif key[-1] not in ("loc", "scale"):
            fine = (x == 0) | (x == td.get(key))
            assert fine[~allowed].all(), f"{key} is set where actions are masked or padded"


def forgets_when_told(case: Case) -> None:
    """After clear() it is empty."""
    operator = case.filled()
    operator.clear()
    assert len(operator) == 0, f"len(operator) is {len(operator)}"
    assert not case.recall(operator, case.batch(514)).acted.any(), "it still acts"


def acts_as_it_says(case: Case) -> None:
    """An operator at ACT does what it says: the mixture, by a gate that does not look at what the policy chose."""
    k, operator = case.keys, case.filled()
    if operator.stage is not Stage.ACT:
        return
    td, other = case.batch(519, 40 * ROWS), case.batch(519, 40 * ROWS)
    if case.spec.continuous:
        other.get(k.action).neg_()
    else:
        other.get(k.action).copy_(other.get(k.action_mask).long().argmax(-1))  # another allowed one
    read, again = case.recall(operator, td).read, case.recall(operator, other).read
    differing = [key for key in changed(read, again) if key not in (k.action, (*k.action,))]
    assert not differing, f"{differing} depend on the action that the policy chose"
    operator.greedy, operator.strength, before, everywhere = False, 0.5, state_of(operator), generator_states()
    operator(td)
    drawn = [name for name in changed(before, state_of(operator)) if name != "_extra_state"]
    assert not drawn, f"acting changes the operator's {drawn}, and not its generator only"
    assert not changed(everywhere, generator_states()), "acting draws from a global generator"
    taken, weight = td.get(k.taken), td.get(k.act_weight)
    action, chosen = td.get(k.action), case.batch(519, 40 * ROWS).get(k.action)
    own = (action == chosen).reshape(*taken.shape, -1).all(-1)
    assert own[~taken].all(), "actions of the policy's are changed where memory says that it took none"
    assert not taken[weight == 0].any(), f"{k.taken} is set where {k.act_weight} is 0"
    _within(taken.float() - weight, weight * (1 - weight), f"{k.act_weight} is not how often memory acts")
    if case.spec.continuous:
        loc, scale = (td.get(k.memory_policy(name)) for name in ("loc", "scale"))
        valid = torch.tensor(case.spec.action_valid) & taken.unsqueeze(-1)
        z = ((torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6)) - loc) / scale)[valid]
        _within(z, torch.ones_like(z), "actions are not distributed as memory's policy says")
        _within(z.square() - 1, 2 * torch.ones_like(z), "actions are not distributed as memory's policy says")
        return
    probs = td.get(k.memory_policy("log_probs")).exp()[taken]
    hot = torch.nn.functional.one_hot(action[taken], probs.shape[-1])
    for i in range(probs.shape[-1]):
        _within(
            hot[:, i] - probs[:, i], probs[:, i] * (1 - probs[:, i]), "actions are not distributed as memory's policy"
        )


def _within(error: torch.Tensor, variance: torch.Tensor, how: str) -> None:
    """That the sum of ``error``, whose parts have mean 0 and ``variance``, lies within five deviations."""
    limit = 5 * variance.sum().sqrt() + 1e-3
    assert error.sum().abs() <= limit, f"{how}: off by {float(error.sum()):.3g}, at most {float(limit):.3g} by chance"


def is_one_on_every_device(case: Case) -> None:
    """A GPU gives what the CPU gives."""
    if not torch.cuda.is_available():
        return
    here, there, td = case.filled(), case.filled().to("cuda"), case.batch(515)
    away = td.to("cuda").lock_()
    differing = changed(case.recall(here, td).read, case.recall(there, away).read, close=True)
    assert not differing, f"what is recalled differs in {differing}"
    step(here, td)
    step(there, away)
    differing = changed(state_of(here), state_of(there), close=True)
    assert not differing, f"what is written differs in {differing}"


PROPERTIES = (
    promises_its_parameters,
    draws_from_its_own_generator,
    empty_is_absent,
    stays_bounded,
    survives_a_checkpoint,
    goes_on_from_a_checkpoint,
    forward_changes_nothing,
    leaves_the_environments_entries_alone,
    adds_to_the_reward,
    write_changes_only_itself,
    declares_what_it_reads,
    strength_0_is_absent,
    takes_any_batch_shape,
    forgets_when_told,
    waits_for_episodes_to_end,
    remembers_after_the_wrap,
    holds_exactly_the_newest,
    does_not_recall_itself,
    keeps_agents_apart,
    ignores_the_dead,
    ignores_padding,
    leaves_masked_actions_alone,
    acts_as_it_says,
    is_one_on_every_device,
)
"""In the order in which they are checked: what later ones build on comes first."""
