"""TorchRL's TD3 on Pendulum, with memory of action gradients: `python td3.py [strength]`.

Without the lines marked `# memory` it is a plain TorchRL script; strength 0 gives its parameters, bit for bit.
"""

import sys

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, RewardSum, StepCounter, TransformedEnv
from torchrl.modules import MLP, AdditiveGaussianModule, TanhModule, ValueOperator
from torchrl.objectives import SoftUpdate, TD3Loss

from marl_memory import TaskSpec  # memory
from marl_memory.memory.gradient_field import GradientField  # memory


def make_networks(env: GymEnv) -> tuple[TensorDictSequential, ValueOperator]:
    observations, actions = env.observation_spec["observation"].shape[-1], env.action_spec.shape[-1]
    body = MLP(in_features=observations, out_features=actions, num_cells=[64, 64], activation_class=nn.ReLU)
    actor = TensorDictSequential(
        TensorDictModule(body, in_keys=["observation"], out_keys=["action"]),
        TanhModule(in_keys=["action"], out_keys=["action"], spec=env.action_spec),
    )
    body = MLP(in_features=observations + actions, out_features=1, num_cells=[64, 64], activation_class=nn.ReLU)
    return actor, ValueOperator(body, in_keys=["observation", "action"])


def train(frames: int = 20_000, strength: float = 1.0, *, updates: int = 64, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    env = TransformedEnv(GymEnv("Pendulum-v1"))
    env.append_transform(RewardSum()).append_transform(StepCounter())
    env.set_seed(seed)
    actor, critic = make_networks(env)
    policy = TensorDictSequential(actor, AdditiveGaussianModule(env.action_spec, sigma_init=0.2, sigma_end=0.2))

    spec = TaskSpec.of_sizes(observation_size=3, action_low=(-2.0,), action_high=(2.0,))  # memory
    field = GradientField(spec=spec, strength=strength)  # memory
    actor = field.tap(actor)  # memory

    loss = TD3Loss(actor, critic, action_spec=env.action_spec)
    loss.make_value_estimator(gamma=0.99)
    targets = SoftUpdate(loss, tau=0.005)
    actor_optimiser = torch.optim.Adam(loss.actor_network_params.flatten_keys().values(), lr=1e-3)
    critic_optimiser = torch.optim.Adam(loss.qvalue_network_params.flatten_keys().values(), lr=1e-3)
    replay = TensorDictReplayBuffer(storage=LazyTensorStorage(frames), batch_size=64)
    collector = Collector(env, policy, frames_per_batch=64, total_frames=frames, init_random_frames=256)
    returns, seen = [], 0
    for batch in collector:
        replay.extend(batch.reshape(-1))
        seen += batch.numel()
        for update in range(updates if seen > 256 else 0):
            rows = replay.sample()
            loss.value_loss(rows)[0].backward()
            critic_optimiser.step()
            critic_optimiser.zero_grad()
            if update % 2:  # the actor and the targets are delayed
                loss.actor_loss(rows)[0].backward()
                actor_optimiser.step()
                actor_optimiser.zero_grad()
                targets.step()
        field.set_progress(seen, seen / frames)  # memory
        returns += batch["next", "episode_reward"][batch["next", "done"]].tolist()
    collector.shutdown()
    print(f"return of the last episodes: {sum(returns[-5:]) / max(len(returns[-5:]), 1):.0f}")
    return locals()


if __name__ == "__main__":
    train(strength=float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
