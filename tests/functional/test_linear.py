"""Products of large matrices: values and derivatives beside float64, and when oneDNN is asked."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from marl_memory.functional import linear as module
from marl_memory.functional.linear import linear

ROWS, FAN_IN, FAN_OUT = 500, 120, 80  # 4.8 million multiplications

pytestmark = pytest.mark.skipif(not module._AVAILABLE, reason="this PyTorch comes without oneDNN")


@pytest.fixture(autouse=True)
def _not_intels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ONEDNN", True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what oneDNN was asked to multiply."""
    shapes: list[torch.Size] = []
    original = module._onednn

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        shapes.append(x.shape)
        return original(x, weight, bias)

    monkeypatch.setattr(module, "_onednn", counting)
    return shapes


def operands(**options: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, generator=generator).requires_grad_(**options)
        for shape in ((ROWS, FAN_IN), (FAN_OUT, FAN_IN), (FAN_OUT,))
    )
    return x, weight, bias


def exact(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    found, expected = found.detach(), expected.detach()
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_derivatives_of_first_and_second_order(with_bias: bool, asked: list[torch.Size]) -> None:
    given, results = operands()[: 3 if with_bias else 2], []
    for function, leaves in ((linear, given), (F.linear, exact(*given))):
        output = function(*leaves)
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)
        results.append([output, *first, *second])
    for mine, other in zip(*results, strict=True):
        near(mine, other)
    assert len(asked) == 3 + 6  # a product has two derivatives, each of which is a product


def test_a_gradient_that_is_one_number_everywhere() -> None:
    given = operands()
    leaves = exact(*given)
    found, expected = (torch.autograd.grad(f(*x).sum(), x) for f, x in ((linear, given), (F.linear, leaves)))
    for mine, other in zip(found, expected, strict=True):
        near(mine, other)


def test_only_the_derivatives_that_are_needed_are_computed(asked: list[torch.Size]) -> None:
    x, weight, bias = operands()
    linear(x.detach(), weight, bias).sum().backward()
    assert x.grad is None and weight.grad is not None and len(asked) == 2
    asked.clear()
    linear(x, weight.detach(), bias.detach()).sum().backward()
    assert x.grad is not None and len(asked) == 2


@pytest.mark.parametrize("layout", ["transposed", "rows apart", "expanded"])
def test_operands_of_any_layout(layout: str) -> None:
    x, weight, bias = operands(requires_grad=False)
    if layout == "transposed":
        x, weight = x.t().contiguous().t(), weight.t().contiguous().t()
    elif layout == "rows apart":
        x = torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]
        weight = torch.stack([weight, torch.full_like(weight, torch.nan)], 2)[..., 0]
    else:
        x, weight, bias = x[:1].expand(ROWS, -1), weight[:, :1].expand(-1, FAN_IN), bias[:1].expand(FAN_OUT)
    near(linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


def test_small_products_other_types_and_autocast_are_pytorch_s_own(asked: list[torch.Size]) -> None:
    x, weight, bias = operands(requires_grad=False)
    assert torch.equal(linear(x[:10], weight, bias), F.linear(x[:10], weight, bias))
    wide = (x.double(), weight.double(), bias.double())
    assert torch.equal(linear(*wide), F.linear(*wide))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16
    assert not asked


@pytest.mark.parametrize(("maker", "by_mkl"), [("GenuineIntel", True), ("AuthenticAMD", False)])
def test_mkl_is_left_to_its_own_maker_s_processors(
    maker: str, by_mkl: bool, asked: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Path, "read_text", lambda _: f"processor : 0\nvendor_id : {maker}\n")
    assert module._intel() == by_mkl
    monkeypatch.setattr(module, "_ONEDNN", not module._intel())
    given = operands(requires_grad=False)
    assert torch.equal(linear(*given), F.linear(*given)) or not by_mkl
    assert bool(asked) != by_mkl


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_it_can_be_mapped_over_and_transformed() -> None:
    x, weight, bias = operands(requires_grad=False)
    weights = torch.stack([weight, 2 * weight])
    mapped = torch.func.vmap(linear, in_dims=(None, 0, None))(x, weights, bias)
    for mine, w in zip(mapped, weights, strict=True):
        near(mine, F.linear(x.double(), w.double(), bias.double()))
    gradient = torch.func.vmap(torch.func.grad(lambda w: linear(x, w, bias).square().sum()))(weights)
    for mine, w in zip(gradient, weights, strict=True):
        near(mine, 2 * F.linear(x.double(), w.double(), bias.double()).t() @ x.double())


def test_the_same_bits_every_time() -> None:
    given = operands(requires_grad=False)
    assert all(torch.equal(linear(*given), linear(*given)) for _ in range(5))
