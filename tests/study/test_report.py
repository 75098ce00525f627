"""The report on a study: what it says, of whole studies and of broken ones, and what its files hold."""

from __future__ import annotations

import csv
import json
import re
import time
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest

from marl_memory.study.definition import Study
from marl_memory.study.report.figures import SERIES
from marl_memory.study.report.markdown import text as escaped
from marl_memory.study.report.write import write_report
from marl_memory.study.results import RECORD, StudyError
from tests.study.synthetic import learning, make_record, make_study, run_folder, write_run, write_study

HEIGHTS = {"no_memory": 1.0, "shared": 4.0, "centralized": 3.5}
VOID = {"meta", "link", "br", "img", "hr", "input", "path", "use", "line"}


class Page(HTMLParser):
    """What a page holds: text, links, ids; its tags must be balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.text = ""
        self.ids: list[str] = []
        self.refs: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append((tag, values))
        self.ids += [values["id"] or ""] if "id" in values else []
        self.refs += [values[name] or "" for name in ("href", "src") if name in values]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def report(folder: Path) -> Page:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    page.text = " ".join(page.text.split())
    return page


def sentence(page: Page) -> str:
    html = page.html
    found = re.search(r'<p class="sentence">(.*?)</p>', html)
    assert found is not None
    return unescape(found[1]).replace("\u00a0", " ")


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "report" / name).read_text(encoding="utf-8").splitlines()))


def estimate(folder: Path, quantity: str, arm: str, against: str = "", task: str = "duel") -> dict[str, str]:
    rows = [
        row
        for row in table(folder, "results.csv")
        if (row["quantity"], row["arm"], row["against"], row["task"]) == (quantity, arm, against, task)
    ]
    assert len(rows) == 1
    return rows[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three arms, two tasks, five seeds: a report on everything."""
    folder = tmp_path_factory.mktemp("whole")
    study = make_study(list(HEIGHTS), ["duel", "dance"], budget=20000)
    write_study(folder, study, learning(HEIGHTS))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(whole: Path) -> Page:
    return Page((whole / "report/index.html").read_text(encoding="utf-8"))


def test_the_report_has_all_its_files(whole: Path) -> None:
    found = {str(path.relative_to(whole / "report")) for path in (whole / "report").rglob("*") if path.is_file()}
    figures = {"curves_duel", "curves_dance", "iqm", "difference", "improvement", "profile"}
    files = {"index.html", "report.md", "results.csv", "runs.csv", "costs.csv", "marl_eval.json"}
    assert found == files | {f"figures/{name}.png" for name in figures}
    assert all((whole / f"report/figures/{name}.png").read_bytes()[:4] == b"\x89PNG" for name in figures)


def test_the_page_needs_nothing_but_itself(page: Page) -> None:
    html = page.html
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"url\((?!#)|@import", html)
    outside = [ref for ref in page.refs if ":" in ref]
    assert outside and all(ref.startswith("https://arxiv.org/abs/") for ref in outside)  # followed by hand only
    assert html.count("https://") == len(outside) and "http://" not in html
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html


