"""Adam over whole networks: one call of a kernel where there would be one for each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam


class FlatAdam:
    """Adam over modules whose parameters are moved side by side into one tensor for each module.

    The numbers are those of ``torch.optim.Adam``.  Small networks of a dozen tensors cost more in calls than in
    arithmetic: in one piece, a step costs a third.  Parameters stay the modules' own: views of that tensor.

    Args:
        modules: what learns.
        lr, eps: Adam's step size and ε.
    """

    def __init__(self, *modules: nn.Module, lr: float, eps: float = 1e-8) -> None:
        self.members = [list(module.parameters()) for module in modules]
        self.flat = [nn.Parameter(torch.empty(0)) for _ in modules]
        self.gradients: list[Tensor] = [torch.empty(0) for _ in modules]
        self.adam = torch.optim.Adam(self.flat, lr=lr, eps=eps, fused=True)
        for i in range(len(modules)):
            self._gather_values(i)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """As of every optimiser of PyTorch."""
        return self.adam.param_groups

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for members in self.members:
            for p in members:
                p.grad = None

    def gather(self) -> None:
        """Take the gradients of the last backward pass; before `clip` and `step`."""
        for i, members in enumerate(self.members):
            if not self._in_place(i):
                self._gather_values(i)
            parts = [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in members]
            torch.cat(parts, out=self.gradients[i])

    def clip(self, limit: float) -> list[Tensor]:
        """Scale each module's gradient down to a norm of ``limit``; the norms ``[]`` before."""
        norms = []
        for gradient in self.gradients:
            norms.append(torch.linalg.vector_norm(gradient))
            gradient.mul_((limit / (norms[-1] + 1e-6)).clamp(max=1.0))
        return norms

    def step(self) -> None:
        """Move the parameters."""
        for flat in self.flat:
            if flat not in self.adam.state:
                self.adam.state[flat] = {name: torch.zeros_like(flat.detach()) for name in ("exp_avg", "exp_avg_sq")}
                self.adam.state[flat]["step"] = torch.zeros(())
        (group,), slots = self.adam.param_groups, [self.adam.state[flat] for flat in self.flat]
        with torch.no_grad():
            adam(  # `torch.optim.Adam.step` takes three times as long for the same kernel
                [flat.detach() for flat in self.flat],
                self.gradients,
                [slot["exp_avg"] for slot in slots],
                [slot["exp_avg_sq"] for slot in slots],
                [],
                [slot["step"] for slot in slots],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )

    # -------------------------------------------------------------------------------------------------------- places

    def _in_place(self, i: int) -> bool:
        """Whether the parameters lie where they were put: a copied or converted module has moved away."""
        members, flat = self.members[i], self.flat[i]
        end = flat.data_ptr() + (flat.numel() - members[-1].numel()) * flat.element_size()
        return members[0].data_ptr() == flat.data_ptr() and members[-1].data_ptr() == end

    def _gather_values(self, i: int) -> None:
        members, flat = self.members[i], self.flat[i]
        flat.data = torch.cat([p.detach().reshape(-1) for p in members])
        self.gradients[i] = torch.zeros_like(flat.detach())
        for p, piece in zip(members, self._pieces(i, flat.data), strict=True):
            p.data = piece
        for name, slot in self.adam.state[flat].items() if flat in self.adam.state else ():
            if name != "step":
                self.adam.state[flat][name] = slot.to(flat)

    def _pieces(self, i: int, flat: Tensor) -> list[Tensor]:
        """``flat`` cut into the shapes of the parameters."""
        members = self.members[i]
        parts = flat.split([p.numel() for p in members])
        return [part.view(p.shape) for part, p in zip(parts, members, strict=True)]

    # --------------------------------------------------------------------------------------------------------- state

    def named_state(self, named: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Tensor]]:
        """The slots keyed by parameter *name*: an order of construction can not mix them up."""
        names = {id(p): name for name, p in named.items()}
        found: dict[str, dict[str, Tensor]] = {}
        for i, (members, flat) in enumerate(zip(self.members, self.flat, strict=True)):
            for slot, value in self.adam.state.get(flat, {}).items():
                pieces = [value.clone() for _ in members] if slot == "step" else self._pieces(i, value)
                for p, piece in zip(members, pieces, strict=True):
                    found.setdefault(names[id(p)], {})[slot] = piece.clone()
        return found

    def load_named_state(self, named: Mapping[str, nn.Parameter], state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """The inverse of `named_state`.

        Raises:
            KeyError: if ``state`` names a parameter that does not exist, or has some of a module's only.
        """
        names = {id(p): name for name, p in named.items()}
        known = {names[id(p)] for members in self.members for p in members}
        if unknown := set(state) - known:
            raise KeyError(f"optimiser state for unknown parameters {sorted(unknown)}; known are {sorted(known)}")
        self.adam.state.clear()
        for members, flat in zip(self.members, self.flat, strict=True):
            there = [names[id(p)] for p in members if names[id(p)] in state]
            if not there:
                continue
            if len(there) < len(members):
                raise KeyError(f"optimiser state of {sorted(there)}, but not of all parameters beside them")
            slots = [state[names[id(p)]] for p in members]
            self.adam.state[flat] = {
                key: value.clone() if key == "step" else torch.cat([slot[key].reshape(-1) for slot in slots])
                for key, value in slots[0].items()
            }
