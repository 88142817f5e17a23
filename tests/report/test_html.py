from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fake_race
import pytest

from steepest import analysis
from steepest.report import formatting, html
from steepest.report.findings import Findings
from steepest.report.styles import COLORS, styles
from steepest.study.store import load_race

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """What the tests ask of the page: ids, links, the leaderboard's cells, balanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.references: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.board: dict[str, list[dict[str, str]]] = {}
        self._row: list[dict[str, str]] | None = None
        self.feed(text)
        self.close()
        assert self.tags == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.references += [attributes["href"]] if "href" in attributes else []
        self.sources += [
            attributes[k] for k in ("src", "srcset", "data", "action") if k in attributes
        ]
        if "data-optimizer" in attributes:
            self._row = self.board.setdefault(attributes["data-optimizer"], [])
        if tag == "td" and self._row is not None:
            self._row.append({"sort": attributes["data-sort"], "text": ""})
        if tag == "a" and self._row is not None:
            self._row[-1]["href"] = attributes["href"]

    def handle_endtag(self, tag):
        assert self.tags.pop() == tag
        if tag == "tr":
            self._row = None

    def handle_data(self, data):
        if self.tags and self.tags[-1] not in ("script", "style"):
            self.text.append(data)
            if self._row and "td" in self.tags:
                self._row[-1]["text"] += data


@pytest.fixture(scope="module")
def text(race) -> str:
    return html.render(race, race.directory)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def chart_data(text: str) -> dict:
    return json.loads(re.search(r'id="chart-data">(.*?)</script>', text, re.S)[1])


def test_nothing_comes_from_elsewhere(page, text):
    assert page.sources == []
    assert not [r for r in page.references if re.match(r"(?i)(https?:)?//", r)]
    assert "@import" not in text.split("</style>")[0]
    assert "url(" not in text.split("</style>")[0]
    assert text.count("plotly.js v") == 1


def test_ids_are_unique_and_anchors_resolve(page):
    assert len(page.ids) == len(set(page.ids))
    anchors = [r[1:] for r in page.references if r.startswith("#")]
    assert anchors
    assert set(anchors) <= set(page.ids)


def test_links_lead_to_the_runs(race, page):
    links = {r for r in page.references if not r.startswith(("#", "data:"))}
    assert links == {f"runs/{run_hash}/" for run_hash in race.runs}
    assert all((race.directory / link).is_dir() for link in links)


def test_links_are_relative_to_where_the_report_is(race, tmp_path):
    path = race.directory.parent / "elsewhere" / "report.html"
    html.write(race, path)
    links = [r for r in Page(path.read_text()).references if not r.startswith(("#", "data:"))]
    assert all((path.parent / link).resolve().is_dir() for link in links)


def number(cell: str) -> float:
    return float(re.match(r"[−+]?[\d.,]+", cell)[0].replace("−", "-").replace(",", ""))


def test_the_table_shows_the_numbers_of_the_analysis(race, page):
    rows = analysis.leaderboard(race.final_runs, race.tuning_runs, race.baseline)
    assert list(page.board) == [row.optimizer for row in rows]
    for row in rows:
        cells = page.board[row.optimizer]
        assert cells[0]["text"] == row.rank_label
        assert number(cells[2]["text"]) == pytest.approx(row.best_lr, rel=5e-3)
        mean, half = (number(part) for part in cells[3]["text"].split(" ± "))
        assert mean == pytest.approx(row.val_loss.mean, abs=row.val_loss.half_width / 3)
        assert half == pytest.approx(row.val_loss.half_width, rel=0.2)
        assert float(cells[3]["sort"]) == row.val_loss.mean
        if row.difference is not None:
            assert float(cells[4]["sort"]) == row.difference.mean
            assert number(cells[4]["text"]) == pytest.approx(
                row.difference.mean, abs=row.difference.half_width / 3
            )
        assert float(cells[5]["sort"]) == pytest.approx(math.exp(row.val_loss.mean))
        assert cells[6]["sort"] == str(row.tokens_to_baseline or "")
        assert number(cells[8]["text"]) == row.step_ms
        assert number(cells[10]["text"]) == pytest.approx(row.state_bytes_per_parameter, abs=5e-3)
        assert cells[11]["text"] == f"{row.diverged} of {row.runs}"


def test_every_number_links_to_its_runs(page):
    for cells in page.board.values():
        (link,) = {cell["href"] for cell in cells}
        assert link.startswith("#runs-")


def test_edges_and_divergence_are_marked(page):
    assert page.board["lion"][2]["text"] == "0.001 high edge"
    assert page.board["muon"][2]["text"] == "0.02"


def test_every_run_is_listed(race, page):
    assert {i for i in page.ids if i.startswith("run-")} == {f"run-{h}" for h in race.runs}
    assert "The training loss was nan at step 150." in page.text


def test_every_point_of_a_chart_goes_to_its_runs(race, page, text):
    charts = chart_data(text)
    assert set(charts) == {"loss-tokens", "sensitivity", "loss-time", "memory", "step-time"}
    for chart in charts.values():
        drawn = [trace for trace in chart["data"] if trace.get("hoverinfo") != "skip"]
        for trace in drawn:
            assert len(trace["customdata"]) == len(trace["x"]) == len(trace["y"])
            for anchor, hover in trace["customdata"]:
                assert anchor in page.ids
                assert any(run_hash in hover for run_hash in race.runs)


def test_charts_draw_the_runs(race, text):
    charts = chart_data(text)
    lines = {t["name"]: t for t in charts["loss-tokens"]["data"] if "name" in t}
    for name, runs in Findings(race).finals.items():
        trace = lines[name.replace("<", "&lt;").replace(">", "&gt;")]
        finished = [run.val_loss for run in runs if run.finished]
        assert trace["y"][-1] == pytest.approx(sum(finished) / len(finished))
        assert trace["x"][-1] == 600 * 2048
    tuned = [t for t in charts["sensitivity"]["data"] if t["marker"]["symbol"] != "x-thin"]
    crosses = [t for t in charts["sensitivity"]["data"] if t["marker"]["symbol"] == "x-thin"]
    finished = [run for run in race.tuning_runs if run.finished]
    assert sorted(y for t in tuned for y in t["y"]) == sorted(run.val_loss for run in finished)
    assert sorted(x for t in crosses for x in t["x"]) == [3e-2, 0.2]
    assert min(y for t in crosses for y in t["y"]) > max(y for t in tuned for y in t["y"])


def test_names_from_users_are_escaped(tmp_path):
    name = '</script><script>alert("x")</script><b onclick=1>'
    racer = fake_race.Racer(name, 1e-2, 3.3)
    folder = fake_race.build(tmp_path, [fake_race.RACERS[0], racer])
    text = html.render(load_race(folder), folder)
    assert "<script>alert" not in text
    assert "<b onclick" not in text
    assert name in Page(text).board
    hovers = [t["customdata"][0][1] for t in chart_data(text)["memory"]["data"]]
    assert any("&lt;script&gt;alert(" in hover for hover in hovers)
    assert not any("<script" in hover for hover in hovers)


def test_names_that_differ_in_punctuation_have_groups_of_their_own():
    drawn = styles(["a b", "a-b", "a:b", "adamw"], "adamw")
    assert len({style.group for style in drawn.values()}) == 4


def test_unfinished_races_have_a_report(race, tmp_path):
    empty = fake_race.build(tmp_path, fake_race.RACERS[:2], seeds=())
    page = Page(html.render(load_race(empty), empty))
    assert any("No final run has finished yet" in part for part in page.text)
    for result in empty.glob("runs/*/result.json"):
        result.unlink()
    race = load_race(empty)
    page = Page(html.render(race, empty))
    assert {i for i in page.ids if i.startswith("run-")} == {
        f"run-{r.hash}" for r in race.unfinished
    }
    assert page.text.count("unfinished") == len(race.unfinished)


def test_runs_on_different_machines_are_told_apart(race):
    run_hash = race.final_runs[0].hash
    environments = {**race.environments, run_hash: {**fake_race.ENVIRONMENT, "threads": 64}}
    page = Page(html.render(replace(race, environments=environments), race.directory))
    rest = len(race.runs) - 1
    assert {f"64 (1 run); 2 ({rest} runs)", f"2 ({rest} runs); 64 (1 run)"} & set(page.text)


def test_every_column_has_a_title_in_each_form():
    for column in formatting.columns("adamw"):
        assert column.title
        assert column.short


CSS = Path(html.__file__).parent / "templates" / "report.css"


def palettes() -> list[list[tuple[float, float, float]]]:
    """Return the light and the dark palette in linear RGB."""
    found = re.findall(r"--s(\d+): #([0-9a-f]{6})", CSS.read_text())
    assert [int(i) for i, _ in found] == [*range(COLORS), *range(COLORS)]
    srgb = [[int(h[i : i + 2], 16) / 255 for i in (0, 2, 4)] for _, h in found]
    linear = [
        tuple(((c + 0.055) / 1.055) ** 2.4 if c > 0.04 else c / 12.92 for c in x) for x in srgb
    ]
    return [linear[:COLORS], linear[COLORS:]]


# Machado, Oliveira and Fernandes (2009), severity 1: how the color-blind see linear RGB.
SIGHTS = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
}


def product(matrix, vector):
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def oklab(rgb):
    """Björn Ottosson's perceptual color space; a distance of 0.02 is seen side by side."""
    cones = product(
        (
            (0.4122214708, 0.5363325363, 0.0514459929),
            (0.2119034982, 0.6806995451, 0.1073969566),
            (0.0883024619, 0.2817188376, 0.6299787005),
        ),
        [min(max(c, 0), 1) for c in rgb],
    )
    return product(
        (
            (0.2104542553, 0.7936177850, -0.0040720468),
            (1.9779984951, -2.4285922050, 0.4505937099),
            (0.0259040371, 0.7827717662, -0.8086757660),
        ),
        [math.cbrt(c) for c in cones],
    )


@pytest.mark.parametrize("sight", SIGHTS)
def test_colors_are_told_apart_by_the_color_blind_too(sight):
    for palette in palettes():
        seen = [oklab(product(SIGHTS[sight], color)) for color in palette]
        nearest = min(math.dist(a, b) for i, a in enumerate(seen) for b in seen[:i])
        assert nearest > 0.04
