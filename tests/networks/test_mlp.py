"""Banks of parameters against separate plain networks, and their initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor, nn

from marl_memory.networks.mlp import LARGE, MLP, linear, tanh

PLAIN = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "gelu": nn.GELU}


def made(in_features: int = 5, out_features: int = 3, seed: int = 0, **kwargs: object) -> MLP:
    return MLP(in_features, out_features, generator=Generator().manual_seed(seed), **kwargs)  # type: ignore[arg-type]


def with_biases(network: MLP) -> MLP:
    for parameter in network.parameters():  # biases start at 0, which would hide a mistake in them
        parameter.data.add_(torch.randn(parameter.shape, generator=Generator().manual_seed(9)) * 0.1)
    return network


def plain_copy(network: MLP, bank: int, activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, layer in enumerate(network.layers):
        weights = layer.weight.unsqueeze(0) if layer.weight.ndim == 2 else layer.weight.transpose(1, 2)
        copy = nn.Linear(weights.shape[-1], weights.shape[-2])
        copy.weight.data.copy_(weights[bank])
        copy.bias.data.copy_(layer.bias.reshape(len(weights), -1)[bank])
        if i > 0:
            layers.append(PLAIN[activation]())
        if network.layer_norm:
            layers.append(nn.LayerNorm(copy.in_features, elementwise_affine=False))
        layers.append(copy)
    return nn.Sequential(*layers)


@pytest.mark.parametrize("activation", sorted(PLAIN))
@pytest.mark.parametrize("layer_norm", [False, True])
def test_banks_are_separate_plain_networks(activation: str, layer_norm: bool) -> None:
    network = with_biases(made(banks=3, hidden=(7, 6), activation=activation, layer_norm=layer_norm)).double()
    copies = [plain_copy(network, bank, activation).double() for bank in range(3)]
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=Generator().manual_seed(1))
    expected = torch.stack([copy(x[..., i, :]) for i, copy in enumerate(copies)], -2)
    found = network(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for bank, copy in enumerate(copies):
        linears = [module for module in copy if isinstance(module, nn.Linear)]
        for layer, copied in zip(network.layers, linears, strict=True):
            torch.testing.assert_close(layer.weight.grad[bank], copied.weight.grad.T)
            torch.testing.assert_close(layer.bias.grad[bank, 0], copied.bias.grad)


@pytest.mark.parametrize("banks", [1, 3])
@pytest.mark.parametrize(("hidden", "layer_norm"), [((7, 6), False), ((7, 6), True), ((), False)])
def test_what_the_last_layer_reads_is_left_where_asked(banks: int, hidden: tuple[int, ...], layer_norm: bool) -> None:
    network = with_biases(made(banks=banks, hidden=hidden, layer_norm=layer_norm))
    x = torch.randn(2, 4, 3, 5)
    left = torch.full((2, 4, 3, network.hidden_size), torch.nan)
    output = network(x, hidden=left)
    assert torch.equal(output, network(x)) and not left.requires_grad and output.requires_grad
    last = network.layers[-1]
    weight = last.weight if banks > 1 else last.weight.T
    torch.testing.assert_close((left.unsqueeze(-2) @ weight).squeeze(-2) + last.bias.reshape(-1, 3), output)


def test_shared_parameters_see_every_agent_alike() -> None:
    network = with_biases(made(hidden=(7,)))
    x = torch.randn(4, 3, 5)
    copy = plain_copy(network, 0, "relu")
    torch.testing.assert_close(network(x), copy(x))
    torch.testing.assert_close(network(x[:, 0]), copy(x[:, 0]))  # without an agent dimension


def test_one_bank_for_one_agent_is_a_shared_network_bit_for_bit() -> None:
    shared, single = made(hidden=(16, 16)), made(hidden=(16, 16), banks=1)
    x = torch.randn(32, 1, 5)

    def results(network: MLP, rows: Tensor) -> list[Tensor]:
        out = network(rows)
        out.square().sum().backward()
        return [out.reshape(-1, 3), *(p.grad for p in network.parameters() if p.grad is not None)]

    pairs = zip(results(shared, x.squeeze(1)), results(single, x), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(("out_features", "in_features"), [(6, 4), (4, 6), (5, 5)])
def test_every_bank_starts_orthogonal(out_features: int, in_features: int) -> None:
    layer = linear(in_features, out_features, banks=3, gain=0.5, generator=Generator().manual_seed(0))
    for weight in layer.weight.detach().transpose(1, 2):
        product = weight @ weight.T if out_features <= in_features else weight.T @ weight
        torch.testing.assert_close(product, 0.25 * torch.eye(len(product)), atol=1e-5, rtol=0)
    assert not torch.equal(layer.weight[0], layer.weight[1])
    assert torch.equal(layer.bias, torch.zeros(3, 1, out_features))


def test_gains_of_hidden_and_last_layers() -> None:
    network = made(8, 2, hidden=(8,), activation="tanh", output_gain=0.01)
    norms = [torch.linalg.matrix_norm(layer.weight.detach(), 2).item() for layer in network.layers]
    assert norms == pytest.approx([5 / 3, 0.01], rel=1e-4)


def test_the_generator_alone_decides_the_weights() -> None:
    torch.manual_seed(0)
    first = made(seed=3).state_dict()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second, other = made(seed=3).state_dict(), made(seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not drawn from
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="network.activation='swish'"):
        made(activation="swish")
    with pytest.raises(ValueError, match="network.hidden"):
        made(hidden=(8, 0))


@pytest.mark.parametrize("rows", [10, 200])  # fewer and more elements than LARGE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_is_torchs_with_its_gradient(rows: int, dtype: torch.dtype) -> None:
    x = (3 * torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))).to(dtype)
    x[0, :3] = torch.tensor([0.0, 50.0, -50.0])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert (rows * 64 >= LARGE) == (rows == 200)
    y = tanh(ours)
    torch.testing.assert_close(y, torch.tanh(theirs), rtol=4 * torch.finfo(dtype).eps, atol=1e-30)
    weight = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    (y * weight).sum().backward()
    (torch.tanh(theirs) * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=4 * torch.finfo(dtype).eps)
    with torch.no_grad():
        assert not tanh(ours).requires_grad
