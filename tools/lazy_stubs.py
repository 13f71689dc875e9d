"""Writes the type stubs of packages whose names are looked up only when they are asked for.

`from poise.optim import Lion` finds `rules/lion.py` through a module-level `__getattr__`, without importing Lion's
neighbours. A type checker cannot follow that. So this reads the sources, without importing them, and writes what there is
to find as plain re-exports into `poise/optim/__init__.pyi`:

    from .rules.lion import Lion as Lion

The build hook in `hatch_build.py` runs it for every wheel and editable install; `make stubs` runs it after a rule is added.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# Package -> its subpackages in which a name is looked for, in the order of the search.
LAZY: Mapping[str, tuple[str, ...]] = {
    "poise.adapt": ("methods",),
    "poise.optim": ("rules", "transforms"),
    "poise.training": ("drivers", "implicit", "layers", "losses", "solvers", "symmetry"),
}

HEADER = "# Written by tools/lazy_stubs.py from the sources (make stubs). Do not edit, do not commit.\n"


def public_definitions(path: Path) -> list[str]:
    """The classes and functions that a module defines at its top level under a public name."""
    body = ast.parse(path.read_text(encoding="utf-8"), filename=str(path)).body
    return [node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")]


def lazy_names(package: Path, rooms: tuple[str, ...]) -> dict[str, str]:
    """Name -> relative module (`.rules.lion`), chosen as the lookup at run time chooses it.

    A module whose file name says the name (Lion, lion.py) comes before all others; then the first that defines it.
    """
    chosen: dict[str, tuple[bool, str]] = {}
    for room in rooms:
        for path in sorted((package / room).glob("*.py")):
            if path.stem.startswith("_"):
                continue
            for name in public_definitions(path):
                says_it = path.stem.replace("_", "") == name.lower()
                if name not in chosen or (says_it and not chosen[name][0]):
                    chosen[name] = (says_it, f".{room}.{path.stem}")
    return {name: module for name, (_, module) in chosen.items()}


def imports(body: list[ast.stmt]) -> Iterator[tuple[str, str, str]]:
    """(module, name, name it is bound to) of every `from module import name` of a module, those for type checkers included."""
    for node in body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield "." * node.level + (node.module or ""), alias.name, alias.asname or alias.name
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from imports(node.body)


def declared(body: list[ast.stmt]) -> list[str] | None:
    """What `__all__` lists, or None where there is none. A list that is computed is read as far as it is written out."""
    for node in body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        if node.value is not None and any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return [c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    return None


def stub(package: Path, name: str, rooms: tuple[str, ...]) -> str:
    """The text of `package/__init__.pyi`: what `__init__.py` imports for its users, then every name it looks up lazily.

    Args:
        package: the package's folder.
        name: its dotted name, `poise.optim`.
        rooms: its subpackages that are searched.

    Raises:
        ValueError: `__all__` lists a name that is neither imported nor found, so that no stub could be true.
    """
    source = package / "__init__.py"
    body = ast.parse(source.read_text(encoding="utf-8"), filename=str(source)).body
    listed = declared(body)
    lines: dict[str, str] = {}
    for module, original, bound in imports(body):
        own = module.startswith(".") or f"{module}.".startswith(f"{name}.")
        if (own and not bound.startswith("_")) if listed is None else bound in listed:
            lines[bound] = f"from {module} import {original} as {bound}"
    for found, module in lazy_names(package, rooms).items():
        lines.setdefault(found, f"from {module} import {found} as {found}")
    missing = sorted(set(listed or ()) - set(lines))
    if missing:
        raise ValueError(
            f"{source}: __all__ lists {', '.join(missing)}, which it neither imports nor finds in {', '.join(rooms)}"
        )
    exports = "".join(f"    {exported!r},\n".replace("'", '"') for exported in sorted(lines))
    return HEADER + "\n" + "\n".join(sorted(lines.values())) + f"\n\n__all__ = [\n{exports}]\n"


def write(src: Path) -> list[Path]:
    """Write every stub below `src` that is not up to date already, and return where they all are."""
    paths: list[Path] = []
    for name, rooms in LAZY.items():
        package = src.joinpath(*name.split("."))
        path, text = package / "__init__.pyi", stub(package, name, rooms)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    for written in write(root / "src"):
        sys.stdout.write(f"{written.relative_to(root)}\n")
