"""One safetensors file: what is read, and how little of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint.forging import FOUR, bits, forge, refused
from poise.checkpoint import CheckpointError, SafetensorsFile
from poise.checkpoint.dtypes import DTYPES

SHAPES = [(5, 3), (7,), (), (0, 4), (2, 3, 4)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Any bits, NaNs of all kinds among them; of booleans, 0 and 1."""
    count = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", [d for n, d in DTYPES.items() if n != "F8_E8M0"], ids=str)
def test_every_dtype_is_read_as_safetensors_reads_it_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    save_file({f"t{i}": drawn(shape, dtype) for i, shape in enumerate(SHAPES)}, path, metadata={"format": "pt"})
    theirs, ours = load_file(path), SafetensorsFile(path)
    assert set(ours) == set(theirs) and len(ours) == len(SHAPES) and "t0" in ours and "t9" not in ours
    assert ours.metadata == {"format": "pt"}
    for name, tensor in theirs.items():
        read = ours[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert bits(read) == bits(tensor)
        assert ours.info(name).nbytes == tensor.nbytes


def test_a_dtype_that_safetensors_cannot_load_into_torch_is_read_all_the_same(tmp_path: Path) -> None:
    header = {"scale": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    read = SafetensorsFile(forge(tmp_path / "s.safetensors", header, bytes([126, 127, 128, 255])))["scale"]
    assert read.dtype == torch.float8_e8m0fnu
    assert read.float()[:3].tolist() == [0.5, 1.0, 2.0] and read.float()[3].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str)
def test_rows_are_slices(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    whole = {"a": drawn((6, 5), dtype), "b": drawn((4, 3, 2), dtype), "c": drawn((5,), dtype)}
    save_file(whole, path)
    found = SafetensorsFile(path)
    for name, tensor in whole.items():
        for start in range(len(tensor) + 1):
            for stop in range(start, len(tensor) + 1):
                rows = found.rows(name, start, stop)
                assert rows.shape == tensor[start:stop].shape
                assert bits(rows) == bits(tensor[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (2, 1), (3, 4)])
def test_rows_that_are_not_there_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    save_file({"a": torch.zeros(3, 2), "s": torch.tensor(1.0)}, tmp_path / "m.safetensors")
    found = SafetensorsFile(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"'a' has rows \[0, 3\)"):
        found.rows("a", start, stop)
    with pytest.raises(ValueError, match="no dimensions"):
        found.rows("s", start, stop)
    assert found.rows("s", 0, 1).shape == ()


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    found = SafetensorsFile(forge(tmp_path / "m.safetensors", {"a": FOUR}, bytes(4)))
    with pytest.raises(KeyError):
        found["b"]
    with pytest.raises(KeyError):
        found.info("b")


def test_what_is_read_belongs_to_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    before = path.read_bytes()
    found = SafetensorsFile(path)
    found["a"].add_(1)
    assert path.read_bytes() == before
    assert found["a"].tolist() == [0, 0, 0]


def test_a_tensor_is_read_and_its_neighbours_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.safetensors"
    save_file({f"t{i}": torch.full((256, 1024), float(i)) for i in range(16)}, path)
    read: list[int] = []
    pread = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        read.append(pread(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    found = SafetensorsFile(path)
    header = sum(read)
    assert header < 4096
    read.clear()
    assert found["t7"].eq(7).all() and sum(read) == 256 * 1024 * 4
    read.clear()
    assert found.rows("t9", 10, 12).eq(9).all() and sum(read) == 2 * 1024 * 4
    read.clear()
    assert found.parameters == 16 * 256 * 1024 and found.fingerprint() and not read


def test_the_kernel_reads_no_more_than_that_either(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({f"t{i}": torch.zeros(256, 1024) for i in range(16)}, path)

    def characters() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    found = SafetensorsFile(path)
    before = characters()
    found["t3"]
    assert characters() - before < 256 * 1024 * 4 + 4096


def test_nothing_stays_open_or_mapped(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(1000, 1000)}, path)
    found = SafetensorsFile(path)
    tensor = found["a"]
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.islink(entry.path)]
    assert str(path) not in links
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert tensor.sum() == 1e6


def test_a_file_that_was_replaced_is_refused_when_it_is_next_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    found = SafetensorsFile(path)
    save_file({"a": torch.ones(4)}, path)
    with pytest.raises(CheckpointError) as error:
        found["a"]
    refused(error, "has changed since it was opened", "open the checkpoint again")


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    found = SafetensorsFile(path)
    path.unlink()
    with pytest.raises(CheckpointError) as error:
        found["a"]
    refused(error, "does not exist")


def test_a_file_cut_off_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(3.0), "b": torch.ones(2, 2)}, path)
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match="cut off"):
            SafetensorsFile(path)


def test_a_disk_that_fails_is_not_mistaken_for_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    found = SafetensorsFile(path)

    def failing(fd: int, buffers: Any, offset: int) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(CheckpointError) as error:
        found["a"]
    refused(error, "cannot be read: Input/output error", "check the disk or the mount")


def test_a_read_that_returns_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    found = SafetensorsFile(path)
    pread = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: pread(fd, [buffers[0][:7]], offset))
    assert found["a"].tolist() == list(range(100))


def test_a_file_cut_off_while_it_is_read_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.arange(100.0)}, path)
    found = SafetensorsFile(path)
    ends = path.stat().st_size - 40
    pread = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: pread(fd, [buffers[0][: max(0, ends - at)]], at))
    with pytest.raises(CheckpointError) as error:
        found["a"]
    refused(error, f"ends at byte {ends}, 40 bytes too early", "it was cut off")


def test_on_a_big_endian_machine_bytes_are_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    whole = {"f": drawn((3,), torch.float32), "h": drawn((3,), torch.bfloat16), "c": drawn((2,), torch.complex64)}
    save_file({**whole, "u": drawn((5,), torch.uint8), "empty": torch.zeros(0)}, path)
    monkeypatch.setattr(sys, "byteorder", "big")
    found = SafetensorsFile(path)
    for name, width in {"f": 4, "h": 2, "c": 4}.items():
        raw = bits(whole[name])
        turned = [b for i in range(0, len(raw), width) for b in reversed(raw[i : i + width])]
        assert bits(found[name]) == turned
    assert bits(found["u"]) == bits(drawn((5,), torch.uint8)) and found["empty"].numel() == 0


def test_the_fingerprint_changes_with_header_size_and_time_and_not_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    first = SafetensorsFile(path).fingerprint()
    assert SafetensorsFile(path).fingerprint() == first
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    path.rename(moved / path.name)
    assert SafetensorsFile(moved / path.name).fingerprint() == first
    os.utime(moved / path.name, ns=(1, 1))
    assert SafetensorsFile(moved / path.name).fingerprint() != first
    header = {"b": {"dtype": "I32", "shape": [1], "data_offsets": [0, 4]}}
    digests = []
    for dtype in ("I32", "F32"):
        header["b"]["dtype"] = dtype
        os.utime(forge(path, header, bytes(4)), ns=(1, 1))
        digests.append(SafetensorsFile(path).fingerprint())
    assert digests[0] != digests[1]
