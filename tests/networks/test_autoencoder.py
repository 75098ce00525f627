"""Autoencoders: shapes, banks that are strangers to each other, and that they learn to draw."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator

from marl_memory.networks.autoencoder import Autoencoder, Convolutions

PICTURES = [(1, 18, 18), (4, 84, 84), (3, 210, 160), (2, 33, 8), (1, 5, 9)]


def made(features: int, *, banks: int = 1, seed: int = 0, latent: int = 6, **more: object) -> Autoencoder:
    return Autoencoder(features, latent, banks=banks, generator=Generator().manual_seed(seed), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("picture", PICTURES, ids=str)
@pytest.mark.parametrize("banks", [1, 2])
def test_what_is_drawn_has_the_size_of_what_is_seen(picture: tuple[int, int, int], banks: int) -> None:
    x = torch.rand(banks, 3, math.prod(picture), generator=Generator().manual_seed(0))
    code, decoded = made(x.shape[-1], banks=banks, picture=picture, hidden=(8,))(x)
    assert code.shape == (banks, 3, 6) and decoded.shape == x.shape


def test_large_pictures_are_quartered_and_halved() -> None:
    """84 → 20 → 9 → 3, as its kernels and steps say; a picture smaller than 8 passes no convolution."""
    eye = Convolutions((4, 84, 84), banks=1, generator=Generator())
    assert eye.sizes == [(4, 84, 84), (32, 20, 20), (64, 9, 9), (64, 3, 3)]
    assert Convolutions((1, 5, 9), banks=1, generator=Generator()).sizes == [(1, 5, 9)]


@pytest.mark.parametrize("picture", [None, (1, 10, 8)], ids=["vectors", "pictures"])
def test_each_bank_has_parameters_of_its_own(picture: tuple[int, int, int] | None) -> None:
    """What one bank sees reaches neither the codes nor the gradients of another."""
    network = made(80, banks=3, picture=picture, hidden=(8, 5))
    x = torch.rand(3, 4, 80, generator=Generator().manual_seed(1))
    other = x.clone()
    other[1] += 1.0
    (code, decoded), (code_2, decoded_2) = network(x), network(other)
    for a, b in ((code, code_2), (decoded, decoded_2)):
        torch.testing.assert_close(a[::2], b[::2], rtol=0, atol=0)
        assert not torch.equal(a[1], b[1])
    decoded[1].square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None
        by_bank = p.grad.reshape(3, -1).any(1).tolist()
        assert by_bank == [False, True, False], name


def test_a_bank_computes_what_it_would_alone() -> None:
    pair, alone = made(80, banks=2, picture=(1, 10, 8), hidden=(8,)), made(80, picture=(1, 10, 8), hidden=(8,))
    parts = {name: p.data.reshape(2, -1)[1] for name, p in pair.named_parameters()}
    for name, p in alone.named_parameters():
        whole = parts[name]  # a single linear map lies the other way round
        turned = p.ndim == 2 and not name.startswith(("eye", "hand"))
        p.data.copy_(whole.reshape(p.shape[::-1]).T if turned else whole.reshape(p.shape))
    x = torch.rand(2, 4, 80, generator=Generator().manual_seed(1))
    for a, b in zip(pair(x), alone(x[1:]), strict=True):
        torch.testing.assert_close(a[1:], b)


def test_convolutions_are_pytorchs() -> None:
    """The eye beside Conv2d, the hand beside ConvTranspose2d, layer by layer."""
    network = made(3 * 17 * 20, picture=(3, 17, 20), hidden=(8,))
    assert network.eye is not None and network.hand is not None
    x = torch.rand(1, 2, 3 * 17 * 20, generator=Generator().manual_seed(1))
    y = x.view(2, 3, 17, 20)
    for weight, bias, (kernel, stride) in zip(network.eye.weights, network.eye.biases, network.eye.steps, strict=True):
        conv = torch.nn.Conv2d(weight.shape[1], weight.shape[0], kernel, stride)
        conv.weight, conv.bias = weight, bias
        y = conv(y).relu()
    torch.testing.assert_close(network.eye(x), y.view(1, 2, -1))
    z = y
    ways = zip(network.hand.weights, network.hand.biases, network.hand.steps, strict=True)
    for i, (weight, bias, (stride, rest)) in enumerate(ways):
        conv = torch.nn.ConvTranspose2d(*weight.shape[:3], stride, output_padding=rest)  # type: ignore[call-arg]
        conv.weight, conv.bias = weight, bias
        z = conv(z if i == 0 else z.relu())
    torch.testing.assert_close(network.hand(y.view(1, 2, -1)), z.reshape(1, 2, -1))


@pytest.mark.parametrize("picture", [None, (1, 8, 8)], ids=["vectors", "pictures"])
def test_it_learns_to_draw(picture: tuple[int, int, int] | None) -> None:
    network = made(64, picture=picture, hidden=(64,), latent=16)
    x = torch.rand(1, 12, 64, generator=Generator().manual_seed(1))
    adam = torch.optim.Adam(network.parameters(), lr=3e-3)
    errors = []
    for _ in range(200):
        error = (network(x)[1] - x).square().mean()
        adam.zero_grad()
        error.backward()
        adam.step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * x.var().item() < errors[0]


def test_a_picture_of_another_size_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"picture=\[1, 8, 8\] holds 64 numbers, not features=63"):
        made(63, picture=(1, 8, 8))
