"""Shards and their index, which have to agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.forging import refused
from poise.checkpoint import CheckpointError, PickledFile, SafetensorsFile, Sharded

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a": ONE, "b": TWO, "c": ONE}


def shards(folder: Path, index: Any = None, **moved: str) -> Path:
    """Two shards; `moved` overrides what the index says, which `index` replaces."""
    save_file({"c": torch.arange(6.0).reshape(3, 2), "a": torch.ones(2)}, folder / ONE, metadata={"format": "pt"})
    save_file({"b": torch.full((4,), 2.0)}, folder / TWO, metadata={"format": "pt"})
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 48}, "weight_map": {**MAP, **moved}} if index is None else index))
    return path


def opened(index: Path) -> Sharded:
    return Sharded(index, SafetensorsFile)


def test_tensors_come_file_by_file_and_know_theirs(tmp_path: Path) -> None:
    found = opened(shards(tmp_path))
    assert set(list(found)[:2]) == {"a", "c"} and list(found)[2] == "b" and len(found) == 3 and "b" in found
    assert found.info("b").file == tmp_path / TWO and found.metadata == {"format": "pt"}
    assert found["b"].tolist() == [2, 2, 2, 2] and found.rows("c", 1, 2).tolist() == [[2, 3]]
    assert found.parameters == 12 and found.nbytes == 48


def test_the_fingerprint_is_that_of_all_shards(tmp_path: Path) -> None:
    index = shards(tmp_path)
    first = opened(index).fingerprint()
    assert opened(index).fingerprint() == first
    save_file({"b": torch.full((4,), 3.0)}, tmp_path / TWO, metadata={"format": "xx"})
    assert opened(index).fingerprint() != first


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / TWO).unlink()
    with pytest.raises(CheckpointError) as error:
        opened(index)
    refused(error, TWO, "does not exist")


def test_a_shard_that_is_a_dangling_link_is_an_unfinished_download(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / TWO).unlink()
    (tmp_path / TWO).symlink_to("../../blobs/4d7a")
    with pytest.raises(CheckpointError) as error:
        opened(index)
    refused(error, "is a link to ../../blobs/4d7a, which does not exist", "fetch the model again")


def test_a_shard_that_was_cut_off_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / TWO).write_bytes((tmp_path / TWO).read_bytes()[:-1])
    with pytest.raises(CheckpointError) as error:
        opened(index)
    refused(error, TWO, "cut off", tensor="b")


def test_a_tensor_in_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(shards(tmp_path, d=TWO))
    refused(error, f"should be in {TWO}, and is in no file", "not of one checkpoint", tensor="d")


def test_a_tensor_in_another_file_than_the_index_says_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(shards(tmp_path, a=TWO))
    refused(error, f"should be in {TWO}, and is in {ONE}", tensor="a")


def test_a_tensor_that_the_index_does_not_know_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(shards(tmp_path, {"weight_map": {"a": ONE, "b": TWO}}))
    refused(error, f"is in {ONE}, and not in the index", tensor="c")


def test_a_tensor_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    index = shards(tmp_path)
    save_file({"b": torch.zeros(4), "a": torch.zeros(2)}, tmp_path / TWO)
    with pytest.raises(CheckpointError) as error:
        opened(index)
    refused(error, f"is in two files, {ONE} and {TWO}", tensor="a")


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a\\b", "C:\\x", "C:x", "x\0y"]
)
def test_an_index_may_not_reach_out_of_its_directory(tmp_path: Path, file: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "inner").mkdir()
    with pytest.raises(CheckpointError) as error:
        opened(shards(tmp_path / "inner", a=file))
    refused(error, "only name files in its own directory", "do not trust this checkpoint", tensor="a")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ([], "must hold a JSON object, not list"),
        ({}, "no 'weight_map'"),
        ({"weight_map": {}}, "no 'weight_map' with tensors"),
        ({"weight_map": [ONE]}, "no 'weight_map'"),
    ],
)
def test_an_index_of_another_form_is_refused(tmp_path: Path, index: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(shards(tmp_path, index))
    refused(error, said)


def test_a_file_that_is_no_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        opened(shards(tmp_path, {"weight_map": {"a": 1}}))
    refused(error, "its file must be a string, not 1", tensor="a")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"weight_map": {"a": "x", "a": "y"}}', "has the key 'a' twice"),
        ('{"weight_map": {"a": ', "is not JSON"),
        ("\xff\xfe", "is not JSON"),
        ('{"a":' * 50_000, "is not JSON (too deep)"),
        ("[" * 2_000_000, "more than a million lists"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ],
)
def test_an_index_that_is_no_json_is_refused(tmp_path: Path, text: str, said: str) -> None:
    index = shards(tmp_path)
    index.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError) as error:
        opened(index)
    refused(error, said)


def test_an_index_that_is_far_too_long_is_not_read(tmp_path: Path) -> None:
    index = shards(tmp_path)
    with index.open("ab") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError) as error:
        opened(index)
    refused(error, "more than the 33554432 a description of weights may have")


def test_pickled_shards_are_read_in_the_same_way_and_keep_their_ties(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    torch.save({"e": shared, "h": shared}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    names = {"e": "pytorch_model-00001-of-00002.bin", "h": "pytorch_model-00001-of-00002.bin"}
    index.write_text(json.dumps({"weight_map": {**names, "x": "pytorch_model-00002-of-00002.bin"}}))
    found = Sharded(index, PickledFile)
    assert list(found) == ["e", "x"] and found.ties == {"h": "e"}
    assert found["e"].tolist() == [0, 1, 2, 3]
