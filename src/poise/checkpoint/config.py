"""`config.json` kept true: what it says of the weights is what is stored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from .errors import CheckpointError
from .planned import Planned
from .structure.ties import DECODERS, is_class
from .structure.words import TOKEN_HEAD, TOKENS

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPE_KEYS = ("dtype", "torch_dtype")  # the second is the older one
WIDTH_KEYS = ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "emb_dim")


def config_for(config: Mapping[str, Any], planned: Sequence[Planned]) -> dict[str, Any]:
    """A config as it must be for these tensors, its keys in their order, none changed that is true.

    - `dtype` (`torch_dtype` where that is the key): that of most floating numbers; in nested configs too, if it is that of all.
    - `vocab_size`: rows of the embedding.
    - `tie_word_embeddings`: false if a head is stored beside the embedding, since older loaders would put the embedding in its
      place; true if a model with a head has none stored, since loaders would make up a random one.

    Widths are not changed: a model of another width is another model.

    Raises:
        CheckpointError: an embedding that is not as wide as the config says, or embeddings and head whose rows contradict.
    """
    kept = copy.deepcopy(dict(config))
    _set_dtype(kept, planned)
    embeddings = [t for t in planned if len(t.shape) == 2 and TOKENS.fullmatch(t.name)]
    if embeddings:
        heads = [t for t in planned if len(t.shape) == 2 and TOKEN_HEAD.fullmatch(t.name)]
        _check_width(kept, embeddings)
        _check_heads(embeddings, heads)
        _set_vocabulary(kept, embeddings)
        _set_ties(kept, bool(heads))
    return kept


def _nested(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config, and those of the models that it is made of."""
    yield config
    for name, value in config.items():
        if name.endswith("_config") and name != "quantization_config" and isinstance(value, dict):
            yield from _nested(value)


def _set_dtype(config: dict[str, Any], planned: Sequence[Planned]) -> None:
    counts = {dtype: sum(t.numel for t in planned if t.dtype == dtype) for dtype in COMPUTED}
    most = max(counts, key=lambda dtype: counts[dtype])
    if not counts[most]:
        return
    name = str(most).removeprefix("torch.")
    alone = sum(map(bool, counts.values())) == 1
    for place in _nested(config) if alone else [config]:
        for key in DTYPE_KEYS:
            if key in place:
                place[key] = name
    if not any(key in config for key in DTYPE_KEYS):
        config["dtype"] = name


def _check_width(config: dict[str, Any], embeddings: Sequence[Planned]) -> None:
    said = {f"{key}={place[key]}": place[key] for place in _nested(config) for key in WIDTH_KEYS if key in place}
    for tensor in embeddings:
        if said and tensor.shape[1] not in said.values():
            raise CheckpointError(
                f"is {tensor.shape[1]} wide, and the config says {', '.join(said)}",
                cure="give the config of a model with these shapes",
                file="config.json",
                tensor=tensor.name,
            )


def _check_heads(embeddings: Sequence[Planned], heads: Sequence[Planned]) -> None:
    rows = {tensor.shape[0]: tensor.name for tensor in embeddings}
    for head in heads:
        if head.shape[0] not in rows:
            longest = ", ".join(f"{name} has {count}" for count, name in rows.items())
            what = f"has {head.shape[0]} rows, {longest}"
            raise CheckpointError(what, cure="bring both to one vocabulary", tensor=head.name)


def _set_vocabulary(config: dict[str, Any], embeddings: Sequence[Planned]) -> None:
    places = [place for place in _nested(config) if place.get("vocab_size") is not None]
    rows = {tensor.shape[0] for tensor in embeddings}
    if not places or any(place["vocab_size"] in rows for place in places):
        return
    if len(rows) > 1 or len({place["vocab_size"] for place in places}) > 1:
        found = ", ".join(f"{tensor.name} has {tensor.shape[0]} rows" for tensor in embeddings)
        said = ", ".join(f"vocab_size={place['vocab_size']}" for place in places)
        cure = "set vocab_size in the config that is given"
        raise CheckpointError(f"says {said}, and {found}", cure=cure, file="config.json")
    for place in places:
        place["vocab_size"] = next(iter(rows))


def _set_ties(config: dict[str, Any], head: bool) -> None:
    key = "tie_word_embeddings"
    inner = config.get("text_config")
    places = [place for place in (config, inner) if isinstance(place, dict) and key in place]
    if head and not places:
        places = [config]
    if head or is_class(config, DECODERS):
        for place in places:
            place[key] = not head
