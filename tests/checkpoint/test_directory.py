"""Model directories: which weights, which config, whether the head is there, and what lies beside."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.forging import refused
from poise.checkpoint import CheckpointError, ModelDirectory, declared_dtype, open_checkpoint

CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 7, "hidden_size": 4}
EMBEDDING = "model.embed_tokens.weight"


def model(folder: Path, config: dict[str, Any] | None = None, *extra: str, **tensors: torch.Tensor) -> Path:
    whole = {EMBEDDING: torch.randn(7, 4), "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4), **tensors}
    save_file({**whole, **{name: torch.randn(7, 4) for name in extra}}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_weights_config_and_side_files_are_found(tmp_path: Path) -> None:
    model(tmp_path, {**CAUSAL, "tie_word_embeddings": False}, "lm_head.weight")
    for name in ("tokenizer.json", "generation_config.json", "vocab.txt", "modeling_own.py", "chat_template.jinja"):
        (tmp_path / name).write_text("{}")
    found = open_checkpoint(tmp_path)
    assert isinstance(found, ModelDirectory) and found.path == tmp_path
    assert found.config["vocab_size"] == 7 and not found.ties and not found.warnings
    names = ["chat_template.jinja", "generation_config.json", "modeling_own.py", "tokenizer.json", "vocab.txt"]
    assert [file.name for file in found.side_files] == names
    assert len(found) == 3 and EMBEDDING in found and found.rows(EMBEDDING, 1, 3).shape == (2, 4)


def test_weights_in_other_formats_and_hidden_files_are_not_side_files(tmp_path: Path) -> None:
    model(tmp_path, {})
    for name in ("pytorch_model.bin", "tf_model.h5", "optimizer.pt", ".gitattributes", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text("{}")
    for name in (".cache/x.json", "original/params.json", "original/consolidated.00.pth", "onnx/model.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert ModelDirectory(tmp_path).side_files == (tmp_path / "original/params.json",)


def test_modules_of_sentence_transformers_are_side_files_with_their_weights(tmp_path: Path) -> None:
    model(tmp_path, {})
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    found = [str(file.relative_to(tmp_path)) for file in ModelDirectory(tmp_path).side_files]
    assert found == ["modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"]


def test_a_side_file_that_is_a_dangling_link_is_named(tmp_path: Path) -> None:
    model(tmp_path, {})
    (tmp_path / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(CheckpointError) as error:
        ModelDirectory(tmp_path)
    refused(error, "tokenizer.json", "is a link to ../blobs/gone")


def test_safetensors_are_read_where_both_formats_are(tmp_path: Path) -> None:
    model(tmp_path, {})
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert EMBEDDING in open_checkpoint(tmp_path)


def test_a_pickled_model_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path)) == ["other"]


def test_a_single_file_of_another_name_is_the_model(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert list(open_checkpoint(tmp_path)) == ["a"]


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"b": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert list(open_checkpoint(tmp_path)) == ["a"]


def test_two_sets_of_weights_are_not_chosen_between(tmp_path: Path) -> None:
    model(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "has model.safetensors and model.safetensors.index.json, two sets of weights", "delete the stale one")


def test_several_files_of_weights_are_listed(tmp_path: Path) -> None:
    for name in ("ema.safetensors", "last.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "several files of weights: ema.safetensors, last.safetensors", "give the path of the one")


def test_shards_without_their_index_are_named(tmp_path: Path) -> None:
    for n in (1, 2):
        save_file({f"a{n}": torch.ones(1)}, tmp_path / f"model-0000{n}-of-00002.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "has 2 shards, model-00001-of-00002.safetensors and so on", "fetch the index")


def test_a_directory_without_weights_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("")
    (tmp_path / "flax_model.msgpack").write_text("")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "neither model.safetensors nor pytorch_model.bin", "there is flax_model.msgpack")


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    model(tmp_path)
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "config.json", "is not JSON")


def test_a_tied_head_that_is_not_stored_is_a_tie(tmp_path: Path) -> None:
    found = ModelDirectory(model(tmp_path, {**CAUSAL, "tie_word_embeddings": True}))
    assert found.ties == {"lm_head.weight": EMBEDDING}


def test_without_the_key_the_class_is_trusted_to_tie(tmp_path: Path) -> None:
    assert ModelDirectory(model(tmp_path, CAUSAL)).ties == {"lm_head.weight": EMBEDDING}


def test_a_key_of_the_text_part_counts(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"tie_word_embeddings": True}}
    assert ModelDirectory(model(tmp_path, config)).ties == {"lm_head.weight": EMBEDDING}


def test_a_head_that_would_be_random_is_refused_with_both_cures(tmp_path: Path) -> None:
    model(tmp_path, {**CAUSAL, "tie_word_embeddings": False})
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(
        error,
        "LlamaForCausalLM would be given a random head",
        '"tie_word_embeddings": true',
        EMBEDDING,
        tensor="lm_head.weight",
    )
    assert error.value.file == tmp_path / "config.json"


def test_and_read_all_the_same_if_one_insists_with_the_error_as_a_warning(tmp_path: Path) -> None:
    found = open_checkpoint(model(tmp_path, {**CAUSAL, "tie_word_embeddings": False}), strict=False)
    assert [warning.tensor for warning in found.warnings] == ["lm_head.weight"] and not found.ties
    assert found[EMBEDDING].shape == (7, 4)


@pytest.mark.parametrize("head", ["lm_head.weight", "embed_out.weight", "lm_head.qweight", "decoder_logits.weight"])
def test_a_head_that_is_stored_under_any_name_is_not_missed(tmp_path: Path, head: str) -> None:
    found = ModelDirectory(model(tmp_path, {**CAUSAL, "tie_word_embeddings": False}, head))
    assert not found.warnings and not found.ties


@pytest.mark.parametrize("other", ["model.embed_positions.weight", "model.wpe.weight", "model.layers.3.mlp.down_proj.weight"])
def test_what_has_the_shape_of_a_head_by_chance_is_not_taken_for_one(tmp_path: Path, other: str) -> None:
    assert ModelDirectory(model(tmp_path, {**CAUSAL, "tie_word_embeddings": False}, other), strict=False).warnings


@pytest.mark.parametrize("classes", [["LlamaModel"], ["LlamaForSequenceClassification"], ["BertForMaskedLM"], None, [3]])
def test_a_model_without_a_head_misses_none(tmp_path: Path, classes: Any) -> None:
    found = ModelDirectory(model(tmp_path, {"architectures": classes, "tie_word_embeddings": False}))
    assert not found.warnings and not found.ties


@pytest.mark.hf
def test_transformers_would_indeed_make_the_head_random(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True)).save_pretrained(tmp_path)
    tied = open_checkpoint(tmp_path)
    assert tied.ties == {"lm_head.weight": EMBEDDING}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    heads = [AutoModelForCausalLM.from_pretrained(tmp_path).lm_head.weight for _ in range(2)]
    assert not torch.equal(heads[0], heads[1])
    with pytest.raises(CheckpointError, match="lm_head"):
        open_checkpoint(tmp_path)


@pytest.mark.hf
@pytest.mark.parametrize("tied", [True, False])
def test_what_save_pretrained_writes_in_shards_is_read_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=12, tie_word_embeddings=tied)
    net = GPT2LMHeadModel(config)
    net.save_pretrained(tmp_path, max_shard_size="10KB")
    found, state = open_checkpoint(tmp_path), net.state_dict()
    assert len({found.info(name).file for name in found}) > 1
    assert found.ties == ({"lm_head.weight": "transformer.wte.weight"} if tied else {})
    assert {*found, *found.ties} == set(state)
    assert all(torch.equal(found[name], state[name]) for name in found)
    assert [file.name for file in found.side_files] == ["generation_config.json"]


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32", "torch_dtype": "float16"}, torch.float32),
        ({"torch_dtype": "torch.float16"}, torch.float16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"dtype": "auto"}, None),
        ({"dtype": "nn"}, None),
        ({"dtype": 3}, None),
        ({}, None),
    ],
)
def test_the_dtype_is_read_under_its_new_key_and_its_old_one(config: dict[str, Any], dtype: torch.dtype | None) -> None:
    assert declared_dtype(config) == dtype


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    first = ModelDirectory(model(tmp_path, CAUSAL)).fingerprint()
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert ModelDirectory(tmp_path).fingerprint() != first
