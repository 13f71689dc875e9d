"""One door to weights of every kind, and what it says when it stays shut."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint.forging import FOUR, as_f32, forge, gguf, refused
from poise.checkpoint import (
    CheckpointError,
    GGUFFile,
    ModelDirectory,
    PickledFile,
    SafetensorsFile,
    Sharded,
    StateDict,
    open_checkpoint,
)


def test_a_mapping_a_module_and_a_checkpoint_are_opened() -> None:
    found = open_checkpoint({"a": torch.ones(2)})
    assert isinstance(found, StateDict) and open_checkpoint(found) is found
    assert list(open_checkpoint(torch.nn.Linear(2, 3))) == ["weight", "bias"]


def test_files_are_told_apart_by_their_first_bytes_and_not_by_their_names(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "one.bin")
    torch.save({"a": torch.ones(1)}, tmp_path / "two.gguf")
    gguf(tmp_path / "three.bin", {"a": as_f32(torch.ones(8))})
    assert isinstance(open_checkpoint(tmp_path / "one.bin"), SafetensorsFile)
    assert isinstance(open_checkpoint(str(tmp_path / "two.gguf")), PickledFile)
    assert isinstance(open_checkpoint(tmp_path / "three.bin"), GGUFFile)


def test_a_pickle_called_safetensors_is_not_read_as_something_else(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "m.safetensors")
    refused(error, "is pickled, whatever its name says", "rename it to .bin")


def test_a_header_as_long_as_a_zip_archive_begins_is_still_a_header(tmp_path: Path) -> None:
    length = int.from_bytes(b"PK\x03\x04", "little")
    path = forge(tmp_path / "m.safetensors", b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(length), bytes(4))
    assert path.read_bytes()[:4] == b"PK\x03\x04"
    assert list(open_checkpoint(path)) == ["a"]


def test_an_index_is_opened_by_its_own_path(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin")
    for kind in ("safetensors", "bin"):
        index = tmp_path / f"model.{kind}.index.json"
        index.write_text(f'{{"weight_map": {{"a": "x.{kind}"}}}}')
        found = open_checkpoint(index)
        assert isinstance(found, Sharded) and found["a"].tolist() == [1]


def test_a_directory_of_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    gguf(tmp_path / "m.gguf", {"a": as_f32(torch.ones(8))})
    (tmp_path / "README.md").write_text("")
    assert isinstance(open_checkpoint(tmp_path), GGUFFile)
    shutil.copy(tmp_path / "m.gguf", tmp_path / "n.gguf")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "several GGUF files: m.gguf, n.gguf", "give the path")
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert isinstance(open_checkpoint(tmp_path), ModelDirectory)


def test_an_adapter_beside_a_model_is_not_chosen_between(tmp_path: Path) -> None:
    save_file({"b": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "both an adapter, adapter_config.json, and a model, model.safetensors", "move one of them out")


def test_a_path_that_is_not_there_is_named_and_hubs_are_not_asked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "meta-llama/Llama-3")
    refused(error, "does not exist", "names of models on a hub are not fetched")


def test_a_dangling_link_is_an_unfinished_download(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../blobs/4d7a")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(source)
        refused(error, "is a link to ../blobs/4d7a, which does not exist", "fetch the model again")


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "blobs/4d7a")
    (tmp_path / "snapshot/model.safetensors").symlink_to("../blobs/4d7a")
    assert open_checkpoint(tmp_path / "snapshot")["a"].tolist() == [1]


def test_an_empty_directory_is_called_empty(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "is empty", "fetch the model again")


@pytest.mark.parametrize("call", ["stat", "listdir", "open"])
def test_what_may_not_be_read_is_named_with_the_command_that_cures_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")

    def forbidden(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(*((Path, "stat") if call == "stat" else (os, call)), forbidden)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "may not be read", "chmod u+rX")


def test_a_closed_directory_is_said_to_be_closed_by_the_kernel_itself(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "model.safetensors")
    script = (
        "import os, sys; from poise.checkpoint import open_checkpoint, CheckpointError\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)  # root may read everything\n"
        "try: open_checkpoint(sys.argv[1])\n"
        "except CheckpointError as error: print(error)"
    )
    folder.chmod(0)
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    folder.chmod(0o700)
    assert "may not be read" in done.stdout and "chmod" in done.stdout


def test_a_disk_that_fails_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "listdir", failing)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "cannot be read: Input/output error", "check the disk")


def test_what_is_neither_file_nor_directory_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "pipe")
    refused(error, "is neither a file nor a directory")


def test_weights_that_are_a_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "is a directory, where a file was expected")


@pytest.mark.parametrize("source", [None, 3, [torch.ones(1)], b"path"])
def test_a_source_of_another_kind_is_a_type_error(source: Any) -> None:
    with pytest.raises(TypeError, match="source must be a path, a mapping of names to tensors, a module or a checkpoint"):
        open_checkpoint(source)


def test_a_page_of_html_saved_as_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "m.safetensors")
    refused(error, "no safetensors file", "fetch the file again")
    assert list(open_checkpoint(forge(tmp_path / "m.safetensors", {"a": FOUR}, bytes(4)))) == ["a"]


def test_an_error_comes_back_whole_from_another_process() -> None:
    error = CheckpointError("has no rows", cure="fetch it again", file=Path("m.safetensors"), tensor="w")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is CheckpointError and str(again) == str(error)
    assert (again.problem, again.cure, again.file, again.tensor) == (
        "has no rows",
        "fetch it again",
        Path("m.safetensors"),
        "w",
    )
