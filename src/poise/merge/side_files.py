"""What goes beside merged weights: the tokenizer that the recipe asks for, its chat template, the recipe itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from poise.checkpoint.side_files import side_files

from . import tokenizers
from .parents import Parent
from .recipe import Recipe, Tokenizer

RECIPE = "merge_recipe.yaml"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class SideFiles:
    """Of a recipe over opened models.

    Attributes:
        donor: the model whose files are taken: the base, or the first.
        vocabularies: of all models; none are read where the recipe asks for no tokenizer.
        target: the tokenizer of the result; None where it is the donor's as it is.
    """

    def __init__(self, recipe: Recipe, parents: Sequence[Parent]) -> None:
        self.recipe, self.parents = recipe, parents
        self.notes: list[str] = []
        base = None if recipe.base is None else recipe.models.index(recipe.base)
        first = recipe.models.index(recipe.slices[0].sources[0].model)
        self.donor = parents[first if base is None else base]
        self.vocabularies: list[tokenizers.Vocabulary | None] = []
        self.target: tokenizers.Target | None = None
        if recipe.tokenizer is not None:
            self.vocabularies = [
                None if (folder := self.folder(parent)) is None else tokenizers.load(folder, parent.vocabulary)
                for parent in parents
            ]
            start = first if base is None else base
            self.target = tokenizers.target(recipe.tokenizer, start, recipe.models, self.vocabularies)
            self.tell(recipe.tokenizer, self.target)
        if recipe.chat_template is not None:  # a wrong one is told before work starts
            self.template()

    def tell(self, wanted: Tokenizer, target: tokenizers.Target) -> None:
        lacking = [str(p) for p, v in zip(self.parents, self.vocabularies, strict=True) if v is None]
        if lacking:
            self.notes.append(f"tokenizer: {', '.join(lacking)} has none, and is taken to have the base's")
        words = [entry for entry in target.new if not entry["special"]]
        if wanted.source == "union" and len(words) > 1000:
            self.notes.append(
                f"tokenizer: {len(words)} tokens of other models became added tokens, which are found before the base's own;"
                " text may be cut differently from what any model has seen"
            )

    @staticmethod
    def folder(parent: Parent) -> Path | None:
        path = parent.checkpoint.path
        return None if path is None else path if path.is_dir() else path.parent

    def template(self) -> str | None:
        assert self.recipe.chat_template is not None
        folders = [folder for parent in self.parents if (folder := self.folder(parent)) is not None]
        try:
            return tokenizers.chosen_template(self.recipe.chat_template, folders)
        except ValueError as error:
            where, _, problem = str(error).partition(": ")
            raise self.recipe.wrong(where, problem) from None

    def files(self, made: Path) -> dict[str, Path]:
        """Names in the result's folder, and what is copied there; what has to be made is made in `made`."""
        path = self.donor.checkpoint.path
        found = side_files(path) if path is not None and path.is_dir() else {}
        if self.target is not None:
            found = {name: file for name, file in found.items() if name not in tokenizers.FILES}
            found |= tokenizers.write(self.target, made)
        if self.recipe.chat_template is not None and (template := self.template()) is not None:
            tokenizers.write_template(template, found, made)
        if self.recipe.text:
            (made / RECIPE).write_text(self.recipe.text, encoding="utf-8")
            found[RECIPE] = made / RECIPE
        return found

    def config(self, config: dict[str, Any] | None) -> dict[str, Any] | None:
        """The config with the numbers of special tokens that go with the tokenizer."""
        if config is None or self.target is None or self.parents[self.target.owner] is self.donor:
            return config
        owner = self.parents[self.target.owner].checkpoint.config
        return config | {key: owner[key] for key in IDS if key in owner and key in config}

    def digest(self) -> str:
        text = f"{self.recipe.text} {tokenizers.digest(self.vocabularies)} {self.recipe.tokenizer}"
        return hashlib.sha256(text.encode()).hexdigest()
