"""From a recipe's references to opened models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from poise.checkpoint import Checkpoint, CheckpointError
from poise.checkpoint.open import open_checkpoint
from poise.checkpoint.peft_directory import PeftDirectory

from .folding import Folded
from .parents import Parent
from .recipe import Recipe, Reference


def open_parents(recipe: Recipe, opened: Mapping[Reference, Checkpoint]) -> list[Parent]:
    """Every model of a recipe, opened, in the order of `recipe.models`. What is in `opened` already is taken from there."""
    held = {reference: opened[reference] for reference in recipe.models if reference in opened}
    return [Parent(model, held[model] if model in held else open_model(model, recipe)) for model in recipe.models]


def open_model(reference: Reference, recipe: Recipe) -> Checkpoint:
    model = open_checkpoint(place(reference.path, recipe))
    if reference.adapter is None:
        return model
    adapter = open_checkpoint(place(reference.adapter, recipe))
    if not isinstance(adapter, PeftDirectory):
        cure = "what follows a + is the folder of a PEFT adapter, with adapter_config.json"
        raise CheckpointError("is no adapter", cure=cure, file=reference.adapter)
    return Folded(model, adapter)


def place(path: str, recipe: Recipe) -> Path:
    """Where a model of the recipe lies: as seen from here, else from the recipe's own folder.

    Raises:
        CheckpointError: neither; also for names of a hub, since nothing is downloaded.
    """
    beside = Path(recipe.file).parent / path
    found = next((where for where in (Path(path), beside) if where.exists()), None)
    if found is None:
        hub = path.count("/") == 1 and not path.startswith((".", "/"))
        name, _, revision = path.partition("@")
        more = f" --revision {revision}" if revision else ""
        cure = f"models are read from disk: `hf download {name}{more}` and name its folder" if hub else "correct the path"
        raise CheckpointError("does not exist", cure=cure, file=path)
    return found
