"""PPO, IPPO and MAPPO in plain PyTorch: what the library is measured against, in numbers and in speed.

The functions are a transcript of the formulas that shares no code with `marl_memory` (one `nn.Sequential` per network,
`torch.distributions`, a loop for the advantages); tests hold the two equal over many updates.  As a script it is the
floor of the speed benchmark: MAPPO on SMAX 3m, stepping JaxMARL with JaxMARL's own reset at the end of an episode.

    python benchmarks/plain_mappo.py --frames 400000
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform, Categorical, Normal, TanhTransform, TransformedDistribution

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an update needs to know; ``low`` and ``high`` ``[P]`` are set for continuous actions."""

    centralised: bool = True
    common_reward: bool = True
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coef: float = 1.0
    entropy_coef: float = 0.01
    max_grad_norm: float = 10.0
    normalise_advantages: bool = True
    low: Tensor | None = None
    high: Tensor | None = None


def stack(sizes: Sequence[int], activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers with activations between them."""
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(zip(sizes, sizes[1:], strict=False)):
        layers += [activation()] * (i > 0) + [nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


class Net(nn.Module):
    """One network for all agents (who see a one-hot of their index), or one each.

    Args:
        sizes: of the layers; the input is without the one-hot.
        agents: A.
        shared: one network instead of A.
        activation: of the hidden layers.
    """

    def __init__(
        self, sizes: Sequence[int], agents: int, *, shared: bool, activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        self.one_hot = shared and agents > 1
        first = sizes[0] + (agents if self.one_hot else 0)
        self.parts = nn.ModuleList(stack([first, *sizes[1:]], activation) for _ in range(1 if shared else agents))

    def forward(self, x: Tensor) -> Tensor:
        """``[*B, A, in] → [*B, A, out]``."""
        if self.one_hot:
            x = torch.cat([x, torch.eye(x.shape[-2], dtype=x.dtype).expand(*x.shape[:-1], -1)], -1)
        if len(self.parts) == 1:
            return self.parts[0](x)
        return torch.stack([net(x[..., i, :]) for i, net in enumerate(self.parts)], -2)


class StateValue(nn.Module):
    """V of the global state: one value where the reward is common, else one head per agent."""

    def __init__(self, sizes: Sequence[int], agents: int, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.agents, self.net = agents, stack(sizes, activation)

    def forward(self, state: Tensor) -> Tensor:
        """``[*B, S] → [*B, A, 1]``."""
        values = self.net(state)
        return values.expand(*values.shape[:-1], self.agents).unsqueeze(-1)


class StateOfEach(nn.Module):
    """V_i(s): each agent's own network of the state."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, state: Tensor) -> Tensor:
        """``[*B, S] → [*B, A, 1]``."""
        return self.net(state.unsqueeze(-2).expand(*state.shape[:-1], len(self.net.parts), -1))


class ValueNormaliser:
    """Debiased exponential averages of the targets and of their squares, as in the reference MAPPO."""

    def __init__(self, beta: float = 0.99999) -> None:
        self.beta, self.running_mean, self.running_mean_sq, self.debiasing = beta, 0.0, 0.0, 0.0

    def update(self, targets: Tensor) -> None:
        self.running_mean = self.running_mean * self.beta + targets.mean().item() * (1 - self.beta)
        self.running_mean_sq = self.running_mean_sq * self.beta + targets.pow(2).mean().item() * (1 - self.beta)
        self.debiasing = self.debiasing * self.beta + 1 - self.beta

    def mean_and_deviation(self) -> tuple[float, float]:
        if self.debiasing == 0:
            return 0.0, 1.0
        mean = self.running_mean / self.debiasing
        return mean, max(self.running_mean_sq / self.debiasing - mean**2, 1e-2) ** 0.5


@dataclass
class Learner:
    """Networks, what trains them and how.  ``log_std`` ``[A or 1, P]`` is set for continuous actions."""

    settings: Settings
    actor: nn.Module
    critic: nn.Module
    optimiser: torch.optim.Optimizer
    normaliser: ValueNormaliser | None = None
    log_std: nn.Parameter | None = None

    def actor_parameters(self) -> list[nn.Parameter]:
        return [*self.actor.parameters(), *([] if self.log_std is None else [self.log_std])]

    def values(self, data: Batch, prefix: str = "") -> Tensor:
        """The critic network's output ``[*B, A]``."""
        return self.critic(data[prefix + ("state" if self.settings.centralised else "observation")]).squeeze(-1)


def weights_and_biases(layer: Any) -> tuple[Tensor, Tensor]:
    """``[G, out, in]`` and ``[G, out]`` of a layer of the library's, which has one bank or G."""
    weight = layer.weight.unsqueeze(0) if layer.weight.ndim == 2 else layer.weight.transpose(1, 2)
    return weight, layer.bias.reshape(len(weight), -1)


def like(ours: Any, settings: Settings, *, fused: bool = False) -> Learner:
    """A plain learner with the weights, the dtype and the optimiser settings of a learner of the library's."""
    from marl_memory.networks.mlp import ACTIVATIONS

    spec, layers = ours.spec, ours.actor.body.layers
    hidden, activation = [layer.bias.shape[-1] for layer in layers[:-1]], nn.ReLU
    if ours.actor.body.activation is ACTIVATIONS["tanh"]:
        activation = nn.Tanh
    agents, shared = spec.n_agents, ours.critic.banks == 1 and spec.n_agents > 1
    options = {"shared": shared, "activation": activation}
    actor = Net([spec.observation_size, *hidden, spec.action_size], agents, **options)
    if not settings.centralised:
        critic: nn.Module = Net([spec.observation_size, *hidden, 1], agents, **options)
    elif shared:
        critic = StateValue([spec.state_size, *hidden, 1 if spec.common_reward else agents], agents, activation)
    else:
        critic = StateOfEach(Net([spec.state_size, *hidden, 1], agents, **options))
    dtype = layers[0].weight.dtype
    actor, critic = actor.to(dtype), critic.to(dtype)
    for network, copied in ((actor, ours.actor), (critic, ours.critic)):
        linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
        for slot, layer in enumerate(copied.body.layers):
            weights, biases = weights_and_biases(layer)
            for bank, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                linear = linears[bank * (len(hidden) + 1) + slot]
                linear.weight.data.copy_(weight)
                linear.bias.data.copy_(bias)
    log_std = None if ours.actor.log_std is None else nn.Parameter(ours.actor.log_std.detach().clone())
    parameters = [*actor.parameters(), *critic.parameters(), *([] if log_std is None else [log_std])]
    group = ours.optimiser.param_groups[0]
    adam = torch.optim.Adam(parameters, lr=ours.lr, eps=group["eps"], betas=group["betas"], fused=fused)
    return Learner(settings, actor, critic, adam, None if ours.value_norm is None else ValueNormaliser(), log_std)


def advantages(
    reward: Tensor, value: Tensor, next_value: Tensor, discount: Tensor, cut: Tensor, gamma: float, lam: float
) -> Tensor:
    """Generalised advantage estimates, all ``[T, N, A]``."""
    result, following = torch.zeros_like(reward), torch.zeros_like(reward[0])
    for t in reversed(range(len(reward))):
        delta = reward[t] + gamma * discount[t] * next_value[t] - value[t]
        following = delta + gamma * lam * (1 - cut[t]) * following
        result[t] = following
    return result


def team_mean(value: Tensor, alive: Tensor) -> Tensor:
    """``[*B, A]``: the dead take the mean value of the living."""
    weight = alive.to(value.dtype)
    mean = (value * weight).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1)
    return value * weight + mean * (1 - weight)


