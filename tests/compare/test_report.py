"""The report says what the results say."""

from __future__ import annotations

import html
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
import pytest

from poise.compare import report
from poise.compare.digits import number, spread
from poise.compare.report import pages
from poise.compare.report.again import command
from poise.compare.report.limits import limits
from poise.compare.report.looks import HUES, LONGEST, PAGE, THEMES, looks
from poise.compare.report.rows import strips
from poise.compare.results import Interval, MethodResult, Results
from poise.compare.statistics import unsure_by

from .report_cases import CASES, HOSTILE, LONG, all_diverged, full, known_optimum, later, made, method, minimal, named, twenty

EVERY = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


class Page(HTMLParser):
    """What a browser would read: texts by element, data of the charts, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.rows: list[list[str]] = []
        self.hues: list[str] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.verdict = ""
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append(tag)
        if "src" in known or tag == "link":
            self.loads.append(known.get("src") or known.get("href") or "")
        if tag not in ("meta", "link", "br", "img", "line", "circle"):
            self.open.append((tag, known))
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        if tag == "span" and "dot" in (known.get("class") or ""):
            self.hues.append((known["class"] or "").split()[-1])

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = [tag for tag, _ in self.open]
        facts = self.open[-1][1] if self.open else {}
        if facts.get("type") == "application/json":
            self.figures[(facts["id"] or "").removesuffix("-figure")] = json.loads(data, parse_constant=refused)
        elif "script" not in inside and "style" not in inside:
            self.text += data
            if "td" in inside:
                self.rows[-1][-1] += data
            if "h1" in inside:
                self.verdict += data

    def row(self, name: str) -> list[str]:
        """The cells of an entry's first row, that of the table of results."""
        return next([cell.strip() for cell in row] for row in self.rows if row and row[0].strip().startswith(name))

    def traces(self, figure: str, name: str) -> list[dict[str, Any]]:
        return [trace for trace in self.figures[figure]["data"] if html.unescape(trace["name"]) == name]


def refused(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without plotly's own five megabytes."""
    monkeypatch.setattr(pages, "get_plotlyjs", lambda: "/* plotly.js */")


def page(results: Results, against: Results | None = None) -> Page:
    return Page(report.render(results, against))


def figures_in(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"[-+]?\d+(?:\.\d+)?(?:e-?\d+)?", text)]


def charts_of(found: Page) -> Iterator[dict[str, Any]]:
    for figure in found.figures.values():
        yield from figure["data"]


def entry(results: Results, name: str) -> MethodResult:
    return next(found for found in results.methods if found.name == name)


# The table.


def test_the_verdict_is_the_results_own_sentence() -> None:
    assert page(full()).verdict == full().verdict.sentence


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_every_number_of_a_row_is_that_of_the_results(name: str) -> None:
    results = full()
    found = entry(results, name)
    cells = page(results).row(name)
    assert (
        found.final is not None and found.final.high is not None and found.timing is not None and found.to_reference is not None
    )
    half = found.final.high - found.final.mean
    assert figures_in(cells[1]) == pytest.approx([found.final.mean, half], abs=0.06 * half)
    if name == "adamw":
        assert cells[2] == cells[3] == ""
    else:
        assert found.to_reference.high is not None and found.speedup is not None
        half = found.to_reference.high - found.to_reference.mean
        assert figures_in(cells[2]) == pytest.approx([found.to_reference.mean, half], abs=0.06 * half)
        speedup = found.speedup
        assert figures_in(cells[3]) == pytest.approx([speedup.ratio, speedup.low, speedup.high], abs=0.005)
    assert figures_in(cells[4]) == [found.finals[0].state_bytes / found.finals[0].parameters]
    times = [found.timing.ratio, 1e3 * found.timing.seconds_per_step, 1e3 * found.timing.optimizer_seconds_per_step]
    assert figures_in(cells[5]) == pytest.approx(times, abs=0.06)
    assert figures_in(cells[7]) == [found.divergences, len(found.trials) + len(found.finals)]


def test_the_chosen_trial_is_the_one_that_the_results_name_with_its_edges_and_what_was_set() -> None:
    cell = page(full()).row("muon")[6]
    assert cell == "lr 0.0256momentum 0.82high edgerule cubicstate int8set"
    assert page(full()).row("adamw")[6] == f"lr {entry(full(), 'adamw').trials[3].hyper['lr']:.4g}"


