"""Stacks made again of single pictures, against a list that keeps the stacks themselves."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from marl_memory.keys import Keys
from marl_memory.training.replay import ReplayRing

K = Keys()
SIZE = 6
"""Numbers of a picture."""
STACKED = [K.observation, K.state, ("next", *K.observation), ("next", K.state)]
ENTRIES: list[Any] = [*STACKED, K.action, ("next", *K.reward)]


class Game:
    """N made-up games of A agents, each observation the last K of random pictures; agents may die, episodes end."""

    def __init__(self, n_envs: int, agents: int, stack: int, padding: str, seed: int) -> None:
        self.n, self.a, self.stack, self.padding = n_envs, agents, stack, padding
        self.generator = torch.Generator().manual_seed(seed)
        self.seen = torch.stack([self.begin() for _ in range(n_envs)])
        self.alive = torch.ones(n_envs, agents, dtype=torch.bool)
        self.steps = 0

    def picture(self) -> torch.Tensor:
        return torch.randint(1, 256, (self.a, SIZE), generator=self.generator, dtype=torch.uint8)

    def begin(self) -> torch.Tensor:
        first = self.picture()
        before = torch.zeros(self.a, SIZE * (self.stack - 1), dtype=torch.uint8)
        return torch.cat([first.repeat(1, self.stack - 1) if self.padding == "first" else before, first], -1)

    def restart(self) -> None:
        """All games are reset."""
        self.seen = torch.stack([self.begin() for _ in range(self.n)])
        self.alive[:] = True

    def play(self, length: int) -> TensorDict:
        """A batch ``[length, N]``."""
        return torch.stack([self.step() for _ in range(length)])

    def step(self) -> TensorDict:
        chance = torch.rand(self.n, 1 + self.a, generator=self.generator)
        done, dies = chance[:, 0] < 0.2, chance[:, 1:] < 0.1
        new = torch.stack([self.picture() for _ in range(self.n)])
        following = torch.cat([self.seen[..., SIZE:], new], -1)
        lives = self.alive & ~(dies & ~done.unsqueeze(-1))
        following[~lives] = 0
        number = self.steps * 10 + torch.arange(self.n)
        td = TensorDict(batch_size=(self.n,))
        td.set(K.observation, self.seen)
        td.set(K.state, self.seen.flatten(1))
        td.set(("next", *K.observation), following)
        td.set(("next", K.state), following.flatten(1))
        td.set(("next", K.done), done.unsqueeze(-1))
        td.set(K.action, number.unsqueeze(-1).expand(-1, self.a))
        td.set(("next", *K.reward), torch.zeros(self.n, self.a, 1))
        self.steps += 1
        begun = torch.stack([self.begin() for _ in range(self.n)])
        self.seen = torch.where(done.view(-1, 1, 1), begun, following)
        self.alive = lives | done.unsqueeze(-1)
        return td


def ring(steps: int, n_envs: int, stack: int) -> ReplayRing:
    sizes: dict[str, Any] = {"capacity": steps * n_envs, "n_envs": n_envs, "batch_size": 200}
    return ReplayRing(**sizes, entries=ENTRIES, learn_entries={}, keys=K, seed=0, frame_stack=stack)


def assert_draws(replay: ReplayRing, kept: dict[int, TensorDict], draws: int = 3) -> None:
    """What the ring draws, and lends in order, is what the list ``kept``, by number of the row, has; all comes up."""
    lent = replay.block(replay.oldest, replay.written).flatten()
    for row, number in enumerate(range(replay.oldest * replay.n_envs, replay.written * replay.n_envs)):
        for key in ENTRIES:
            assert torch.equal(lent[key][row], kept[number][key]), (key, number)
    seen = set()
    for _ in range(draws):
        rows = replay.draw()
        for i, number in enumerate(rows[K.row].tolist()):
            for key in ENTRIES:
                assert torch.equal(rows[key][i], kept[number][key]), (key, number)
            seen.add(number)
    assert len(seen) > 0.8 * len(replay)


class Oracle:
    """Keeps every row, stacks and all."""

    def __init__(self) -> None:
        self.rows: dict[int, TensorDict] = {}
        self.steps = 0

    def extend(self, batch: TensorDict) -> None:
        for step in batch:
            for n, row in enumerate(step):
                self.rows[self.steps * batch.shape[1] + n] = row.clone()
            self.steps += 1


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(-1, 9), min_size=1, max_size=12).filter(lambda x: max(x) > 0),
    stack=st.integers(1, 5),
    agents=st.integers(1, 2),
    padding=st.sampled_from(["zeros", "first"]),
    seed=st.integers(0, 1000),
)
def test_stacks_are_those_of_a_list_that_keeps_them(
    lengths: list[int], stack: int, agents: int, padding: str, seed: int
) -> None:
    """Batches of any lengths, resets of all games in between (-1, 0), rings that wrap."""
    game, replay, oracle = Game(2, agents, stack, padding, seed), ring(9, 2, stack), Oracle()
    for length in lengths:
        if length < 1:
            replay.cut_episodes()
            game.restart()
            continue
        batch = game.play(length)
        replay.extend(batch)
        oracle.extend(batch)
        assert_draws(replay, oracle.rows, draws=1)


@pytest.mark.parametrize("cut", [False, True])
def test_a_replay_read_back_from_its_parts_draws_the_same(cut: bool) -> None:
    game, replay, oracle = Game(3, 2, 4, "zeros", 1), ring(20, 3, 4), Oracle()
    parts, saved = [], 0
    for round_ in range(7):
        for _ in range(3):
            batch = game.play(3)
            replay.extend(batch)
            oracle.extend(batch)
        parts.append(replay.part(saved))
        saved, state = replay.written, replay.state_dict()
        if cut and round_ < 6:
            replay.cut_episodes()
            game.restart()
    other = ring(20, 3, 4)
    other.load_state_dict(state, [torch.load(io.BytesIO(part)) for part in parts])
    for _ in range(3):
        assert torch.equal(replay.draw()[K.row], other.draw()[K.row])
        for key in ENTRIES:
            assert torch.equal(replay.draw()[key], other.draw()[key])
    for one in (replay, other):  # and both go on alike
        one.cut_episodes()
    game.restart()
    for _ in range(8):
        batch = game.play(4)
        oracle.extend(batch)
        for one in (replay, other):
            one.extend(batch)
    assert_draws(replay, oracle.rows)
    assert_draws(other, oracle.rows)


def test_each_picture_is_kept_once() -> None:
    """A stack of 4 at t and at t + 1, as observation and as state, would be 16 pictures a row."""
    game, replay = Game(4, 1, 4, "zeros", 0), ring(1000, 4, 4)
    for _ in range(10):
        replay.extend(game.play(100))
    assert replay.frames is not None and replay.frames.pictures is not None
    assert replay.frames.pictures.numel() == (1000 + 4) * 4 * SIZE


def test_what_is_no_stack_is_refused() -> None:
    batch = Game(2, 1, 4, "zeros", 0).play(5)
    batch.get(("next", *K.observation))[3] = 7
    with pytest.raises(ValueError, match=r"frame_stack=4: an observation is not the one before with one picture more"):
        ring(9, 2, 4).extend(batch)
    batch = Game(2, 1, 4, "zeros", 0).play(1)
    batch.get(K.observation)[0, :, :, 0] = 7
    with pytest.raises(ValueError, match="begins neither with zeros nor with its first picture repeated"):
        ring(9, 2, 4).extend(batch)
