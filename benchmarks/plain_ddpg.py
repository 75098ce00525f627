"""DDPG, MADDPG, TD3 and MATD3 in plain PyTorch: what the library is measured against, in numbers and in speed.

A transcript of the formulas that shares no code with `marl_memory`: one `nn.Sequential` per agent and critic, one Adam
per agent, and loops over agents, as one would write it.
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
    """What an update needs to know."""

    centralised: bool = True
    common_reward: bool = False
    continuous: bool = True
    joint: bool = False
    gamma: float = 0.99
    tau: float = 0.005
    policy_delay: int = 1
    target_noise: float = 0.2
    target_noise_clip: float = 0.5
    temperature: float = 1.0
    logit_penalty: float = 0.0


class Learner:
    """A agents that share nothing: an actor, C critics, targets and two optimisers each.

    Args:
        settings: of the updates.
        actors: one a network per agent.
        critics: ``critics[i][c]``.
        lr: step sizes of actors and critics.
        fused: Adam's own switch.
    """

    def __init__(
        self,
        settings: Settings,
        actors: list[nn.Sequential],
        critics: list[nn.ModuleList],
        lr: tuple[float, float],
        *,
        fused: bool = False,
    ) -> None:
        self.settings, self.actors, self.critics, self.updates = settings, actors, critics, 0
        self.target_actors, self.target_critics = deepcopy(actors), deepcopy(critics)
        self.actor_adams = [torch.optim.Adam(net.parameters(), lr=lr[0], fused=fused) for net in actors]
        self.critic_adams = [torch.optim.Adam(net.parameters(), lr=lr[1], fused=fused) for net in critics]

    # ---- acting

    def output(self, actor: nn.Module, rows: Batch, i: int, prefix: str = "") -> Tensor:
        """μ_i in [−1, 1], or masked logits: ``[B, P]``."""
        raw = actor(rows[prefix + "observation"][:, i])
        if self.settings.continuous:
            return torch.tanh(raw)
        return raw.masked_fill(~rows[prefix + "mask"][:, i], -torch.inf)

    def sample(self, logits: Tensor, u: Tensor) -> Tensor:
        """A straight-through Gumbel-softmax sample ``[B, P]``."""
        noisy = logits - torch.log(-torch.log(u))
        soft = torch.softmax(noisy / self.settings.temperature, -1)
        return F.one_hot(noisy.argmax(-1), logits.shape[-1]).to(soft) + soft - soft.detach()

    def choice(self, rows: Batch, i: int, u: Tensor | None) -> Tensor:
        """What agent i does now, with a gradient."""
        output = self.output(self.actors[i], rows, i)
        return output if u is None else self.sample(output, u[:, i])

    def target_choice(self, rows: Batch, i: int, noise: Tensor | None) -> Tensor:
        """What agent i's target does next: ``[B, P]``; ``noise`` is TD3's."""
        s, output = self.settings, self.output(self.target_actors[i], rows, i, "next_")
        if s.continuous:
            if noise is None:
                return output
            return (output + (noise[:, i] * s.target_noise).clamp(-s.target_noise_clip, s.target_noise_clip)).clamp(
                -1, 1
            )
        if noise is None:
            return F.one_hot(output.argmax(-1), output.shape[-1]).to(output)
        return self.sample(output, noise[:, i])

    def values(self, nets: nn.ModuleList, rows: Batch, actions: list[Tensor], i: int, prefix: str = "") -> Tensor:
        """Q_i ``[B, C]`` of all agents' ``actions``."""
        if self.settings.centralised:
            x = torch.cat([rows[prefix + "state"], *actions], -1)
        else:
            x = torch.cat([rows[prefix + "observation"][:, i], actions[i]], -1)
        return torch.cat([net(x) for net in nets], -1)

    # ---- an update

    def update(
        self,
        rows: Batch,
        *,
        target_noise: Tensor | None = None,
        u: Tensor | None = None,
        targets: Tensor | None = None,
        under_weight: float = 1.0,
    ) -> None:
        """One update on B rows.

        ``rows``: observation ``[B, A, F]``, state ``[B, S]``, mask, alive (may be left out), the same one step later
        (``next_…``), action vectors ``[B, A, P]``, reward and discount ``[B, A]``.

        Args:
            rows: see above.
            target_noise: ``[B, A, P]``: TD3's, standard normal (discrete: uniform).
            u: ``[B, A, P]`` uniform, for the actors' samples (discrete).
            targets: ``[B, A, C]``, what the critics learn instead of their own targets.
            under_weight: of squared errors where a value lies under its target.
        """
        s, agents = self.settings, range(len(self.actors))
        taken = list(rows["action"].unbind(1))
        with torch.no_grad():
            following = [self.target_choice(rows, i, target_noise) for i in agents]
            after = [self.values(self.target_critics[i], rows, following, i, "next_") for i in agents]
            after = [values.min(-1, keepdim=True).values for values in after]
            if s.common_reward:
                after = self.team_mean(after, rows["next_alive"])
        for i in agents:
            target = rows["reward"][:, i] + s.gamma * rows["discount"][:, i] * after[i][:, 0]
            value = self.values(self.critics[i], rows, taken, i)
            error = value - (target.unsqueeze(-1) if targets is None else targets[:, i])
            square = error**2 if under_weight == 1 else torch.where(error < 0, under_weight, 1.0) * error**2
            loss = self.living(square, rows, i).mean(0).sum()
            self.critic_adams[i].zero_grad()
            loss.backward()
            self.critic_adams[i].step()
        self.updates += 1
        if self.updates % s.policy_delay:
            return
        self.move_actors(rows, taken, u)
        for present, target in ((self.actors, self.target_actors), (self.critics, self.target_critics)):
            for net, slow in zip(present, target, strict=True):
                for p, q in zip(net.parameters(), slow.parameters(), strict=True):
                    q.data.add_(s.tau * (p.data - q.data))

    def move_actors(self, rows: Batch, taken: list[Tensor], u: Tensor | None) -> None:
        """A step of every actor along its own critic's gradient, or along all critics' (``joint``)."""
        agents = range(len(self.actors))
        chosen = [self.choice(rows, i, u) for i in agents]
        if self.settings.joint:
            losses = [-self.values(self.critics[j], rows, chosen, j)[:, 0].mean() for j in agents]
            sum(losses).backward()  # type: ignore[union-attr]
        for i in agents:
            if not self.settings.joint:
                value = self.values(self.critics[i], rows, [*taken[:i], chosen[i], *taken[i + 1 :]], i)[:, 0]
                (-self.living(value - self.penalty(rows, i), rows, i).mean()).backward()
        for adam in self.actor_adams:
            adam.step()
        for adam in [*self.actor_adams, *self.critic_adams]:
            adam.zero_grad()

    def penalty(self, rows: Batch, i: int) -> Tensor | float:
        """The weighted mean square of agent i's allowed logits: ``[B]``."""
        if not self.settings.logit_penalty:
            return 0.0
        logits = self.output(self.actors[i], rows, i)
        means = [(row[mask] ** 2).mean() for row, mask in zip(logits, rows["mask"][:, i], strict=True)]
        return self.settings.logit_penalty * torch.stack(means)

    def living(self, x: Tensor, rows: Batch, i: int) -> Tensor:
        """The rows of ``x`` in which agent i lives; all where nobody dies (no ``alive`` in ``rows``)."""
        return x[rows["alive"][:, i]] if "alive" in rows else x

    def team_mean(self, values: list[Tensor], alive: Tensor) -> list[Tensor]:
        """The dead take the mean value of the living: ``[B, 1]`` each."""
        stacked, weight = torch.stack(values, 1), alive.to(values[0].dtype).unsqueeze(-1)
        mean = (stacked * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        none = weight.sum(1, keepdim=True) == 0
        return list(torch.where(none, stacked, stacked * weight + mean * (1 - weight)).unbind(1))


def like(ours: Any, settings: Settings, *, fused: bool = False) -> Learner:
    """A plain learner with the weights and step sizes of a learner of the library's that shares no parameters."""
    spec, count = ours.spec, ours.spec.n_agents

    def copy(body: Any, sizes: list[int]) -> list[nn.Sequential]:
        nets = [stack(sizes).to(body.layers[0].weight.dtype) for _ in range(count)]
        for slot, layer in enumerate(body.layers):
            weights, biases = weights_and_biases(layer)
            for i, net in enumerate(nets):
                net[2 * slot].weight.data.copy_(weights[i])
                net[2 * slot].bias.data.copy_(biases[i])
        return nets

    hidden = [layer.bias.shape[-1] for layer in ours.actor.body.layers[:-1]]
    inputs = spec.observation_size + spec.action_size
    if settings.centralised:
        inputs = spec.state_size + count * spec.action_size
    twins = [copy(twin, [inputs, *hidden, 1]) for twin in ours.critic.twins]
    return Learner(
        settings,
        copy(ours.actor.body, [spec.observation_size, *hidden, spec.action_size]),
        [nn.ModuleList(nets[i] for nets in twins) for i in range(count)],
        (ours.actor_optimiser.param_groups[0]["lr"], ours.critic_optimiser.param_groups[0]["lr"]),
        fused=fused,
    )
