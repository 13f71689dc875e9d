"""Recipes in mergekit's own YAML. A key that is not known is refused by its name, with its place and the nearest known one.

mergekit's documentation describes the format; `names.py` says which of its methods and settings are ours. What it has and poise
has not is in `REFUSED`, with the reason.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .schema import Case, Recipe, Reference, Setting, Settings, Slice, Source, Token, Tokenizer

RECIPE = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template",
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16", "float64")
REFUSED = {
    "residual_weight": "mergekit reads this key and does nothing with it",
    "override_architecture": "poise reads names and shapes and asks for no architecture",
    "revision": "models are read from disk; download that revision and name its folder",
}


def read(source: str | Path) -> Recipe:
    """A recipe from a YAML file, or from YAML text that holds a line break.

    Raises:
        ValueError: `RECIPE.yaml:7: models[1].parameters.weigth: unknown key; did you mean weight?`
    """
    if isinstance(source, str) and "\n" in source:
        return parse(source)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, file: str = "recipe") -> Recipe:
    """A recipe from text; `file` is what messages call it."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise ModuleNotFoundError("recipes are YAML: pip install 'poise[compare]', or pyyaml") from None
    try:
        tree: Any = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    return Reader(text, file, lines_of(node)).recipe(tree)


def lines_of(node: Any, where: str = "") -> dict[str, int]:
    """Line of every key: models[1].parameters.weight -> 7."""
    lines = {} if node is None else {where: node.start_mark.line + 1}
    if node is not None and node.id == "mapping":
        for key, value in node.value:
            inner = join(where, str(key.value))
            lines |= lines_of(value, inner) | {inner: key.start_mark.line + 1}
    elif node is not None and node.id == "sequence":
        for i, value in enumerate(node.value):
            lines |= lines_of(value, f"{where}[{i}]")
    return lines


def join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


