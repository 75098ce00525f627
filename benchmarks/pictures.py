"""The pictures of the operators' pages, by the operators themselves.

python -m benchmarks.pictures docs/images [runs of benchmarks.tabular]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from torch import Tensor

from benchmarks.measure import seconds
from benchmarks.neighbours import states
from benchmarks.tabular import DOWN, RIGHT, column, reflected, walked
from marl_memory.functional.neighbours import nearest, recall
from marl_memory.functional.returns import max_backpropagation, n_step_returns, twin_backpropagation
from marl_memory.functional.transport import gaussian_barycenter
from marl_memory.memory.gradient_field import GradientField
from marl_memory.memory.index import Lists
from marl_memory.spec import TaskSpec
from marl_memory_envs.toy.tabular import CLIFF

INK, PAST, NOW, BOTH = "#555555", "#b5541c", "#9db4c0", "#12476b"


def one_dimensional() -> TaskSpec:
    """One agent with one observation and one action."""
    return TaskSpec(
        name="line",
        agents=("agent",),
        observation_sizes=(1,),
        action_sizes=(1,),
        continuous=True,
        state_size=1,
        own_state=False,
        common_reward=False,
        action_low=((-1.0,),),
        action_high=((1.0,),),
    )


def rows(spec: TaskSpec, state: Tensor, gradient: Tensor) -> TensorDict:
    """What a host shows the field at states ``[B]`` with gradients ``[B]``."""
    k, b = spec.keys, len(state)
    td = TensorDict(batch_size=(b,))
    td.set(k.observation, state.view(b, 1, 1))
    td.set(k.alive, torch.ones(b, 1, dtype=torch.bool))
    td.set(k.action_gradient, gradient.view(b, 1, 1))
    td.set(k.policy_action, torch.zeros(b, 1, 1))
    return td


def gradient_field(file: Path) -> None:
    """A noisy gradient over the line, what is remembered of it, and the mixture."""
    spec, g = one_dimensional(), torch.Generator().manual_seed(0)
    field = GradientField(spec=spec, half_life=None, capacity=512)
    true = lambda s: torch.sin(2 * s)  # noqa: E731
    for _ in range(20):
        state = 4 * torch.rand(64, generator=g) - 2
        td = rows(spec, state, true(state) + 0.6 * torch.randn(64, generator=g))
        field(td)
        field.write(td)
    state = torch.linspace(-2, 2, 160)
    noisy = true(state) + 0.6 * torch.randn(160, generator=g)
    td = field(rows(spec, state, noisy))
    mixed, beta = td.get(spec.keys.action_gradient).flatten(), td.get(field.report)[:, 0, 2]
    past = (mixed - (1 - beta) * noisy) / beta
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(state, noisy, ".", color=NOW, markersize=4, label="g: fresh, noisy")
    axes.plot(state, past, color=PAST, label="ĝ: remembered")
    axes.plot(state, mixed, color=BOTH, linewidth=0.9, label=f"mixture, β ≈ {beta.mean():.2f}")
    axes.plot(state, true(state), color=INK, linestyle="--", linewidth=1, label="the critic without noise")
    axes.set(xlabel="state", ylabel="∂Q/∂a")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig(file)


def barycenter_region(file: Path) -> None:
    """Past distributions at one state, the present one, and p* for three strengths of the anchor."""
    means, stds = torch.tensor([[[-0.9], [-0.4], [-0.6]]]), torch.tensor([[[0.30], [0.35], [0.25]]])
    mean, std = torch.tensor([[0.8]]), torch.tensor([[0.5]])
    x = torch.linspace(-2.2, 2.6, 400)
    density = lambda m, s: torch.exp(-0.5 * ((x - m) / s) ** 2) / (s * 2.5066)  # noqa: E731
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes = figure.add_subplot()
    for i in range(3):
        label = "past distributions" if i == 0 else None
        axes.plot(x, density(means[0, i], stds[0, i]), color=PAST, alpha=0.5, linewidth=1, label=label)
    axes.plot(x, density(mean[0], std[0]), color=INK, linestyle="--", label="π: the present policy")
    for lam, alpha in ((0.5, 0.4), (2.0, 0.7), (8.0, 1.0)):
        m, s = gaussian_barycenter(mean, std, means, stds, torch.full((1, 3), 1 / 3), torch.ones(1), lam)
        axes.plot(x, density(m[0], s[0]), color=BOTH, alpha=alpha, label=f"p*, λ = {lam:g}")
    axes.set(xlabel="action (before squashing)", ylabel="density")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def retrieval(file: Path) -> None:
    """Time of 256 searches for 16 neighbours over the number of rows, exact and with lists; states of HalfCheetah."""
    queries, every = states()
    sizes = [1 << i for i in range(10, 18)]
    exact, listed, recalls = [], [], []
    for size in sizes:
        rows = every[:, :size].contiguous()
        exact.append(1e3 * shortest(partial(nearest, queries, rows, 16)))
        if size >= 16_384:
            generator = torch.Generator().manual_seed(0)
            index = Lists(1, size, rows.shape[-1], probes=16, generator=generator)
            index.note(rows, size, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool))
            listed.append(1e3 * shortest(partial(index.nearest, queries, rows, 16)))
            recalls.append(float(recall(index.nearest(queries, rows, 16)[1], nearest(queries, rows, 16)[1])))
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    axes.loglog(sizes, exact, color=BOTH, marker="o", markersize=4, label="exact")
    large = sizes[-len(listed) :]
    axes.loglog(large, listed, color=PAST, marker="o", markersize=4, label="lists, 16 probes")
    for size, took, share in zip(large, listed, recalls, strict=True):
        axes.annotate(
            f"recall {share:.2f}", (size, took), (0, -14), textcoords="offset points", ha="center", fontsize=7
        )
    axes.set(xlabel="rows", ylabel="ms for 256 queries", ylim=(min(exact + listed) / 2, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)
    print("rows", sizes, "exact ms", [round(x, 2) for x in exact], "lists ms", [round(x, 2) for x in listed], recalls)


def cliff(file: Path) -> None:
    """How far memory trusts a step to the right and one down, in every cell above the cliff."""
    operator, rules = walked(0.1)
    found = reflected(operator, rules)
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, (action, name) in zip(axes, ((RIGHT, "right"), (DOWN, "down")), strict=True):
        shown = on_map(ax, rules, found.confidence[:, action])
        ax.set_title(f"confidence of going {name}", fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.savefig(file)
    below = rules.tables.successors[:, DOWN, 0]
    edge = (rules.grid.kinds[below] == CLIFF) & (rules.grid.kinds != CLIFF)
    for decay in (0.1, 0.5, 0.9):
        operator, rules = walked(decay)
        c = reflected(operator, rules).confidence[edge]
        print(f"cliff, blame_decay {decay}: down at most {c[:, DOWN].max():.3f}, right {c[:, RIGHT].min():.3f} to "
              f"{c[:, RIGHT].max():.3f}, mean {c[:, RIGHT].mean():.3f}")  # fmt: skip


def four_rooms(file: Path, runs: Path) -> None:
    """Where memory trusts its own action after a run, and how often it acted on the way, beside the returns."""
    from marl_memory.training.run import load_acting
    from marl_memory_envs.toy.four_rooms import FourRooms

    rules = FourRooms()
    operator: Any = load_acting(runs / "reflection_0", checkpoint="last")[1].operators["reflection"]
    found = reflected(operator, rules)
    figure = Figure(figsize=(10.5, 3.3), layout="constrained")
    place, share, returns = figure.subplots(1, 3)
    shown = on_map(place, rules, found.of_mode)
    cells = rules.grid.cells
    step = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])[found.mode]
    place.quiver(cells[:, 1], cells[:, 0], step[:, 0], step[:, 1], scale=18, width=0.006, color=INK)
    place.set_title("confidence of memory's action, seed 0", fontsize=9)
    figure.colorbar(shown, ax=place, shrink=0.8)
    for run in sorted(runs.glob("reflection_*")):
        frames, values = column(run, "memory/reflection/share")
        share.plot(frames, values, label=f"seed {run.name[11:]}")
    share.set(xlabel="frames", title="share of steps that memory took", ylim=(-0.03, 1))
    for arm, colour in (("host", NOW), ("reflection", BOTH)):
        for run in sorted(runs.glob(f"{arm}_*")):
            frames, values = column(run, "train/return")
            returns.plot(frames, values, color=colour, label=arm if run.name.endswith("_0") else None)
    returns.set(xlabel="frames", title="return in training", ylim=(-0.03, 1.05))
    for axes in (share, returns):
        axes.title.set_fontsize(9)
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(file)


def on_map(axes: Any, rules: Any, values: np.ndarray) -> Any:
    """Values ``[S]`` of a grid task's states, on its map; states in which an episode is over are left out."""
    picture = np.full(rules.grid.map.shape, np.nan)
    picture[tuple(rules.grid.cells.T)] = np.where(rules.tables.terminal, np.nan, values)
    axes.set(xticks=[], yticks=[], facecolor="#888888")
    return axes.imshow(picture, vmin=0, vmax=1, cmap="RdYlBu")