@pytest.mark.parametrize("bound, mark", [("exact", ""), ("at least", "≥ "), ("at most", "≤ ")])
def test_a_speed_up_that_is_only_a_bound_is_marked_as_one(bound: str, mark: str) -> None:
    results = full()
    lion = entry(results, "lion")
    assert lion.speedup is not None
    changed = lion.model_copy(update={"speedup": lion.speedup.model_copy(update={"bound": bound})})
    methods = [changed if found.name == "lion" else found for found in results.methods]
    assert page(results.model_copy(update={"methods": methods})).row("lion")[3].startswith(f"{mark}1.08×")


def test_rows_stand_by_final_loss_and_what_diverged_stands_last() -> None:
    results = full()
    rows = [row[0].strip() for row in page(results).rows if row]
    order = ("muon", "lion", "adamw", "wild")
    assert [row.startswith(name) for row, name in zip(rows, order, strict=True)] == [True] * 4
    assert page(results).row("wild")[1:4] == ["diverged", "", ""]


def test_leaders_are_marked_and_a_tie_is_called_one() -> None:
    results = full()
    tie = results.model_copy(update={"verdict": results.verdict.model_copy(update={"leaders": ["muon", "lion"]})})
    found = page(tie)
    assert [found.row(name)[0].count("ties for the lead") for name in ("muon", "lion", "adamw")] == [1, 1, 0]


def test_columns_that_nobody_fills_are_not_there() -> None:
    assert len(page(full()).row("muon")) == 8
    assert page(minimal()).row("sgd") == ["sgd", "1.25", "8", "", "0 of 2"]


def test_differences_share_one_line_that_holds_zero() -> None:
    one = Interval(mean=-0.2, low=-0.3, high=-0.1)
    two = Interval(mean=0.05, low=0.0, high=0.1)
    drawn = strips({"one": one, "two": two, "bare": Interval(mean=0.1, low=None, high=None), "gone": None})
    assert set(drawn) == {"one", "two"}
    scale = (drawn["two"].high - drawn["one"].low) / 0.4
    for name, value in (("one", one), ("two", two)):
        assert (drawn[name].mean - drawn[name].zero) / scale == pytest.approx(value.mean, abs=1e-3)
        assert 0 <= drawn[name].low <= drawn[name].mean <= drawn[name].high <= 100


@pytest.mark.parametrize(
    "value, text",
    [
        (Interval(mean=2.12823, low=2.11723, high=2.13923), "2.128 ± 0.011"),
        (Interval(mean=123.4, low=100.0, high=146.8), "123 ± 23"),
        (Interval(mean=12345.0, low=12000.0, high=12690.0), "12340 ± 340"),
        (Interval(mean=3.214e-9, low=3.114e-9, high=3.314e-9), "3.21e-09 ± 1e-10"),
        (Interval(mean=0.2500038, low=0.2500028, high=0.2500048), "0.2500038 ± 1e-06"),
        (Interval(mean=0.0, low=-1e-9, high=1e-9), "0 ± 1e-09"),
        (Interval(mean=1.5, low=None, high=None), "1.5"),
        (Interval(mean=0.25, low=0.25, high=0.25), "0.25 ± 0"),
        (None, "diverged"),
    ],
)
def test_a_mean_has_the_digits_that_its_interval_gives_meaning_to(value: Interval | None, text: str) -> None:
    assert spread(value) == text


def test_signs_are_written_where_they_are_asked_for() -> None:
    assert (number(0.5, 0.01, "+"), number(-0.5, sign="+")) == ("+0.500", "-0.5")


# The charts.


@EVERY
def test_plotly_knows_every_property_of_every_chart(make: Callable[[], Results]) -> None:
    found = page(make())
    assert found.figures
    for figure in found.figures.values():
        go.Figure(figure)


