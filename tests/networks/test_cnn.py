"""The convolutional network against plain PyTorch; who shares parameters; bytes all the way to it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Generator, nn

from marl_memory.algorithms.ppo import PPO
from marl_memory.networks.actor import Actor, AgentInput
from marl_memory.networks.cnn import CNN
from marl_memory.networks.critic import Critic
from marl_memory.spec import TaskSpec

PICTURE = (2, 12, 10)
SIZE = 240
SMALL: dict[str, Any] = {"channels": (3, 4), "kernels": (4, 3), "strides": (2, 1), "hidden": (7,)}


def seeded() -> Generator:
    return Generator().manual_seed(0)


def body(in_features: int = SIZE, out_features: int = 5, **options: Any) -> CNN:
    settings = {"generator": seeded(), "picture": PICTURE, **SMALL}
    return CNN(in_features, out_features, **(settings | options))


def spec(agents: int = 2, *, common_reward: bool = False, continuous: bool = False) -> TaskSpec:
    bounds = ((1.0, 1.0, 1.0),) * agents if continuous else None
    return TaskSpec(
        name="pictures",
        agents=tuple(f"agent_{i}" for i in range(agents)),
        observation_sizes=(SIZE,) * agents,
        action_sizes=(3,) * agents,
        continuous=continuous,
        state_size=SIZE * agents,
        own_state=False,
        common_reward=common_reward,
        picture=PICTURE,
        action_low=None if bounds is None else tuple(tuple(-x for x in row) for row in bounds),
        action_high=bounds,
    )


def seen(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, SIZE), generator=seeded(), dtype=torch.uint8)


def plain(network: CNN, bank: int = 0) -> nn.Sequential:
    """The same network, written down with PyTorch's own modules."""
    first, second = nn.Conv2d(2, 3, 4, 2), nn.Conv2d(3, 4, 3, 1)
    one, two = nn.Linear(network.seen, 7), nn.Linear(7, 5)
    for layer, ours in zip((first, second), network.layers, strict=True):
        layer.weight.data, layer.bias.data = (x.chunk(network.banks)[bank] for x in (ours.weight.data, ours.bias.data))
    for layer, ours in zip((one, two), network.head.layers, strict=True):
        weight = ours.weight.data if network.banks == 1 else ours.weight.data[bank].T
        layer.weight.data, layer.bias.data = weight, ours.bias.data.reshape(network.banks, -1)[bank]
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), one, nn.ReLU(), two)


def test_one_bank_is_the_network_written_down_plainly() -> None:
    network, x = body(), seen(6, 3)
    expected = plain(network)(x.reshape(-1, *PICTURE).float() / 255).reshape(6, 3, 5)
    torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(network(x.float()), expected)  # numbers from 0 to 255 will do


def test_each_bank_is_such_a_network_of_its_own() -> None:
    network, x = body(banks=3), seen(4, 3)
    for bank in range(3):
        expected = plain(network, bank)(x[:, bank].reshape(-1, *PICTURE).float() / 255)
        torch.testing.assert_close(network(x)[:, bank], expected)


def test_the_default_is_the_network_of_nature_2015() -> None:
    network = CNN(4 * 84 * 84, 6, generator=seeded(), picture=(4, 84, 84))
    sizes = [tuple(layer.weight.shape) for layer in (*network.layers, *network.head.layers)]  # type: ignore[union-attr]
    assert sizes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136), (6, 512)]


def test_what_lies_beside_the_picture_is_not_scaled() -> None:
    network, x = body(SIZE + 2), seen(5)
    beside = torch.tensor([[0, 1]], dtype=torch.uint8).expand(5, 2)
    layer = network.head.layers[0]
    bright = x.reshape(-1, *PICTURE).float() / 255
    for conv in network.layers:
        bright = torch.relu(conv(bright))
    expected = torch.relu(layer(torch.cat([bright.flatten(1), beside.float()], 1)))  # type: ignore[operator]
    torch.testing.assert_close(network(torch.cat([x, beside], 1)), network.head.layers[1](expected))  # type: ignore[operator]


