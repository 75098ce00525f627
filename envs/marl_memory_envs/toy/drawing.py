"""Pictures of toy tasks: coloured squares."""

from __future__ import annotations

import numpy as np

LINE = (200, 200, 196)

PALETTE = np.array(
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]],
    np.uint8,
)
"""Okabe and Ito's colours, which everybody can tell apart."""

BLANK = np.array([236, 236, 230], np.uint8)


def enlarge(colours: np.ndarray, size: int) -> np.ndarray:
    """``[H, W, 3]`` colours as squares of ``size`` pixels with lines between, ``[H·size + 1, W·size + 1, 3]`` uint8."""
    picture = np.pad(colours.repeat(size, 0).repeat(size, 1), ((0, 1), (0, 1), (0, 0)))
    picture[::size], picture[:, ::size] = LINE, LINE
    return picture