def test_a_curve_is_the_mean_over_the_seeds_and_its_band_their_extremes() -> None:
    results = full()
    drawn = page(results)
    for name in ("adamw", "lion", "muon"):
        curves = [dict(run.curve) for run in entry(results, name).finals]
        line, end = drawn.traces("curves", name)
        (band,) = drawn.traces("curves", f"{name}, seeds")
        assert line["x"] == [at for at, _ in entry(results, name).finals[0].curve]
        assert line["y"] == pytest.approx([fmean(curve[at] for curve in curves) for at in line["x"]])
        upper = [max(curve[at] for curve in curves) for at in line["x"]]
        lower = [min(curve[at] for curve in curves) for at in line["x"]]
        assert band["y"] == [*upper, *reversed(lower)] and band["x"] == [*line["x"], *reversed(line["x"])]
        final = entry(results, name).final
        assert final is not None and final.high is not None
        assert (end["x"], end["y"]) == ([300], [final.mean])
        assert end["error_y"]["array"] == pytest.approx([final.high - final.mean])


def test_a_curve_ends_where_a_seed_diverged_instead_of_going_on_without_it() -> None:
    line, end = page(full()).traces("curves", "wild")
    assert max(line["x"]) == 100 and end["x"] == [100]
    assert "diverged" in end["hovertemplate"]


def test_the_view_of_the_curves_holds_every_end_and_not_the_first_steps() -> None:
    drawn = page(full())
    low, high = drawn.figures["curves"]["layout"]["yaxis"]["range"]
    for name in ("adamw", "lion", "muon"):
        line, end = drawn.traces("curves", name)
        assert low < min(line["y"] + end["y"]) and line["y"][2] <= high < line["y"][0]


def test_the_reference_is_drawn_at_its_budgets_and_everyone_at_their_own() -> None:
    results = full()
    drawn = page(results)
    (curve,) = drawn.traces("budgets", "adamw at every budget")
    assert curve["x"] == [point.passes for point in results.budgets]
    assert curve["y"] == [point.loss.mean for point in results.budgets if point.loss is not None]
    for name in ("lion", "muon"):
        found = entry(results, name)
        assert found.final is not None and found.speedup is not None
        (own,) = drawn.traces("budgets", name)
        (read,) = drawn.traces("budgets", f"{name}, read off")
        assert (own["x"], own["y"]) == ([300], [found.final.mean])
        assert read["x"] == [300, found.speedup.passes] and read["y"] == [found.final.mean] * 2
    (lion,), (muon,) = (drawn.traces("budgets", f"{name}, read off") for name in ("lion", "muon"))
    assert lion["marker"]["symbol"][1] == "line-ns-open" and muon["marker"]["symbol"][1] == "arrow-right"
    assert "≥ 2.00×: adamw needs ≥ 600 passes" in muon["hovertemplate"]


def test_trials_are_drawn_where_they_were_with_the_choice_ringed_and_the_diverged_on_top() -> None:
    results = full()
    adamw = entry(results, "adamw")
    healthy, fallen, chosen = page(results).figures["tuning-0"]["data"]
    assert healthy["x"] == [run.hyper["lr"] for run in adamw.trials[:5]]
    assert healthy["y"] == [run.loss for run in adamw.trials[:5]]
    assert fallen["x"] == [adamw.trials[5].hyper["lr"]] and fallen["y"][0] > max(healthy["y"])
    assert fallen["marker"]["symbol"] == "x-thin-open"
    assert chosen["x"] == [adamw.trials[3].hyper["lr"]] and chosen["y"] == [adamw.trials[3].loss]
    assert "trial 3: loss" in healthy["customdata"][3] and "diverged, loss not finite" in fallen["customdata"][0]


def test_a_trial_that_ended_above_its_start_is_drawn_among_the_diverged() -> None:
    found = entry(full(), "adamw")
    risen = found.trials[0].model_copy(update={"loss": 5.8, "diverged": True})
    healthy, fallen, _ = page(made([found.model_copy(update={"trials": [risen, *found.trials[1:]]})])).figures["tuning-0"][
        "data"
    ]
    assert 5.8 not in healthy["y"] and fallen["x"] == [risen.hyper["lr"], found.trials[5].hyper["lr"]]
    assert "trial 0: diverged, loss 5.8" in fallen["customdata"][0]


