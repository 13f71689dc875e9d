"""`config.json` of a merge: the base's, with what the merge changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .parents import LAYERS, Parent
from .plan import Line
from .recipe import Slice


def result_config(
    lines: Sequence[Line], slices: Sequence[Slice], donor: Parent, frame: Parent, sources: Sequence[Sequence[Parent]]
) -> dict[str, Any] | None:
    """The donor's config with the result's layers, vocabulary and ties; None if the donor has none.

    Args:
        lines: the tensors of the result.
        slices: of the recipe.
        donor: the base, or the first model.
        frame: the model whose names the first slice follows.
        sources: the models of every slice.
    """
    if not donor.checkpoint.config:
        return None
    config = dict(donor.checkpoint.config)
    inner = config.get("text_config")
    text = dict(inner) if isinstance(inner, dict) else config
    if text is not config:
        config["text_config"] = text
    if slices[0].sources[0].layers is not None:
        set_layers(text, donor, slices, [parents[0] for parents in sources])
    shapes = {line.name: line.shape for line in lines}
    if frame.embedding in shapes and isinstance(text.get("vocab_size"), int) and shapes[frame.embedding][0] != frame.vocabulary:
        text["vocab_size"] = shapes[frame.embedding][0]
    head = has_head(shapes, [parent for parents in sources for parent in parents])
    for holder in (config, text):
        # A config that does not say is taken at its class's default, which is right as long as nothing changed.
        if "tie_word_embeddings" in holder or (holder is config and head != has_head(donor.names, [donor])):
            holder["tie_word_embeddings"] = not head
    return config


def has_head(names: Mapping[str, Any], parents: Sequence[Parent]) -> bool:
    """Whether one of `names` is a head of its own: a matrix with a row for each token, beside the embedding."""
    return any(
        name in parent.names and name != parent.embedding and len(parent.shape(name)) == 2 and parent.by_token(name)
        for name in names
        for parent in parents
        if names is not parent.names or parent.names[name] == name
    )


def set_layers(config: dict[str, Any], donor: Parent, slices: Sequence[Slice], firsts: Sequence[Parent]) -> None:
    """The number of layers, and whatever the config lists one entry of for each."""
    had = donor.stack.count
    for key in LAYERS:
        if config.get(key) == had:
            config[key] = sum(part.length for part in slices)
    for key, value in config.items():
        if isinstance(value, list) and len(value) == had and "layer" in key:
            picked: list[Any] = []
            for part, parent in zip(slices, firsts, strict=True):
                layers = part.sources[0].layers
                assert layers is not None
                picked += parent.config.get(key, value)[layers[0] : layers[1]]
            config[key] = picked