def test_weights_are_orthogonal_and_drawn_from_the_generator_given() -> None:
    before = torch.get_rng_state()
    network = body(banks=2)
    for bank in network.layers[0].weight.data.view(2, 3, -1):  # type: ignore[union-attr]
        torch.testing.assert_close(bank @ bank.T, 2 * torch.eye(3), atol=1e-5, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("banks", [1, 2])
def test_what_the_last_layer_reads_is_left_where_asked(banks: int) -> None:
    network, x = body(banks=banks), seen(5, 2)
    left = torch.full((5, 2, network.hidden_size), torch.nan)
    output = network(x, hidden=left)
    last = network.head.layers[-1]
    weight = last.weight if banks > 1 else last.weight.T
    torch.testing.assert_close((left.unsqueeze(-2) @ weight).squeeze(-2) + last.bias.reshape(-1, 5), output)


@pytest.mark.parametrize("shared", [True, False])
def test_an_actor_keeps_pictures_as_bytes(shared: bool) -> None:
    task = spec()
    entrance = AgentInput(task, share_parameters=shared, normalise=False)
    assert entrance(seen(4, 2)).dtype == torch.uint8
    network: Any = partial(CNN, picture=PICTURE, **SMALL)
    actor = Actor(task, network, share_parameters=shared, normalise_observations=False, init_generator=seeded(), seed=0)
    mask = torch.ones(4, 2, 3, dtype=torch.bool)
    td = TensorDict({"agents": {"observation": seen(4, 2), "action_mask": mask}}, batch_size=4)
    assert actor(td)["agents", "action"].shape == (4, 2)
    if shared:  # the same picture, but another agent
        td["agents", "observation"][:, 1] = td["agents", "observation"][:, 0]
        assert not torch.equal(*actor.distribution(td).parameters["log_probs"].unbind(1))


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("centralised", [True, False])
def test_critics_of_every_kind_read_pictures(centralised: bool, shared: bool, common: bool) -> None:
    critic = Critic(
        spec(3, common_reward=common),
        partial(CNN, picture=PICTURE, **SMALL),  # type: ignore[arg-type]
        centralised=centralised,
        share_parameters=shared,
        normalise_observations=False,
        init_generator=seeded(),
    )
    observation = seen(4, 3)
    td = TensorDict({"agents": {"observation": observation}, "state": observation.flatten(1)}, batch_size=4)
    assert critic(td).shape == (4, 3, 1)
    changed = td.clone()
    changed["agents", "observation"][:, 2] //= 2
    changed["state"] = changed["agents", "observation"].flatten(1)
    moved = (critic(td) != critic(changed))[..., 0].any(0).tolist()
    assert moved == [centralised, centralised, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strides": (2,)}, r"network\.channels=\[3, 4\].*must be equally long"),
        ({"channels": (3, 0)}, r"network\.channels=\[3, 0\] must hold positive numbers"),
        ({"kernels": ()}, r"network\.kernels=\[\] must hold positive numbers"),
        ({"kernels": (4, 9)}, r"network\.kernels=\[4, 9\] .* leave nothing of a picture of 12 × 10"),
        ({"activation": "sine"}, r"network\.activation='sine' must be one of"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        body(**options)


def test_pictures_are_not_normalised_by_running_statistics() -> None:
    with pytest.raises(ValueError, match=r"algorithm\.normalise_observations=true does not fit pictures"):
        PPO(spec=spec(), network=partial(CNN, picture=PICTURE), seed=0, normalise_observations=True)  # type: ignore[arg-type]


def test_rewards_are_clipped_for_learning_only() -> None:
    task = TaskSpec.from_dict({**spec(1).to_dict(), "clip_rewards": 1.0})
    learner = PPO(spec=task, network=partial(CNN, picture=PICTURE, **SMALL), seed=0)  # type: ignore[arg-type]
    reward = torch.tensor([-7.0, 0.5, 30.0]).view(3, 1, 1, 1)
    batch = TensorDict({"next": {"agents": {"reward": reward.clone()}}, "learn": {"reward": torch.zeros(3, 1, 1, 1)}})
    learner.derive_rewards(batch)
    assert batch["learn", "reward"].flatten().tolist() == [-1.0, 0.5, 1.0]
    assert torch.equal(batch["next", "agents", "reward"], reward)