def test_where_every_trial_diverged_the_crosses_claim_no_loss_and_no_curve_is_promised() -> None:
    drawn = page(all_diverged())
    assert drawn.figures["tuning-0"]["layout"]["yaxis"]["showticklabels"] is False
    assert len(drawn.figures["tuning-0"]["data"][0]["x"]) == 6
    assert "curves" not in drawn.figures and "Learning curves" not in drawn.text


def test_every_hyper_parameter_has_a_panel_with_the_ends_of_its_space() -> None:
    figure = page(full()).figures["tuning-2"]
    layout = figure["layout"]
    assert [layout[f"xaxis{n}"]["title"]["text"] for n in ("", 2, 3)] == ["lr", "momentum", "rule"]
    assert [layout[f"xaxis{n}"].get("type") for n in ("", 2, 3)] == ["log", None, "category"]
    lines = [(shape["xref"], shape["x0"]) for shape in layout["shapes"] if shape["type"] == "line"]
    assert lines == [("x", 1e-4), ("x", 1e-1), ("x2", 0.5), ("x2", 0.99)]
    (field,) = [shape for shape in layout["shapes"] if shape["type"] == "rect"]
    assert (field["xref"], field["x0"], field["x1"]) == ("x", 1e-4, 1.0)
    assert {trace["xaxis"] for trace in figure["data"]} == {"x", "x2", "x3"}
    domains = [layout[f"xaxis{n}"]["domain"] for n in ("", 2, 3)]
    assert all(left[1] < right[0] for left, right in itertools.pairwise(domains))


def test_panels_go_on_below_after_three() -> None:
    space = {f"h{n}": {"kind": "uniform", "low": 0.0, "high": 1.0, "options": ()} for n in range(4)}
    found = method("adamw", [1.0, 1.1], [1.0, 1.1], [1.0, 1.1], space=space)
    layout = page(made([found])).figures["tuning-0"]["layout"]
    assert layout["xaxis4"]["domain"] == layout["xaxis"]["domain"]
    assert layout["yaxis4"]["domain"][1] < layout["yaxis"]["domain"][0]


def test_memory_is_drawn_against_loss_and_the_line_joins_what_nothing_beats() -> None:
    results = full()
    drawn = page(results)
    for name, size in (("adamw", 8.0), ("lion", 4.0), ("muon", 4.5)):
        (point,) = drawn.traces("frontier", name)
        final = entry(results, name).final
        assert final is not None and (point["x"], point["y"]) == ([size], [final.mean])
    (line,) = drawn.traces("frontier", "nothing beats these in both")
    assert line["x"] == [4.0, 4.5]


def test_where_the_optimum_is_known_the_excess_over_it_is_drawn_on_a_logarithm() -> None:
    results = known_optimum()
    drawn = page(results)
    line, end = drawn.traces("curves", "adamw")
    means = [fmean(dict(run.curve)[at] for run in entry(results, "adamw").finals) for at in line["x"]]
    final = entry(results, "adamw").final
    lowest = min(abs(mean - 0.25) for mean in means)
    assert final is not None
    for mean, y in zip(means, line["y"], strict=True):
        assert y == pytest.approx(mean - 0.25) if mean > 0.25 else 0 < y < lowest
    assert end["y"] == pytest.approx([final.mean - 0.25])
    assert drawn.figures["curves"]["layout"]["yaxis"]["type"] == "log"
    assert drawn.figures["tuning-0"]["layout"]["yaxis"]["type"] == "log"
    assert all(y > 0 for trace in charts_of(drawn) for y in trace["y"])


# Colours.


@pytest.mark.parametrize("make", [full, twenty])
def test_an_entry_keeps_its_colour_and_its_symbol_through_every_chart(make: Callable[[], Results]) -> None:
    results = make()
    drawn = page(results)
    for name, look in looks(results).items():
        traces = [trace for trace in charts_of(drawn) if trace["name"] == name]
        ring = [trace for trace in traces if trace.get("marker", {}).get("symbol") == "circle-open"]
        crosses = [trace for trace in traces if trace.get("marker", {}).get("symbol") == "x-thin-open"]
        seen = [trace for trace in traces if trace not in ring]
        assert len(seen) >= 3
        assert {(trace["marker"] if "marker" in trace else trace["line"])["color"] for trace in seen} == {look.colour}
        symbols = {trace["marker"]["symbol"] for trace in seen if "marker" in trace and trace not in crosses}
        assert symbols == {look.symbol}
    assert len(set(looks(results).values())) == len(results.methods)
    by_loss = [found.name for found in sorted(results.methods, key=lambda m: m.final.mean if m.final else 9e9)]
    assert drawn.hues[: len(by_loss)] == [f"hue{looks(results)[name].index}" for name in by_loss]