def episodic_return(file: Path) -> None:
    """Targets along a stored trajectory, and the bias of four estimators where critics are noisy."""
    gamma, steps = 0.95, 40
    reward, cut = torch.zeros(steps), torch.zeros(steps, dtype=torch.bool)
    reward[-1], cut[-1] = 1.0, True
    figure = Figure(figsize=(7.2, 2.8), layout="constrained")
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for estimate, color, at in ((one_step, PAST, (1, 10, 30)), (twin_backpropagation, BOTH, (1,))):
        q = torch.zeros(steps, 2)
        for sweep in range(1, max(at) + 1):
            after = torch.cat([q[1:], torch.zeros(1, 2)])
            q = estimate(reward, after, (~cut).float(), cut, gamma=gamma)
            if sweep in at:
                name = "one-step targets" if estimate is one_step else "returns"
                times = f"{sweep} refresh" + "es" * (sweep > 1)
                alpha = 1.0 if estimate is not one_step else 0.4 + 0.6 * sweep / max(at)
                axes.plot(q[:, 0], color=color, alpha=alpha, label=f"{name}, {times}")
    axes.set(xlabel="step of the trajectory", ylabel="target")
    axes.legend(frameon=False, fontsize=7)
    biases = noise_biases()
    bars.barh(list(biases), list(biases.values()), color=[PAST, BOTH, NOW, NOW])
    bars.axvline(0, color=INK, linewidth=0.8)
    bars.invert_yaxis()
    bars.tick_params(labelsize=7)
    bars.set(xlabel="target − truth")
    figure.savefig(file)
    print("episodic_return", {name: round(bias, 2) for name, bias in biases.items()})


