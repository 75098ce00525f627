"""A GRADIENT operator in a loss that has no seam for it: the gradient is replaced on its way back to the actor."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor

from marl_memory.memory.stock import StockEntries

if TYPE_CHECKING:
    from marl_memory.memory.gradient_field import GradientField


class ActionTap(TensorDictModuleBase):
    r"""Follows a deterministic actor; has no parameters and changes no entry.

    When a loss L sends its gradient back to the action, the field recalls, replaces the gradient, and remembers the one
    it was given.  The field's gradient is $g = \partial Q / \partial u$, with u the action in units where its bounds
    are ±1, and $L = -\frac{1}{B} \sum_b Q(s_b, \mu(s_b))$ over the B rows of a batch:

    $$
    \frac{\partial L}{\partial a_b} = -\frac{1}{B} \frac{\partial Q}{\partial a_b}, \qquad
    g_b = -B\, h\, \frac{\partial L}{\partial a_b}, \qquad
    \frac{\partial \tilde L}{\partial a_b} = -\frac{\tilde g_b}{B\, h}
    $$

    with h half the range of the action.  A mean over A agents too, weights of a prioritised replay or a coefficient of
    the loss multiply g by a number; the field works in units of g's running root mean square, so a number that stays
    makes no difference.  Where a critic reads several agents' actions, g_i is the gradient of all of its outputs.

    The operator is no submodule: it is in no ``state_dict``, no optimiser and no target network, and a copy of this
    module (``deepcopy``, pickle, another process) holds none and does nothing.  Nor does it without gradients.  Every
    backward pass that reaches the action recalls and remembers once.

    Args:
        field: the operator.
        entries: where its entries lie.
        action: key of the action.
        reduction: the loss's: ``mean``, or ``sum`` (B = 1 above).
    """

    field: GradientField | None
    entries: StockEntries
    last: TensorDict | None
    """The rows of the last backward pass."""
    centre: Tensor
    half_range: Tensor

    def __init__(
        self, field: GradientField, entries: StockEntries, action: Any, reduction: Literal["mean", "sum"]
    ) -> None:
        super().__init__()
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} must be 'mean' or 'sum'")
        spec = field.spec
        if not spec.continuous:
            raise ValueError("tap() follows actors with continuous actions; this task's are discrete")
        self.__dict__["field"] = field  # an attribute would be a submodule
        self.entries, self.action, self.reduction, self.last = entries, action, reduction, None
        low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
        self.centre = (high + low) / 2
        self.half_range = torch.where(torch.tensor(spec.action_valid), (high - low) / 2, 1.0)
        # The loss hands an actor only the entries that it names here.
        wanted = ["observation", "alive", "row"] + ["state"] * spec.own_state * field.scope.joint
        wanted += ["features"] * (field.trace.feature_size is not None)
        wanted += ["td_error", "value_target", "reward"] * (field.gate is not None)
        self.in_keys = [action, *(key for name in wanted for key in entries.keys[name])]
        self.out_keys = [action]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "field": None, "last": None}

    def metrics(self) -> dict[str, Tensor]:
        """The operator's metrics of the last backward pass; none before it."""
        return {} if self.field is None or self.last is None else self.field.metrics(self.last)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Wait at ``action`` ``[*B, P]`` or ``[*B, A, P]`` for its gradient."""
        action: Tensor = tensordict.get(self.action)
        field = self.field
        if field is not None and torch.is_grad_enabled() and action.requires_grad:
            rows = self._rows(field, tensordict, action.detach())
            action.register_hook(partial(self._replace, field, rows))
        return tensordict

    def _rows(self, field: GradientField, td: TensorDictBase, action: Tensor) -> TensorDict:
        """What the field reads and writes, but for the gradient."""
        k, rows = field.spec.keys, self.entries.view(td, field.trace.feature_size)
        if field.gate is not None:
            for key, name in ((k.td_error, "td_error"), (k.value_target, "value_target"), (k.learn_reward, "reward")):
                if self.entries.find(td, name) is None:
                    raise ValueError(
                        f"the fixed-point gate reads {name}, which this loss does not give its actor: build "
                        "GradientField(…, fixed_point_gate=False)"
                    )
                rows.set(key, self.entries(td, name))
        rows.set(k.policy_action, self._unit(self.entries.of_team(action, td.batch_size, "action")))
        return rows

    def _unit(self, action: Tensor) -> Tensor:
        return (action - self.centre.to(action)) / self.half_range.to(action)

    def _replace(self, field: GradientField, rows: TensorDict, gradient: Tensor) -> Tensor | None:
        """∂L/∂a as the actor is to follow it; None for as it is."""
        key = field.spec.keys.action_gradient
        given = self.entries.of_team(gradient.detach(), rows.batch_size, "action")
        scale = -self.half_range.to(given) * (rows.batch_size.numel() if self.reduction == "mean" else 1)
        fresh = given * scale
        rows = rows.copy().set(key, fresh.clone())
        field(rows)
        field.write(rows)
        self.last, fused = rows, rows.get(key)
        changed = (fused != fresh) & rows.get(field.spec.keys.alive).unsqueeze(-1)
        if not bool(changed.any()):
            return None
        # There and back by `scale` would move the last bits of what memory left alone.
        return torch.where(changed, fused / scale, given).view_as(gradient)
