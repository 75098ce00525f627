"""Pictures of SMAX battles, drawn by JaxMARL's own routines: those that its `SMAXVisualizer` calls.

The visualiser itself takes a whole recorded sequence, guesses the key of each step (ours are known) and hands the
drawing to pyplot.  Called one step at a time, the same routines need neither, and nothing is computed unless a film
is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np

SIZE = 480
"""Height and width of a picture, in pixels."""


def frames_within(game: Any, key: Any, state: Any, actions: dict[str, Any]) -> list[np.ndarray]:
    """What a battle looks like within one step: after each of its ticks (8 of 1/16 s), ``[480, 480, 3]`` uint8.

    Args:
        game: JaxMARL's `HeuristicEnemySMAX`.
        key: the key that the step used, ``[2]``.
        state: the battle before the step.
        actions: each ally's; what a dead one does is ignored, as in `SmaxVector`.
    """
    import jax

    alive, stop = state.state.unit_alive, game.num_movement_actions - 1
    actions = {ally: action if alive[i] else stop for i, (ally, action) in enumerate(actions.items())}
    ticks = jax.device_get(game.step_env(key, state, actions, True))
    count = len(ticks.step)
    return [picture(game, jax.tree.map(lambda leaf, i=i: leaf[i], ticks), tick=i) for i in range(count)]


def picture(game: Any, state: Any, *, tick: int = 0) -> np.ndarray:
    """One state: allies blue, enemies green, shots grey, ``[480, 480, 3]`` uint8.

    Args:
        game: JaxMARL's `HeuristicEnemySMAX`.
        state: all units, as `SMAX` keeps them.
        tick: how many ticks of the step have passed: shots fly from tick to tick.
    """
    import jax
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = FigureCanvasAgg(Figure(figsize=(SIZE / 100, SIZE / 100), dpi=100))
    state = jax.device_get(state)
    shots = dict(zip(game.all_agents, state.prev_attack_actions.tolist(), strict=True))
    with jax.disable_jit():  # its branches are new functions at every call: compiling them takes longer than all else
        game.init_render(canvas.figure.add_subplot(), (None, state, shots), tick, int(state.step))
    # It has drawn the picture, and then put it upon itself as an image, for the sake of matplotlib's animations: what
    # was drawn is taken as it is.
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
