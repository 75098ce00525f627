"""The confidence from which on memory acts."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

RECENT = 2048
"""Confidences that an adaptive threshold is a quantile of."""

CERTAIN = 1 - 1e-6
"""An adaptive threshold does not rise above: where every confidence is 1, none would be greater."""

UNKNOWN = 0.5
"""What the confidence is where nothing is known: an adaptive threshold does not fall below."""


class Threshold(nn.Module):
    r"""κ, by a schedule.

    | schedule   | κ                                                                                                  |
    |------------|----------------------------------------------------------------------------------------------------|
    | `constant` | ``kappa``                                                                                          |
    | `linear`   | from ``kappa`` to ``final``, in the run's frames                                                   |
    | `adaptive` | the ``quantile`` of the last `RECENT` confidences, ½ to `CERTAIN`; ``kappa`` until there is one    |

    Args:
        kappa: in (0, 1].
        schedule: see above.
        final: in (0, 1]; of ``linear``.
        quantile: in (0, 1); of ``adaptive``.

    Raises:
        ValueError: for a value out of range, or ``final`` without the schedule that reads it, or the reverse.
    """

    def __init__(
        self,
        *,
        kappa: float,
        schedule: Literal["constant", "linear", "adaptive"],
        final: float | None,
        quantile: float,
    ) -> None:
        super().__init__()
        if schedule not in ("constant", "linear", "adaptive"):
            raise ValueError(f"kappa_schedule={schedule!r} must be 'constant', 'linear' or 'adaptive'")
        for name, value in (("kappa", kappa), ("kappa_final", final)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value!r} must lie in (0, 1]")
        if (final is not None) != (schedule == "linear"):
            raise ValueError(
                f"kappa_final={final!r} with kappa_schedule={schedule!r}: what κ changes to goes with 'linear', and "
                "with nothing else"
            )
        if not 0 < quantile < 1:
            raise ValueError(f"kappa_quantile={quantile!r} must lie in (0, 1)")
        self.first, self.final, self.quantile = kappa, kappa if final is None else final, quantile
        self.adaptive = schedule == "adaptive"
        self.register_buffer("recent", torch.zeros(RECENT if self.adaptive else 0))
        self.register_buffer("known", torch.zeros((), dtype=torch.int64))
        self.register_buffer("adapted", torch.tensor(float(kappa), dtype=torch.float64))
        self.scheduled = kappa

    recent: Tensor
    """``[RECENT]``, the newest behind."""
    known: Tensor
    """``[]``: how many of them there are."""
    adapted: Tensor
    """``[]``."""

    @property
    def value(self) -> float:
        """κ now."""
        return float(self.adapted) if self.adaptive else self.scheduled

    @property
    def closed(self) -> bool:
        """Whether no confidence can be above it."""
        return self.value >= 1

    @property
    def logit(self) -> float:
        """log κ/(1 − κ), for κ below 1."""
        return math.log(self.value) - math.log1p(-self.value)

    def set_progress(self, progress: float) -> None:
        """Follow the schedule."""
        self.scheduled = self.first + (self.final - self.first) * min(progress, 1.0)

    def take(self, confidence: Tensor) -> None:
        """Follow the latest confidences ``[M]``, of which those that are no numbers do not count."""
        confidence = confidence[confidence.isfinite()]
        if self.adaptive and len(confidence) > 0:
            self.recent.copy_(torch.cat([self.recent, confidence])[-RECENT:])
            torch.clamp(self.known + len(confidence), max=RECENT, out=self.known)
            self.adapted.copy_(self.recent[-int(self.known) :].quantile(self.quantile).clamp(UNKNOWN, CERTAIN))

    def clear(self) -> None:
        """Forget all confidences."""
        self.recent.zero_()
        self.known.zero_()
        self.adapted.fill_(self.first)