@torch.no_grad()
def prepare(learner: Learner, data: Batch) -> None:
    """Add ``old_output``, ``target`` and ``advantage`` ``[T, N, A]`` to a batch, and update the value normaliser.

    A batch holds observation ``[T, N, A, F]``, state ``[T, N, S]``, action, log_prob, alive, discount, reward
    ``[T, N, A]``, done ``[T, N]`` and of the step's true end next_observation, next_state, next_alive; or, where the
    true end is lost, ``next_output`` ``[T, N, A]``, what the critic makes of the rows that follow.
    """
    s, alive = learner.settings, data["alive"]
    mean, deviation = (0.0, 1.0) if learner.normaliser is None else learner.normaliser.mean_and_deviation()
    output = data["old_output"] if "old_output" in data else learner.values(data)
    next_output = data["next_output"] if "next_output" in data else learner.values(data, "next_")
    value, next_value = output * deviation + mean, next_output * deviation + mean
    cut = data["done"].unsqueeze(-1).expand_as(alive).to(value.dtype)
    if s.common_reward:
        value, next_value = team_mean(value, alive), team_mean(next_value, data["next_alive"])
    else:
        cut = torch.maximum(cut, 1 - data["next_alive"].to(value.dtype))
    advantage = advantages(data["reward"], value, next_value, data["discount"], cut, s.gamma, s.gae_lambda)
    target = advantage + value
    if learner.normaliser is not None:
        learner.normaliser.update(target[alive])
    if s.normalise_advantages:
        living = advantage[alive]
        advantage = (advantage - living.mean()) / (living.std(correction=0) + 1e-8)
    data |= {"old_output": output, "target": target, "advantage": advantage}


