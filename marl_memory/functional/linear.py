"""Products of large matrices, on a CPU that is not Intel's by oneDNN."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

LARGE = 2**22
"""Multiplications from which on oneDNN is called: with its derivatives a call costs some 60 µs more than PyTorch's."""

_AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _intel() -> bool:
    """Whether MKL runs on its own maker's processor, where it is the faster.  By name: a timing would not repeat."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # no Linux
        return "GenuineIntel" in platform.processor()


_ONEDNN = _AVAILABLE and not _intel()


class _Linear(torch.autograd.Function):
    """x Wᵀ + b by oneDNN; its derivatives are again such products, of any order."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (g,), (x, weight) = gradients, ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(g, weight.t()) if of_x else None,
            linear(g.t(), x.t()) if of_weight else None,
            g.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b.

    PyTorch multiplies float32 matrices on a CPU by MKL, which on other makers' processors takes up to 2.3 times as long
    as the oneDNN that PyTorch also brings, and on Intel's as little as a third.  Where oneDNN is called, results differ
    from `torch.nn.functional.linear` in their last digits.

    Args:
        x: ``[R, I]``.
        weight: ``[O, I]``.
        bias: ``[O]`` or None.

    Returns:
        ``[R, O]``.
    """
    large = x.shape[0] * weight.numel() >= LARGE and x.dtype == torch.float32 and x.device.type == "cpu"
    if not (large and _ONEDNN) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _onednn(x, weight, bias)
    return cast(Tensor, _Linear.apply(x, weight, bias))  # pyright: ignore[reportUnknownMemberType]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # of x and weight it reads any layout
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
