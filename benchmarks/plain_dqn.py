"""DQN and IDQN in plain PyTorch: what the library is measured against, in numbers and in speed.

A transcript of the formulas that shares no code with `marl_memory`: one `nn.Sequential` per critic, for each agent or
for all of them, and loops over agents, as one would write it.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.plain_mappo import Batch, stack, weights_and_biases


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an update needs to know; ``sizes`` are the agents' numbers of actions."""

    sizes: tuple[int, ...]
    shared: bool = False
    double: bool = True
    dueling: bool = False
    huber: bool = True
    common_reward: bool = False
    gamma: float = 0.99
    tau: float = 1.0
    target_every: int = 500
    max_grad_norm: float | None = None


class Learner:
    """A agents with C critics, their targets and an optimiser each; or with one such set for all.

    Args:
        settings: of the updates.
        nets: ``nets[i][c]``; one i for all agents where they share.
        lr: step size.
        fused: Adam's own switch.
    """

    def __init__(self, settings: Settings, nets: list[nn.ModuleList], lr: float, *, fused: bool = False) -> None:
        self.settings, self.nets, self.targets, self.updates = settings, nets, deepcopy(nets), 0
        self.adams = [torch.optim.Adam(twins.parameters(), lr=lr, fused=fused) for twins in nets]

    def values(self, nets: list[nn.ModuleList], observation: Tensor, i: int) -> list[Tensor]:
        """Q of agent i's own actions, by each critic: C times ``[B, P_i]``."""
        s, x = self.settings, observation[:, i]
        if s.shared and len(s.sizes) > 1:
            x = torch.cat([x, F.one_hot(torch.tensor(i), len(s.sizes)).to(x).expand(len(x), -1)], -1)
        outputs = [net(x) for net in nets[0 if s.shared else i]]
        if not s.dueling:
            return [output[:, : s.sizes[i]] for output in outputs]
        values, advantages = [y[:, -1:] for y in outputs], [y[:, : s.sizes[i]] for y in outputs]
        return [v + a - a.mean(-1, keepdim=True) for v, a in zip(values, advantages, strict=True)]

    def next_value(self, rows: Batch, i: int) -> Tensor:
        """``[B]``: the smaller of the critics at the action that the first present one, or each itself, likes best."""
        forbidden = ~rows["next_mask"][:, i, : self.settings.sizes[i]]
        after = self.values(self.targets, rows["next_observation"], i)
        if self.settings.double:
            now = self.values(self.nets, rows["next_observation"], i)[0].masked_fill(forbidden, -torch.inf)
            best = now.argmax(-1, keepdim=True)
            after = [q.gather(-1, best)[:, 0] for q in after]
        else:
            after = [q.masked_fill(forbidden, -torch.inf).max(-1).values for q in after]
        return torch.stack(after).min(0).values

    def update(self, rows: Batch) -> None:
        """One update on B rows.

        ``rows``: observation ``[B, A, F]``, the same and mask ``[B, A, P]`` one step later (``next_…``); action, reward
        and discount ``[B, A]``; alive, next_alive and under_weight ``[B, A]`` may be left out.
        """
        s, agents = self.settings, range(len(self.settings.sizes))
        with torch.no_grad():
            after = torch.stack([self.next_value(rows, i) for i in agents], 1)
            if s.common_reward and "next_alive" in rows:
                after = self.team_mean(after, rows["next_alive"])
            target = rows["reward"] + s.gamma * rows["discount"] * after
        living = rows["alive"] if "alive" in rows else torch.ones_like(target, dtype=torch.bool)
        sums = []
        for i in agents:
            for q in self.values(self.nets, rows["observation"], i):
                error = q.gather(-1, rows["action"][:, i : i + 1])[:, 0] - target[:, i]
                each = error**2
                if s.huber:
                    each = torch.where(error.abs() <= 1, 0.5 * error**2, error.abs() - 0.5)
                if "under_weight" in rows:
                    each = torch.where(error < 0, rows["under_weight"][:, i] * each, each)
                sums.append(each[living[:, i]].sum() / (living.sum() if s.shared else living[:, i].sum()))
        for adam in self.adams:
            adam.zero_grad()
        torch.stack(sums).sum().backward()
        if s.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for twins in self.nets for p in twins.parameters()], s.max_grad_norm)
        for adam in self.adams:
            adam.step()
        self.updates += 1
        if self.updates % s.target_every == 0:
            for twins, slow in zip(self.nets, self.targets, strict=True):
                for p, q in zip(twins.parameters(), slow.parameters(), strict=True):
                    q.data.add_(s.tau * (p.data - q.data))

    def team_mean(self, values: Tensor, alive: Tensor) -> Tensor:
        """The dead take the mean value of the living: ``[B, A]``."""
        weight = alive.to(values.dtype)
        mean = (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return torch.where(alive | ~alive.any(1, keepdim=True), values, mean)


def like(ours: Any, settings: Settings, *, fused: bool = False) -> Learner:
    """A plain learner with the weights and the step size of a learner of the library's."""
    count = 1 if settings.shared else len(settings.sizes)
    nets = [nn.ModuleList() for _ in range(count)]
    for twin in ours.actor.twins:
        layers = [weights_and_biases(layer) for layer in twin.layers]
        sizes = [layers[0][0].shape[-1], *(bias.shape[-1] for _, bias in layers)]
        for i in range(count):
            net = stack(sizes).to(layers[0][0].dtype)
            for slot, (weights, biases) in enumerate(layers):
                net[2 * slot].weight.data.copy_(weights[i])
                net[2 * slot].bias.data.copy_(biases[i])
            nets[i].append(net)
    return Learner(settings, nets, ours.optimiser.param_groups[0]["lr"], fused=fused)
