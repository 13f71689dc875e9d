"""Which tensors are one: what the checkpoint says, what its config says, and where the two do not go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# How classes are called that turn into tokens. The head of another one may well be missing and random: a user's classifier.
DECODERS = ("ForCausalLM", "LMHeadModel")  # their head is called `lm_head`
GENERATORS = (*DECODERS, "ForConditionalGeneration")
TOKEN_MODELS = (*GENERATORS, "ForMaskedLM")


@dataclass(frozen=True)
class Tied:
    """How the head comes by its weights.

    Attributes:
        embedding: name of the token table; None without one.
        head: name of the output head's own tensor; None where none is stored.
        shared: whether the head is the embedding, which is then stored once.
        problem: what is wrong, if anything.
    """

    embedding: str | None
    head: str | None
    shared: bool
    problem: str | None = None


def tied(
    embeddings: Iterable[str],
    heads: Iterable[str],
    shapes: Mapping[str, torch.Size],
    ties: Mapping[str, str],
    config: Mapping[str, Any],
) -> Tied:
    """Judge by names and config alone.

    Args:
        embeddings, heads: names that are stored, of tables of tokens and of output heads.
        ties: other name -> stored name, as the checkpoint says.
    """
    embeddings, heads = list(embeddings), list(heads)
    embedding = next((name for name in embeddings if name in ties.values()), next(iter(embeddings), None))
    size = None if embedding is None else shapes[embedding]
    head = next((name for name in heads if shapes[name] == size), next(iter(heads), None))
    wanted = asks(config)
    if embedding is None or head is not None or embedding in ties.values():
        return Tied(embedding, head, shared=head is None and embedding in ties.values(), problem=None)
    if not is_class(config, TOKEN_MODELS):
        return Tied(embedding, None, shared=False)
    problem = None
    if not wanted:
        problem = (
            f"no output head is stored and config.json says tie_word_embeddings: false, so the head will be random; "
            f"if it is {embedding!r}, say true"
        )
    return Tied(embedding, None, shared=wanted, problem=problem)


def is_class(config: Mapping[str, Any], endings: tuple[str, ...]) -> bool:
    """Whether the config is of a class whose name ends so."""
    classes = config.get("architectures")
    return isinstance(classes, list) and any(isinstance(name, str) and name.endswith(endings) for name in classes)


def insists(config: Mapping[str, Any]) -> bool:
    """Whether config says in so many words that the head is tied."""
    return any(_said(config))


def asks(config: Mapping[str, Any]) -> bool:
    """Whether config asks for a tied head. The key is left out where it is true, which is what it is unless said otherwise."""
    said = _said(config)
    return any(said) or not said


def _said(config: Mapping[str, Any]) -> list[bool]:
    """What the config says of ties, and that of the text model inside of it."""
    inner = config.get("text_config")
    parts = [config, inner] if isinstance(inner, Mapping) else [config]
    return [part["tie_word_embeddings"] is True for part in parts if "tie_word_embeddings" in part]
