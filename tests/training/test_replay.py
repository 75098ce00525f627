"""The replay ring against a plain list, before and after it wraps."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from marl_memory.keys import Entry, Keys
from marl_memory.training.replay import ReplayRing

K = Keys()
ENTRIES = [K.observation, K.action, ("next", *K.reward)]


def ring(
    capacity: int = 21, n_envs: int = 3, batch_size: int = 64, seed: int = 0, folder: Path | None = None
) -> ReplayRing:
    return ReplayRing(
        capacity=capacity,
        n_envs=n_envs,
        batch_size=batch_size,
        entries=ENTRIES,
        learn_entries={K.value_target: Entry((2, 1))},
        keys=K,
        seed=seed,
        folder=folder,
    )


def batch(first: int, length: int, n_envs: int = 3) -> TensorDict:
    """Steps whose every number tells step and environment: step × 10 + environment."""
    number = (torch.arange(first, first + length).unsqueeze(-1) * 10 + torch.arange(n_envs)).float()
    td = TensorDict(batch_size=(length, n_envs))
    td.set(K.observation, number[..., None, None].expand(-1, -1, 2, 4).clone())
    td.set(K.action, number.long()[..., None].expand(-1, -1, 2).clone())
    td.set(("next", *K.reward), -number[..., None, None].expand(-1, -1, 2, 1).clone())
    td.set(("next", K.done), (number.long() % 4 == 0).unsqueeze(-1))
    return td


def fill(replay: ReplayRing, lengths: list[int]) -> list[tuple[int, int]]:
    """Write batches of these lengths; the oracle: (step, environment) of the rows that a ring of this size keeps."""
    step = 0
    for length in lengths:
        replay.extend(batch(step, length))
        step += length
    return [(t, n) for t in range(max(step - replay.steps, 0), step) for n in range(replay.n_envs)]


@pytest.mark.parametrize("lengths", [[1], [2, 3], [7], [5, 4], [7, 7, 7], [3] * 11, [1] * 23])
def test_rows_are_those_of_a_list(lengths: list[int]) -> None:
    replay = ring()
    held = fill(replay, lengths)
    assert len(replay) == len(held)
    expected = torch.tensor([t * 10.0 + n for t, n in held]).reshape(-1, 3)
    assert torch.equal(replay.in_order(K.observation)[:, :, 0, 0], expected)
    assert torch.equal(replay.in_order(("next", *K.reward))[:, :, 1, 0], -expected)
    assert torch.equal(replay.ends_in_order(), expected.long() % 4 == 0)
    seen = set()
    for _ in range(30):
        rows = replay.draw()
        number = rows[K.observation][:, 0, 0]
        assert torch.equal(rows["next", "agents", "reward"][:, 1, 0], -number)
        assert torch.equal(rows[K.action][:, 0], number.long())
        # row = step × N + environment, counted from the start of the run
        assert torch.equal(rows[K.row], (number // 10).long() * 3 + (number % 10).long())
        seen |= set(number.tolist())
    assert seen == {t * 10.0 + n for t, n in held}


def test_draws_are_uniform() -> None:
    replay = ring(batch_size=10_000)
    fill(replay, [7, 4])
    counts = torch.zeros(11 * 3)
    for _ in range(20):
        counts += torch.bincount(replay.draw()[K.row], minlength=33)
    counts = counts[-21:]
    assert (counts / counts.sum() * 21 - 1).abs().max() < 0.05  # 0.01 is one standard deviation


def test_a_draw_is_the_same_memory_and_holds_the_learners_entries() -> None:
    replay = ring()
    fill(replay, [5])
    first, second = replay.draw(), replay.draw()
    assert first is second
    assert first[K.value_target].shape == (64, 2, 1)
    with pytest.raises(RuntimeError, match="locked"):
        first.set("new", torch.zeros(64))


@pytest.mark.parametrize("memmap", [False, True])
@pytest.mark.parametrize("cuts", [[4, 9, 23], [6], [1, 2, 20]])
def test_restored_from_its_parts(cuts: list[int], memmap: bool, tmp_path: Path) -> None:
    replay, parts, since = ring(folder=tmp_path / "a" if memmap else None), [], 0
    for step in range(23):
        replay.extend(batch(step, 1))
        if step + 1 in cuts:
            parts.append(replay.part(since))
            since = step + 1
            replay.cut_episodes()
            state = replay.state_dict()
            kept = {key: replay.in_order(key).clone() for key in ENTRIES}
            ends = replay.ends_in_order().clone()
            assert ends[-1].all()
    other = ring(seed=5, folder=tmp_path / "b" if memmap else None)
    read: Any = [torch.load(io.BytesIO(data), weights_only=True) for data in parts]
    other.load_state_dict(state, read)
    assert other.written == cuts[-1]
    for key in ENTRIES:
        assert torch.equal(other.in_order(key), kept[key])
    assert torch.equal(other.ends_in_order(), ends)
    if cuts[-1] == 23:  # nothing was written since
        assert torch.equal(other.draw()[K.row], replay.draw()[K.row])


def test_a_part_holds_only_what_is_new() -> None:
    replay = ring(capacity=3000)
    replay.extend(batch(0, 900))
    whole = len(replay.part(0))
    replay.extend(batch(900, 9))
    assert len(replay.part(900)) < whole / 20


def test_missing_parts_are_named() -> None:
    replay = ring()
    replay.extend(batch(0, 3))
    first = torch.load(io.BytesIO(replay.part(0)), weights_only=True)
    replay.extend(batch(3, 3))
    with pytest.raises(ValueError, match="hold steps 0 to 3; 6 were written"):
        ring().load_state_dict(replay.state_dict(), [first])


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="algorithm.capacity=2 must hold a step of training.n_envs=3"):
        ring(capacity=2)
    with pytest.raises(ValueError, match="must hold a batch of 8 steps of 3"):
        ring().extend(batch(0, 8))
    with pytest.raises(RuntimeError, match="empty replay"):
        ring().draw()
