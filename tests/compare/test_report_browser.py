"""The report as a browser shows it."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from browser import NAMES, chromium, window
from playwright.sync_api import Browser, Page
from screenshot import shoot

from poise.compare import report
from poise.compare.report.looks import HUES, LONGEST, looks
from poise.compare.results import Results

from .report_cases import CASES, HOSTILE, full, later, minimal, named

pytestmark = pytest.mark.browser

MISSING = (
    f"no Chromium on the path (looked for {', '.join(NAMES)}), and without one nobody can tell whether the report draws. "
    "Install your system's package, on Debian and Ubuntu `apt install chromium`, or leave these tests out with "
    "-m 'not browser and not slow'."
)
DRAWN = ".main-svg .scatterlayer .trace path"  # lines and points alike
# The middle of a point of a trace, by the name that the legend shows; plotly keeps each trace's data on its element.
POINT = """([chart, name]) => {
    for (const trace of document.querySelectorAll(`#${chart} .scatterlayer .trace`)) {
        const text = document.createElement("textarea");
        text.innerHTML = trace.__data__[0].trace.name;
        const point = trace.querySelector(".points path");
        if (text.value === name && point) {
            point.scrollIntoView({block: "center"});
            const box = point.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }
    }
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The machine's own Chromium."""
    if chromium() is None:
        pytest.fail(MISSING)
    with window() as found:
        yield found


class Opened(NamedTuple):
    """A page, and what happened while it was opened."""

    page: Page
    asked: list[str]  # addresses
    wrong: list[str]  # messages of errors


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Writes a report and opens the file."""
    with opener(browser, tmp_path) as load:
        yield load


@pytest.fixture(scope="module")
def whole(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """The full report, opened once for those that only look at it."""
    with opener(browser, tmp_path_factory.mktemp("whole")) as load:
        yield load(full())


@contextmanager
def opener(browser: Browser, folder: Path) -> Iterator[Callable[..., Opened]]:
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="dark")

    def load(results: Results, against: Results | None = None) -> Opened:
        path = folder / "report.html"
        report.write(results, path, against)
        found = Opened(context.new_page(), [], [])
        found.page.on("request", lambda request: found.asked.append(request.url))
        found.page.on("pageerror", lambda error: found.wrong.append(str(error)))
        found.page.on("console", lambda said: found.wrong.append(said.text) if said.type in ("error", "warning") else None)
        found.page.on("dialog", lambda dialog: found.wrong.append(dialog.message))
        found.page.goto(path.as_uri())
        assert found.asked[0] == path.as_uri()
        return found

    yield load
    context.close()


def drawn(page: Page) -> dict[str, int]:
    """Lines and points in every chart."""
    boxes = page.locator(".js-chart")
    return {boxes.nth(at).get_attribute("id") or "": boxes.nth(at).locator(DRAWN).count() for at in range(boxes.count())}


def label_over(page: Page, chart: str, name: str) -> str:
    """What the chart says when the mouse rests on a point."""
    place = page.evaluate(POINT, [chart, name])
    assert place is not None, f"no point of {name} in {chart}"
    page.mouse.move(1, 1)  # off every chart: the label before goes
    page.wait_for_selector(".hoverlayer .hovertext", state="detached", timeout=5000)
    page.mouse.move(*place, steps=2)
    page.wait_for_selector(f"#{chart} .hoverlayer .hovertext", timeout=5000)
    return page.locator(f"#{chart} .hoverlayer").text_content() or ""


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_everything_is_drawn_without_an_error_and_without_a_network(opened: Callable[..., Opened], make: Callable) -> None:
    results = make()
    page, asked, wrong = opened(results)
    assert page.locator("#verdict").is_visible() and page.locator("#verdict").text_content() == results.verdict.sentence
    assert page.locator("#results").is_visible()
    assert page.locator("#results tbody tr").count() == len(results.methods)
    counts = drawn(page)
    assert [chart for chart, count in counts.items() if count == 0] == []
    assert page.locator(".js-plotly-plot").count() == len(counts) > 0
    assert len(asked) == 1 and wrong == []
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 1200  # nothing hangs over


@pytest.mark.parametrize("chart", ["curves", "budgets", "frontier", "tuning"])
def test_the_mouse_on_a_point_tells_whose_it_is(whole: Opened, chart: str) -> None:
    page, _, wrong = whole
    for place, name in enumerate(("adamw", "lion", "muon")):
        shown = f"{name} at every budget" if (chart, name) == ("budgets", "adamw") else name
        assert name in label_over(page, f"tuning-{place}" if chart == "tuning" else chart, shown)
    assert wrong == []


def test_the_mouse_on_a_point_of_a_lone_method_tells_its_name_and_its_loss(opened: Callable[..., Opened]) -> None:
    text = label_over(opened(minimal()).page, "curves", "sgd")
    assert "sgd" in text and "1.25" in text


def test_a_name_that_is_html_runs_nothing_and_is_read_as_it_is_written(opened: Callable[..., Opened]) -> None:
    page, asked, wrong = opened(named(HOSTILE))
    short = f"{HOSTILE[: LONGEST - 13]}…{HOSTILE[-12:]}"
    assert page.locator("#results").text_content().count(HOSTILE) == 1  # pyright: ignore[reportOptionalMemberAccess]
    assert short in label_over(page, "frontier", short)
    assert len(asked) == 1 and wrong == [] and page.locator("img").count() == 0


def test_the_other_studys_curves_are_dashed(opened: Callable[..., Opened]) -> None:
    page, asked, wrong = opened(full(), later())
    lines = page.locator("#curves .scatterlayer .trace .js-line")
    dashes = [lines.nth(at).evaluate("line => getComputedStyle(line).strokeDasharray") for at in range(lines.count())]
    assert sum(dash != "none" for dash in dashes) == 2
    assert page.locator("#against tbody tr").count() == 2
    assert len(asked) == 1 and wrong == []


def test_the_page_and_its_charts_turn_light_with_the_system(whole: Opened) -> None:
    page = whole.page
    index = looks(full())["muon"].index

    def colours() -> tuple[str, str]:
        point = page.locator("#frontier .scatterlayer .trace .points path").last
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return point.evaluate("point => getComputedStyle(point).fill"), paper

    def rgb(colour: str) -> str:
        return f"rgb({', '.join(str(int(colour[at : at + 2], 16)) for at in (1, 3, 5))})"

    assert colours() == (rgb(HUES[index][0]), "rgb(18, 22, 27)")
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(200)
    assert colours() == (rgb(HUES[index][1]), "rgb(251, 251, 249)")
    page.emulate_media(color_scheme="dark")


def test_a_picture_is_as_wide_as_asked_for(browser: Browser, tmp_path: Path) -> None:
    # In a process of its own: playwright cannot be entered twice in one.
    report.write(minimal(), tmp_path / "report.html")
    tool = Path(shoot.__code__.co_filename)
    subprocess.run([sys.executable, tool, tmp_path / "report.html", tmp_path / "out.png", "640", "400"], check=True, timeout=60)
    head = (tmp_path / "out.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:24]) == (1280, 800)
