"""Files of torch.save: tensors are read, code is not run."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.forging import bits, refused
from poise.checkpoint import CheckpointError, PickledFile, open_checkpoint


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_a_state_dict_is_read_bit_for_bit(path: Path) -> None:
    whole = OrderedDict(
        a=torch.randn(4, 3).bfloat16(), b=torch.arange(5), s=torch.tensor(2.0), p=torch.nn.Parameter(torch.ones(2))
    )
    whole["turned"] = torch.randn(3, 5).T
    torch.save(whole, path)
    found = PickledFile(path)
    assert list(found) == list(whole) and found.info("a").file == path and len(found) == 5 and "b" in found
    for name, tensor in whole.items():
        assert found[name].dtype == tensor.dtype and bits(found[name]) == bits(tensor.detach())
        assert not found[name].requires_grad
    assert bits(found.rows("turned", 1, 3)) == bits(whole["turned"][1:3])


def test_tensors_that_share_their_bytes_are_stored_once(path: Path) -> None:
    shared = torch.randn(4, 2)
    torch.save({"wte.weight": shared, "lm_head.weight": shared, "part": shared[:2]}, path)
    found = PickledFile(path)
    assert list(found) == ["wte.weight", "part"] and found.ties == {"lm_head.weight": "wte.weight"}


def test_what_is_read_belongs_to_the_caller(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path)
    found = PickledFile(path)
    found["a"].add_(1)
    assert found["a"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: {"a": bomb}, lambda bomb: {bomb: torch.ones(1)}])
def test_code_in_a_pickle_is_refused_and_not_run(path: Path, tmp_path: Path, wrap: Any) -> None:
    mark = tmp_path / "ran"
    bomb = Bomb(mark)
    torch.save(wrap(bomb), path)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    refused(error, "it asks for posix.system", "was not read", "get the weights as safetensors")
    assert not mark.exists()
    # It is a bomb: read without care it goes off.
    torch.load(path, weights_only=False)
    assert mark.exists()


def test_a_bare_pickle_with_code_is_refused_and_not_run(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path.write_bytes(pickle.dumps({"a": Bomb(mark)}, protocol=2))
    with pytest.raises(CheckpointError):
        PickledFile(path)
    with pytest.raises(CheckpointError):
        open_checkpoint(path)
    assert not mark.exists()


def test_a_bomb_between_tensors_is_refused_too(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": [1, {"c": Bomb(mark)}], "z": torch.ones(1)}, path)
    with pytest.raises(CheckpointError):
        PickledFile(path)
    assert not mark.exists()


def test_a_module_is_refused(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError) as error:
        PickledFile(path)
    refused(error, "torch.nn.modules.linear.Linear", "could run code")


def test_the_format_before_torch_1_6_is_read_too(path: Path) -> None:
    shared = torch.randn(4, 2)
    torch.save({"a": shared, "b": shared, "c": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    found = open_checkpoint(path)
    assert isinstance(found, PickledFile) and found.ties == {"b": "a"}
    assert torch.equal(found["a"], shared) and torch.equal(found.rows("c", 1, 3), torch.tensor([1, 2]))


def test_code_in_the_old_format_is_refused_and_not_run(path: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a": torch.ones(1), "b": Bomb(mark)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    refused(error, "it asks for posix.system", "was not read")
    assert not mark.exists()


def test_a_training_checkpoint_is_refused_and_its_state_dict_pointed_at(path: Path) -> None:
    torch.save({"epoch": 3, "model": {"a": torch.ones(2)}}, path)
    with pytest.raises(CheckpointError) as error:
        PickledFile(path)
    refused(error, "holds int under 'epoch'", "perhaps the one under 'model'")


def test_a_list_of_tensors_is_refused(path: Path) -> None:
    torch.save([torch.ones(2)], path)
    with pytest.raises(CheckpointError) as error:
        PickledFile(path)
    refused(error, "holds list, not a state dict")


def test_a_sparse_tensor_is_refused_by_name(path: Path) -> None:
    torch.save({"a": torch.eye(3).to_sparse()}, path)
    with pytest.raises(CheckpointError) as error:
        PickledFile(path)
    refused(error, "not a dense tensor", tensor="a")


def test_a_tensor_larger_than_its_file_is_refused(path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(10**6, 10**6)}, path)
    with pytest.raises(CheckpointError) as error:
        PickledFile(path)
    refused(error, "takes more bytes than the file has", tensor="a")


def test_a_file_cut_off_is_refused(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path)
    raw = path.read_bytes()
    for size in (0, 3, 50, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError) as error:
            PickledFile(path)
        refused(error)


def test_an_archive_of_something_else_is_refused(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<p/>")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(path)
    refused(error, "cannot be read by torch")


def test_a_file_that_was_replaced_is_refused_when_it_is_next_read(path: Path) -> None:
    torch.save({"a": torch.ones(1000)}, path)
    found = PickledFile(path)
    first = found.fingerprint()
    os.utime(path, ns=(1, 1))
    with pytest.raises(CheckpointError) as error:
        found["a"]
    refused(error, "has changed since it was opened")
    assert PickledFile(path).fingerprint() != first
