"""The page of `poise inspect` as a browser shows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from browser import chromium, window
from playwright.sync_api import Browser, Page

from poise.checkpoint import StateDict
from poise.checkpoint.inspecting import Inspection, inspect
from poise.compare import inspection
from poise.models import GPT, GPTConfig

from .test_report_browser import DRAWN, MISSING

pytestmark = pytest.mark.browser

HOSTILE = '<img src="http://evil.example/x" onerror="alert(1)">{b}'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if chromium() is None:
        pytest.fail(MISSING)
    with window() as opened:
        yield opened


@pytest.fixture
def opened(browser: Browser, tmp_path: Path) -> Iterator[Callable[[Inspection], Page]]:
    """Writes a page and opens the file; fails where anything was fetched, or went wrong."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, color_scheme="dark")
    asked: list[str] = []
    wrong: list[str] = []

    def load(found: Inspection) -> Page:
        path = tmp_path / "page.html"
        inspection.write(found, path)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield load
    context.close()
    assert len(asked) == 1 and asked[0].startswith("file:") and wrong == []


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=3))
    found = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found["model.layers.1.mlp.up_proj.weight"][2, 3] = math.nan
    found["lm_head.weight"][5, 5] = 60.0
    return found


def counts(page: Page) -> dict[str, int]:
    """Lines and points in every chart."""
    boxes = page.locator(".js-chart")
    return {boxes.nth(at).get_attribute("id") or "": boxes.nth(at).locator(DRAWN).count() for at in range(boxes.count())}


def colours(page: Page) -> tuple[str, str]:
    """Of a line and of the page."""
    line = page.locator("#norms .scatterlayer .trace .js-line").first
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return line.evaluate("line => getComputedStyle(line).stroke"), paper


def test_every_chart_is_drawn_and_every_tensor_listed(opened: Callable[[Inspection], Page]) -> None:
    found = inspect(StateDict(tensors(), {"vocab_size": 256}), spectra=True)
    page = opened(found)
    drawn, dark = counts(page), colours(page)
    assert set(drawn) == {"norms", "sizes", "outliers", "entries", "spectra", "ranks", "conditions"}
    assert all(count > 0 for count in drawn.values())
    # Nine roles with a line or a point each; points: 7 matrices in 3 layers, embedding and head.
    assert page.locator("#norms .scatterlayer .trace").count() == 9
    assert page.locator("#norms .scatterlayer .points path").count() == 7 * 3 + 2
    assert page.locator("#tensors tbody tr").count() == len(found.tensors) == 30
    assert page.locator("#findings li").count() == len(found.findings) == 2
    assert page.locator("#verdict").text_content() == "29.6 k parameters: 1 error, 1 note".replace(
        "29.6", f"{found.parameters / 1e3:.3g}"
    )
    assert page.locator("tr.bad").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    page.emulate_media(color_scheme="light")
    page.wait_for_timeout(200)
    light = colours(page)
    assert dark[0] != light[0] and (dark[1], light[1]) == ("rgb(18, 22, 27)", "rgb(251, 251, 249)")


def test_names_that_are_html_are_read_as_they_are_written_and_without_spectra_there_are_no_charts_of_them(
    opened: Callable[[Inspection], Page],
) -> None:
    page = opened(inspect(StateDict({f"layers.{i}.{HOSTILE}.weight": torch.randn(4, 4) for i in range(2)})))
    assert page.locator("img").count() == 0
    assert HOSTILE in (page.locator("#tensors").text_content() or "")
    assert set(counts(page)) == {"norms", "sizes", "outliers", "entries"}
    assert "condition" not in (page.locator("#tensors thead").text_content() or "")


def test_a_page_of_nothing_to_draw_is_still_a_page(opened: Callable[[Inspection], Page]) -> None:
    weights = {"n": torch.tensor(3), "w": torch.zeros(4, 4), "e": torch.zeros(0, 2), "b": torch.randn(3)}
    page = opened(inspect(StateDict(weights), spectra=True))
    assert counts(page) == {} and page.locator("#tensors tbody tr").count() == len(weights)
