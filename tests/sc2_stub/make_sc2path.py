"""Create a fake StarCraft II installation that starts ``server.py``.

    python make_sc2path.py DIR          # then: export SC2PATH=DIR

The tree holds what pysc2 looks for: ``Versions/Base<build>/SC2_x64`` (a launcher
for the stand-in, run by the interpreter that ran this script), ``.build.info``,
``Maps/SMAC_Maps/*.SC2Map`` (placeholders, the stand-in goes by their names),
``Replays`` and ``Libs``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import stat
import sys

HERE = pathlib.Path(__file__).resolve().parent
BUILD = 75689  # game version 4.10, the one SMAC results are reported for
VERSION = "4.10.0.75689"
MAPS = (
    "10gen_empty 10gen_protoss 10gen_terran 10gen_zerg 32x32_flat 32x32_flat_test "
    "32x32_small 3m 8m 25m 5m_vs_6m 8m_vs_9m 10m_vs_11m 27m_vs_30m MMM MMM2 2s3z 3s5z "
    "3s5z_vs_3s6z 3s_vs_3z 3s_vs_4z 3s_vs_5z 1c3s5z 2m_vs_1z corridor 6h_vs_8z "
    "2s_vs_1sc so_many_baneling bane_vs_bane 2c_vs_64zg"
).split()


def make(root: str | os.PathLike, python: str | None = None) -> pathlib.Path:
    root = pathlib.Path(root).resolve()
    base = root / "Versions" / f"Base{BUILD}"
    for folder in (base, root / "Maps" / "SMAC_Maps", root / "Replays", root / "Libs"):
        folder.mkdir(parents=True, exist_ok=True)
    launcher = base / "SC2_x64"
    # exec keeps the process id, so signals sent by pysc2 reach the stand-in.
    launcher.write_text(
        '#!/bin/sh\nexec {} {} "$@"\n'.format(
            shlex.quote(python or sys.executable), shlex.quote(str(HERE / "server.py"))
        )
    )
    launcher.chmod(launcher.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    (root / ".build.info").write_text(
        f"Branch!STRING:0|Active!DEC:1|Version!STRING:0|Product!STRING:0\nstub|1|{VERSION}|s2\n"
    )
    for name in MAPS:
        path = root / "Maps" / "SMAC_Maps" / f"{name}.SC2Map"
        path.write_bytes(b"placeholder map, known to the stand-in by name: " + name.encode())
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", help="where to create the tree")
    root = make(parser.parse_args().dir)
    print(root)


if __name__ == "__main__":
    main()
