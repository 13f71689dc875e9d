"""What names and shapes say of a model, for several families of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.checkpoint import CheckpointError, StateDict
from poise.merge.parents import Parent, is_before
from poise.merge.recipe import Reference


def parent(shapes: dict[str, tuple[int, ...]], config: dict[str, Any] | None = None) -> Parent:
    return Parent(Reference("m"), StateDict({name: torch.ones(shape) for name, shape in shapes.items()}, config or {}))


GPT2 = {"wte.weight": (10, 4), "wpe.weight": (10, 4), "ln_f.weight": (4,)} | {
    f"h.{i}.{rest}": (4, 4) for i in range(3) for rest in ("attn.c_attn.weight", "mlp.c_fc.weight")
}
BERT = {
    "bert.embeddings.word_embeddings.weight": (10, 4),
    "bert.embeddings.position_embeddings.weight": (10, 4),
    "bert.embeddings.LayerNorm.weight": (4,),
    "bert.encoder.layer.0.output.dense.weight": (4, 4),
    "bert.encoder.layer.1.output.dense.weight": (4, 4),
    "cls.predictions.bias": (10,),
    "cls.predictions.decoder.weight": (10, 4),
}
EXPERTS = {"model.embed_tokens.weight": (10, 4), "lm_head.weight": (10, 4)} | {
    f"model.layers.{i}.mlp.experts.{j}.up.weight": (4, 4) for i in range(2) for j in range(4)
}
T5 = {"shared.weight": (10, 4)} | {f"{part}.block.{i}.w": (4,) for part in ("encoder", "decoder") for i in range(2)}


def test_layers_are_the_runs_of_first_numbers() -> None:
    found = parent(GPT2, {"n_layer": 3})
    assert found.stack.prefix == "h." and found.stack.count == 3 and found.layer("ln_f.weight") is None
    assert found.layer("h.2.mlp.c_fc.weight") == (found.stack, 2, "mlp.c_fc.weight")
    experts = parent(EXPERTS)
    assert experts.stack.prefix == "model.layers." and experts.stack.count == 2
    place = experts.layer("model.layers.1.mlp.experts.3.up.weight")
    assert place is not None and place[1:] == (1, "mlp.experts.3.up.weight")


def test_slices_need_one_run_of_layers() -> None:
    both = parent(T5, {"num_layers": 2})
    found = both.layer("decoder.block.1.w")
    assert found is not None and found[1] == 1  # gradients over layers have their place in each
    with pytest.raises(CheckpointError, match=r"m: has several runs of layers: decoder.block.\* \(2\), encoder.block.\* \(2\)"):
        _ = both.stack
    with pytest.raises(CheckpointError, match="m: has no numbered layers; slices need them"):
        _ = parent({"w": (4,)}).stack


def test_numbers_that_are_no_layers_are_not_taken_for_some() -> None:
    assert parent({"net.0.weight": (4, 4), "net.2.weight": (4, 4)}).stacks == {}
    assert parent({"head.0.w": (4,), "head.1.w": (4,)}, {"num_hidden_layers": 6}).stacks == {}


@pytest.mark.parametrize(
    ("shapes", "rows"),
    [
        (GPT2, {"wte.weight"}),
        (BERT, {"bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder.weight"}),
        (EXPERTS, {"model.embed_tokens.weight", "lm_head.weight"}),
        (T5, {"shared.weight"}),
        ({"a.weight": (10, 4), "b.weight": (4, 4)}, {"a.weight"}),
    ],
)
def test_what_has_a_row_for_each_token_is_found(shapes: dict[str, tuple[int, ...]], rows: set[str]) -> None:
    found = parent(shapes, {"vocab_size": 10})
    assert {name for name in found.names if found.by_token(name)} == rows and found.vocabulary == 10


def test_a_width_that_is_the_number_of_tokens_does_not_deceive() -> None:
    square = parent({"model.embed_tokens.weight": (4, 4), "model.norm.weight": (4,), "lm_head.weight": (4, 4)})
    assert {name for name in square.names if square.by_token(name)} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_embeddings_stand_before_the_layers_and_the_rest_behind() -> None:
    before = ["model.embed_tokens.weight", "wte.weight", "wpe.weight", "bert.embeddings.LayerNorm.weight", "embed_positions.w"]
    after = ["model.norm.weight", "lm_head.weight", "ln_f.weight", "embed_out.weight", "cls.predictions.bias", "project_out.w"]
    assert all(map(is_before, before)) and not any(map(is_before, after))


def test_a_head_is_tied_unless_the_config_says_that_it_is_not() -> None:
    assert parent(GPT2, {"tie_word_embeddings": True}).tie("lm_head.weight")
    found = parent(GPT2)
    assert found.tie("lm_head.weight") and found.shape("lm_head.weight") == (10, 4)
    assert not parent(GPT2, {"tie_word_embeddings": False}).tie("lm_head.weight")


def test_of_several_parts_the_texts_config_counts() -> None:
    found = parent(EXPERTS, {"model_type": "both", "text_config": {"num_hidden_layers": 2, "vocab_size": 10}})
    assert found.config["num_hidden_layers"] == 2 and found.config["model_type"] == "both"


def test_numbers_that_are_only_large_are_not_taken_for_infinite() -> None:
    model = Parent(Reference("m"), StateDict({"w": torch.full((4, 4), 3e38), "v": torch.tensor([1.0, float("inf")])}))
    assert torch.equal(model.rows("w", 0, 4), torch.full((4, 4), 3e38))
    with pytest.raises(CheckpointError, match="m: tensor 'v': infinite numbers in rows 0 to 1"):
        model.rows("v", 0, 2)
