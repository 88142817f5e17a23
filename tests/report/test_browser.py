"""The page in a real browser: do the charts draw, do clicks work, does anything overflow?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

from steepest.report import html

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")

PROBE = """
<script>
addEventListener("load", () => {
  const seen = {};
  const rows = () => [...document.querySelectorAll(".board tbody tr")];
  const names = () => rows().map((row) => row.dataset.optimizer);
  const heads = document.querySelectorAll(".board th button");
  heads[1].click(); seen.byName = names();
  heads[4].click(); seen.byDifference = names();
  heads[4].click(); seen.byDifferenceDown = names();
  const chart = document.getElementById("chart-sensitivity");
  chart.emit("plotly_click", { points: [{ customdata: chart.data[0].customdata[0] }] });
  seen.hash = location.hash;
  seen.target = document.querySelector(":target").id;
  seen.color = chart.data[0].line.color;
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  const probe = document.createElement("p");
  probe.id = "probe"; probe.textContent = JSON.stringify(seen);
  document.body.append(probe);
});
</script>
"""


def dump(path: Path, profile: Path, width: int) -> tuple[str, str]:
    """Return the page's DOM after its scripts ran, and what the browser logged."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        "--enable-logging=stderr",
        f"--user-data-dir={profile}",
        f"--window-size={width},900",
        "--virtual-time-budget=8000",
        "--dump-dom",
        path.as_uri(),
    ]
    # Files, not pipes: helper processes that outlive the browser would keep pipes open.
    dom, log = path.with_suffix(".dom"), path.with_suffix(".log")
    with dom.open("w") as out, log.open("w") as err:
        subprocess.run(command, stdout=out, stderr=err, timeout=120, check=True)
    return dom.read_text(), log.read_text()


@pytest.fixture(scope="module", params=[1100, 500])
def browsed(request, race, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    page = folder / "report.html"
    page.write_text(html.render(race, race.directory).replace("</body>", PROBE + "</body>"))
    return dump(page, folder / "profile", request.param)


@pytest.fixture(scope="module")
def seen(browsed):
    return json.loads(unescape(re.search(r'<p id="probe">(.*?)</p>', browsed[0])[1]))


def test_charts_are_drawn_without_an_error(browsed):
    dom, log = browsed
    drawn = dom.split("<h2>Charts</h2>")[1].split("What this race can")[0]
    assert drawn.count('class="scatterlayer') == 5
    assert drawn.count('class="legendtext"') == 5 * 7
    assert "Uncaught" not in log
    assert "Error" not in "".join(line for line in log.splitlines() if "CONSOLE" in line)


def test_columns_sort(seen):
    by_name = ["adamw", "lion", "mine.py:<Mine>", "muon", "schedulefree", "sgd", "soap"]
    assert seen["byName"] == by_name
    assert seen["byDifference"][:2] == ["soap", "muon"]
    assert seen["byDifferenceDown"] == seen["byDifference"][::-1]


def test_a_click_on_a_point_goes_to_its_run(race, seen):
    assert seen["target"] == seen["hash"][1:] == f"run-{race.tuning['adamw'][0]}"


def test_charts_have_the_colors_of_the_page(seen):
    assert seen["color"] == "#4a5058"


def test_the_page_is_not_wider_than_the_window(seen):
    assert seen["overflow"] <= 0
