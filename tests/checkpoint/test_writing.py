"""A folder of weights as other libraries read it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from checkpoint.writers import CONFIG, contents, plan, value, written
from poise.checkpoint import CheckpointError, Planned, StateDict, Written, altered, side_files, write
from poise.checkpoint.journal import JOURNAL
from poise.checkpoint.shards import ORDER
from poise.models import GPT, GPTConfig


def stored(out: Path, tensors: Mapping[str, Tensor], **other: Any) -> Written:
    """Write tensors as they are."""
    planned = [Planned(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]

    def rows(tensor: Planned, start: int, stop: int) -> Tensor:
        whole = tensors[tensor.name]
        return whole[start:stop] if tensor.shape else whole

    return write(out, planned, rows, fingerprint="one", **other)


def every_dtype() -> dict[str, Tensor]:
    """All that can be stored, in shapes that are not matrices too, in an order that is not that of the file."""
    numbers = torch.arange(1, 25).reshape(4, 6)
    tensors = {f"{str(dtype)[6:]}": numbers.to(torch.float32).to(dtype) for dtype in reversed(ORDER)}
    tensors |= {"scalar": torch.tensor(2.5), "one": torch.ones(1), "none": torch.ones(0, 3), "no rows": torch.ones(3, 0, 2)}
    tensors['é\n"\\\x01\x7f'] = torch.ones(2, 2, 2, dtype=torch.bfloat16)
    return tensors


@pytest.mark.parametrize("tile_bytes", [1, 40, 2**20])
def test_a_file_is_the_one_that_safetensors_writes_byte_for_byte(tmp_path: Path, tile_bytes: int) -> None:
    tensors = every_dtype()
    stored(tmp_path / "out", tensors, tile_bytes=tile_bytes)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("out/model.safetensors", "theirs"))
    assert ours == theirs


def test_without_metadata_too(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.int64)}
    stored(tmp_path / "out", tensors, metadata={})
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == save(tensors)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda name: name != "__metadata__")
tensors = st.builds(
    lambda shape, dtype: torch.arange(torch.Size(shape).numel()).reshape(shape).remainder(100).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool, torch.float64]),
)


@given(st.dictionaries(names, tensors, min_size=1, max_size=5), st.integers(1, 64))
def test_whatever_the_names_shapes_and_dtypes(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], tile: int
) -> None:
    out = tmp_path_factory.mktemp("any") / "out"
    stored(out, tensors, tile_bytes=tile)
    assert (out / "model.safetensors").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_rows_need_not_be_contiguous_nor_the_callers_for_good(tmp_path: Path) -> None:
    wide = torch.randn(8, 6, dtype=torch.float64).clone()
    views = {
        "transposed": wide.T,
        "strided": wide[::2, ::3],
        "expanded": wide[:1].expand(5, 6),
        "parameter": torch.nn.Parameter(wide),
    }
    stored(tmp_path / "out", views, tile_bytes=100)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_shards_and_index_are_those_of_transformers(tmp_path: Path) -> None:
    written(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 6 * 24 * 8, "total_size": 6 * 24 * 8 * 2}
    assert list(index["weight_map"]) == sorted(tensor.name for tensor in plan())
    for tensor in plan():
        with safe_open(tmp_path / "out" / index["weight_map"][tensor.name], "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_tensor(tensor.name), value(tensor).bfloat16())


@pytest.mark.hf
def test_the_index_is_written_as_transformers_writes_it(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2, vocab_size=40
    )
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    stored(tmp_path / "ours", model.state_dict(), max_shard_bytes=5000)
    name = "model.safetensors.index.json"
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert len(ours) > 5
    for name in ours.keys() - {JOURNAL}:
        assert ours[name] == theirs[name]


@pytest.mark.hf
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [10_000, 10**9])
def test_transformers_loads_it_with_the_same_logits(tmp_path: Path, tied: bool, shard: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes: dict[str, Any] = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3, max_position_embeddings=32)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**sizes, tie_word_embeddings=tied, initializer_range=0.3))
    model.save_pretrained(tmp_path / "before")
    weights = StateDict(model)
    planned = [Planned(name, weights.info(name).shape, torch.float32) for name in weights]
    config = json.loads((tmp_path / "before" / "config.json").read_text())
    travelling = side_files(tmp_path / "before")

    def rows(tensor: Planned, start: int, stop: int) -> Tensor:
        return weights.rows(tensor.name, start, stop).double()

    settings: dict[str, Any] = dict(fingerprint="one", config=config, side_files=travelling, max_shard_bytes=shard)
    done = write(tmp_path / "after", planned, rows, **settings)
    assert done.shards > 3 if shard == 10_000 else done.shards == 1
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
    tokens = torch.randint(256, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "after").decode([104, 105]) == "hi"
    before, after = contents(tmp_path / "before"), contents(tmp_path / "after")
    # A config that was true stays what it was, byte for byte in its values and their order.
    assert list(json.loads(after["config.json"]).items()) == list(config.items())
    assert all(after[name] == before[name] for name in travelling)


def test_one_file_has_no_index_and_the_config_comes_last(tmp_path: Path) -> None:
    one = written(tmp_path / "one", max_shard_bytes=10**9)
    assert [path.name for path in one.files] == ["model.safetensors", "tokenizer.json", "config.json"]
    three = written(tmp_path / "three")
    assert [path.name for path in three.files][3:] == ["tokenizer.json", "model.safetensors.index.json", "config.json"]
    assert (three.shards, three.tensors, three.found) == (3, 6, 0)
    assert three.bytes == sum(path.stat().st_size for path in three.files[:3])
    assert sorted([JOURNAL, *(path.name for path in three.files)]) == sorted(contents(tmp_path / "three"))
    assert all(path.is_file() for path in three.files)


def test_the_config_is_kept_true(tmp_path: Path) -> None:
    written(tmp_path / "out", config=CONFIG | {"vocab_size": 20})
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(found.items()) == list((CONFIG | {"dtype": "bfloat16"}).items())


def test_tiles_are_as_large_as_asked_and_whole_tensors_whole(tmp_path: Path) -> None:
    asked: list[tuple[str, int, int]] = []

    def rows(tensor: Planned, start: int, stop: int) -> Tensor:
        asked.append((tensor.name, start, stop))
        return torch.zeros(stop - start, *tensor.shape[1:]) if tensor.shape else torch.zeros(())

    shapes = {"a": (10, 4), "b": (10, 4), "c": (), "d": (0, 7), "e": (3, 1000), "f": (5,)}
    planned = [Planned(name, torch.Size(shape), torch.float32) for name, shape in shapes.items()]
    write(tmp_path / "out", planned, rows, fingerprint="one", tile_bytes=4 * 4 * 4, whole=lambda tensor: tensor.name == "b")
    a = [("a", 0, 4), ("a", 4, 8), ("a", 8, 10)]
    assert asked == [*a, ("b", 0, 10), ("c", 0, 1), ("e", 0, 1), ("e", 1, 2), ("e", 2, 3), ("f", 0, 5)]


def test_whole_tensors_are_cast_in_the_same_small_buffer(tmp_path: Path) -> None:
    written(tmp_path / "tiles")
    written(tmp_path / "whole", whole=lambda tensor: True)
    assert contents(tmp_path / "tiles") == contents(tmp_path / "whole")


def test_a_file_that_changed_is_told_from_one_that_did_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    written(out)
    assert altered(out) == []
    name = "model-00002-of-00003.safetensors"
    data = bytearray((out / name).read_bytes())
    data[-1] ^= 1
    (out / name).write_bytes(data)
    (out / "model-00003-of-00003.safetensors").unlink()
    assert altered(out) == [name, "model-00003-of-00003.safetensors"]


def test_side_files_are_copied_byte_for_byte_into_folders_too(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 5000)
    files = {"1_Pooling/config.json": source, "vocab.txt": source}
    written(tmp_path / "out", side_files=files)
    assert all((tmp_path / "out" / name).read_bytes() == source.read_bytes() for name in files)
    (tmp_path / "out" / "vocab.txt").write_bytes(b"other")
    written(tmp_path / "out", side_files=files)
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == source.read_bytes()


@pytest.mark.parametrize(
    "other, error, message",
    [
        ({"planned": []}, ValueError, "planned is empty"),
        ({"planned": [*plan(), plan()[0]]}, ValueError, "'model.embed_tokens.weight' is there twice"),
        ({"planned": [Planned("__metadata__", torch.Size([1]), torch.float32)]}, ValueError, "the format's own"),
        ({"planned": [Planned("a", torch.Size([1]), torch.complex128)]}, TypeError, "'a': dtype=torch.complex128 cannot"),
        ({"max_shard_bytes": 0}, ValueError, "max_shard_bytes=0 must be positive"),
        ({"tile_bytes": -1}, ValueError, "tile_bytes=-1 must be positive"),
        ({"metadata": {"step": 3}}, ValueError, "metadata 'step': 3 must be strings"),
        ({"side_files": {"../x": Path(__file__)}}, ValueError, "'../x' must be a name below the folder"),
        ({"side_files": {"/x": Path(__file__)}}, ValueError, "'/x' must be a name below the folder"),
        ({"side_files": {"config.json": Path(__file__)}}, ValueError, "'config.json' must be a name .* nothing else has"),
        ({"side_files": {"x": Path("nowhere")}}, CheckpointError, "nowhere: is not there to be copied; restore it"),
        ({"config": CONFIG | {"hidden_size": 9}}, CheckpointError, "is 8 wide, and the config says hidden_size=9"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, other: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        written(tmp_path / "out", **other)
    assert not (tmp_path / "out").exists()


def test_rows_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"embed_tokens.weight': rows \[0, 8\) are \(24, 8\) instead of \(8, 8\)"):
        written(tmp_path / "out", lambda tensor, start, stop: value(tensor))
    with pytest.raises(ValueError, match=r"rows \[0, 24\) are \(25, 8\) instead of \(24, 8\)"):
        written(tmp_path / "out", lambda tensor, start, stop: torch.zeros(25, 8), whole=lambda tensor: True)