class Reader:
    """Reads one recipe and knows the line of everything in it."""

    def __init__(self, text: str, file: str, lines: Mapping[str, int]) -> None:
        self.text, self.file, self.lines = text, file, lines

    def wrong(self, where: str, problem: str) -> ValueError:
        return Recipe("", (), file=self.file, places=self.lines).wrong(where, problem)

    def keys(self, tree: Any, where: str, known: Sequence[str]) -> dict[str, Any]:
        """A mapping that holds known keys only."""
        if not isinstance(tree, dict):
            raise self.wrong(where, f"must be a mapping, not {tree!r}")
        for key in tree:
            inner = join(where, str(key))
            if key in REFUSED:
                raise self.wrong(inner, f"not supported: {REFUSED[key]}")
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=2)
                hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
                raise self.wrong(inner, f"unknown key; {hint}")
        return {str(key): value for key, value in tree.items() if value is not None}

    def items(self, tree: Any, where: str) -> list[tuple[Any, str]]:
        """The entries of a list that is not empty, with their places."""
        if not isinstance(tree, list) or not tree:
            raise self.wrong(where, f"must be a list of at least one entry, not {tree!r}")
        return [(entry, f"{where}[{i}]") for i, entry in enumerate(tree)]

    def text_of(self, tree: Any, where: str) -> str:
        if not isinstance(tree, str) or not tree:
            raise self.wrong(where, f"must be text, not {tree!r}")
        return tree

    def recipe(self, tree: Any) -> Recipe:
        found = self.keys(tree, "", RECIPE)
        if "merge_method" not in found:
            raise self.wrong("", "merge_method is missing")
        parts = [key for key in ("models", "slices", "modules") if key in found]
        if len(parts) != 1:
            raise self.wrong("", f"exactly one of models, slices and modules is needed, not {', '.join(parts) or 'none'}")
        if "tokenizer" in found and "tokenizer_source" in found:
            raise self.wrong("tokenizer_source", "tokenizer.source says the same; only one of the two may stand")
        dtype = None
        for key in ("dtype", "out_dtype"):  # the second one, where both stand, is that of what is written
            if key in found:
                dtype = self.dtype(found[key], key)
        tokenizer = None
        if "tokenizer" in found:
            tokenizer = self.tokenizer(found["tokenizer"], "tokenizer")
        elif "tokenizer_source" in found:
            tokenizer = Tokenizer(self.vocabulary(found["tokenizer_source"], "tokenizer_source"))
        slices, inner = self.body(found, parts[0], "")
        return Recipe(
            method=self.text_of(found["merge_method"], "merge_method"),
            slices=slices,
            base=self.model(found["base_model"], "base_model") if "base_model" in found else None,
            settings={**self.settings(found.get("parameters"), "parameters"), **inner},
            dtype=dtype,
            tokenizer=tokenizer,
            chat_template=self.text_of(found["chat_template"], "chat_template") if "chat_template" in found else None,
            text=self.text,
            file=self.file,
            places=self.lines,
        )

    def body(self, found: dict[str, Any], key: str, where: str) -> tuple[tuple[Slice, ...], Settings]:
        """The slices of a recipe or a module, and a module's own settings."""
        place = join(where, key)
        if key == "models":
            return (Slice(tuple(self.source(*entry, ranges=False) for entry in self.items(found[key], place))),), {}
        if key == "slices":
            return tuple(self.slice(*entry) for entry in self.items(found[key], place)), {}
        if not isinstance(found[key], dict) or len(found[key]) != 1:
            raise self.wrong(place, "not supported: a recipe of several modules; one alone is read as the whole model")
        ((name, tree),) = found[key].items()
        inner = join(place, str(name))
        module = self.keys(tree, inner, ("models", "slices", "parameters"))
        parts = [part for part in ("models", "slices") if part in module]
        if len(parts) != 1:
            raise self.wrong(inner, "exactly one of models and slices is needed")
        slices, _ = self.body(module, parts[0], inner)
        return slices, self.settings(module.get("parameters"), join(inner, "parameters"))

    def slice(self, tree: Any, where: str) -> Slice:
        found = self.keys(tree, where, ("sources", "parameters", "base_model"))
        sources = tuple(self.source(*entry, ranges=True) for entry in self.items(found.get("sources"), join(where, "sources")))
        lengths = {source.layers[1] - source.layers[0] for source in sources if source.layers is not None}
        if len(lengths) > 1:
            raise self.wrong(join(where, "sources"), f"layer_range must be equally long in all, not {sorted(lengths)} layers")
        base = self.model(found["base_model"], join(where, "base_model")) if "base_model" in found else None
        return Slice(sources, self.settings(found.get("parameters"), join(where, "parameters")), base, where)

    def source(self, tree: Any, where: str, *, ranges: bool) -> Source:
        found = self.keys(tree, where, ("model", "layer_range", "parameters") if ranges else ("model", "parameters"))
        for key in ("model", "layer_range") if ranges else ("model",):
            if key not in found:
                raise self.wrong(where, f"{key} is missing")
        layers = None
        if ranges:
            layers = found["layer_range"]
            place = join(where, "layer_range")
            if not (isinstance(layers, list) and len(layers) == 2 and all(type(end) is int for end in layers)):
                raise self.wrong(place, f"must be two layer numbers, the first and one past the last, not {layers!r}")
            if not 0 <= layers[0] < layers[1]:
                raise self.wrong(place, f"must rise from 0 or more, not {layers}")
            layers = (layers[0], layers[1])
        settings = self.settings(found.get("parameters"), join(where, "parameters"))
        return Source(self.model(found["model"], join(where, "model")), layers, settings, where)

    def model(self, tree: Any, where: str) -> Reference:
        if isinstance(tree, dict):
            found = self.keys(tree, where, ("model", "lora", "path"))
            if "path" in found:
                return Reference(self.text_of(found["path"], join(where, "path")))
            root = self.model(found.get("model"), join(where, "model"))
            return Reference(root.path, self.model(found["lora"], join(where, "lora")).path if "lora" in found else None)
        text = self.text_of(tree, where)
        try:
            return Reference.parse(text)
        except ValueError as error:
            raise self.wrong(where, str(error)) from None

    def settings(self, tree: Any, where: str) -> Settings:
        if tree is None:
            return {}
        if not isinstance(tree, dict):
            raise self.wrong(where, f"must be a mapping of names to values, not {tree!r}")
        return {str(key): self.setting(value, join(where, str(key))) for key, value in tree.items() if value is not None}

    def setting(self, tree: Any, where: str) -> Setting:
        if isinstance(tree, bool | int | float | str):
            return tree
        if isinstance(tree, dict):
            return (self.case(tree, where),)
        entries = self.items(tree, where)
        if all(isinstance(entry, dict) for entry in tree):
            return tuple(self.case(*entry) for entry in entries)
        return self.gradient(tree, where)

    def gradient(self, tree: list[Any], where: str) -> tuple[Any, ...]:
        texts = sum(isinstance(entry, str) for entry in tree)
        if not all(isinstance(entry, bool | int | float | str) for entry in tree) or texts not in (0, len(tree)):
            raise self.wrong(where, f"must be numbers, or all text, or all mappings of filter and value, not {tree!r}")
        return tuple(tree)

    def case(self, tree: Any, where: str) -> Case:
        found = self.keys(tree, where, ("filter", "value"))
        value = found.get("value")
        if isinstance(value, list) and value:
            value = self.gradient(value, join(where, "value"))
        elif not isinstance(value, bool | int | float | str):
            raise self.wrong(join(where, "value"), f"must be a value or a list of them, not {value!r}")
        return Case(value, self.text_of(found["filter"], join(where, "filter")) if "filter" in found else None)

    def dtype(self, tree: Any, where: str) -> str:
        name = str(tree).removeprefix("torch.")
        if name not in DTYPES:
            raise self.wrong(where, f"{tree!r} must be one of {', '.join(DTYPES)}")
        return name

    def vocabulary(self, tree: Any, where: str) -> str | Reference:
        return tree if tree in ("union", "base") else self.model(tree, where)

    def tokenizer(self, tree: Any, where: str) -> Tokenizer:
        found = self.keys(tree, where, ("source", "tokens", "pad_to_multiple_of"))
        multiple = found.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            raise self.wrong(join(where, "pad_to_multiple_of"), f"must be a positive whole number, not {multiple!r}")
        tokens = found.get("tokens", {})
        if not isinstance(tokens, dict):
            raise self.wrong(join(where, "tokens"), f"must be a mapping of tokens, not {tokens!r}")
        return Tokenizer(
            self.vocabulary(found.get("source", "union"), join(where, "source")),
            {str(text): self.token(entry, join(join(where, "tokens"), str(text))) for text, entry in tokens.items()},
            multiple,
        )

    def token(self, tree: Any, where: str) -> Token:
        found = self.keys(tree, where, ("source", "force"))
        force, source, place = found.get("force", False), found.get("source"), join(where, "source")
        if not isinstance(force, bool):
            raise self.wrong(join(where, "force"), f"must be true or false, not {force!r}")
        if source is None:
            raise self.wrong(where, "source is missing")
        if not (isinstance(source, dict) and "kind" in source):
            return Token(self.model(source, place), None, force)
        inner = self.keys(source, place, ("kind", "model", "token", "token_id"))
        if inner["kind"] == "zero":
            return Token(None, None, force)
        if inner["kind"] != "model_token":
            raise self.wrong(join(place, "kind"), f"must be zero or model_token, not {inner['kind']!r}")
        if ("token" in inner) == ("token_id" in inner):
            raise self.wrong(place, "exactly one of token and token_id is needed")
        return Token(self.model(inner.get("model"), join(place, "model")), inner.get("token", inner.get("token_id")), force)
