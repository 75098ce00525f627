"""A REGION operator in a loop of one's own, beside any policy-gradient loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution

from marl_memory.functional.returns import masked_mean
from marl_memory.functional.transport import categorical_kl, gaussian_kl, gaussian_w2
from marl_memory.memory.operator import put
from marl_memory.memory.stock import StockEntries, allowed_by, parameters_of

if TYPE_CHECKING:
    from marl_memory.memory.barycenter_region import BarycenterRegion


class JoinedRegion:
    r"""A `BarycenterRegion` and the actor of a stock script: `recall`, `penalty` and `remember`.

    ``recall`` leaves p* and its weight in the batch, under ``learn``; whatever draws minibatches from the batch takes
    them along.  At strength 0, and with an empty memory, ``penalty`` is a constant 0.

    Args:
        region: the operator.
        actor: has ``get_dist(td)``, as TorchRL's probabilistic actors do.
        entries: where its entries lie.
    """

    def __init__(self, region: BarycenterRegion, actor: Any, entries: StockEntries) -> None:
        if not hasattr(actor, "get_dist"):
            raise TypeError(f"join() needs an actor with get_dist(td), got {type(actor).__name__}")
        self.region, self.actor, self.entries = region, actor, entries

    @torch.no_grad()
    def recall(self, td: TensorDictBase) -> TensorDictBase:
        """Set p* and its weight in a batch ``[*B]``: before the epochs, with advantages and targets there already.

        The actor must be as it was when it collected the batch.
        """
        k, distribution = self.region.spec.keys, self.distribution(td)
        policy = {k.policy(name): self._of_team(x, td) for name, x in parameters_of(distribution).items()}
        if not set(policy) <= set(self.region.asks):
            wanted = "continuous: a Gaussian" if self.region.spec.continuous else "discrete: a categorical"
            raise ValueError(
                f"the policy is a {type(distribution).__name__}; the spec's actions are {wanted} fits them"
            )
        view = self._view(td).update(policy)
        if (allowed := allowed_by(distribution)) is not None:
            view.set(k.action_mask, self._of_team(allowed, td))
        self.region(view)
        for key in (*policy, *self.region.entries):
            put(td, key, view.get(key))
        return td

    def penalty(self, td: TensorDictBase, distribution: Distribution | None = None) -> Tensor:
        r"""Mean over rows and living agents of $c_M\,\omega\,\mathrm{KL}(p^* \| \pi)$: add it to the loss ``[]``.

        Args:
            td: rows ``[*B]`` of a batch that was recalled.
            distribution: π there; None: the actor's.
        """
        region = self.region
        weight: Tensor | None = td.get(region.weight, None)
        if weight is None:
            raise ValueError("these rows have no p*: recall(batch) before minibatches are drawn from it")
        if not bool(weight.any()):
            return weight.new_zeros(())
        here = parameters_of(self.distribution(td) if distribution is None else distribution)
        theirs = {name: td.get(key) for name, key in region.references.items()}
        ours = {name: self._of_team(x, td) for name, x in here.items()}
        if region.spec.continuous and not bool(region.valid.all()):  # padding has no distribution
            for name, there in theirs.items():
                ours[name] = torch.where(region.valid, ours[name], there)
        if "log_probs" in ours:
            divergence = categorical_kl(theirs["log_probs"], ours["log_probs"])
        else:
            between = gaussian_kl if region.divergence == "kl" else gaussian_w2
            divergence = between(theirs["loc"], theirs["scale"], ours["loc"], ours["scale"])
        alive = self.entries.view(td).get(region.spec.keys.alive)
        return masked_mean(weight * divergence, alive)

    @torch.no_grad()
    def remember(self, td: TensorDictBase) -> None:
        """Take in a batch ``[*B]`` that was recalled: after the epochs."""
        region = self.region
        if td.get(region.weight, None) is None:
            raise ValueError("this batch has no p*: recall(batch) first")
        recalled = (*(region.asks.keys() - region.trace.asks.keys()), *region.entries)
        region.write(self._view(td).update({key: td.get(key) for key in recalled}))

    def set_progress(self, frames: int, progress: float) -> None:
        """See `MemoryOperator.set_progress`."""
        self.region.set_progress(frames, progress)

    def metrics(self, td: TensorDictBase) -> dict[str, Tensor]:
        """The operator's, of a batch that was recalled."""
        return self.region.metrics(self.entries.view(td).update({self.region.report: td.get(self.region.report)}))

    def distribution(self, td: TensorDictBase) -> Distribution:
        """The actor's now; ``td`` is left as it is."""
        return self.actor.get_dist(td.select(*self.actor.in_keys))

    def _of_team(self, x: Tensor, td: TensorDictBase) -> Tensor:
        return self.entries.of_team(x, td.batch_size, "action")

    def _view(self, td: TensorDictBase) -> TensorDict:
        """What the operator reads besides the policy's distribution."""
        region, k = self.region, self.region.spec.keys
        view = self.entries.view(td, region.trace.feature_size)
        if not region.spec.continuous:
            shape = (*view.batch_size, region.spec.n_agents, region.spec.action_size)
            view.set(k.action_mask, torch.ones(shape, dtype=torch.bool, device=view.get(k.alive).device))
        if region.gate is not None:
            view.set(k.value, self.entries(td, "value"))
            view.set(k.value_target, self.entries(td, "value_target"))
            view.set(k.learn_reward, self.entries(td, "reward"))
        if region.cost_name == "value":
            view.set(k.action_values, self.entries(td, "action_values"))
        if region.quality is not None:
            view.set(k.advantage, self.entries(td, "advantage"))
        return view
