"""Operators in a TorchRL loop of one's own: where stock scripts keep what operators read, and in which shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributions import Distribution

from marl_memory.spec import TaskSpec

DEFAULTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "observation": (("GROUP", "observation"), ("observation",)),
    "action": (("GROUP", "action"), ("action",)),
    "state": (("state",),),
    "alive": (("GROUP", "alive"),),
    "row": (("index",),),
    "value": (("GROUP", "state_value"), ("state_value",)),
    "value_target": (("GROUP", "value_target"), ("value_target",)),
    "reward": (("next", "GROUP", "reward"), ("next", "reward")),
    "advantage": (("GROUP", "advantage"), ("advantage",)),
    "td_error": (("learn", "td_error"),),
    "action_values": (("learn", "action_values"),),
    "features": (("GROUP", "features"), ("features",)),
}
"""Where each entry is looked for, in this order, unless a key is given; ``GROUP`` is the agents' group."""

COMMON = ("value", "value_target", "reward", "advantage", "td_error")
"""What may be one for the whole team."""


class StockEntries:
    """Reads entries of stock TensorDicts ``[*B]`` as operators want them: ``[*B, A, …]``.

    An entry without agent dimension is that of the one agent; value, target, reward, advantage and TD error may also
    be one for a whole team.

    Args:
        spec: the task.
        names: keys of entries that lie elsewhere than `DEFAULTS` says; None: there is no such entry.

    Raises:
        ValueError: for a name that is none of `DEFAULTS`.
    """

    def __init__(self, spec: TaskSpec, names: Mapping[str, Any]) -> None:
        if unknown := set(names) - set(DEFAULTS):
            raise ValueError(f"unknown entries {sorted(unknown)}; known are {', '.join(DEFAULTS)}")
        self.spec = spec
        self.keys: dict[str, tuple[Any, ...]] = {
            name: tuple(tuple(spec.group if part == "GROUP" else part for part in key) for key in keys)
            for name, keys in DEFAULTS.items()
        }
        self.keys |= {name: () if key is None else (key,) for name, key in names.items()}

    def find(self, td: TensorDictBase, name: str) -> Tensor | None:
        """The entry as it lies in ``td``; None if there is none."""
        return next((x for key in self.keys[name] if (x := td.get(key, None)) is not None), None)

    def __call__(self, td: TensorDictBase, name: str) -> Tensor:
        """The entry ``[*B, A, …]``; without dimensions behind the agents' for ``alive``, one for all others.

        Raises:
            ValueError: if ``td`` has no such entry, or one of another shape.
        """
        x = self.find(td, name)
        if x is None:
            there = ", ".join(sorted(map(_spelled, td.keys(True, True))))
            raise ValueError(
                f"there is no {name} at {' or '.join(map(_spelled, self.keys[name]))}: say where it is, by "
                f"{name}=KEY; the TensorDict has {there}"
            )
        return self.of_team(x.detach(), td.batch_size, name)

    def of_team(self, x: Tensor, batch: torch.Size, name: str) -> Tensor:
        """``[*B, …]`` or ``[*B, A, …]`` as ``[*B, A, …]``."""
        at, agents = len(batch), self.spec.n_agents
        if x.ndim == at + (name != "alive"):
            x = x.unsqueeze(at)
        if name in COMMON and x.ndim > at and x.shape[at] == 1:
            x = x.expand(*batch, agents, *x.shape[at + 1 :])
        if x.shape[: at + 1] != (*batch, agents) or x.ndim != at + 1 + (name != "alive"):
            behind = "" if name == "alive" else ", …"
            raise ValueError(f"{name} must be {[*batch, agents]}{behind} for {agents} agents, got {list(x.shape)}")
        return x

    def view(self, td: TensorDictBase, feature_size: int | None = None) -> TensorDict:
        """Of ``td`` ``[*B]`` what rows are found by: observation, state, who lives, and row numbers if there are any.

        Without an entry ``alive`` all live.  With a ``feature_size``, features of that width too.
        """
        k = self.spec.keys
        observation = self(td, "observation")
        if observation.shape[-1] != self.spec.observation_size:
            raise ValueError(f"observations have {observation.shape[-1]} features, not {self.spec.observation_size}")
        alive = torch.ones(observation.shape[:-1], dtype=torch.bool, device=observation.device)
        if self.find(td, "alive") is not None:
            alive = self(td, "alive").bool()
        view = TensorDict({k.observation: observation, k.alive: alive}, batch_size=td.batch_size)
        state = self.find(td, "state") if self.spec.own_state else observation.flatten(-2)
        if state is not None:
            view.set(k.state, state.detach())
        if feature_size is not None:
            features = self(td, "features")
            if features.shape[-1] != feature_size:
                raise ValueError(f"features are {features.shape[-1]} wide, not feature_size={feature_size}")
            view.set(k.features, features)
        if (row := self.find(td, "row")) is not None:
            if row.shape != td.batch_size:
                raise ValueError(f"row must be {list(td.batch_size)}, got {list(row.shape)}; row=None does without")
            view.set(k.row, row)
        return view


def parameters_of(distribution: Distribution) -> dict[str, Tensor]:
    """What operators call ``policy(name)``: ``log_probs`` ``[*B, P]``, or ``loc`` and ``scale`` before squashing.

    Args:
        distribution: a (masked, one-hot) categorical, or a Gaussian, independent or not, squashed or not.

    Raises:
        TypeError: for another.
    """
    base: Any = distribution
    while not isinstance(base, torch.distributions.Normal) and hasattr(base, "base_dist"):
        base = base.base_dist  # Independent, and whatever transforms: they change neither KL nor its gradient
    if isinstance(base, torch.distributions.Normal):
        return {"loc": base.loc, "scale": base.scale}
    if isinstance(base, torch.distributions.OneHotCategorical | torch.distributions.Categorical):
        logits = base.logits
        # A finite logit for what is forbidden: a softmax of −∞ alone would spoil gradients.
        return {"log_probs": logits.clamp(min=torch.finfo(logits.dtype).min).log_softmax(-1)}
    raise TypeError(f"the policy's distribution must be a Gaussian or a categorical, got {type(distribution).__name__}")


def allowed_by(distribution: Distribution) -> Tensor | None:
    """``[*B, P]`` bool: actions that a masked categorical allows; without a mask those of a probability above 0.

    None if it has neither, as a Gaussian.
    """
    mask = getattr(distribution, "mask", None)
    if isinstance(mask, Tensor) and mask.dtype == torch.bool:
        return mask
    probabilities = getattr(distribution, "probs", None)
    return None if probabilities is None else probabilities.detach() > 0


def _spelled(key: str | tuple[str, ...]) -> str:
    return key if isinstance(key, str) else "/".join(key)
