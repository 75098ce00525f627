"""Batches in which memory took some of the actions: what an on-policy learner has to know of them."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

from marl_memory.functional.mixture import mixture_log_prob, truncated_ratio
from marl_memory.keys import Keys
from marl_memory.networks.actor import Actor
from marl_memory.networks.distributions import Distribution


def taken_by_memory(batch: TensorDictBase, keys: Keys) -> Tensor | None:
    """``[*B, A]`` bool: where memory's action was executed; None where it was nowhere, or there is no such memory."""
    taken: Tensor | None = batch.get(keys.taken, None)
    return taken if taken is not None and bool(taken.any()) else None


@torch.no_grad()
def settle(batch: TensorDictBase, actor: Actor, acted: Distribution, taken: Tensor) -> Tensor:
    r"""Write log π of the executed actions into ``log_prob``, and log b; the ratios of the advantages.

    Actions that the policy drew itself keep the log-probability that they were drawn with.

    Args:
        batch: ``[*B]``.
        actor: π.
        acted: π at the batch's observations, as it collected.
        taken: ``[*B, A]`` bool.

    Returns:
        ρ ``[*B, A]``, see `truncated_ratio`.
    """
    k = actor.keys
    action, alive = batch.get(k.action), batch.get(k.alive)
    own = torch.where(taken, acted.log_prob(action), batch.get(k.log_prob))
    batch.get(k.log_prob).copy_(own)
    parameters = {name: batch.get(k.memory_policy(name)) for name in acted.parameters}
    memory = actor.of_parameters(parameters).log_prob(action)
    if (asked := batch.get(k.behaviour_log_prob, None)) is not None:
        asked.copy_(mixture_log_prob(torch.where(alive, batch.get(k.act_weight), 0.0), memory, own))
    return truncated_ratio(taken & alive, own, memory)
