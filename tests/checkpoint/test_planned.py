"""What is known before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.checkpoint import CheckpointError, Planned, check_disk, parse_size, plan_shards, planned_memory
from poise.checkpoint.planned import divide, readable


def of(sizes: list[int]) -> list[Planned]:
    return [Planned(f"t{n}", torch.Size([size]), torch.uint8) for n, size in enumerate(sizes)]


def test_files_fill_up_in_order_and_what_is_too_large_goes_alone() -> None:
    found = divide(of([6, 6, 2, 25, 6, 2, 2]), 10)
    assert [[tensor.numel for tensor in shard] for shard in found.values()] == [[6], [25], [6, 2], [6, 2, 2]]
    assert list(found) == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert list(divide(of([5, 5]), 10)) == ["model.safetensors"]


@pytest.mark.hf
@settings(max_examples=50)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 40))
def test_they_are_divided_as_hugging_face_divides(sizes: list[int], most: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    planned = of(sizes)
    weights = {tensor.name: torch.empty(tensor.shape, dtype=torch.uint8) for tensor in planned}
    pattern = "model{suffix}.safetensors"
    theirs = split_torch_state_dict_into_shards(weights, filename_pattern=pattern, max_shard_size=most)
    ours = divide(planned, most)
    assert {name: [tensor.name for tensor in shard] for name, shard in ours.items()} == theirs.filename_to_tensors


@pytest.mark.parametrize(
    "text, size",
    [("5GB", 5 * 10**9), ("200 mb", 2 * 10**8), ("1.5GiB", 3 * 2**29), ("123", 123), ("7kb", 7000), ("2 TB", 2 * 10**12)],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 XB", "-5GB", "0", "5e9", "5B5", "1,5GB", "nan"])
def test_and_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=rf"size '{text}' must be a positive number of bytes, or one with KB, MB, GB, TB, KiB"):
        parse_size(text)


def test_sizes_are_written_as_people_read_them() -> None:
    assert [readable(n) for n in (12, 1500, 2 * 10**6, 3 * 10**9, 10**13)] == [
        "12 bytes",
        "1.5 KB",
        "2.0 MB",
        "3.0 GB",
        "10.0 TB",
    ]


def test_disk_is_known_to_the_byte() -> None:
    shards = plan_shards(of([6, 6]), 10, {"format": "pt"})
    assert [shard.nbytes - len(shard.header) for shard in shards] == [6, 6]
    assert all(len(shard.header) % 8 == 0 for shard in shards)


def test_memory_is_the_rows_that_are_held_and_one_stored_tile() -> None:
    tile, other = 2**25, 2 * 10**6
    matrix = Planned("w", torch.Size([100_000, 1024]), torch.bfloat16)
    assert planned_memory([matrix], tile) == tile + tile // 2 + other
    assert planned_memory([matrix], tile, held=5) == 5 * tile + tile // 2 + other
    assert planned_memory([matrix], tile, lambda tensor: True) == 4 * matrix.numel + tile // 2 + other
    row = Planned("w", torch.Size([2, 10**8]), torch.float16)
    assert planned_memory([matrix, row], tile) == 4 * 10**8 + 2 * 10**8 + other
    double = Planned("w", torch.Size([100_000, 1024]), torch.float64)
    assert planned_memory([double], tile) == 2 * tile + other
    assert planned_memory([Planned("w", torch.Size([0, 9]), torch.float16)], tile) == other


def test_a_disk_that_is_too_small_is_named_with_what_is_missing(tmp_path: Path) -> None:
    check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(
        CheckpointError, match=r"not/yet: the weights need 1000000.0 TB and the disk has .* free; free .* or write"
    ):
        check_disk(tmp_path / "not" / "yet", 10**18)
