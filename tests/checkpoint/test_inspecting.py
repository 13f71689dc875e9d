"""A checkpoint looked through: totals, and what stands out."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from poise.checkpoint import StateDict
from poise.checkpoint.inspecting import Inspection, inspect
from poise.models import GPT, GPTConfig

CONFIG = {"architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": 16, "tie_word_embeddings": False}


def weights(**changes: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()} | changes


def of(tensors: dict[str, torch.Tensor], **config: Any) -> Inspection:
    return inspect(StateDict(tensors, CONFIG | config))


def said(found: Inspection) -> list[tuple[str, str | None]]:
    return [(finding.level, finding.tensor) for finding in found.findings]


def test_a_sound_model_has_nothing_that_stands_out() -> None:
    found = of(weights())
    assert found.findings == []
    assert found.parameters == sum(tensor.numel() for tensor in weights().values()) == found.nbytes // 4
    assert sum(parameters for _, parameters, _ in found.roles.values()) == found.parameters
    assert found.roles["norm"][0] == 5 and list(found.dtypes) == ["float32"]


def test_the_worst_stands_first() -> None:
    tensors = weights()
    tensors["model.layers.0.mlp.up_proj.weight"][2, 3] = math.nan
    tensors["model.layers.1.mlp.down_proj.weight"][1, 2] = math.inf
    tensors["model.layers.0.self_attn.q_proj.weight"][3] = 0
    tensors["model.layers.0.self_attn.k_proj.weight"][:, 4] = 0
    tensors["model.layers.1.self_attn.v_proj.weight"].zero_()
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] = 1e3
    tensors["model.norm.weight"] = tensors["model.norm.weight"].bfloat16()
    found = of(tensors)
    outlier = "model.layers.1.self_attn.o_proj.weight"
    assert [level for level, _ in said(found)] == ["error"] * 2 + ["warning"] * 3 + ["note"]
    assert [name for _, name in said(found)[:2]] == ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"]
    text = {(finding.tensor, finding.says) for finding in found.findings}
    assert ("model.layers.0.mlp.up_proj.weight", "1 of 384 entries are NaN, the first that is not finite at [2, 3]") in text
    assert ("model.layers.0.self_attn.q_proj.weight", "1 of 16 rows are zero throughout") in text
    assert ("model.layers.0.self_attn.k_proj.weight", "1 of 16 columns are zero throughout") in text
    assert ("model.layers.1.self_attn.v_proj.weight", "every entry is zero") in text
    assert any(name is None and "bfloat16" in says and "model.norm.weight" in says for name, says in text)
    assert not any(name == outlier for name, _ in text)  # one of 256 entries can be at most 16 RMS: no outlier by its count


def test_an_entry_far_beyond_the_others_is_noted() -> None:
    tensors = weights()
    tensors["lm_head.weight"][7, 7] = 100.0
    (finding,) = of(tensors).findings
    assert (finding.level, finding.tensor) == ("note", "lm_head.weight") and "times the root mean square" in finding.says


def test_zero_rows_of_an_embedding_are_padding_and_only_noted() -> None:
    tensors = weights()
    tensors["model.embed_tokens.weight"][0] = 0
    assert said(of(tensors)) == [("note", "model.embed_tokens.weight")]


def test_a_head_that_is_missing_is_an_error_unless_tied() -> None:
    tensors = weights()
    del tensors["lm_head.weight"]
    (finding,) = of(tensors).findings
    assert finding.level == "error" and "tie_word_embeddings: false" in finding.says and "random" in finding.says
    assert of(tensors, tie_word_embeddings=True).findings == []


def test_a_head_that_differs_from_what_it_is_tied_to_is_an_error() -> None:
    (finding,) = of(weights(), tie_word_embeddings=True).findings
    assert (finding.level, finding.tensor) == ("error", "lm_head.weight") and "will be dropped" in finding.says


def test_a_head_that_could_be_tied_is_noted_with_what_that_would_save() -> None:
    tensors = weights()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (finding,) = of(tensors).findings
    assert finding.level == "note" and f"{256 * 16 * 4:,} bytes smaller" in finding.says
    assert of(tensors, tie_word_embeddings=True).findings == []


def test_a_vocabulary_that_config_does_not_know_is_an_error() -> None:
    (finding,) = of(weights(), vocab_size=300).findings
    assert finding.level == "error" and "256 tokens have a row, config.json says vocab_size 300" in finding.says


def test_with_spectra_a_singular_matrix_is_noted() -> None:
    tensors = weights()
    tensors["model.layers.0.mlp.up_proj.weight"][:, 3] = tensors["model.layers.0.mlp.up_proj.weight"][:, 4]
    found = inspect(StateDict(tensors, CONFIG), spectra=True)
    assert said(found) == [("note", "model.layers.0.mlp.up_proj.weight")]
    measured = {tensor.name: tensor.spectrum is not None for tensor in found.tensors}
    assert measured["lm_head.weight"] and not measured["model.norm.weight"]


def test_a_glob_chooses_what_is_read() -> None:
    read = []
    found = inspect(StateDict(weights(), CONFIG), match="*.q_proj.*", advance=read.append)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    assert [tensor.name for tensor in found.tensors] == read == names
    assert found.parameters > sum(parameters for _, parameters, _ in found.roles.values())
    with pytest.raises(ValueError, match=r"match '\*\.nothing': none of the 21 names"):
        inspect(StateDict(weights(), CONFIG), match="*.nothing")


def test_what_is_printed_as_json_is_json_that_any_reader_takes() -> None:
    tensors = weights()
    tensors["model.layers.0.mlp.up_proj.weight"][2] = math.nan
    tensors["count"], tensors["empty"] = torch.tensor(3), torch.zeros(0, 4)
    found = json.loads(json.dumps(inspect(StateDict(tensors, CONFIG), spectra=True).as_dict(), allow_nan=False))
    assert found["schema_version"] == 1 and found["layers"] == {"model.layers": 2} and found["head_is"] == "lm_head.weight"
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name["model.layers.0.mlp.up_proj.weight"]["statistics"]["nan"] == 16
    assert by_name["empty"]["statistics"]["rms"] is None and by_name["count"]["role"] == "buffer"
    assert by_name["lm_head.weight"]["spectrum"]["method"] == "svd"
    assert found["by_role"]["head"] == {"tensors": 1, "parameters": 256 * 16, "bytes": 256 * 64}
