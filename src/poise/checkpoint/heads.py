"""Whether a language model's output head is there, tied to the embedding, or missing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint
from .errors import CheckpointError
from .structure.ties import GENERATORS, asks, is_class
from .structure.words import TOKEN_HEAD, TOKENS

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Head:
    ties: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[CheckpointError, ...] = ()


def find_head(weights: Checkpoint, config: Mapping[str, Any], path: Path) -> Head:
    """Look for the head of a model whose config says that it generates text.

    Stored once, it is tied if `tie_word_embeddings` is true, or is not said and so is the class's default. If it is false, what
    loads the directory draws the head at random, and says so in a line of its log at most: that is a warning.
    """
    if not is_class(config, GENERATORS):
        return Head()
    embeddings = [name for name in weights if TOKENS.fullmatch(name)]
    if not embeddings or _stored(weights, embeddings):
        return Head()
    if asks(config):
        # Encoder and decoder have names of their own for what is shared; the shared one is the shortest.
        return Head({HEAD: min(embeddings, key=len)})
    name = config["architectures"][0]
    problem = f'is not stored, and the config says "tie_word_embeddings": false: {name} would be given a random head'
    cure = (
        f'if the model was tied, set "tie_word_embeddings": true, so that the head is {embeddings[0]!r}; '
        f"if it was not, fetch or save the weights again, with their head"
    )
    return Head(warnings=(CheckpointError(problem, cure=cure, file=path, tensor=HEAD),))


def _stored(weights: Checkpoint, embeddings: list[str]) -> bool:
    """A tensor with a head's name; or, outside of the layers, one that has as many rows as there are tokens."""
    tokens = {weights.info(name).shape[:1] for name in embeddings}
    for name in weights:
        if TOKEN_HEAD.fullmatch(name):
            return True
        shape = weights.info(name).shape
        outside = not re.search(r"\.\d+\.", name) and not re.search(r"pos|wpe|type", name)
        if name not in embeddings and len(shape) == 2 and shape[:1] in tokens and outside:
            return True
    return False
