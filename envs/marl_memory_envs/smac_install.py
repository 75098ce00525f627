"""What SMAC needs beyond Python packages of PyPI, what of it is here, and how to get the rest.

`examine` is what ``marl-memory doctor`` shows, `check` what a task raises before it begins.  Neither imports smacv2.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

GAME = "Base75689"
"""The folder of StarCraft II 4.10 below ``Versions``.  Win rates of other versions are not comparable with it."""

VERSION = "4.10"

GET_PACKAGES = 'pip install "marl-memory[smac]"'
GET_SMACV2 = "pip install --no-deps pysc2==4.0.0 git+https://github.com/oxwhirl/smacv2"
GET_GAME = "Linux package 4.10: https://github.com/Blizzard/s2client-proto#downloads"
GET_MAPS = """unpack its *.SC2Map into Maps/SMAC_Maps (SMAC's maps and SMACv2's):
https://github.com/oxwhirl/smacv2/releases/download/maps/SMAC_Maps.zip"""

FROM_PYPI = ("absl", "portpicker", "s2clientprotocol", "websocket")
"""Modules that pysc2 and smacv2 import when they play; the extra ``smac`` brings them."""

SMAC_MAPS = (
    "3m", "8m", "25m", "5m_vs_6m", "8m_vs_9m", "10m_vs_11m", "27m_vs_30m", "MMM", "MMM2", "2s3z", "3s5z",
    "3s5z_vs_3s6z", "3s_vs_3z", "3s_vs_4z", "3s_vs_5z", "1c3s5z", "2m_vs_1z", "corridor", "6h_vs_8z", "2s_vs_1sc",
    "so_many_baneling", "bane_vs_bane", "2c_vs_64zg",
)  # fmt: skip
"""The maps of SMAC, in the order of the package."""

RACES = ("terran", "protoss", "zerg")
SIZES = ("5_vs_5", "10_vs_10", "10_vs_11", "20_vs_20", "20_vs_23")
SMACV2_MAPS = tuple(f"{race}_{size}" for race in RACES for size in SIZES)
"""The scenarios of SMACv2 in their standard sizes."""

FLAT = "32x32_flat"
"""The map on which all scenarios of SMACv2 are played."""


class Found(NamedTuple):
    """One thing: its name, what was found, whether it is there, and how to get it if it is not."""

    name: str
    found: str
    there: bool = True
    hint: str = ""


def root() -> Path:
    """The game's folder: ``SC2PATH``, else ``~/StarCraftII``, as in pysc2."""
    return Path(os.environ.get("SC2PATH") or "~/StarCraftII").expanduser()


def scenario(name: str) -> tuple[str, int, int] | None:
    """Race, allies and enemies of a SMACv2 scenario, as in ``terran_5_vs_5``; None if ``name`` is none."""
    race, _, size = name.partition("_")
    allies, versus, enemies = size.partition("_vs_")
    if race in RACES and versus and allies.isdecimal() and enemies.isdecimal() and int(allies) and int(enemies):
        return race, int(allies), int(enemies)
    return None


def map_file(name: str) -> Path:
    """The file of a map."""
    return root() / "Maps" / "SMAC_Maps" / f"{FLAT if scenario(name) else name}.SC2Map"


def examine() -> Iterator[Found]:
    """What is there: packages, the game, its version, the maps."""
    lacking = [module for module in FROM_PYPI if find_spec(module) is None]
    yield Found("smac packages", f"{', '.join(lacking)} missing" if lacking else "installed", not lacking, GET_PACKAGES)
    for package in ("pysc2", "smacv2"):
        there = find_spec(package) is not None
        yield Found(package, "installed" if there else "not installed", there, GET_SMACV2)
    folder = root()
    found = f"{folder}{'' if os.environ.get('SC2PATH') else ' (not set)'}"
    if not folder.is_dir():
        yield Found("SC2PATH", f"{found}: no such folder", False, f"{GET_GAME}\nexport SC2PATH=FOLDER/StarCraftII")
        return
    yield Found("SC2PATH", found)
    games = sorted(file.parent.name for file in folder.glob("Versions/Base*/SC2_x64"))
    if GAME in games:
        yield Found("game", f"{VERSION} ({', '.join(games)})")
    else:
        yield Found("game", f"{', '.join(games) or 'none'} in Versions, not {GAME} ({VERSION})", False, GET_GAME)
    maps = {file.stem for file in (folder / "Maps" / "SMAC_Maps").glob("*.SC2Map")}
    lacking = [name for name in (*SMAC_MAPS, FLAT) if name not in maps]
    said = f"{len(SMAC_MAPS) + 1 - len(lacking)} of {len(SMAC_MAPS) + 1} in Maps/SMAC_Maps"
    yield Found("maps", f"{said}{f', not {lacking[0]}' if lacking and maps else ''}", not lacking, GET_MAPS)


def check_map(name: str) -> None:
    """Raise ValueError, with the nearest names, unless there is such a map."""
    known = (*SMAC_MAPS, *SMACV2_MAPS)
    if name not in known and scenario(name) is None:
        near = ", ".join(difflib.get_close_matches(str(name), known, n=4)) or "nothing"
        raise ValueError(
            f"env.map={name!r} is unknown; near it: {near}; the maps are {', '.join(SMAC_MAPS)}, and race_A_vs_E for "
            f"A allies and E enemies of {', '.join(RACES)}, as in {SMACV2_MAPS[0]}"
        )


def check(name: str, version: str) -> None:
    """Raise unless map ``name`` can be played here in ``version`` of the game.

    Raises:
        ImportError: if a package is missing.
        ValueError: if the map is unknown, or the game or the map's file is not where ``SC2PATH`` says.
    """
    check_map(name)
    rows = {row.name: row for row in examine()}
    for package in ("smac packages", "pysc2", "smacv2"):
        if not (row := rows[package]).there:
            raise ImportError(f"env.map={name} needs {package}: {row.found}.  {row.hint}", name=package)
    where = rows["SC2PATH"]
    if not where.there:
        raise ValueError(f"SC2PATH={where.found}.  It must name the folder of StarCraft II.\n{where.hint}")
    # A version of one's own choice is looked for by pysc2, which knows their folders.
    if version == VERSION and not rows["game"].there:
        raise ValueError(f"SC2PATH={root()} holds no StarCraft II {version}: {rows['game'].found}.\n{GET_GAME}")
    if not (file := map_file(name)).is_file():
        raise ValueError(f"env.map={name} needs the file {file}, which is not there.\n{GET_MAPS}")