def policy(learner: Learner, rows: Batch, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy ``[R, A]``; with continuous actions an estimate from ``noise`` ``[R, A, P]``."""
    s, output = learner.settings, learner.actor(rows["observation"])
    if learner.log_std is None:
        logits = output.masked_fill(~rows["mask"], -torch.inf)
        distribution = Categorical(logits=logits, validate_args=False)
        return distribution.log_prob(rows["action"]), distribution.entropy()
    assert noise is not None
    assert s.low is not None
    assert s.high is not None
    normal = Normal(output, learner.log_std.exp().expand_as(output))
    squash = [TanhTransform(cache_size=1), AffineTransform((s.high + s.low) / 2, (s.high - s.low) / 2, cache_size=1)]
    squashed = TransformedDistribution(normal, squash, validate_args=False)
    drawn = normal.loc + normal.scale * noise
    for part in squash:
        drawn = part(drawn)
    return squashed.log_prob(rows["action"]).sum(-1), -squashed.log_prob(drawn).sum(-1)


def gradient_step(learner: Learner, rows: Batch, noise: Tensor | None = None) -> Tensor:
    """One Adam step on the rows ``[R, …]`` of a minibatch; returns the loss."""
    s, weight = learner.settings, rows["alive"].to(rows["advantage"].dtype)
    weight = weight / weight.sum()
    log_prob, entropy = policy(learner, rows, noise)
    ratio = (log_prob - rows["log_prob"]).exp()
    gain = torch.min(ratio * rows["advantage"], ratio.clamp(1 - s.clip, 1 + s.clip) * rows["advantage"])
    mean, deviation = (0.0, 1.0) if learner.normaliser is None else learner.normaliser.mean_and_deviation()
    target, value = (rows["target"] - mean) / deviation, learner.values(rows)
    error = (value - target) ** 2
    if s.value_clip is not None:
        clipped = rows["old_output"] + (value - rows["old_output"]).clamp(-s.value_clip, s.value_clip)
        error = torch.max(error, (clipped - target) ** 2)
    loss = ((-gain - s.entropy_coef * entropy + s.value_coef * error) * weight).sum()
    learner.optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(learner.actor_parameters(), s.max_grad_norm)
    nn.utils.clip_grad_norm_(learner.critic.parameters(), s.max_grad_norm)
    learner.optimiser.step()
    return loss.detach()


ROWS = ("observation", "state", "mask", "action", "log_prob", "alive", "advantage", "target", "old_output")


def learn(
    learner: Learner, data: Batch, orders: Iterable[Sequence[Tensor]], noise: Callable[[int], Tensor] | None = None
) -> None:
    """All gradient steps of one update: each element of ``orders`` is an epoch's minibatches of row numbers."""
    prepare(learner, data)
    rows = {key: data[key].flatten(0, 1) for key in ROWS if key in data}
    for minibatches in orders:
        for index in minibatches:
            drawn = None if noise is None else noise(len(index))
            gradient_step(learner, {key: x[index] for key, x in rows.items()}, drawn)


# ------------------------------------------------------------------------------------------------ the floor: SMAX 3m


class Smax:
    """N battles of JaxMARL's SMAX in one jitted call; arrays cross to PyTorch over dlpack."""

    def __init__(self, scenario: str, n_envs: int, seed: int) -> None:
        for name, value in {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "1"}.items():
            os.environ.setdefault(name, value)
        import jax
        from jax import numpy as jnp
        from jaxmarl.environments.smax import HeuristicEnemySMAX, map_name_to_scenario

        env = HeuristicEnemySMAX(scenario=map_name_to_scenario(scenario))
        self.agents, self.actions = env.num_agents, env.num_ally_actions
        self.features, self.state_size = env.obs_size, env.state_size

        def show(observations: Any, states: Any) -> tuple[Any, ...]:
            mask = jax.vmap(env.get_avail_actions)(states)
            alive = states.state.unit_alive[:, : env.num_agents]
            per_agent = [jnp.stack([x[agent] for agent in env.agents], 1) for x in (observations, mask)]
            return per_agent[0], observations["world_state"], per_agent[1].astype(bool), alive

        def reset(key: Any) -> tuple[Any, ...]:
            key, used = jax.random.split(key)
            observations, states = jax.vmap(env.reset)(jax.random.split(used, n_envs))
            return (key, states), *show(observations, states)

        def step(carry: Any, action: Any) -> tuple[Any, ...]:
            key, used = jax.random.split(carry[0])
            chosen = {agent: action[:, i] for i, agent in enumerate(env.agents)}
            observations, states, reward, done, _ = jax.vmap(env.step)(jax.random.split(used, n_envs), carry[1], chosen)
            team_reward = jnp.stack([reward[agent] for agent in env.agents], 1)
            return (key, states), *show(observations, states), team_reward, done["__all__"]

        self.carry, *self.seen = jax.jit(reset)(jax.random.PRNGKey(seed))
        self._step = jax.jit(step)

    def look(self) -> Batch:
        """What can be seen now."""
        names = ("observation", "state", "mask", "alive")
        return {name: torch.from_dlpack(x) for name, x in zip(names, self.seen, strict=True)}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards ``[N, A]`` and ends ``[N]``."""
        self.carry, *self.seen, reward, done = self._step(self.carry, action.to(torch.int32).numpy())
        return torch.from_dlpack(reward), torch.from_dlpack(done)


@torch.no_grad()
def collect(env: Smax, learner: Learner, steps: int) -> Batch:
    """A batch of ``steps`` × N; what follows an end is the next episode, so a time limit counts as a termination."""
    columns: dict[str, list[Tensor]] = {}
    for _ in range(steps):
        row = env.look()
        logits = learner.actor(row["observation"]).masked_fill(~row["mask"], -torch.inf)
        distribution = Categorical(logits=logits, validate_args=False)
        row["action"] = distribution.sample()
        row["log_prob"] = distribution.log_prob(row["action"])
        row["old_output"] = learner.values(row)
        row["reward"], row["done"] = env.step(row["action"])
        for key, x in row.items():
            columns.setdefault(key, []).append(x)
    data = {key: torch.stack(rows) for key, rows in columns.items()}
    last = env.look()
    data["next_output"] = torch.cat([data["old_output"][1:], learner.values(last).unsqueeze(0)])
    data["next_alive"] = torch.cat([data["alive"][1:], last["alive"].unsqueeze(0)])
    data["discount"] = 1.0 - data["done"].unsqueeze(-1).expand_as(data["reward"]).float()
    return data


class Floor:
    """MAPPO on SMAX 3m: `iterate` collects a batch and learns from it, and says how many seconds each took."""

    def __init__(
        self,
        *,
        iterations: int,
        n_envs: int = 64,
        steps: int = 128,
        epochs: int = 4,
        minibatches: int = 4,
        lr: float = 1e-3,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.iterations, self.done, self.lr = iterations, 0, lr
        self.steps, self.rows, self.epochs, self.minibatches = steps, n_envs * steps, epochs, minibatches
        self.env = Smax("3m", n_envs, seed)
        agents = self.env.agents
        actor = Net([self.env.features, 128, 128, self.env.actions], agents, shared=True)
        critic = StateValue([self.env.state_size, 128, 128, 1], agents)
        for linear in (module for net in (actor, critic) for module in net.modules() if isinstance(module, nn.Linear)):
            gain = {self.env.actions: 0.01, 1: 1.0}.get(linear.out_features, 2**0.5)
            nn.init.orthogonal_(linear.weight, gain)
            nn.init.zeros_(linear.bias)
        adam = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=lr, eps=1e-5, fused=True)
        self.learner = Learner(Settings(value_clip=None), actor, critic, adam, ValueNormaliser())

    def iterate(self) -> dict[str, float]:
        self.learner.optimiser.param_groups[0]["lr"] = self.lr * max(1 - self.done / self.iterations, 0.0)
        started = time.perf_counter()
        data = collect(self.env, self.learner, self.steps)
        collected = time.perf_counter()
        orders = (torch.randperm(self.rows).tensor_split(self.minibatches) for _ in range(self.epochs))
        learn(self.learner, data, orders)
        times = {"collect": collected - started, "learn": time.perf_counter() - collected}
        won = data["reward"][..., 0][data["done"]] >= 1.0  # the bonus of a won battle
        self.done += 1
        return {"frames": self.done * self.rows, "success": won.float().mean().item(), **times}


def main() -> None:
    parser = argparse.ArgumentParser(description="plain PyTorch MAPPO on SMAX 3m")
    parser.add_argument("--frames", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    iterations = max(options.frames // (64 * 128), 1)
    floor = Floor(iterations=iterations, seed=options.seed)
    for _ in range(iterations):
        print(json.dumps(floor.iterate()), flush=True)


if __name__ == "__main__":
    main()
