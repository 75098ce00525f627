"""A field of payloads in random Fourier features: memory that does not grow with what it remembers."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from marl_memory.functional.neighbours import nearest
from marl_memory.memory.store import LEAST_BANDWIDTH, LEAST_SCALE

WARM_UP = 1024
"""Rows from which scale and bandwidth are taken before anything is remembered: sums in one basis fit no other."""


class FourierSketch(nn.Module):
    r"""Kernel regression of payloads on keys, of which only two sums are kept.

    With $\varphi(s) = \sqrt{2 / D} \cos(\Omega s / h + b)$, $\Omega \sim N(0, 1)$, b uniform, the products
    $\langle \varphi(s), \varphi(s') \rangle$ approximate $e^{-\lVert s - s' \rVert^2 / 2 h^2}$, and

    $$
    G = \sum_i \lambda^{\mathrm{age}_i} g_i \varphi(s_i)^\top, \qquad z = \sum_i \lambda^{\mathrm{age}_i} \varphi(s_i),
    \qquad \hat g(s) = \frac{G \varphi(s)}{z^\top \varphi(s)}
    $$

    of which the denominator is the mass W around s.  Its error is some $\sqrt{2 / D}$ of all mass: where W is below
    that, there is nothing.  Only means can be read, no single neighbour, and a row is found again by itself.

    Args:
        banks: of sums.
        features: F, of a key.
        payloads: S, in a row.
        payload_size: P.
        size: D, of φ.
        neighbours: the bandwidth is the median distance to so many neighbours among the first `WARM_UP` rows.
        half_life: environment steps after which a row counts half; None: never.
        generator: where Ω and b are drawn from.

    Reference: Rahimi and Recht, "Random Features for Large-Scale Kernel Machines" (2007).
    """

    def __init__(
        self,
        *,
        banks: int,
        features: int,
        payloads: int,
        payload_size: int,
        size: int,
        neighbours: int,
        half_life: float | None,
        generator: Generator,
    ) -> None:
        super().__init__()
        self.size, self.neighbours = size, neighbours
        self.decay = 0.0 if half_life is None else math.log(2) / half_life
        self.frequencies: Tensor
        self.phases: Tensor
        self.register_buffer("frequencies", torch.randn(features, size, generator=generator))
        self.register_buffer("phases", torch.rand(size, generator=generator) * 2 * math.pi)
        self.sums: Tensor
        self.masses: Tensor
        self.scale: Tensor
        self.recent: Tensor
        self.written: Tensor
        self.rejected: Tensor
        self.now: Tensor
        self.last: Tensor
        self.register_buffer("sums", torch.zeros(banks, payloads, payload_size, size))
        self.register_buffer("masses", torch.zeros(banks, payloads, size))
        self.register_buffer("scale", torch.zeros(banks, features))
        self.register_buffer("recent", torch.zeros(banks, WARM_UP, features))
        self.register_buffer("written", torch.zeros(banks, dtype=torch.int64))
        self.register_buffer("rejected", torch.zeros(banks, dtype=torch.int64))
        self.register_buffer("now", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros((), dtype=torch.int64))

    @property
    def held(self) -> Tensor:
        """``[G]`` rows in the sums."""
        return (self.written - WARM_UP).clamp(min=0)

    @property
    def seen(self) -> Tensor:
        """See `RingStore.seen`."""
        return self.written

    def __len__(self) -> int:
        return int(self.held.sum())

    def clear(self) -> None:
        """Forget everything."""
        for name in ("sums", "masses", "scale", "recent", "written", "rejected", "now", "last"):
            getattr(self, name).zero_()

    def read(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Mean payloads ``[G, R, S, P]`` and masses ``[G, R, S]`` around ``keys`` ``[G, R, F]``."""
        waves = self._waves(keys)
        mass = torch.einsum("grd,gsd->grs", waves, self.masses)
        # What lies far away adds up to nothing but its error.
        held = self.held.view(-1, 1, 1)
        mass = torch.where(mass > held * math.sqrt(2 / self.size) / 2, mass, 0.0)
        sums = torch.einsum("grd,gspd->grsp", waves, self.sums)
        return sums / mass.clamp(min=1e-6).unsqueeze(-1) * (mass > 0).unsqueeze(-1), mass

    def write(self, keys: Tensor, payload: Tensor, live: Tensor) -> None:
        """Take in R rows a bank; arguments as in `RingStore.write`."""
        finite = keys.isfinite().all(-1, keepdim=True) & (payload.isfinite().all(-1) | ~live).all(-1, keepdim=True)
        offered = live.any(-1)
        self.rejected += (offered & ~finite.squeeze(-1)).sum(1)
        live = live & finite
        offered = live.any(-1)
        keys = torch.where(finite, keys, 0.0)
        payload = torch.where(live.unsqueeze(-1), payload, 0.0)
        rank = offered.cumsum(1) - 1 + self.written.unsqueeze(1)
        warming = offered & (rank < WARM_UP)
        if bool(warming.any()):
            bank = torch.arange(len(keys), device=keys.device).unsqueeze(1) * WARM_UP
            self.recent.flatten(0, 1)[(rank + bank)[warming]] = keys[warming]
        self.written += offered.sum(1)
        if bool((warming & (rank == WARM_UP - 1)).any()):
            self._measure()
        fading = torch.exp(-self.decay * (self.now - self.last).to(self.sums.dtype))
        self.last.copy_(self.now)
        weight = (live & ~warming.unsqueeze(-1)).to(payload.dtype)
        waves = self._waves(keys)
        self.masses.mul_(fading).add_(torch.einsum("grs,grd->gsd", weight, waves))
        self.sums.mul_(fading).add_(torch.einsum("grsp,grd->gspd", payload * weight.unsqueeze(-1), waves))

    def _waves(self, keys: Tensor) -> Tensor:
        """φ ``[G, R, D]``."""
        inner = (keys * self.scale.unsqueeze(1)) @ self.frequencies + self.phases
        return inner.cos() * math.sqrt(2 / self.size)

    def _measure(self) -> None:
        """Fix 1/(σh) of every bank that has just warmed up."""
        ready = (self.written >= WARM_UP) & (self.scale == 0).all(-1)
        std = self.recent.std(1, correction=0).clamp(min=LEAST_SCALE)
        scaled = self.recent / std.unsqueeze(1)
        own = torch.arange(WARM_UP, device=scaled.device).expand(len(scaled), -1)
        squared, _ = nearest(scaled, scaled, self.neighbours, exclude=own)
        bandwidth = squared[..., -1].median(1).values.sqrt().clamp(min=LEAST_BANDWIDTH)
        self.scale.copy_(torch.where(ready.unsqueeze(-1), 1 / (std * bandwidth.unsqueeze(-1)), self.scale))
