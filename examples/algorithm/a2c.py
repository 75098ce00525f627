"""An algorithm of one's own: advantage actor-critic, one gradient step a batch.

marl-memory train --config-dir . env=toy/masked_duel algorithm=a2c
"""

import torch
from torch import Generator

from marl_memory.algorithms.algorithm import OnPolicyAlgorithm, derive_seed, load_optimiser_state, optimiser_state
from marl_memory.functional.returns import gae, masked_mean
from marl_memory.keys import Entry
from marl_memory.networks.actor import Actor
from marl_memory.networks.critic import Critic


class A2C(OnPolicyAlgorithm):
    """Actor-critic for teams, after Mnih et al. 2016 (arXiv 1602.01783); agents share parameters.

    Args:
        spec: the task.
        network: maker of network bodies.
        seed: the run's seed.
        gamma: discount factor γ.
        gae_lambda: λ of the advantages.
        entropy_coef: weight of the entropy.
        lr: Adam's step size.
    """

    stages = frozenset({"act", "reward", "target"})  # where memory can act on this learner
    actions = frozenset({"discrete", "continuous"})  # what it can learn

    def __init__(self, *, spec, network, seed, gamma=0.99, gae_lambda=0.95, entropy_coef=0.01, lr=1e-3):
        super().__init__()
        self.spec, self.keys = spec, spec.keys
        self.gamma, self.gae_lambda, self.entropy_coef = gamma, gae_lambda, entropy_coef
        options = {"share_parameters": True, "normalise_observations": False}
        drawn = {who: Generator().manual_seed(derive_seed(seed, who, "init")) for who in ("actor", "critic")}
        sample = derive_seed(seed, "actor", "sample")
        self.actor = Actor(spec, network, **options, init_generator=drawn["actor"], seed=sample)
        self.critic = Critic(spec, network, centralised=False, **options, init_generator=drawn["critic"])
        self.entropy_generator = Generator().manual_seed(derive_seed(seed, "entropy"))
        self.optimiser = torch.optim.Adam(self.parameters(), lr=lr)

    @property
    def learn_entries(self):
        k = self.keys
        return dict.fromkeys((k.learn_reward, k.advantage, k.value_target), Entry((self.spec.n_agents, 1)))

    def check_batch(self, rows):
        """Any batch will do."""

    def set_progress(self, progress):
        """There are no schedules."""

    def derive_rewards(self, batch):
        batch.get(self.keys.learn_reward).copy_(batch.get(("next", *self.keys.reward)))

    @torch.no_grad()
    def compute_advantages(self, batch):
        k, value, discount = self.keys, self.critic(batch), batch.get(("next", *self.keys.discount))
        cut = batch.get(("next", k.done)).unsqueeze(-2) | (discount == 0)
        following, factors = self.critic(batch.get("next")), {"gamma": self.gamma, "lam": self.gae_lambda}
        advantage = gae(batch.get(k.learn_reward), value, following, discount, cut, **factors)
        batch.get(k.advantage).copy_(advantage)
        batch.get(k.value_target).copy_(advantage + value)
        return {"value/mean": value.mean().item()}

    def minibatches(self, batch):
        yield batch

    def update(self, minibatch):
        k, alive = self.keys, minibatch.get(self.keys.alive)
        policy = self.actor.distribution(minibatch)
        gain = masked_mean(policy.log_prob(minibatch.get(k.action)) * minibatch.get(k.advantage).squeeze(-1), alive)
        entropy = masked_mean(policy.entropy(self.entropy_generator), alive)
        error = masked_mean((self.critic(minibatch) - minibatch.get(k.value_target)).square().squeeze(-1), alive)
        self.optimiser.zero_grad()
        (error - gain - self.entropy_coef * entropy).backward()
        self.optimiser.step()
        return {"loss/policy": -gain.detach(), "loss/value": error.detach(), "policy/entropy": entropy.detach()}

    def finish_update(self, batch):
        """There are no running statistics."""

    def cut_episodes(self):
        """Nothing is carried over from batch to batch."""

    def bootstrap_values(self, td):
        return self.critic(td)

    def get_extra_state(self):
        """What a checkpoint holds beside parameters and buffers: optimiser slots by name, and generators."""
        optimiser = optimiser_state(self.optimiser, dict(self.named_parameters()))
        generators = [self.actor.generator.get_state(), self.entropy_generator.get_state()]
        return {"optimiser": optimiser, "generators": generators}

    def set_extra_state(self, state):
        load_optimiser_state(self.optimiser, dict(self.named_parameters()), state["optimiser"])
        for generator, saved in zip((self.actor.generator, self.entropy_generator), state["generators"], strict=True):
            generator.set_state(saved)
