"""`poise.merge.merge`: a recipe built in Python, carried out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from poise.checkpoint import Checkpoint
from poise.checkpoint.open import open_checkpoint

from .merger import Merger, Progress
from .merging import Merged, run
from .recipe import Case, Recipe, Reference, Slice, Source, Tokenizer
from .recipe.names import resolve
from .recipe.schema import Setting

Model = str | Path | Checkpoint | Mapping[str, Tensor] | nn.Module


# What comes back hangs on `out` alone; the other arguments are those below.
@overload
def merge(
    models: Sequence[Model],
    method: str | Callable[..., Tensor] = ...,
    base: Model | None = ...,
    *,
    out: None = ...,
    **others: Any,
) -> dict[str, Tensor]: ...
@overload
def merge(
    models: Sequence[Model],
    method: str | Callable[..., Tensor] = ...,
    base: Model | None = ...,
    *,
    out: str | Path,
    **others: Any,
) -> Merged: ...
def merge(
    models: Sequence[Model],
    method: str | Callable[..., Tensor] = "linear",
    base: Model | None = None,
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    tokenizer: str | Tokenizer | None = None,
    chat_template: str | None = None,
    common_rows: bool = False,
    seed: int | None = None,
    max_shard_bytes: int = 5 * 10**9,
    fresh: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> Merged | dict[str, Tensor]:
    """Merge models into a folder that transformers loads, or into a dictionary of tensors.

        merge(["math", "code"], method="ties", base="llama", out="merged", density=0.3, weight=(1.0, 0.5))

    Args:
        models: folders, files, `path+adapter`, state dicts, modules or checkpoints.
        method: a merging method's name (`poise methods --family merge`), or a function that is one (`poise.merge.protocol`).
        base: what they were fine-tuned from, for methods of differences; also gives config, tokenizer and dtypes.
        out: folder; None returns the merged tensors.
        dtype: of the result; by default each tensor's in the base, or in the first model.
        tokenizer: "union", "base", a model's path, or a `Tokenizer`; None: the base's, or the first model's, as it is.
        chat_template: "auto", "chatml", or Jinja.
        common_rows: where vocabularies differ in length, merge the rows that all have.
        seed: of methods that draw.
        max_shard_bytes, fresh: see `poise.checkpoint.write`.
        progress: told the pass, and bytes done and in all.
        settings: of the method. A tuple has one value for each model, a list is a gradient from the first layer to the last,
            and a dictionary maps parts of tensors' names to values, of which the first that fits holds; "*" fits all.

    Raises:
        ValueError, TypeError: for arguments, naming them.
        CheckpointError: for what is wrong with the models.
    """
    if isinstance(models, str | os.PathLike | Mapping | nn.Module) or not models:
        raise TypeError("models: must be a sequence of at least one model")
    opened: dict[Reference, Checkpoint] = {}

    def reference(model: Model, name: str) -> Reference:
        if isinstance(model, str | os.PathLike):
            return Reference.parse(str(model))
        opened[Reference(name)] = open_checkpoint(model)
        return Reference(name)

    sources = [Source(reference(model, f"models[{i}]"), where=f"models[{i}]") for i, model in enumerate(models)]
    rooted = next((s.model for s, m in zip(sources, models, strict=True) if m is base), None) if base is not None else None
    if base is not None and rooted is None:
        rooted = reference(base, "base")
    name = method if isinstance(method, str) else getattr(method, "__name__", "method")
    function = None if isinstance(method, str) else method
    known = resolve(name, function, own=True)
    shared: dict[str, Setting] = {}
    for key, value in settings.items():
        if key in known.beside:
            value = tuple(str(reference(held, f"{key}[{i}]")) for i, held in enumerate(value))
        if isinstance(value, tuple) and (key in known.each or key not in known.keys):
            if len(value) != len(models):
                raise ValueError(
                    f"{key}={value}: a tuple has one value for each of the {len(models)} models; a gradient is a list"
                )
            sources = [replace(s, settings={**s.settings, key: setting(one)}) for s, one in zip(sources, value, strict=True)]
        else:
            shared[key] = setting(value)
    if isinstance(tokenizer, str):
        tokenizer = Tokenizer(tokenizer if tokenizer in ("union", "base") else Reference.parse(tokenizer))
    recipe = Recipe(name, (Slice(tuple(sources)),), rooted, shared, tokenizer=tokenizer, chat_template=chat_template, own=True)
    wanted = str(dtype).removeprefix("torch.") if dtype is not None else None
    merger = Merger(recipe, opened, seed=seed, dtype=wanted, common_rows=common_rows, function=function)
    if out is not None:
        return run(merger, out, max_shard_bytes=max_shard_bytes, fresh=fresh, progress=progress)
    merger.plan.check()
    merger.observe(progress)
    return {t.name: merger.rows(t, 0, t.shape[0] if t.shape else 1).to(t.dtype) for t in merger.planned}


def setting(value: Any) -> Setting:
    """A setting as a recipe holds it: lists are gradients, dictionaries cases by part of the name."""
    if isinstance(value, Mapping):
        return tuple(
            Case(tuple(v) if isinstance(v, list) else v, None if part == "*" else str(part)) for part, v in value.items()
        )
    return tuple(value) if isinstance(value, list) else value
