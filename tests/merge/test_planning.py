"""What headers tell of models that do not fit together, or do after all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from merge.folders import config, model, rewrite, tensors
from poise.checkpoint import CheckpointError
from poise.merge import merge
from poise.merge.merger import Merger
from poise.merge.recipe import parse

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def errors(*models: Path, more: str = "") -> list[ValueError]:
    listed = ", ".join(f"{{model: {folder}}}" for folder in models)
    return Merger(parse(f"merge_method: linear\nmodels: [{listed}]\n{more}")).plan.errors


def test_models_of_other_widths_are_named_with_the_cause(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", 0), model(tmp_path / "two", 1, hidden_size=24)
    (error,) = errors(one, two)
    assert isinstance(error, CheckpointError) and error.tensor in (EMBEDDING, HEAD)
    said = str(error)
    assert str(two / "model.safetensors") in said and f"is [40, 24], but [40, 16] in {one}" in said
    assert "hidden_size is 16 and 24" in said


def test_a_vocabulary_that_grew_is_told_with_its_cures(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", 0), model(tmp_path / "two", 1, vocab_size=43)
    (error,) = errors(one, two)
    assert "the vocabularies differ by 3 tokens: tokenizer_source: union" in str(error) and "--common-rows" in str(error)


def test_common_rows_are_merged_when_asked_for(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", 0), model(tmp_path / "two", 1, vocab_size=43)
    out = tmp_path / "out"
    for order in ([one, two], [two, one]):
        merge(order, out=out, common_rows=True, fresh=True)
        a, b, found = tensors(one), tensors(two), tensors(out)
        for name in (EMBEDDING, HEAD):
            torch.testing.assert_close(found[name], (a[name] + b[name][:40]) / 2)
        assert json.loads((out / "config.json").read_text())["vocab_size"] == 40


def test_other_numbers_of_layers_are_told_with_the_cure(tmp_path: Path) -> None:
    found = errors(model(tmp_path / "one", 0), model(tmp_path / "two", 1, num_hidden_layers=5))
    assert len(found) == 9 and all("has 4 layers" in str(e) and "layer_range" in str(e) for e in found)


def test_a_missing_tensor_is_named_with_both_models(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", 0), model(tmp_path / "two", 1)
    rest = tensors(two)
    del rest["model.norm.weight"]
    rewrite(two, rest)
    for order, lacking, having in (((one, two), two, one), ((two, one), two, one)):
        (error,) = errors(*order)
        assert isinstance(error, CheckpointError) and error.tensor == "model.norm.weight"
        assert str(error).startswith(f"{lacking}: ") and f"{having} has it" in str(error)


def test_only_the_first_error_is_raised_with_the_number_of_the_others(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"8 more errors; `poise plan merge` lists them"):
        merge([model(tmp_path / "one", 0), model(tmp_path / "two", 1, num_hidden_layers=5)])


@pytest.mark.parametrize("tied_first", [True, False])
def test_a_head_tied_in_one_model_is_merged_with_the_one_that_another_stores(tied_first: bool, tmp_path: Path) -> None:
    tied, own = model(tmp_path / "tied", 0, tie_word_embeddings=True), model(tmp_path / "own", 1)
    assert HEAD not in tensors(tied)
    merge([tied, own] if tied_first else [own, tied], out=tmp_path / "out")
    found = tensors(tmp_path / "out")
    torch.testing.assert_close(found[HEAD], (tensors(tied)[EMBEDDING] + tensors(own)[HEAD]) / 2)
    torch.testing.assert_close(found[EMBEDDING], (tensors(tied)[EMBEDDING] + tensors(own)[EMBEDDING]) / 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_heads_tied_in_all_stay_tied(tmp_path: Path) -> None:
    models = [model(tmp_path / str(seed), seed, tie_word_embeddings=True) for seed in range(2)]
    merge(models, out=tmp_path / "out")
    assert HEAD not in tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_stack_whose_end_has_a_head_of_its_own_is_untied(tmp_path: Path) -> None:
    tied, own = model(tmp_path / "tied", 0, tie_word_embeddings=True), model(tmp_path / "own", 1)
    text = f"""
merge_method: passthrough
slices:
  - sources: [{{model: {tied}, layer_range: [0, 2]}}]
  - sources: [{{model: {own}, layer_range: [2, 4]}}]
"""
    merger = Merger(parse(text))
    assert merger.plan.errors == [] and HEAD in merger.lines
    assert merger.plan.config is not None and merger.plan.config["tie_word_embeddings"] is False


def test_quantized_models_are_refused(tmp_path: Path) -> None:
    one, two = model(tmp_path / "one", 0), model(tmp_path / "two", 1)
    config(two, quantization_config={"quant_method": "gptq"})
    (error,) = errors(one, two)
    assert str(error).startswith(f"{two}: is quantized")
    rewrite(one, {n: t.to(torch.float8_e4m3fn) if "q_proj" in n else t for n, t in tensors(one).items()})
    assert any("is stored in torch.float8_e4m3fn" in str(e) for e in errors(one))


def test_numbers_that_are_not_floating_are_the_bases_own() -> None:
    models: list[dict[str, Any]] = [{"w": torch.full((3,), float(i)), "n": torch.tensor([i, 7])} for i in range(3)]
    found = merge(models[1:], "task_arithmetic", base=models[0])
    assert isinstance(found, dict) and found["n"].tolist() == [0, 7] and found["w"].tolist() == [3.0, 3.0, 3.0]
    found = merge(models[1:])
    assert isinstance(found, dict) and found["n"].tolist() == [1, 7] and found["w"].tolist() == [1.5, 1.5, 1.5]


def test_buffers_that_one_version_stored_are_left_out() -> None:
    new = {"model.layers.0.w": torch.ones(2)}
    old = {"model.layers.0.w": torch.zeros(2), "model.layers.0.rotary_emb.inv_freq": torch.ones(3)}
    for models in ([new, old], [old, new]):
        found = merge(models)
        assert isinstance(found, dict) and list(found) == ["model.layers.0.w"]


def test_every_tensor_keeps_the_bases_dtype_unless_told() -> None:
    base = {"a": torch.ones(4, dtype=torch.bfloat16), "b": torch.ones(4)}
    models = [{"a": torch.ones(4) * 3, "b": torch.ones(4, dtype=torch.float16)}, base]
    found = merge(models, "task_arithmetic", base=base, weight=0.5)
    assert isinstance(found, dict) and found["a"].dtype == torch.bfloat16 and found["b"].dtype == torch.float32
    found = merge(models, dtype="float16")
    assert isinstance(found, dict) and {t.dtype for t in found.values()} == {torch.float16}
    with pytest.raises(ValueError, match="dtype='int8': must be float16"):
        merge(models, dtype="int8")


def test_sums_are_not_taken_in_what_is_stored() -> None:
    """1 + 2^-9 is no bfloat16: differences that were rounded first would vanish."""
    base = {"w": torch.ones(4, dtype=torch.bfloat16)}
    fine = {"w": torch.full((4,), 1 + 2.0**-9)}
    found = merge([fine, fine], "task_arithmetic", base=base, dtype="float32")
    assert isinstance(found, dict) and torch.equal(found["w"], torch.full((4,), 1 + 2.0**-8))