one_step = partial(n_step_returns, n=1)


def noise_biases() -> dict[str, float]:
    """The mean target of the first of 100 steps, where values are 0 and critics say noise of deviation 1."""
    draws, gamma = 20_000, 0.99
    reward, cut = torch.zeros(100, draws), torch.zeros(100, draws, dtype=torch.bool)
    cut[-1] = True
    noise = torch.randn(100, draws, 4, generator=torch.Generator().manual_seed(0))
    twins, pairs = noise[..., :2], noise.unflatten(-1, (2, 2)).amin(-1)
    rest = {"discount": (~cut).float(), "cut": cut, "gamma": gamma}
    floored = [
        torch.maximum(twin_backpropagation(reward, b, **rest), one_step(reward, b, **rest)) for b in (twins, pairs)
    ]
    found = {
        "single maximum": max_backpropagation(reward, twins, **rest),
        "twins": twin_backpropagation(reward, twins, **rest),
        "twins, floor": floored[0],
        "pairs, floor": floored[1],
    }
    return {name: float(x[0].mean()) for name, x in found.items()}


def shortest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of 15 calls."""
    return min(seconds(call) for _ in range(15))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    retrieval(folder / "retrieval.svg")
    gradient_field(folder / "gradient_field.svg")
    barycenter_region(folder / "barycenter_region.svg")
    cliff(folder / "reflection_cliff.svg")
    if len(sys.argv) > 2:  # runs of benchmarks.tabular
        four_rooms(folder / "reflection_four_rooms.svg", Path(sys.argv[2]))
    episodic_return(folder / "episodic_return.svg")
