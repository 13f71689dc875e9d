"""Pages of the documentation that are made: the catalog, a page for each method in it, and CONTRIBUTING.md.

mkdocs calls `on_files` once in each build (`hooks:` in mkdocs.yml). A method that enters the catalog is thereby documented.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poise.catalog import Method, Paper, methods

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def cell(text: str) -> str:
    """`text` as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def source(paper: Paper) -> str:
    """The paper's title, linked where there is an address."""
    address = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else paper.url
    title = cell(paper.title) + (f" ({paper.year})" if paper.year else "")
    return f"[{title}]({address})" if address else title


def page_of(method: Method) -> str:
    """Where the method's page stands in the site."""
    return f"methods/{method.name}.md"


def catalog_page(entries: Iterable[Method]) -> str:
    """A table for each family and kind: name, what it does, where it comes from."""
    sections: dict[tuple[str, str], list[str]] = {}
    for m in entries:
        row = f"| [{m.name}]({page_of(m)}) | {cell(m.summary)} | {source(m.paper)} |"
        sections.setdefault((m.family, m.kind), []).append(row)
    parts = [
        "# Catalog",
        "Every method of poise, as `poise methods` prints it. Each stands in one file, and comes with the test that a wrong "
        "version of it fails.",
    ]
    for (family, kind), rows in sorted(sections.items()):
        table = ["| name | what it does | source |", "|---|---|---|", *sorted(rows)]
        parts += [f"## {family}: {kind}", "\n".join(table)]
    return "\n\n".join(parts) + "\n"


def method_page(method: Method) -> str:
    """What the method's docstring says, where it comes from, and what a comparison tunes."""
    parts = [f"# {method.name}", f"Source: {source(method.paper)}"]
    if method.tune:
        rows = [f"| `{name}` | {cell(str(range_of(space)))} |" for name, space in method.tune.items()]
        parts += ["\n".join(["| tuned by `poise compare` | range |", "|---|---|", *rows])]
    parts += [f"::: {method.import_path}\n    options:\n      members: []"]
    return "\n\n".join(parts) + "\n"


def range_of(space: Any) -> str:
    """A range as a reader writes it."""
    if space.kind == "choice":
        return ", ".join(map(str, space.options))
    return f"{space.low:g} to {space.high:g}" + (", logarithmic" if space.kind == "log_uniform" else "")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those that mkdocs has found."""
    from mkdocs.structure.files import File

    contributing = Path(config.config_file_path).parent / "CONTRIBUTING.md"
    files.append(File.generated(config, "contributing.md", abs_src_path=str(contributing)))
    entries = methods()
    files.append(File.generated(config, "catalog.md", content=catalog_page(entries)))
    for entry in entries:
        files.append(File.generated(config, page_of(entry), content=method_page(entry)))
    return files
