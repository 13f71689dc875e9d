"""The pages that the documentation makes."""

from __future__ import annotations

from pathlib import Path

import docs_pages

from poise.catalog import Method, Paper, choice, log_uniform, methods, uniform
from poise.compare import results


def hammer() -> None:
    """Flattens a | b."""


def entry(name: str = "hammer", paper: Paper | None = None, **facts: object) -> Method:
    return Method(name, "optim", paper or Paper("On Hammers", arxiv="2401.00001", year=2024), hammer, **facts)  # pyright: ignore[reportArgumentType]


def test_the_catalog_page_lists_every_method_with_a_page_of_its_own() -> None:
    entries = methods()
    page = docs_pages.catalog_page(entries)
    assert entries
    for m in entries:
        assert f"[{m.name}](methods/{m.name}.md)" in page
        assert f"::: {m.import_path}" in docs_pages.method_page(m)


def test_a_row_is_three_cells_even_where_the_text_has_bars() -> None:
    (row,) = [line for line in docs_pages.catalog_page([entry()]).splitlines() if "hammer" in line]
    assert row == r"| [hammer](methods/hammer.md) | Flattens a \| b. | [On Hammers (2024)](https://arxiv.org/abs/2401.00001) |"


def test_a_paper_without_an_address_is_not_a_link() -> None:
    assert docs_pages.source(Paper("Folklore")) == "Folklore"
    assert docs_pages.source(Paper("A Post", url="https://example.org/post")) == "[A Post](https://example.org/post)"


def test_families_and_kinds_have_a_table_each() -> None:
    page = docs_pages.catalog_page([entry("b"), entry("a"), entry("c", kind="transform")])
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## optim: optimizer", "## optim: transform"]
    assert page.index("[a]") < page.index("[b]") < page.index("[c]")


def test_ranges_are_written_as_a_reader_writes_them() -> None:
    assert docs_pages.range_of(log_uniform(1e-5, 1e-2)) == "1e-05 to 0.01, logarithmic"
    assert docs_pages.range_of(uniform(0, 1)) == "0 to 1"
    assert docs_pages.range_of(choice("a", 2)) == "a, 2"
    assert "| `lr` | 1e-05 to 0.01, logarithmic |" in docs_pages.method_page(entry(tune={"lr": log_uniform(1e-5, 1e-2)}))


SCHEMA = results.Results.model_json_schema(mode="serialization")


def test_every_object_and_every_field_of_the_results_is_on_their_page() -> None:
    page = docs_pages.results_page(SCHEMA)
    kinds = [found for found in vars(results).values() if isinstance(found, type) and issubclass(found, results.Record)]
    models = [found for found in kinds if found is not results.Record]
    assert {results.Results, results.Settings, results.MethodResult, results.Run} <= set(models)
    for model in models:
        text = page.split(f"\n## {model.__name__}\n")[1].split("\n## ")[0]
        for name, field in model.model_fields.items():
            (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
            assert docs_pages.cell(field.description or "") in row and row.count(" | ") == 2
    assert page.index("## Results") < page.index("## Settings") < page.index("## Run\n") < page.index("## Interval")


def test_types_are_in_jsons_words() -> None:
    kinds = {name: docs_pages.kind(spec) for name, spec in SCHEMA["$defs"]["MethodResult"]["properties"].items()}
    assert kinds["name"] == "string"
    assert kinds["best"] == "integer or null"
    assert kinds["trials"] == "list of [Run](#run)"
    assert kinds["final"] == "[Interval](#interval) or null"
    assert kinds["edges"] == 'object of `"low"` or `"high"` by name'
    assert docs_pages.kind(SCHEMA["$defs"]["Run"]["properties"]["curve"]) == "list of [integer, number]"
    assert docs_pages.kind(SCHEMA["properties"]["kind"]) == '`"poise.compare"`'


def test_every_comparison_among_the_results_can_be_shown_and_what_is_none_is_left_out() -> None:
    folder = Path(__file__).resolve().parents[1] / "docs" / "results"
    found = docs_pages.compared(folder)
    assert {"code-lm.json", "digits.json"} <= {path.name for path in found}
    assert folder / "merging.json" not in found
    assert all(results.Results.read(path).methods for path in found)
