"""Which tensors are one: what the checkpoint says, what its config says, and where the two do not go together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Heads by these names, or by none, turn into tokens; others may well be random where they are missing: a user's classifier.
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")


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
    generates = any(str(name).endswith(GENERATES) for name in config.get("architectures") or ())
    if not generates:
        return Tied(embedding, None, shared=False)
    problem = None
    if not wanted:
        problem = (
            f"no output head is stored and config.json says tie_word_embeddings: false, so the head will be random; "
            f"if it is {embedding!r}, say true"
        )
    return Tied(embedding, None, shared=wanted, problem=problem)


def insists(config: Mapping[str, Any]) -> bool:
    """Whether config says in so many words that the head is tied."""
    inner = config.get("text_config")
    parts = [config, inner] if isinstance(inner, Mapping) else [config]
    return any(part.get("tie_word_embeddings") is True for part in parts)


def asks(config: Mapping[str, Any]) -> bool:
    """Whether config asks for a tied head. The key is left out where it is true, which is what it is unless said otherwise."""
    inner = config.get("text_config")
    default = asks(inner) if isinstance(inner, Mapping) and "tie_word_embeddings" in inner else True
    return bool(config.get("tie_word_embeddings", default))
