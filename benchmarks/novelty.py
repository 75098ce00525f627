"""What coarse and fine novelty tell apart, and a picture of it: ``python -m benchmarks.novelty docs/images``.

Four rooms: novelty over the map, of an operator that has seen two of the rooms.  Dark chamber: how well each of the two
tells the pictures of neighbouring cells apart, under noise of an eighth of what the agent glows.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

from marl_memory.memory.novelty import StateNovelty
from marl_memory_envs.toy.dark_chamber import DarkChamber
from marl_memory_envs.toy.four_rooms import FourRooms

INK, COARSE, FINE = "#555555", "#12476b", "#b5541c"
NOISE, LOOKS, SIDE = 0.005, 32, 9
PICTURE = (1, 18, 18)

DEFAULTS: dict[str, Any] = {"size": 4096, "latent": 64, "hidden": (256, 256), "sparsity": 1e-3, "lr": 1e-4}
"""Of `CoarseFineNovelty`."""


class Apart(NamedTuple):
    """Of the pairs of neighbouring cells, d′ by r_c and by r_f: ``[144]`` each."""

    coarse: Tensor
    fine: Tensor


def learner(features: int, seed: int, *, picture: tuple[int, int, int] | None = None, **more: Any) -> StateNovelty:
    """One with the operator's defaults, but for ``more``."""
    valid = torch.ones(1, features, dtype=torch.bool)
    return StateNovelty(valid, picture=picture, fine_sign=1, seed=seed, **{**DEFAULTS, **more})


def dark_chamber(seed: int, *, pictures: bool, collections: int = 8, batch_size: int = 256, **more: Any) -> Apart:
    r"""How well novelty tells neighbouring cells apart once all were seen alike, in so many collections of one batch.

    $$
    d' = \frac{|\mathbb{E}\, r(a) - \mathbb{E}\, r(b)|}{\sqrt{(\mathrm{var}\, r(a) + \mathrm{var}\, r(b)) / 2}}
    $$

    over looks at the cells a and b, that differ by noise: 1 is what an observer finds hard, 3 is easy.

    Args:
        seed: of everything.
        pictures: whether the operator is shown pictures (bytes, convolutions), or vectors (normalised).
        collections: times that 64 steps are made.
        batch_size: states in each.
        more: of `StateNovelty`.
    """
    g, views = Generator().manual_seed(seed), torch.from_numpy(DarkChamber().views)[:, 0]

    def looks(cells: Tensor) -> Tensor:
        seen = views[cells] + NOISE * (2 * torch.rand(len(cells), views.shape[1], generator=g) - 1)
        return (seen * 255).round().clamp(0, 255).to(torch.uint8) if pictures else seen

    model = learner(views.shape[1], seed, picture=PICTURE if pictures else None, **more)
    model.write(looks(torch.randint(len(views), (4096,), generator=g)).unsqueeze(0), torch.ones(1, 4096).bool())
    for _ in range(collections):
        model.learn(64, batch_size)
    said = model.of(looks(torch.arange(len(views)).repeat(LOOKS)).unsqueeze(0))
    cells = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    a = torch.cat([cells[:, :-1].flatten(), cells[:-1].flatten()])
    b = torch.cat([cells[:, 1:].flatten(), cells[1:].flatten()])

    def apart(r: Tensor) -> Tensor:
        mean, var = r.view(LOOKS, -1).mean(0), r.view(LOOKS, -1).var(0)
        return (mean[a] - mean[b]).abs() / ((var[a] + var[b]) / 2).sqrt().clamp(min=1e-12)

    return Apart(apart(said.coarse), apart(said.fine))


def four_rooms(seed: int, collections: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """r_c / σ_c and (r_f − μ_f) / σ_f over the map ``[13, 13]``, NaN in walls; and which cells were seen."""
    rules, g = FourRooms(), Generator().manual_seed(seed)
    views, cells = torch.from_numpy(rules.views)[:, 0], torch.from_numpy(rules.grid.cells)
    seen = (cells[:, 1] < 6).nonzero().flatten()  # the rooms on the left
    model = learner(views.shape[1], seed)
    model.write(views[seen[torch.randint(len(seen), (4096,), generator=g)]].unsqueeze(0), torch.ones(1, 4096).bool())
    for _ in range(collections):
        model.learn(64, 256)
    said, scale = model.of(views.unsqueeze(0)), model.deviations[0]
    maps = []
    seen_there = torch.zeros(len(views)).index_fill(0, seen, 1.0)
    for r in (said.coarse[0] / scale[0], (said.fine[0] - model.level) / scale[1], seen_there):
        over = torch.full(rules.grid.map.shape, torch.nan)
        over[cells[:, 0], cells[:, 1]] = r
        maps.append(over)
    return maps[0], maps[1], maps[2]


def picture(file: Path) -> None:
    """Both, side by side."""
    coarse, fine, _ = four_rooms(0)
    apart = {"pictures": dark_chamber(0, pictures=True), "vectors": dark_chamber(0, pictures=False)}
    figure = Figure(figsize=(9.6, 2.9), layout="constrained")
    axes = figure.subplots(1, 4)
    for ax, over, title in ((axes[0], coarse, "coarse, $r_c/\\sigma_c$"), (axes[1], fine, "fine, centred")):
        figure.colorbar(ax.imshow(over, cmap="cividis"), ax=ax, shrink=0.8)
        ax.set(xticks=[], yticks=[], title=title)
    for ax, (name, both) in zip(axes[2:], apart.items(), strict=True):
        for values, colour, label in ((both.coarse, COARSE, "coarse"), (both.fine, FINE, "fine")):
            ordered = values.sort().values
            ax.step(ordered, torch.linspace(1, 0, len(ordered)), color=colour, label=label)
            print(name, label, f"median d' {ordered.median():.2f}, above 1: {(ordered > 1).float().mean():.2f}")
        ax.axvline(1, color=INK, linestyle="--", linewidth=0.8)
        ax.set(
            xlabel="d′ of neighbouring cells", ylabel="share of pairs above", title=f"dark chamber, {name}", xlim=(0, 4)
        )
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    picture(Path(sys.argv[1]) / "novelty.svg")
