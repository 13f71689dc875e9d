"""`config.json` says what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.checkpoint import CheckpointError, Planned, config_for

LLAMA: dict[str, Any] = {
    "hidden_size": 8,
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "dtype": "float32",
    "rope": [1, 2],
}


def of(dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> list[Planned]:
    return [Planned(name.replace("__", "."), torch.Size(shape), dtype) for name, shape in shapes.items()]


def llama(dtype: torch.dtype = torch.float32, rows: int = 24, head: bool = False) -> list[Planned]:
    return of(
        dtype,
        model__embed_tokens__weight=(rows, 8),
        model__norm__weight=(8,),
        **({"lm_head__weight": (rows, 8)} if head else {}),
    )


def changed(config: dict[str, Any], planned: list[Planned]) -> dict[str, Any]:
    """Keys that were changed; the others, and the order of all, must be the same."""
    found = config_for(config, planned)
    assert list(found)[: len(config)] == list(config)
    return {key: value for key, value in found.items() if key not in config or config[key] != value}


def test_a_true_config_is_not_changed() -> None:
    assert changed(LLAMA, llama()) == {}
    assert changed(LLAMA | {"tie_word_embeddings": True}, llama()) == {}
    assert changed(LLAMA | {"tie_word_embeddings": False}, llama(head=True)) == {}
    assert changed({"dtype": "float32", "vocab_size": 3}, of(bert__pooler__weight=(4, 4))) == {}


def test_what_is_given_is_not_changed() -> None:
    config = {"text_config": {"dtype": "float32", "vocab_size": 3}}
    config_for(config, llama(torch.bfloat16))
    assert config == {"text_config": {"dtype": "float32", "vocab_size": 3}}


def test_dtype_is_what_is_stored_under_the_key_that_is_there() -> None:
    half = llama(torch.bfloat16)
    assert changed(LLAMA, half) == {"dtype": "bfloat16"}
    assert changed({"torch_dtype": "float16"}, half) == {"torch_dtype": "bfloat16"}
    assert changed({"model_type": "llama"}, half) == {"dtype": "bfloat16"}
    assert changed({"dtype": None}, half) == {"dtype": "bfloat16"}


def test_dtype_is_that_of_most_numbers_and_nested_ones_change_only_if_it_is_that_of_all() -> None:
    nested = {
        "dtype": "float32",
        "vision_config": {"dtype": "float32", "layers": 2},
        "quantization_config": {"dtype": "float32"},
    }
    half = of(torch.bfloat16, a=(5, 5))
    assert changed(nested, half) == {"dtype": "bfloat16", "vision_config": {"dtype": "bfloat16", "layers": 2}}
    mixed = [*half, *of(torch.float32, b=(5,)), *of(torch.int8, c=(100,))]
    assert changed(nested, mixed) == {"dtype": "bfloat16"}
    assert changed(nested, of(torch.int8, c=(100,))) == {}


def test_vocabulary_is_as_long_as_the_embedding() -> None:
    assert changed(LLAMA, llama(rows=26)) == {"vocab_size": 26}
    assert changed({"text_config": {"vocab_size": 24}, "dtype": "float32"}, llama(rows=26)) == {
        "text_config": {"vocab_size": 26}
    }
    assert changed({"n_embd": 8, "vocab_size": 5, "dtype": "float32"}, of(wte__weight=(7, 8), wpe__weight=(9, 8))) == {
        "vocab_size": 7
    }
    assert changed({"dtype": "float32"}, llama(rows=26)) == {}


def test_a_head_that_is_stored_is_not_tied() -> None:
    assert changed(LLAMA | {"tie_word_embeddings": True}, llama(head=True)) == {"tie_word_embeddings": False}
    assert changed(LLAMA, llama(head=True)) == {"tie_word_embeddings": False}  # the default of some families is true
    inner = {"text_config": {"tie_word_embeddings": True}, "dtype": "float32"}
    assert changed(inner, llama(head=True)) == {"text_config": {"tie_word_embeddings": False}}


def test_a_head_that_is_not_stored_is_tied_where_there_must_be_one() -> None:
    assert changed(LLAMA | {"tie_word_embeddings": False}, llama()) == {"tie_word_embeddings": True}
    assert changed(LLAMA | {"architectures": ["LlamaModel"], "tie_word_embeddings": False}, llama()) == {}


def test_another_width_is_another_model() -> None:
    message = (
        r"config.json: tensor 'model.embed_tokens.weight': is 8 wide, and the config says hidden_size=9; give the config of"
    )
    with pytest.raises(CheckpointError, match=message):
        config_for(LLAMA | {"hidden_size": 9}, llama())
    assert changed({"hidden_size": 9, "embedding_size": 8, "dtype": "float32"}, llama()) == {}  # ALBERT's is narrower


def test_embedding_and_head_of_two_vocabularies_are_refused() -> None:
    planned = of(model__embed_tokens__weight=(26, 8), lm_head__weight=(24, 8))
    message = "tensor 'lm_head.weight': has 24 rows, model.embed_tokens.weight has 26; bring both to one vocabulary"
    with pytest.raises(CheckpointError, match=message):
        config_for(LLAMA, planned)


def test_two_embeddings_of_which_neither_fits_are_refused() -> None:
    planned = of(encoder__embed_tokens__weight=(26, 8), decoder__embed_tokens__weight=(28, 8))
    assert changed(LLAMA | {"vocab_size": 28}, planned) == {}
    with pytest.raises(CheckpointError, match=r"says vocab_size=24, and encoder.embed_tokens.weight has 26 rows, decoder"):
        config_for(LLAMA, planned)