def linear(colour: str) -> list[float]:
    """sRGB to linear light."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]


def lab(light: list[float]) -> list[float]:
    """CIE L*a*b* under D65."""
    r, g, b = (min(1.0, max(0.0, part)) for part in light)
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089,
    )
    x, y, z = (part ** (1 / 3) if part > 0.008856 else 7.787 * part + 16 / 116 for part in xyz)
    return [116 * y - 16, 500 * (x - y), 200 * (y - z)]


# Machado, Oliveira and Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency" (2009), severity 1.
SIGHT = {
    "full": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("theme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("sight", SIGHT)
def test_hues_are_told_apart_from_each_other_and_from_the_page(theme: int, sight: str) -> None:
    seen = [
        lab([sum(w * part for w, part in zip(row, linear(hue[theme]), strict=True)) for row in SIGHT[sight]]) for hue in HUES
    ]
    for one, two in itertools.combinations(seen, 2):
        assert sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) ** 0.5 > 10  # 2.3 is the smallest that is noticed

    def luminance(colour: str) -> float:
        return sum(w * part for w, part in zip((0.2126, 0.7152, 0.0722), linear(colour), strict=True))

    for hue in HUES:
        dark, light = sorted([luminance(hue[theme]), luminance(PAGE[theme])])
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_no_colour_is_swapped_twice_when_the_page_turns_light() -> None:
    assert not {dark for dark, _ in THEMES} & {light for _, light in THEMES}
    assert len({dark for dark, _ in THEMES}) == len(THEMES)


# What comes from users, and what goes out.


def test_a_name_that_is_html_stays_text() -> None:
    plain, hostile = page(named("lion")), page(named(HOSTILE))
    assert hostile.tags.count("img") == 0 and hostile.tags.count("script") == plain.tags.count("script")
    assert HOSTILE in hostile.verdict and HOSTILE in hostile.row(HOSTILE)[0]
    assert "{{ 7 * 7 }}" in hostile.text and "49" not in hostile.row(HOSTILE)[0]
    for trace in charts_of(hostile):
        for text in (trace["name"], trace.get("hovertemplate", "")):
            assert "<img" not in text and "</script" not in text and "%{x}" not in text.replace("<br>%{x} passes", "")


def test_a_very_long_name_is_whole_in_the_table_and_short_in_the_charts() -> None:
    drawn = page(named(LONG))
    assert LONG in drawn.row(LONG)[0]
    assert all(len(trace["name"]) <= LONGEST + len(", the other study") for trace in charts_of(drawn))
    assert any("…" in trace["name"] for trace in charts_of(drawn))


@EVERY
def test_nothing_is_loaded_from_anywhere(make: Callable[[], Results]) -> None:
    text = report.render(make())
    assert [load for load in Page(text).loads if not load.startswith("data:")] == []
    assert "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text


def test_plotly_is_in_the_file_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    text = report.render(minimal())
    assert len(re.findall(r"plotly\.js v\d", text)) == 1


def test_the_file_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    report.write(full(), path)
    assert path.read_text(encoding="utf-8") == report.render(full())

    def stop(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", stop)
    with pytest.raises(OSError, match="no space"):
        report.write(minimal(), path)
    assert path.read_text(encoding="utf-8") == report.render(full())


# What the budget could and could not show.


def said(results: Results, heading: str) -> str:
    return " ".join(text for found, text in limits(results) if found == heading)


def test_the_smallest_difference_that_could_have_been_shown_is_that_of_the_verdict() -> None:
    results = full()
    text = said(results, "Resolution")
    for name in ("lion", "muon"):
        found, reference = entry(results, name), entry(results, results.reference)
        assert found.to_reference is not None
        unsure = unsure_by(found.to_reference, found.tuning_gap, reference.tuning_gap)
        assert float(re.findall(rf"{name} ([\d.]+\d)", text)[0]) == pytest.approx(unsure, rel=0.05)


def test_one_seed_and_one_method_say_that_nothing_could_be_told() -> None:
    assert "nothing to compare" in said(minimal(), "Resolution")
    one = full().model_copy(update={"settings": full().settings.model_copy(update={"seeds": 1})})
    assert "One seed gives no interval" in said(one, "Resolution")


@pytest.mark.parametrize(
    "make, heading, words",
    [
        (full, "Budget", ["6 tuning trials of 150 passes", "5 final runs of 300 passes", "best of muon lay at an edge"]),
        (minimal, "Budget", ["sgd had nothing to tune", "1 final run of"]),
        (full, "Luck in tuning", ["muon 0.011"]),
        (full, "Edges", ["lr of lion at the low end", "momentum of muon at the high end"]),
        (full, "Divergence", ["adamw 1 of 11", "wild 2 of 11"]),
        (full, "No place", ["wild"]),
        (all_diverged, "No place", ["adamw and lion", "are not ranked"]),
        (full, "Speed-up", ["No finished run of adamw reached the loss of muon", "least"]),
        (all_diverged, "Speed-up", ["adamw diverged"]),
        (twenty, "Speed-up", ["one budget only"]),
        (full, "Halfway", ["lion, then muon, then adamw; at the end it is muon, then lion, then adamw"]),
        (full, "Seconds", ["40 rounds"]),
        (minimal, "Seconds", ["not measured"]),
        (full, "Scale", ["100 parameters"]),
    ],
)
def test_what_makes_the_results_less_than_they_seem_is_said(
    make: Callable[[], Results], heading: str, words: list[str]
) -> None:
    assert [word for word in words if word not in said(make(), heading)] == []
    assert [word for word in words if word not in page(make()).text] == []


def test_what_did_not_happen_is_not_said() -> None:
    assert {heading for heading, _ in limits(minimal())} == {"Budget", "Resolution", "Seconds", "Scale"}


def test_a_reference_that_diverged_at_a_budget_is_named() -> None:
    results = full()
    first = results.budgets[0].model_copy(update={"loss": None})
    assert "diverged at 150 passes" in said(results.model_copy(update={"budgets": [first, *results.budgets[1:]]}), "Speed-up")


# How it was made.


def test_the_command_that_makes_it_again_names_every_choice() -> None:
    words = shlex.split(command(full()))
    assert words[:5] == ["poise", "compare", "code-lm", "--methods", "adamw,lion,muon(state=int8),wild=sgd"]
    assert words[5:] == ["--trials", "6", "--tune-steps", "150", "--steps", "300", "--seeds", "5", "--seed", "0"]
    assert command(minimal()).startswith("poise compare mine.py ")
    assert command(full()) in page(full()).text


def test_the_end_names_settings_environment_data_and_schema() -> None:
    text = page(full()).text.split("How this was made")[1]
    for word in ("0.5, 2.0", "5ca1ab1e", "2.13.0", "Linux & <friends>", "schema version"):
        assert word in text


# Beside another.


def test_another_study_is_laid_beside_and_its_curves_are_dashed() -> None:
    results, other = full(), later()
    drawn = page(results, other)
    (dashed,) = drawn.traces("curves", "lion, the other study")
    assert dashed["line"] == {"color": looks(results)["lion"].colour, "width": 1.8, "dash": "dash"}
    curves = [dict(run.curve) for run in entry(other, "lion").finals]
    assert dashed["y"] == pytest.approx([fmean(curve[at] for curve in curves) for at in dashed["x"]])
    assert not drawn.traces("curves", "newton, the other study")
    below = [row for row in drawn.rows if len(row) == 6]
    assert [row[0] for row in below] == ["adamw", "lion"]
    assert [cell.strip() for cell in below[1][1:]] == [
        "2.2366 ± 0.0094",
        "2.2866 ± 0.0094",
        "-0.05 ± 0",
        "better here",
        "seed by seed",
    ]
    assert "2.13.0 here, 2.14.0 there" in drawn.text


def test_a_study_of_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'code-lm' here and 'mine' there"):
        report.render(full(), minimal())
