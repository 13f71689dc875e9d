"""What goes with weights, and what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from poise.checkpoint import CheckpointError, side_files

TRAVEL = [
    "LICENSE",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "modeling_own.py",
    "preprocessor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
]
STAY = [
    ".gitattributes",
    ".git/config",
    ".poise-journal",
    "README.md",
    "adapter_config.json",
    "config.json",
    "model-00001-of-00002.safetensors",
    "model.gguf",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "optimizer.pt",
    "picture.png",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "trainer_state.json",
    "eval_results.json",
]


def laid(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_tokenizer_code_and_licence_travel_and_weights_do_not(tmp_path: Path) -> None:
    found = side_files(laid(tmp_path, TRAVEL + STAY))
    assert list(found) == sorted(TRAVEL)
    assert all(path == tmp_path / name for name, path in found.items())


def test_the_readme_travels_when_asked(tmp_path: Path) -> None:
    assert list(side_files(laid(tmp_path, ["README.md", "vocab.txt"]), readme=True)) == ["README.md", "vocab.txt"]


def modules(folder: Path, *places: str) -> None:
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    listed = [
        {"path": place, "type": f"sentence_transformers.models.{kind}"} for place, kind in zip(places, kinds, strict=False)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))


def test_modules_of_sentence_transformers_travel_with_their_own_weights(tmp_path: Path) -> None:
    laid(
        tmp_path,
        ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "other/config.json", "config.json"],
    )
    modules(tmp_path, "", "1_Pooling", "2_Dense", "3_Normalize")
    found = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors", "modules.json"]
    assert list(side_files(tmp_path)) == found
    modules(tmp_path, "2_Dense", "1_Pooling")  # the first is the transformer, whose weights are written anew
    assert list(side_files(tmp_path)) == ["1_Pooling/config.json", "modules.json"]


@pytest.mark.parametrize("place", ["../elsewhere", "/etc"])
def test_modules_elsewhere_are_refused(tmp_path: Path, place: str) -> None:
    modules(tmp_path, "", place)
    with pytest.raises(CheckpointError, match=f"modules.json: names '{place}', outside of its folder; correct the path"):
        side_files(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}x", "[1]", '[{"path": 1}]', "3"])
def test_modules_that_are_none_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not the list of modules that sentence-transformers writes"):
        side_files(tmp_path)


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("tokens")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").symlink_to("../blob")
    assert side_files(tmp_path / "model")["tokenizer.json"].read_text() == "tokens"
