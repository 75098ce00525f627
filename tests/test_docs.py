"""The site: it builds without a warning, and it is complete."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import marl_memory
import marl_memory_envs
from benchmarks import evidence

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_public_module_is_in_the_api(site: Path) -> None:
    shown = set(re.findall(r'id="([\w.]+)"', "".join(page.read_text() for page in (site / "api").glob("*.html"))))
    for package in (marl_memory, marl_memory_envs):
        found = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
        public = {package.__name__, *(name for name in found if not name.rpartition(".")[2].startswith("_"))}
        assert public <= shown, f"a page of docs/api needs ::: {sorted(public - shown)}"


def test_every_config_is_in_the_reference(site: Path) -> None:
    page = (site / "configuration.html").read_text()
    for file in (ROOT / "configs").rglob("*.yaml"):
        group, *rest = file.relative_to(ROOT / "configs").with_suffix("").parts
        name = "/".join(rest)
        assert not rest or f"<code>{name}</code>" in page or f"<code>{group}={name}</code>" in page, file


def test_every_top_level_key_is_in_the_reference(site: Path) -> None:
    page = (site / "configuration.html").read_text()
    text = (ROOT / "configs" / "config.yaml").read_text()
    keys = set(re.findall(r"^(?:  - )?(\w+):", text, re.MULTILINE)) - {"defaults", "hydra"}
    assert {"env", "algorithm", "seed", "run_folder"} <= keys
    for key in keys:
        assert f"<td><code>{key}</code></td>" in page, key


def test_a_table_shows_values_of_the_files_and_words_of_the_docstrings(site: Path) -> None:
    page = (site / "configuration.html").read_text()
    assert re.search(r"<code>gae_lambda</code></td>\s*<td><code>0.95</code></td>\s*<td>λ of the advantages</td>", page)
    assert re.search(r"<code>true</code> \(mappo\)<br ?/?><code>false</code> \(ippo, ppo\)", page)


def test_formulas_are_drawn_and_no_page_asks_another_host(site: Path) -> None:
    assert "<math" in (site / "api" / "algorithms.html").read_text()
    for page in site.rglob("*.html"):
        text = page.read_text()
        for left in (":math:", ".. math::", "arithmatex", "<!-- keys", "<!-- tasks", "<!-- experiments", "<!-- source"):
            assert left not in text, (page, left)
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="https?:', text), page


def test_the_readme_quotes_the_studies_truly() -> None:
    assert evidence.table() in (ROOT / "README.md").read_text()
