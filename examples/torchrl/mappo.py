"""TorchRL's MAPPO on simple_spread, with memory of action distributions: `python mappo.py [strength]`.

Without the lines marked `# memory` it is a plain TorchRL script; strength 0 gives its parameters, bit for bit.
"""

import sys

import torch
from mpe2 import simple_spread_v3
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import PettingZooWrapper
from torchrl.modules import MultiAgentMLP, ProbabilisticActor
from torchrl.objectives.multiagent import MAPPOLoss

from marl_memory import TaskSpec  # memory
from marl_memory.memory.barycenter_region import BarycenterRegion  # memory


def make_networks(agents: int, observations: int, actions: int) -> tuple[ProbabilisticActor, TensorDictModule]:
    body = MultiAgentMLP(
        n_agent_inputs=observations, n_agent_outputs=actions, n_agents=agents, centralized=False, share_params=True,
        num_cells=[64, 64], activation_class=nn.Tanh,
    )  # fmt: skip
    actor = ProbabilisticActor(
        TensorDictModule(body, in_keys=[("agent", "observation")], out_keys=[("agent", "logits")]),
        in_keys=[("agent", "logits")],
        out_keys=[("agent", "action")],
        distribution_class=Categorical,
        return_log_prob=True,
        log_prob_key=("agent", "action_log_prob"),
    )
    body = MultiAgentMLP(
        n_agent_inputs=observations, n_agent_outputs=1, n_agents=agents, centralized=True, share_params=True,
        num_cells=[64, 64], activation_class=nn.Tanh,
    )  # fmt: skip
    return actor, TensorDictModule(body, in_keys=[("agent", "observation")], out_keys=[("agent", "state_value")])


def train(frames: int = 100_000, strength: float = 1.0, *, steps: int = 1000, epochs: int = 10, seed: int = 0) -> dict:
    torch.manual_seed(seed)
    env = PettingZooWrapper(env=simple_spread_v3.parallel_env(N=3, max_cycles=25), use_mask=False, seed=seed)
    actor, critic = make_networks(agents=3, observations=18, actions=5)

    spec = TaskSpec.of_sizes(observation_size=18, n_actions=5, agents=3, group="agent")  # memory
    region = BarycenterRegion(spec=spec, strength=strength, gamma=0.95).join(actor)  # memory

    loss = MAPPOLoss(actor, critic)
    loss.set_keys(
        value=("agent", "state_value"),
        action=("agent", "action"),
        sample_log_prob=("agent", "action_log_prob"),
        reward=("agent", "reward"),
        done=("agent", "done"),
        terminated=("agent", "terminated"),
    )
    loss.make_value_estimator(gamma=0.95, lmbda=0.9)
    optimiser = torch.optim.Adam(loss.parameters(), lr=1e-3)
    minibatches = TensorDictReplayBuffer(
        storage=LazyTensorStorage(steps), sampler=SamplerWithoutReplacement(), batch_size=steps // 5
    )
    collector = Collector(env, actor, frames_per_batch=steps, total_frames=frames)
    rewards, seen = [], 0
    for batch in collector:
        with torch.no_grad():
            loss.value_estimator(
                batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params
            )
        region.recall(batch)  # memory
        minibatches.empty()
        minibatches.extend(batch)
        for _ in range(epochs):
            for rows in minibatches:
                terms = loss(rows)
                total = terms["loss_objective"] + terms["loss_critic"] + terms["loss_entropy"]
                total = total + region.penalty(rows)  # memory
                total.backward()
                nn.utils.clip_grad_norm_(loss.parameters(), 10.0)
                optimiser.step()
                optimiser.zero_grad()
        region.remember(batch)  # memory
        seen += batch.numel()
        region.set_progress(seen, seen / frames)  # memory
        rewards.append(batch["next", "agent", "reward"].mean().item())
    collector.shutdown()
    print(f"mean reward of a step in the last batch: {rewards[-1]:.2f}")
    return locals()


if __name__ == "__main__":
    train(strength=float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
