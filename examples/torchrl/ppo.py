"""TorchRL's PPO on Pendulum, with memory of action distributions: `python ppo.py [strength]`.

Without the lines marked `# memory` it is a plain TorchRL script; strength 0 gives its parameters, bit for bit.
"""

import sys

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import GymEnv, RewardSum, StepCounter, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from marl_memory import TaskSpec  # memory
from marl_memory.memory.barycenter_region import BarycenterRegion  # memory


def make_networks(env: GymEnv) -> tuple[ProbabilisticActor, ValueOperator]:
    observations, actions = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    body = MLP(in_features=observations, out_features=2 * actions, num_cells=[64, 64], activation_class=nn.Tanh)
    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(body, NormalParamExtractor()), in_keys=["observation"], out_keys=["loc", "scale"]
        ),
        in_keys=["loc", "scale"],
        spec=env.action_spec,
        distribution_class=TanhNormal,
        distribution_kwargs={"low": env.action_spec.space.low, "high": env.action_spec.space.high},
        return_log_prob=True,
    )
    body = MLP(in_features=observations, out_features=1, num_cells=[64, 64], activation_class=nn.Tanh)
    return actor, ValueOperator(body, in_keys=["observation"])


def train(frames: int = 100_000, strength: float = 1.0, *, steps: int = 2000, epochs: int = 10, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    env = TransformedEnv(GymEnv("Pendulum-v1"))
    env.append_transform(RewardSum()).append_transform(StepCounter())
    env.set_seed(seed)
    actor, critic = make_networks(env)

    spec = TaskSpec.of_sizes(observation_size=3, action_low=(-2.0,), action_high=(2.0,))  # memory
    region = BarycenterRegion(spec=spec, strength=strength, gamma=0.95).join(actor)  # memory

    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.0, normalize_advantage=True)
    advantages = GAE(gamma=0.95, lmbda=0.95, value_network=critic)
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
    minibatches = TensorDictReplayBuffer(
        storage=LazyTensorStorage(steps), sampler=SamplerWithoutReplacement(), batch_size=steps // 10
    )
    collector = Collector(env, actor, frames_per_batch=steps, total_frames=frames)
    returns, seen = [], 0
    for batch in collector:
        with torch.no_grad():
            advantages(batch)
        region.recall(batch)  # memory
        minibatches.empty()
        minibatches.extend(batch)
        for _ in range(epochs):
            for rows in minibatches:
                terms = loss(rows)
                total = terms["loss_objective"] + terms["loss_critic"]
                total = total + region.penalty(rows)  # memory
                total.backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
                optimiser.step()
                optimiser.zero_grad()
        region.remember(batch)  # memory
        seen += batch.numel()
        region.set_progress(seen, seen / frames)  # memory
        returns += batch["next", "episode_reward"][batch["next", "done"]].tolist()
    collector.shutdown()
    print(f"return of the last episodes: {sum(returns[-5:]) / max(len(returns[-5:]), 1):.0f}")
    return locals()


if __name__ == "__main__":
    train(strength=float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
