"""Pages of the documentation that are made: the catalog, a page for each method, the schema of results, the reports of the
league's comparisons, and CONTRIBUTING.md.

mkdocs calls `on_files` once in each build (`hooks:` in mkdocs.yml). A method that enters the catalog is thereby documented.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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


def results_page(schema: Mapping[str, Any]) -> str:
    """Every object of `results.json` and every field, from its JSON schema, in the order in which a reader comes upon them."""
    known = {schema["title"]: schema} | dict(schema.get("$defs", {}))
    parts = [
        "# results.json",
        "What `poise compare` writes, field by field. `schema_version` changes whenever a reader of the file must. In Python, "
        "`poise.compare.Results.read(path)` reads and checks it.",
    ]
    waiting, seen = [schema["title"]], set()
    while waiting:
        name = waiting.pop(0)
        if name not in seen:
            seen.add(name)
            parts += section(name, known[name])
            waiting += references(known[name].get("properties", {}))
    return "\n\n".join(parts) + "\n"


def section(name: str, schema: Mapping[str, Any]) -> list[str]:
    """One object: what it is, and a row for each field."""
    rows = [
        f"| `{field}` | {cell(kind(spec))} | {cell(spec.get('description', ''))} |"
        for field, spec in schema.get("properties", {}).items()
    ]
    return [f"## {name}", schema.get("description", ""), "\n".join(["| field | type | what it is |", "|---|---|---|", *rows])]


def kind(spec: Mapping[str, Any]) -> str:
    """The type of a field, in JSON's words."""
    if "$ref" in spec:
        name = spec["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in spec:
        return " or ".join(map(kind, spec["anyOf"]))
    if "const" in spec or "enum" in spec:
        return " or ".join(f"`{value!r}`".replace("'", '"') for value in spec.get("enum", [spec.get("const")]))
    if spec.get("type") == "array":
        return f"[{', '.join(map(kind, spec['prefixItems']))}]" if "prefixItems" in spec else f"list of {kind(spec['items'])}"
    if spec.get("type") == "object":
        inner = spec.get("additionalProperties")
        return f"object of {kind(inner)} by name" if isinstance(inner, Mapping) else "object"
    return spec.get("type", "anything")


def references(spec: Any) -> list[str]:
    """The objects that a schema refers to."""
    if isinstance(spec, Mapping):
        own = [spec["$ref"].rpartition("/")[2]] if isinstance(spec.get("$ref"), str) else []
        return own + [name for inner in spec.values() for name in references(inner)]
    return [name for inner in spec for name in references(inner)] if isinstance(spec, list) else []


def compared(folder: Path) -> list[Path]:
    """The files of results that `poise compare` wrote; other measurements lie beside them."""
    return [path for path in sorted(folder.glob("*.json")) if "schema_version" in json.loads(path.read_text(encoding="utf-8"))]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the made pages to those that mkdocs has found."""
    from mkdocs.structure.files import File

    from poise.compare import report
    from poise.compare.results import Results

    contributing = Path(config.config_file_path).parent / "CONTRIBUTING.md"
    files.append(File.generated(config, "contributing.md", abs_src_path=str(contributing)))
    schema = Results.model_json_schema(mode="serialization")
    files.append(File.generated(config, "results.md", content=results_page(schema)))
    for found in compared(Path(config.docs_dir, "results")):
        page = report.render(Results.read(found))
        files.append(File.generated(config, f"results/{found.stem}-report.html", content=page))
    entries = methods()
    files.append(File.generated(config, "catalog.md", content=catalog_page(entries)))
    for entry in entries:
        files.append(File.generated(config, page_of(entry), content=method_page(entry)))
    return files
