"""Headers of safetensors files that lie, each in its own way, and what is said about them."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint.forging import FOUR, forge, refused
from poise.checkpoint import CheckpointError, SafetensorsFile
from poise.checkpoint.header import MAX_HEADER, parse_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_true_header_is_read_and_its_tensors_come_in_the_order_of_their_bytes(path: Path) -> None:
    header = {"b": entry([2, 3], 8, 32), "__metadata__": {"format": "pt", "ü": '"\\'}, "a": entry([2], 0, 8)}
    found = SafetensorsFile(forge(path, header, bytes(32)))
    assert list(found) == ["a", "b"]
    assert found.metadata == {"format": "pt", "ü": '"\\'}
    assert found.info("b").shape == (2, 3) and found.info("b").dtype == torch.float32 and found.info("b").file == path


def test_spaces_may_follow_the_header_and_stand_between_its_parts(path: Path) -> None:
    raw = b'{ "a" :\t{\n"shape" : [ 1 ,\r\n1 ] , "data_offsets":[ 0,4 ],"dtype" : "F32" } }   \n'
    assert SafetensorsFile(forge(path, raw, bytes(4)))["a"].shape == (1, 1)


def test_a_file_of_no_tensors_is_a_checkpoint_of_none(path: Path) -> None:
    assert list(SafetensorsFile(forge(path, b"{}"))) == []


def test_scalars_and_empty_tensors_are_allowed_wherever_they_lie(path: Path) -> None:
    header = {"s": entry([], 0, 4), "front": entry([0], 0, 0), "mid": entry([3, 0, 2], 4, 4), "end": entry([0], 8, 8)}
    found = SafetensorsFile(forge(path, {**header, "t": entry([1], 4, 8)}, bytes(8)))
    assert found["s"].shape == () and found["mid"].shape == (3, 0, 2) and found["end"].numel() == 0


def test_names_may_be_any_text(path: Path) -> None:
    raw = json.dumps({"": entry([1], 0, 4), 'a"\\b/../[{': entry([1], 4, 8), "層": entry([1], 8, 12)}).encode()
    assert list(SafetensorsFile(forge(path, raw, bytes(12)))) == ["", 'a"\\b/../[{', "層"]


CUT = "fetch the file again"
LIES: dict[str, tuple[Any, int, str, str | None]] = {
    "overlap": ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "overlap those of 'a', which end at 8", "b"),
    "same bytes": ({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, 8, "overlap those of 'a'", "b"),
    "empty inside": ({"a": entry([2], 0, 8), "b": entry([0], 4, 4)}, 8, "overlap those of 'a'", "b"),
    "hole": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, 12, "bytes [4, 8) before it belong to no tensor", "b"),
    "hole in front": ({"a": entry([1], 4, 8)}, 8, "bytes [0, 4) before it", "a"),
    "hole at the end": ({"a": entry([1], 0, 4)}, 7, "the last 3 bytes belong to no tensor", None),
    "no tensors": ({}, 1, "the last 1 bytes belong to no tensor", None),
    "beyond the file": ({"a": entry([2], 0, 8)}, 6, "its bytes end at 8 of the data, and the file has 6", "a"),
    "size": ({"a": entry([3], 0, 8)}, 8, "takes 12 bytes, and its data_offsets [0, 8] hold 8", "a"),
    "backwards": ({"a": entry([0], 4, 0)}, 4, "data_offsets [4, 0], which are not [begin, end]", "a"),
    "one offset": ({"a": {**FOUR, "data_offsets": [4]}}, 4, "data_offsets [4], which", "a"),
    "three offsets": ({"a": {**FOUR, "data_offsets": [0, 4, 8]}}, 4, "data_offsets [0, 4, 8], which", "a"),
    "negative dimension": ({"a": entry([-1], 0, 4)}, 4, "'shape' must hold integers of 0 to 2**63 - 1, not -1", "a"),
    "negative offset": ({"a": entry([1], -4, 0)}, 4, "'data_offsets' must hold integers", "a"),
    "fraction": ({"a": entry([1.0], 0, 4)}, 4, "not 1.0", "a"),
    "power": (b'{"a":{"dtype":"F32","shape":[1e9],"data_offsets":[0,4]}}', 4, "not 1e9", "a"),
    "truth": ({"a": entry([True], 0, 4)}, 4, "not true", "a"),
    "leading zero": (b'{"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}}', 4, "not 01", "a"),
    "no number": (b'{"a":{"dtype":"F32","shape":[1,],"data_offsets":[0,4]}}', 4, "'shape' must hold integers", "a"),
    "overflow": ({"a": entry([2**40, 2**40], 0, 4)}, 4, "more than memory can address", "a"),
    "overflow behind zero": ({"a": entry([0, 2**40, 2**40], 0, 0)}, 0, "more than memory can address", "a"),
    "overflow to the size": ({"a": entry([2**62, 4, 4], 0, 0)}, 0, "more than memory can address", "a"),
    "large number": ({"a": entry([2**63], 0, 4)}, 4, "'shape' must hold integers of 0 to 2**63 - 1", "a"),
    "huge number": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % (b"9" * 4000), 4, "must hold integers", "a"),
    "dimensions": ({"a": entry([1] * 65, 0, 4)}, 4, "'shape' has more than 64 entries", "a"),
    "nested shape": ({"a": entry([[1]], 0, 4)}, 4, "'shape' must be a list of integers", "a"),
    "shape of text": ({"a": {**FOUR, "shape": "1"}}, 4, "'shape' must be a list", "a"),
    "unknown dtype": ({"a": entry([1], 0, 4, "F31")}, 4, "dtype 'F31', which is not one of BOOL, U8", "a"),
    "lower case": ({"a": entry([1], 0, 4, "f32")}, 4, "dtype 'f32'", "a"),
    "dtype of number": ({"a": {**FOUR, "dtype": 4}}, 4, "'dtype' must be a string", "a"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "has no 'dtype'", "a"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "has no 'shape'", "a"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, 4, "has no 'data_offsets'", "a"),
    "nothing": ({"a": {}}, 4, "has no 'dtype'", "a"),
    "unknown field": ({"a": {**FOUR, "strides": [1]}}, 4, "has a field 'strides'", "a"),
    "no object": ({"a": [1]}, 4, "is not described by a JSON object", "a"),
    "null": ({"a": None}, 4, "is not described by a JSON object", "a"),
    "twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8,
              "is in the header twice", "a"),
    "twice, written otherwise": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', 8,
        "is in the header twice", "a"),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "has 'dtype' twice", "a"),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', 0, "'__metadata__' twice", None),
    "metadata key twice": (b'{"__metadata__":{"a":"b","a":"c"}}', 0, "'__metadata__' has 'a' twice", None),
    "metadata of numbers": ({"__metadata__": {"step": 7}}, 0, "must map strings to strings, and 'step'", None),
    "metadata nested": ({"__metadata__": {"step": {"a": "b"}}}, 0, "must map strings to strings", None),
    "metadata list": ({"__metadata__": ["pt"]}, 0, "'__metadata__' is not a JSON object", None),
    "metadata null": ({"__metadata__": None}, 0, "'__metadata__' is not a JSON object", None),
    "space in front": (b' {}', 0, "header starts with b' '", None),
    "list": (b"[]", 0, "header starts with b'['", None),
    "nothing at all": (b"", 0, "header starts with b''", None),
    "open": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}', 4, "no JSON at byte", None),
    "comma": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},}', 4, "no JSON at byte", None),
    "after the end": (b'{}{"a":1}', 0, "goes on after its end", None),
    "zero padding": (b"{}\0\0", 0, "goes on after its end", None),
    "no UTF-8": (b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "a string that is no text", None),
    "half a pair": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "a string that is no text", None),
    "bad escape": (b'{"\\x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "a string that is no text", None),
    "control character": (b'{"a\nb":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4, "no JSON at byte 1", None),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused(path: Path, case: str) -> None:
    header, data, said, tensor = LIES[case]
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(forge(path, header, bytes(data)))
    refused(error, said, CUT, tensor=tensor)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F6_E3M2"])
def test_elements_of_less_than_a_byte_are_refused_by_name(path: Path, dtype: str) -> None:
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(forge(path, {"a": entry([8], 0, 4 if dtype == "F4" else 6, dtype)}, bytes(6)))
    refused(error, f"dtype {dtype}, of less than a byte", "convert it", tensor="a")


@pytest.mark.parametrize("size", range(8))
def test_a_file_too_short_for_a_length_is_refused(path: Path, size: int) -> None:
    path.write_bytes(bytes(size))
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    refused(error, f"has {size} bytes, too few", "it was cut off")


@pytest.mark.parametrize("more", [1, 8, 10_000])
def test_a_header_that_claims_more_than_the_file_is_a_cut_download(path: Path, more: int) -> None:
    there = len(json.dumps({"a": FOUR})) + 4
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(forge(path, {"a": FOUR}, bytes(4), length=there + more))
    refused(error, f"claims a header of {there + more} bytes, and has {there} bytes", "it was cut off")


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**40, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_before_memory_is_asked_for(path: Path, length: int) -> None:
    tracemalloc.start()
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(forge(path, {"a": FOUR}, bytes(4), length=length))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    refused(error, f"claims a header of {length} bytes, more than the {MAX_HEADER}")


def test_what_git_left_in_place_of_the_weights_is_called_by_its_name(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    refused(error, "Git LFS pointer", "git lfs pull")


def test_a_name_as_long_as_the_header_does_not_fill_the_screen(path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(forge(path, {"x" * 100_000: {**FOUR, "dtype": "y" * 100_000}}, bytes(4)))
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":' + b"[" * 20_000_000,
        b'{"a":' * 4_000_000,
        b'{"__metadata__":{"a":' + b"[[],[]," * 3_000_000,
        b'{"a":{"dtype":"F32","shape":[' + b"0," * 10_000_000 + b'0],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 20_000_000 + b'],"data_offsets":[0,0]}}',
        b'{"a":{"dtype":"F32","data_offsets":[0,0],"shape":[' + b"[0]," * 5_000_000 + b"]}}",
        b'{"' + b"\\" * 20_000_001 + b'"}',
        b'{"a":' + b" " * 20_000_000 + b"1}",
        b"{" + b" " * 20_000_000,
        b"{}" + b" " * 20_000_000 + b"x",
        b'{"a":{"dtype":"' + b"x" * 20_000_000,
    ],
    ids=["lists", "objects", "pairs", "dimensions", "digits", "shapes", "escapes", "gap", "open", "padding", "text"],
)
def test_a_hostile_header_costs_no_more_than_its_length(raw: bytes) -> None:
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(CheckpointError) as error:
        parse_header(raw, 0, "model.safetensors")
    spent, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert spent < 2.0
    assert peak < 5 * len(raw)
    assert len(str(error.value)) < 1000


def test_memory_for_a_large_true_header_is_some_ten_times_its_length() -> None:
    count = 5_000
    raw = json.dumps({f"layers.{n}.weight": entry([1], n * 4, n * 4 + 4) for n in range(count)}).encode()
    tracemalloc.start()
    found = parse_header(raw, 4 * count)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found.slots) == count
    assert peak < 10 * len(raw)
