"""SuperSuit's wrappers by name, around any ParallelEnv: what ``env.wrappers`` means."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import supersuit
from pettingzoo import ParallelEnv
from pettingzoo.utils import BaseParallelWrapper

Team = ParallelEnv[str, Any, Any]

NAMED = re.compile(r"(.+)_v(\d+)")

FOR_VECTORS = ("gym_vec_env", "pettingzoo_env_to_vec_env", "concat_vec_envs", "vectorize_aec_env")
"""What SuperSuit makes vectors of environments with: these are vectors already."""

RANDOM = ("sticky_actions", "nan_random")
"""Wrappers that draw from a generator which they seed anew at each reset, from the clock unless a seed is given."""

BEHIND_STACK = (
    "resize",
    "sticky_actions",
    "clip_reward",
    "reward_lambda",
    "clip_actions",
    "scale_actions",
    "action_lambda",
)
"""Wrappers that leave a stack of pictures what it is."""


def known_wrappers() -> dict[str, Callable[..., Any]]:
    """SuperSuit's wrappers of environments, by their versioned names."""
    found = {name: value for name, value in vars(supersuit).items() if NAMED.fullmatch(name)}
    return {name: value for name, value in found.items() if not name.startswith((*FOR_VECTORS, "stable_baselines"))}


class Wrapped:
    """A factory of environments with SuperSuit's wrappers around what ``make`` makes, the first inmost.

    A wrapper is a name, or a mapping of one name to the wrapper's arguments: ``[clip_reward, {frame_stack: {stack_size:
    4}}]``.  A name without its version stands for the newest.  Where a wrapper takes functions (the lambda wrappers),
    text of the form ``package.module:function`` names one.

    Wrappers that draw (`RANDOM`) would draw from the clock in each episode but the first; with one of them every reset
    seeds the environment anew, from a generator that the first seed began.

    Args:
        make: the factory.
        wrappers: see above.

    Raises:
        ValueError: for a name that SuperSuit does not have (with the nearest ones), or arguments that do not fit.
    """

    def __init__(self, make: Callable[..., Team], wrappers: Sequence[Any]) -> None:
        self.make, self.__module__ = make, getattr(make, "__module__", __name__)  # whose REQUIRES tell what is missing
        self.layers = [_read(f"env.wrappers[{i}]", wrapper) for i, wrapper in enumerate(wrappers)]

    def __call__(self, **kwargs: Any) -> Team:
        """One environment, wrapped.

        Raises:
            ValueError: if a wrapper does not fit the environment.
        """
        env = self.make(**kwargs)
        stacked = env.metadata.get("frame_stack", 1)
        if not hasattr(env.unwrapped, "np_random"):
            env.unwrapped.np_random = np.random.default_rng(0)  # type: ignore[attr-defined]  # frame_skip asks for one
        for i, (name, arguments) in enumerate(self.layers):
            try:
                _check_stack(env, name, arguments)
                env = known_wrappers()[name](env, **_python(arguments))
            except Exception as error:  # SuperSuit checks by assertions
                raise ValueError(f"env.wrappers[{i}]: {name}({_told(arguments)}) does not fit: {error}") from error
            stacked = self._stack(stacked, name, arguments)
        return _Layers(env, stacked, reseed=any(_base(name) in RANDOM for name, _ in self.layers))

    @staticmethod
    def _stack(stacked: int, name: str, arguments: Mapping[str, Any]) -> int:
        """How many pictures, each one step older than the next, an observation has behind this wrapper."""
        if _base(name) == "frame_stack":
            return arguments.get("stack_size", 4) if stacked == 1 else 1
        return stacked if _base(name) in BEHIND_STACK else 1


class _Layers(BaseParallelWrapper[str, Any, Any]):
    """The outmost layer: says how many pictures are stacked, and seeds what the wrappers draw from."""

    def __init__(self, env: Team, stacked: int, *, reseed: bool) -> None:
        super().__init__(env)
        self.metadata = {**env.metadata, "frame_stack": stacked}
        self.generator = np.random.default_rng() if reseed else None

    def reset(
        self, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Start an episode."""
        if self.generator is not None:
            if seed is not None:
                self.generator = np.random.default_rng(seed)
            seed = int(self.generator.integers(2**31))
        return super().reset(seed=seed, options=options)

    def __str__(self) -> str:
        return str(self.env.unwrapped)


def _read(place: str, wrapper: Any) -> tuple[str, dict[str, Any]]:
    """A wrapper's full name and its arguments, checked."""
    if isinstance(wrapper, Mapping) and len(wrapper) == 1:
        ((given, arguments),) = wrapper.items()
    else:
        given, arguments = wrapper, None
    if not isinstance(given, str) or not isinstance(arguments, Mapping | None):
        raise ValueError(
            f"{place}={wrapper!r} must be a wrapper's name, or a mapping of one name to its arguments, as in "
            "{frame_stack: {stack_size: 4}}"
        )
    name = _full_name(place, given)
    try:
        _signature(known_wrappers()[name]).bind(None, **(arguments or {}))
    except TypeError as error:
        raise ValueError(f"{place}: {name}({_told(arguments or {})}): {error}") from error
    return name, dict(arguments or {})


def _full_name(place: str, given: str) -> str:
    """``given`` with its version, the newest where none is named."""
    known = known_wrappers()
    if given in known:
        return given
    versions = {_base(name): name for name in sorted(known, key=lambda name: int(name.rpartition("_v")[2]))}
    if given in versions:
        return versions[given]
    if _base(given) in versions:
        raise ValueError(
            f"{place}={given!r}: SuperSuit {supersuit.__version__} has {versions[_base(given)]}; name that, or "
            f"{_base(given)} for whichever is newest"
        )
    near = difflib.get_close_matches(_base(given), versions, n=3, cutoff=0.5)
    told = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(versions))}"
    raise ValueError(f"{place}={given!r} is no wrapper of SuperSuit {supersuit.__version__}: {told}")


def _base(name: str) -> str:
    match = NAMED.fullmatch(name)
    return match[1] if match else name


def _signature(wrapper: Any) -> inspect.Signature:
    """What a wrapper takes: SuperSuit hides it behind a chooser between kinds of environments."""
    chosen = getattr(wrapper, "parallel_wrapper", None) or getattr(wrapper, "aec_wrapper", None) or wrapper
    return inspect.signature(chosen)


def _check_stack(env: Team, name: str, arguments: Mapping[str, Any]) -> None:
    """SuperSuit 3.11 writes a picture of two dimensions over all places of a stack but the newest."""
    shape = env.observation_space(env.possible_agents[0]).shape
    if _base(name) == "frame_stack" and arguments.get("stack_dim", -1) == 0 and len(shape or ()) == 2:
        raise ValueError(f"stack_dim=0 is wrong in SuperSuit for pictures of shape {shape}: leave it out")


def _python(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as SuperSuit takes them: functions for their names, tuples for lists."""
    found = {key: _function(value) if _is_path(value) else value for key, value in arguments.items()}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:\w+", value) is not None


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _told(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())
