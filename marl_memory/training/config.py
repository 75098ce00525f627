"""What may stand in a run's configuration, and the objects that its sections name.

Every check is made before any work starts, and names the key, its value and what would be right.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

SECTIONS = ("env", "algorithm", "network", "training", "logger")
"""Mappings that every run needs."""

SCALARS = ("seed", "scope")


def config_dir() -> Path:
    """The folder of YAML configs: inside an installed wheel, or beside the package in a checkout."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "configs", here.parent / "configs"):
        if (folder / "config.yaml").exists():
            return folder
    raise FileNotFoundError(f"no configs/config.yaml beside or inside {here}: the installation is incomplete")


def options(group: str, folders: Iterable[Path]) -> list[str]:
    """The names that ``group=…`` can take, as in ``smax/3m``, in the config ``folders``."""
    files = [(folder / group, file) for folder in folders for file in (folder / group).rglob("*.yaml")]
    return sorted({str(file.relative_to(root).with_suffix("")) for root, file in files})


def suggest(name: str, known: Collection[str]) -> str:
    """What ``name`` may have been meant to be: near names, else all of its level; ends a sentence."""
    known = [other for other in known if other != name and not other.rpartition(".")[2].startswith("_")]
    level = [other for other in known if other.count(".") == name.count(".")]
    ends = [other for other in known if name in (other.rpartition(sign)[2] for sign in "./")]
    near = _near(name, level) or ends or _near(name, known)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"known are {', '.join(sorted(level or known))}" if known else "there is none yet"


def _near(name: str, known: Collection[str]) -> list[str]:
    spelled = {other.lower(): other for other in known}
    return [spelled[other] for other in difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.7)]


def check_sections(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a section is missing, is no mapping, or is one that nothing reads."""
    known = [*SECTIONS, "memory", *SCALARS]
    for key in config:
        if key not in known:
            dotted = [*known, *(f"{name}.{inner}" for name in SECTIONS for inner in config.get(name) or {})]
            raise ValueError(f"{key}={config[key]!r} is unknown, nothing reads it: {suggest(str(key), dotted)}")
    for key in SECTIONS:
        if not isinstance(config.get(key), Mapping):
            raise ValueError(f"{key}={config.get(key)!r} must be a mapping of keys: choose one of the group {key}")
    if "seed" not in config:
        raise ValueError("seed is missing: give seed=0 or any other whole number")
    memory = config.get("memory")
    if memory and not (isinstance(memory, Mapping) and all(isinstance(node, Mapping) for node in memory.values())):
        raise ValueError(f"memory={memory!r} must hold one mapping of keys for each operator: choose with memory=[…]")


def check_arguments(
    section: str,
    target: Callable[..., Any],
    given: Mapping[str, Any],
    *,
    built: Collection[str] = (),
    others: Collection[str] = (),
) -> None:
    """Hold ``given`` against the parameters of ``target``: names, and values against plain annotations.

    Args:
        section: the keys' place in the configuration, as in ``algorithm``.
        target: what will be called.
        given: the keys and values of the configuration.
        built: parameters that the run hands over itself.
        others: keys of the section that somebody else takes and checks.

    Raises:
        ValueError: for a key that is unknown, missing or not for the user to set, or a value of another kind.
    """
    parameters = inspect.signature(target).parameters
    known = [name for name in parameters if name not in built]
    for name, value in given.items():
        if name in others:
            continue
        if name in built:
            raise ValueError(f"{section}.{name}={value!r} is set by the run itself: leave it out")
        if name not in parameters:
            near = suggest(name, [*known, *others])
            raise ValueError(f"{section}.{name}={value!r} is unknown, nothing reads it: {near}")
        check_value(f"{section}.{name}", value, parameters[name].annotation)
    for name in known:
        if name not in given and parameters[name].default is inspect.Parameter.empty:
            raise ValueError(f"{section}.{name} is missing: give {section}.{name}=…")


def check_value(key: str, value: Any, annotation: Any) -> None:
    """Raise ValueError if ``value`` is none of the kinds in ``annotation``, as far as these are known here.

    Bools are no numbers, numbers are finite, and text is nothing else than text.
    """
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    kinds = [_KINDS.get(part.strip()) for part in text.split("|")]
    known = [kind for kind in kinds if kind is not None]
    if len(known) == len(kinds) and not any(fits(value) for fits, _ in known):
        raise ValueError(f"{key}={value!r} must be {' or '.join(words for _, words in known)}")


def locate(section: str, node: Mapping[str, Any]) -> Callable[..., Any]:
    """What the ``_target_`` of a section names.

    Raises:
        ValueError: if it is missing or names nothing.
    """
    from hydra.utils import get_object

    path = node.get("_target_")
    if not isinstance(path, str):
        raise ValueError(f"{section}._target_={path!r} must name a class or function, as in package.module.Name")
    try:
        return get_object(path)
    except ImportError as error:
        raise ValueError(f"{section}._target_={path} can not be imported: {_one_line(error)}") from error


def check_node(
    section: str, node: Mapping[str, Any], *, built: Collection[str]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a section names and the arguments it gives, which fit; ``built`` are those that the run adds.

    Raises:
        ValueError: see `locate` and `check_arguments`.
    """
    target = locate(section, node)
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    check_arguments(section, target, arguments, built=built)
    return target, arguments


def instantiate(section: str, node: Mapping[str, Any], *, later: Collection[str] = (), **built: Any) -> Any:
    """The object that a section names, made of its keys.

    Args:
        section: the section's place in the configuration.
        node: its keys.
        later: parameters that are handed over later, where the section asks for a ``_partial_``.
        built: collaborators, handed over as they are.

    Raises:
        ValueError: see `locate` and `check_arguments`.
    """
    target, arguments = check_node(section, node, built={*built, *later})
    return partial(target, **arguments, **built) if node.get("_partial_") else target(**arguments, **built)


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each key, dotted, at which two resolved configurations differ, with both values as text."""
    flat_a, flat_b = dict(_leaves(a)), dict(_leaves(b))
    for key in dict.fromkeys([*flat_a, *flat_b]):
        if flat_a.get(key, ...) != flat_b.get(key, ...):
            a_text, b_text = (repr(flat[key]) if key in flat else "nothing" for flat in (flat_a, flat_b))
            yield key, a_text, b_text


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_whole(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(_is_whole(item) for item in value)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (_is_whole, "a whole number"),
    "float": (_is_number, "a finite number"),
    "str": (lambda value: isinstance(value, str), "text"),
    "None": (lambda value: value is None, "null"),
    "Sequence[int]": (_are_whole, "a list of whole numbers, as in [128, 128]"),
    "Mapping[str, Any]": (lambda value: isinstance(value, Mapping), "a mapping, as in {size: 3}"),
}