def test_every_link_and_reference_leads_somewhere(whole: Path, page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    for ref in page.refs:
        if ref.startswith("#"):
            assert ref[1:] in page.ids, ref
        elif ":" not in ref:
            assert (whole / "report" / unquote(ref)).exists(), ref
    for name in re.findall(r"url\(#([^)]*)\)", page.html):
        assert name in page.ids
    assert "../runs/dance/centralized/seed_4/metrics.csv" in page.refs


def test_the_page_and_its_drawings_follow_the_scheme(page: Page) -> None:
    style = page.html[page.html.index("<style>") : page.html.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")[0], style.split("prefers-color-scheme: dark")[1]
    used = set(re.findall(r"var\((--[\w-]+)\)", page.html))
    assert {"--ink", "--muted", "--arm-0", "--arm-1"} <= used
    assert all(f"{name}:" in light and f"{name}:" in dark for name in used)
    drawings = "".join(re.findall(r"<svg.*?</svg>", page.html, flags=re.DOTALL))
    assert not set(re.findall(r"#[0-9a-f]{6}\b", drawings)) - {"#000000", "#ffffff"}


def contrast(a: str, b: str) -> float:
    """Of two colours, as the Web Content Accessibility Guidelines define it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear))

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_told_from_either_page(page: Page) -> None:
    schemes = page.html[: page.html.index("</style>")].split("@media (prefers-color-scheme: dark)")
    for scheme in schemes:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", scheme))
        for name in ("ink", "soft", "link", *(f"arm-{i}" for i in range(8))):
            assert contrast(colours[name], colours["paper"]) >= 4, name
        for name in ("wrong", "warning", "good"):
            assert contrast(colours[name], colours[f"{name}-sheet"]) >= 4.5, name
    light = dict(re.findall(r"--arm-(\d): (#[0-9a-f]{6})", schemes[0]))
    assert tuple(light[str(i)] for i in range(8)) == SERIES  # files have the light page's


def test_drawings_have_a_title_and_an_alternative(page: Page) -> None:
    drawings = [values for tag, values in page.tags if tag == "svg" and "aria-hidden" not in values]
    assert len(drawings) == 6
    assert all(values["role"] == "img" and values["aria-label"] for values in drawings)
    assert [tag for tag, _ in page.tags].count("figcaption") == 6
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_the_answer_is_the_difference_to_the_baseline(whole: Path, page: Page) -> None:
    found = estimate(whole, "difference", "shared", "no_memory", task="(all)")
    said = sentence(page)
    assert said.startswith("Over 2 tasks, shared is best: 0.")
    assert f"{float(found['value']):.2f} [{float(found['low']):.2f}, {float(found['high']):.2f}]" in said
    assert "above no_memory" in said and "normalised evaluation/return" in said
    assert "5 paired seeds on each of 2 tasks" in said and said.endswith("the interval excludes 0.")


def test_the_page_tells_cost_versions_commands_and_seeds(page: Page) -> None:
    for words in ("Does memory help?", "single agents", "4 096", "12 288", "2.13.0+cpu"):
        assert words in page.text.replace("\u202f", " "), words
    assert "marl-memory study scope" in page.text
    assert "marl-memory train env=mpe/dance seed=4" in page.text
    assert "0, 1, 2, 3, 4" in page.text


def test_the_markdown_says_the_same(whole: Path, page: Page) -> None:
    text = (whole / "report/report.md").read_text(encoding="utf-8")
    assert escaped(sentence(page).replace(" [", "\u00a0[")).replace("\u00a0", " ") in text.replace("\u00a0", " ")
    for name in re.findall(r"\]\((figures/[^)]*)\)", text):
        assert (whole / "report" / name).exists()
    assert text.count("![") == 6
    headings = re.findall(r"<h2 [^>]*>(.*?)</h2>", page.html)
    assert headings == re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    for rows in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.strip().split("\n")}
        assert len(widths) == 1


def test_tables_hold_every_run_and_estimate(whole: Path) -> None:
    runs = table(whole, "runs.csv")
    assert len(runs) == 30 and not any(row["missing"] for row in runs)
    assert float(estimate(whole, "final", "shared")["value"]) == pytest.approx(
        np.mean(sorted(float(r["final"]) for r in runs if (r["task"], r["arm"]) == ("duel", "shared"))[1:4])
    )
    back = estimate(whole, "improvement", "no_memory", "shared", task="(all)")
    there = estimate(whole, "improvement", "shared", "no_memory", task="(all)")
    assert float(back["value"]) + float(there["value"]) == pytest.approx(1.0)
    assert float(back["low"]) + float(there["high"]) == pytest.approx(1.0)
    costs = table(whole, "costs.csv")
    assert len(costs) == 30 and costs[0]["rows"] == "4096" and costs[0]["wall_seconds"]


def test_final_tables_are_the_same_to_the_last_bit(whole: Path, tmp_path: Path) -> None:
    # The same records, with other timings and written in another order.
    study = make_study(list(HEIGHTS), ["duel", "dance"], budget=20000)
    write_study(tmp_path, study, lambda *_: None)
    curve = learning(HEIGHTS)
    for seed in reversed(study.seeds):
        for arm in reversed(HEIGHTS):
            for task in ("dance", "duel"):
                record = make_record(task, arm, seed, curve(task, arm, seed))
                write_run(tmp_path, make_record(task, arm, seed, curve(task, arm, seed), costs={"wall_seconds": 1.0}))
                assert record.costs["wall_seconds"] != 1.0
    write_report(tmp_path)
    for name in ("results.csv", "runs.csv", "marl_eval.json"):
        assert (tmp_path / "report" / name).read_bytes() == (whole / "report" / name).read_bytes()
    assert (tmp_path / "report/costs.csv").read_bytes() != (whole / "report/costs.csv").read_bytes()


def test_a_report_again_is_the_same_page(whole: Path) -> None:
    before = {path: path.read_bytes() for path in (whole / "report").rglob("*") if path.is_file()}
    (whole / "report/figures/of_an_older_report.png").write_bytes(b"")
    write_report(whole)
    assert {path: path.read_bytes() for path in (whole / "report").rglob("*") if path.is_file()} == before


def test_marl_eval_gets_its_form(whole: Path) -> None:
    found = json.loads((whole / "report/marl_eval.json").read_text())
    assert list(found) == ["mpe"] and list(found["mpe"]) == ["duel", "dance"]
    for algorithms in found["mpe"].values():
        assert list(algorithms) == list(HEIGHTS)
        for runs in algorithms.values():
            assert list(runs) == [f"seed_{seed}" for seed in range(5)]
            for steps in runs.values():
                assert list(steps) == [*(f"step_{i}" for i in range(21)), "absolute_metrics"]
                assert steps["step_3"]["step_count"] == 3000 and len(steps["step_3"]["return"]) == 1
                assert len(steps["absolute_metrics"]["return"]) == 4
                metrics = {frozenset(step) - {"step_count"} for step in steps.values()}
                assert metrics == {frozenset({"return"})}


def test_marl_eval_gets_no_gaps(tmp_path: Path) -> None:
    study = make_study(["a,b", "c", "d"], seeds=[0, 1])
    gone = {("d", 0), ("d", 1), ("c", 1)}
    write_study(tmp_path, study, lambda task, arm, seed: None if (arm, seed) in gone else [0.0, 1.0])
    page = report(tmp_path)
    found = json.loads((tmp_path / "report/marl_eval.json").read_text())["mpe"]["duel"]
    assert {arm: list(runs) for arm, runs in found.items()} == {"a;b": ["seed_0"], "c": ["seed_0"]}
    assert "arms without a finished run everywhere are left out: d" in page.text
    assert "seeds without a finished run everywhere are left out: 1" in page.text


def test_missing_runs_are_listed_with_their_reasons(tmp_path: Path) -> None:
    study = make_study()
    curve = learning(HEIGHTS)
    lost = {("shared", 0), ("no_memory", 4)}
    study = make_study(["no_memory", "shared"])
    write_study(tmp_path, study, lambda task, arm, seed: None if (arm, seed) in lost else curve(task, arm, seed))
    run_folder(tmp_path, "duel", "shared", 0).parent.joinpath("seed_0.failed.txt").write_text("trace\nBoom: <b>\n")
    damaged = run_folder(tmp_path, "duel", "shared", 1) / RECORD
    damaged.write_text(damaged.read_text().replace('"frames": 20000', '"frames": 20001'))
    page = report(tmp_path)
    assert "3 of 10 runs are missing" in page.text
    assert "duel, shared, seed 0: Boom: <b>" in page.text and "<b>" not in page.html
    assert "duel, no_memory, seed 4: not finished" in page.text
    assert "its checksum differs" in page.text
    assert estimate(tmp_path, "difference", "shared", "no_memory")["runs"] == "2"  # seeds 2 and 3
    assert estimate(tmp_path, "final", "shared")["runs"] == "3"
    assert "no difference can be told" in sentence(page) and "an interval takes 3 seeds" in sentence(page)
    missing = [row["seed"] for row in table(tmp_path, "runs.csv") if row["missing"]]
    assert missing == ["4", "0", "1"]


def test_a_run_with_numbers_that_are_none_is_left_out(tmp_path: Path) -> None:
    curve = learning(HEIGHTS)
    write_study(tmp_path, make_study(["no_memory", "shared"]), curve)
    write_run(tmp_path, make_record("duel", "shared", 2, [0.0, float("nan")]))
    write_run(tmp_path, make_record("duel", "shared", 3, [0.0], curves={"evaluation/length": ([0], [1.0])}))
    page = report(tmp_path)
    assert "seed 2: its evaluation/return is not finite everywhere" in page.text
    assert "seed 3: it has no evaluation/return" in page.text


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    write_study(tmp_path, make_study(["no_memory", "shared"], seeds=[3]), learning(HEIGHTS, noise=0.1))
    page = report(tmp_path)
    assert "Too few seeds for an interval of any arm: 3 on each task is the least" in page.text
    said = sentence(page)
    assert said.startswith("On duel, no difference can be told: shared is ") and "over 1 paired seed)" in said
    assert estimate(tmp_path, "difference", "shared", "no_memory")["low"] == ""


def test_no_finished_run_is_one_error(tmp_path: Path) -> None:
    write_study(tmp_path, make_study(), lambda *_: None)
    with pytest.raises(StudyError, match="no run has finished.*duel, no memory, seed 0: not finished"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()
    with pytest.raises(StudyError, match="holds no study"):
        write_report(tmp_path / "nowhere")


def test_an_unknown_metric_names_the_known_ones(tmp_path: Path) -> None:
    write_study(tmp_path, make_study(metric="evaluation/success"), lambda *_: [0.0, 1.0])
    with pytest.raises(StudyError, match="'evaluation/success'; they have evaluation/return"):
        write_report(tmp_path)


def same_digest(folder: Path, study: Study, arms: dict[str, str], tasks: list[str], seeds: list[int]) -> None:
    """Let each of ``arms`` end in the bits of another one."""
    for task in tasks:
        for arm, like in arms.items():
            for seed in seeds:
                digest = make_record(task, like, seed, [0.0]).digest
                write_run(folder, make_record(task, arm, seed, [0.0, 1.0], digest=digest))


def test_arms_that_end_in_the_same_bits_are_named(tmp_path: Path) -> None:
    study = make_study(["a", "b", "c"], ["duel", "dance"], seeds=[0, 1, 2])
    write_study(tmp_path, study, lambda *_: [0.0, 1.0])
    same_digest(tmp_path, study, {"b": "a"}, ["duel", "dance"], [0, 1, 2])
    same_digest(tmp_path, study, {"c": "a"}, ["dance"], [0, 1])  # not at seed 2
    page = report(tmp_path)
    assert "there the axis is not one" in page.text
    assert "a and b: same parameters on every task, at every seed that they share" in page.text
    assert "and c: same" not in page.text
    assert "must end in the same bits" not in page.text


def test_arms_that_must_be_equal_are_checked(tmp_path: Path) -> None:
    study = make_study(["a", "b", "c"], seeds=[0, 1, 2], equal=[["a", "b"]])
    write_study(tmp_path, study, lambda *_: [0.0, 1.0])
    page = report(tmp_path)
    assert "a and b differ on duel at seeds 0, 1 and 2" in page.text and "do not trust this study" in page.text
    assert page.html.index("do not trust") < page.html.index('class="answer"')
    assert "notice wrong" in page.html
    same_digest(tmp_path, study, {"b": "a"}, ["duel"], [0, 1, 2])
    page = report(tmp_path)
    assert "Arms that must end in the same bits do" in page.text and "3 pairs of runs compared" in page.text
    assert "notice wrong" not in page.html and "the axis is not one" not in page.text
    assert "With the same score as a at every seed: b, c." in page.text


def test_differences_between_runs_are_named(tmp_path: Path) -> None:
    write_study(tmp_path, make_study(), lambda *_: [0.0, 1.0], run={"git_commit": "f" * 40 + "-dirty"}, command=None)
    record = make_record("duel", "shared", 4, [0.0, 1.0])
    job = ["/somewhere/marl_memory/study/job.py", "my study", "duel", "shared", "4", "--tied"]
    resumed = [{"threads": 2, "versions": {"torch": "3.0"}}]
    write_run(tmp_path, record, git_commit="f" * 40 + "-dirty", resumed=resumed, command=job)
    page = report(tmp_path)
    assert "torch: 2.13.0+cpu in 9 runs; 2.13.0+cpu, then 3.0 in 1 run" in page.text
    assert "torch threads: 1 in 9 runs; 1, then 2 in 1 run" in page.text
    assert "changed but not committed" in page.text
    assert "The command that ran this study" not in page.text
    assert "python -m marl_memory.study.job 'my study' duel shared 4 " in page.text


def test_text_of_users_is_escaped(tmp_path: Path) -> None:
    arm, question = "<script>alert(1)</script> $x$ | _y_ & z", "Is 1 < 2 & \"so\" *on*? <img src=x onerror='a'>"
    study = make_study(["base", arm.replace("/", "")], question=question)
    write_study(tmp_path, study, lambda *_: [0.0, 1.0])
    page = report(tmp_path)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert question in page.text and arm.replace("/", "") in page.text
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "<script>" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL) and r"\$x\$ \| \_y\_" in text


def test_arms_with_levels_have_the_baseline_of_their_own(tmp_path: Path) -> None:
    heights = {"off+local": 0.0, "off+joint": 5.0, "on+local": 3.0, "on+joint": 2.0}
    study = make_study(list(heights), baseline="off", levels=["local", "joint"])
    write_study(tmp_path, study, learning(heights, noise=0.2))
    said = sentence(report(tmp_path))
    assert re.search(r"on\+local is 2\.8\d* ", said) and "above off+local" in said
    assert re.search(r"on\+joint is 2\.\d+ ", said) and "below off+joint" in said
    assert {path.name for path in (tmp_path / "report/figures").glob("curves*")} == {
        "curves_duel_local.png",
        "curves_duel_joint.png",
    }


@pytest.mark.parametrize(
    ("heights", "said"),
    [
        ({"base": 5.0, "x": 1.0, "y": 2.0}, "base is best: the nearest arm, y, is "),
        ({"base": 1.0, "x": 1.0, "y": 0.9}, "no arm can be told to be better than base at 5 paired seeds: "),
        ({"base": 1.0, "x": 1.02}, "no difference can be told at 5 paired seeds: x is "),
        ({"base": 1.0, "x": 6.0}, "On duel, x is "),
        ({"base": 1.0}, "On duel, base scores "),
    ],
)
def test_the_answer_says_no_more_than_the_interval(heights: dict[str, float], said: str, tmp_path: Path) -> None:
    write_study(tmp_path, make_study(list(heights)), learning(heights))
    assert said in sentence(report(tmp_path))


def test_an_arm_that_equals_the_baseline_is_no_answer(tmp_path: Path) -> None:
    curve = learning({"base": 5.0, "x": 1.0})
    study = make_study(["base", "strength_0", "x"])
    write_study(tmp_path, study, lambda task, arm, seed: curve(task, arm.replace("strength_0", "base"), seed))
    assert "base is best: the nearest arm, x, is " in sentence(report(tmp_path))
    write_study(tmp_path, study, lambda task, arm, seed: [0.0, float(seed)])
    assert "On duel, every arm scores the same as base at 5 paired seeds" in sentence(report(tmp_path))


def test_who_learns_sooner_is_told_where_all_end_alike(tmp_path: Path) -> None:
    curves = {"base": (0, 0, 1), "sooner": (0, 1, 1), "later": (0, -1, 1)}
    study = make_study(list(curves))
    write_study(tmp_path, study, lambda task, arm, seed: [(4.0 + seed) * height for height in curves[arm]])
    page = report(tmp_path)
    assert "every arm scores the same as base" in sentence(page)
    # By hand: means of the middle seeds' (4 + seed)/4 and 3 (4 + seed)/4, seeds 1 to 3.
    found = estimate(tmp_path, "area_difference", "sooner", "base")
    assert float(found["value"]) == pytest.approx(4.5 - 1.5) and float(found["low"]) > 0
    back = estimate(tmp_path, "area_difference", "base", "sooner")
    assert float(back["value"]) == -float(found["value"]) and float(back["high"]) == -float(found["low"])
    for side, arm in (("above", "sooner"), ("below", "later")):
        assert f"With an area under the curve {side} that of base (the interval excludes 0): {arm}." in page.text


def test_without_the_baseline_nothing_is_compared(tmp_path: Path) -> None:
    curve = learning({"x": 1.0, "y": 2.0})
    study = make_study(["base", "x", "y"])
    write_study(tmp_path, study, lambda task, arm, seed: None if arm == "base" else curve(task, arm, seed))
    page = report(tmp_path)
    assert "nothing can be told: the baseline base has no finished run" in sentence(page)
    assert "base has no run at all" in page.text
    assert not (tmp_path / "report/figures/difference.png").exists()


def test_a_report_over_two_hundred_runs_takes_half_a_minute_at_most(tmp_path: Path) -> None:
    heights = {f"arm_{i}": float(i) for i in range(10)}
    study = make_study(list(heights), [f"task_{i}" for i in range(4)])
    write_study(tmp_path, study, learning(heights, points=100))
    began = time.perf_counter()
    write_report(tmp_path)
    assert time.perf_counter() - began <= 30
    assert len(table(tmp_path, "runs.csv")) == 200
