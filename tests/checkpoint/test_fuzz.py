"""Damaged and hostile files, ten thousand of each seed: refused or read, and nothing else; quickly, and in little memory.

safetensors' own reader is asked about the same files. What it takes and poise does not is one of a few things, each with its
reason, and the other way round there is nothing.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import struct
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, deserialize

from checkpoint.forging import as_f32, gguf
from poise.checkpoint import Checkpoint, CheckpointError, open_checkpoint
from poise.checkpoint.dtypes import DTYPES, NAMES

# What safetensors takes and poise refuses, by the words it is refused with, and why.
STRICTER = {
    "is in the header twice": "one of the two would be dropped in silence",
    "'__metadata__' has": "the same, of metadata given twice",
    "has a field": "the format has three, and what a fourth might mean is not known",
    "'__metadata__' is not a JSON object": "the format says an object; null is taken for none",
    "header starts with": "the format says '{', and spaces only behind",
    "is not described by a JSON object": "the format says an object; a list of the three values is taken for one",
    "of less than a byte": "torch has no tensor of them to read rows into",
    "more than memory can address": "an empty tensor whose strides no torch tensor can have",
    "has more than 64 entries": "dimensions that numpy, and most of torch, cannot have",
}


def base(rng: random.Random) -> tuple[dict[str, Any], bytes]:
    """A true header of a few tensors, and their bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}} if rng.random() < 0.5 else {}
    at = 0
    for n in range(rng.randint(1, 4)):
        name = rng.choice(["F32", "BF16", "I64", "U8", "F8_E4M3", "BOOL", "F16"])
        shape = [rng.choice([0, 1, 2, 3, 3, 5]) for _ in range(rng.randint(0, 3))]
        size = int(np.prod(shape, dtype=int)) * DTYPES[name].itemsize
        header[f"layer.{n}.weight"] = {"dtype": name, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return header, rng.randbytes(at) if rng.random() < 0.5 else bytes(at)


VALUES: list[Any] = [
    0, 1, -1, 3, 4, 8, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**9, 10**30, 1.5, 1e300, True, None, "", "F32", "F4",
    "F8_E8M0", "C64", "x", [], [0], [1, 2], {}, {"a": "b"}, [[1]], [0] * 70, [10**9, 10**9], [0, 2**40, 2**40], "\u0000",
    "\ud83d\ude00",
]  # fmt: skip


def in_the_tree(rng: random.Random, header: dict[str, Any]) -> bytes:
    """One value, key or entry changed, dropped, moved or copied."""
    names = list(header)
    name = rng.choice(names)
    entry = header[name]
    what = rng.randrange(9)
    if what == 0:
        header[name] = rng.choice(VALUES)
    elif what == 1:
        entry[rng.choice([*entry, "strides"])] = rng.choice(VALUES)
    elif what == 2:
        del entry[rng.choice(list(entry))]
    elif what == 3:
        header[rng.choice(["", "__metadata__", "x" * 300, "\ud83d\ude00", "../x"])] = header.pop(name)
    elif what == 4:
        header["copy"] = dict(entry)
    elif what == 5 and isinstance(entry.get("data_offsets"), list):
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-8, -4, -1, 1, 4, 8, 2**32])
    elif what == 6 and isinstance(entry.get("shape"), list):
        entry["shape"].insert(rng.randint(0, len(entry["shape"])), rng.choice([0, 1, 2, -1, 10**9, 2**62, 1.0]))
    elif what == 7:
        header = {key: header[key] for key in rng.sample(names, len(names))}
    else:
        other = header[rng.choice(names)]
        keys = [key for key in entry if key in other]
        for key in keys[: rng.randint(0, 3)]:
            entry[key], other[key] = other[key], entry[key]
    return json.dumps(header, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def slyly(rng: random.Random, header: dict[str, Any], size: int) -> tuple[bytes, bytes]:
    """A header that another reader takes, and bytes to follow the true ones."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [size, size]}
    what = rng.randrange(9)
    if what == 0:
        header["sub"] = {
            "dtype": rng.choice(["F4", "F4", "F6_E2M3", "F6_E3M2"]),
            "shape": [8],
            "data_offsets": [size, size + 4],
        }
        header["sub"]["data_offsets"][1] += 2 * header["sub"]["dtype"].startswith("F6")
        return json.dumps(header).encode(), bytes(header["sub"]["data_offsets"][1] - size)
    if what == 1:
        header["strides"] = {**empty, "shape": [0, *[rng.choice([2**40, 2**62, 10**10])] * 2]}
    if what == 2:
        header["dims"] = {**empty, "shape": [0, *[1] * rng.randint(60, 70)]}
    if what == 3:
        header["list"] = ["F32", [0], [size, size]]
    if what == 4:
        header["__metadata__"] = rng.choice([None, {}, {"format": "pt"}, {"step": 1}])
    raw = json.dumps(header)
    name = rng.choice(list(header))
    if what == 5:
        raw = f"{raw[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"
    if what == 6:
        raw = raw.replace('{"format": "pt"}', '{"format": "pt", "format": "np"}')
    if what == 7:
        raw = raw.replace('"dtype"', rng.choice(['"d\\u0074ype"', ' "dtype" ', '"dtype": "F32", "dtype"']), 1)
    if what == 8:
        raw = raw.replace('"shape": [', '"shape": [' + " " * 5000, 1)
    return raw.encode(), b""


def in_the_text(rng: random.Random, raw: bytes) -> bytes:
    """A few bytes of the JSON changed, dropped, copied or nested deep."""
    text = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text)) if text else 0
        what = rng.randrange(8)
        if what == 0 and text:
            text[at] ^= 1 << rng.randrange(8)
        elif what == 1 and text:
            text[at] = rng.choice(b'{}[]",:\\ 0123456789-+.eEtfn\x00\xff')
        elif what == 2:
            del text[at : at + rng.randint(1, 9)]
        elif what == 3:
            text[at:at] = text[at : at + rng.randint(1, 60)]
        elif what == 4:
            text[at:at] = rng.choice([b"[", b"{", b'{"a":', b"[0,", b'"', b"\\", b" ", b"9"]) * rng.choice([1, 1, 2, 5000])
        elif what == 5:
            text[at:at] = rng.choice([b'"__metadata__":null,', b'"__metadata__":{},', b'"layer.0.weight":', b',"dtype":"F32"'])
        elif what == 6:
            text += rng.choice([b" ", b"\n", b"\0", b"}", b",", b"{}"]) * rng.randint(1, 8)
        else:
            text[:0] = rng.choice([b" ", b"\n", b"\xef\xbb\xbf", b"["])
    return bytes(text)


def case(seed: int) -> bytes:
    """The bytes of a file."""
    rng = random.Random(seed)
    header, data = base(rng)
    if rng.random() < 0.2:
        raw, more = slyly(rng, header, len(data))
        return struct.pack("<Q", len(raw)) + raw + data + more
    raw = in_the_tree(rng, header) if rng.random() < 0.5 else json.dumps(header).encode()
    if rng.random() < 0.5:
        raw = in_the_text(rng, raw)
    length = len(raw)
    what = rng.randrange(8)
    if what == 0:
        length = rng.choice(
            [0, 1, length - 1, length + 1, length + len(data), 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1]
        )
    if what == 1:
        data = data[: rng.randint(0, len(data))] if rng.random() < 0.5 else data + bytes(rng.randint(1, 9))
    blob = struct.pack("<Q", max(length, 0)) + raw + data
    if what == 2:
        blob = blob[: rng.randint(0, len(blob))]
    if what == 3:
        at = rng.randrange(len(blob))
        blob = blob[:at] + bytes([blob[at] ^ 1 << rng.randrange(8)]) + blob[at + 1 :]
    return blob


def theirs(blob: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What safetensors makes of a file."""
    try:
        return {name: (found["dtype"], found["shape"], bytes(found["data"])) for name, found in deserialize(blob)}
    except SafetensorError:
        return None


def attempt(path: Path) -> Checkpoint | CheckpointError:
    """Open a checkpoint and read all of it. Anything raised but a CheckpointError is a failure of the test."""
    try:
        found = open_checkpoint(path)
        for name in found:
            assert found[name].shape == found.info(name).shape
    except CheckpointError as error:
        return error
    return found


class Bounds:
    """Time of any one case, and the most memory the process has had."""

    def __enter__(self) -> Bounds:
        self.slowest = 0.0
        self.before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return self

    def timed(self, act: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = act()
        self.slowest = max(self.slowest, time.process_time() - began)
        return found

    def __exit__(self, *_: object) -> None:
        assert self.slowest < 1.0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.before < 100 * 1024  # KiB


def test_ten_thousand_damaged_safetensors_files_are_refused_or_read_as_safetensors_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    outcomes: Counter[str] = Counter()
    with Bounds() as bounds:
        for seed in range(10_000):
            blob = case(seed)
            path.write_bytes(blob)
            ours, other = bounds.timed(lambda: attempt(path)), theirs(blob)
            if isinstance(ours, CheckpointError):
                assert ours.cure and str(path) in str(ours) and len(str(ours)) < 2000
                if other is not None:
                    reason = next((words for words in STRICTER if words in ours.problem), None)
                    assert reason is not None, (seed, str(ours), blob)
                    outcomes[reason] += 1
                outcomes["refused"] += 1
            else:
                assert other is not None, (seed, blob)
                read = {name: (NAMES[t.dtype], list(t.shape), _raw(t)) for name, t in ours.items()}
                assert read == other, (seed, blob)
                outcomes["read"] += 1
    # The cases are worth something: a good part is read, and each reason comes up.
    assert outcomes["read"] > 1000 and outcomes["refused"] > 5000
    assert all(outcomes[words] for words in STRICTER), outcomes


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def flip(rng: random.Random, raw: bytes, reach: int) -> bytes:
    """A few bytes among the first `reach` changed, dropped or put in, or the end cut off."""
    blob = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(1, min(reach, len(blob))))
        what = rng.randrange(5)
        if what == 0:
            blob[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 1:
            blob[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, rng.randrange(100)]))
        elif what == 2:
            del blob[at : at + rng.randint(1, 8)]
        elif what == 3:
            blob[at:at] = rng.randbytes(rng.randint(1, 8))
        elif rng.random() < 0.3:
            del blob[rng.randrange(len(blob) + 1) :]
    return bytes(blob)


def test_damaged_gguf_files_are_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    given = {"general.architecture": "llama", "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    given |= {"tokenizer.ggml.tokens": ["a", "bc"], "x": [0.5, 1.5], "general.alignment": 32}
    tensors = {"token_embd.weight": (8, [3, 32], bytes(3 * 34)), "blk.0.attn_q.weight": as_f32(torch.ones(8, 8))}
    tensors |= {"blk.0.attn_k.weight": as_f32(torch.ones(4, 8)), "output_norm.weight": (12, [256], bytes(144))}
    raw = gguf(path, tensors, given).read_bytes()
    outcomes: Counter[type] = Counter()
    with Bounds() as bounds:
        for seed in range(3_000):
            path.write_bytes(flip(random.Random(seed), raw, 560))
            outcomes[type(bounds.timed(lambda: attempt(path)))] += 1
    assert outcomes[CheckpointError] > 1000 and outcomes.total() - outcomes[CheckpointError] > 200


def test_damaged_indices_and_configs_are_refused_or_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    index, config = tmp_path / "pytorch_model.bin.index.json", tmp_path / "config.json"
    texts = {
        index: json.dumps({"metadata": {}, "weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}).encode(),
        config: json.dumps({"architectures": ["XForCausalLM"], "tie_word_embeddings": False, "text_config": {}}).encode(),
    }
    outcomes: Counter[bool] = Counter()
    with Bounds() as bounds:
        for seed in range(1_000):
            rng = random.Random(seed)
            for path, text in texts.items():
                path.write_bytes(in_the_text(rng, text) if rng.random() < 0.6 else text)
            outcomes[isinstance(bounds.timed(lambda: attempt(tmp_path)), CheckpointError)] += 1
    assert outcomes[True] > 300 and outcomes[False] > 100


def test_damaged_adapters_are_refused_or_read(tmp_path: Path) -> None:
    raw = json.dumps(
        {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "rank_pattern": {"q": 1}, "alpha_pattern": {"q": 3}}
    ).encode()
    a = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
    header = json.dumps(
        {"base_model.model.q.lora_A.weight": a, "q.lora_B.weight": {**a, "shape": [2, 1], "data_offsets": [8, 16]}}
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(16))
    outcomes: Counter[bool] = Counter()

    def folded() -> bool:
        try:
            found = open_checkpoint(tmp_path)
            deltas: Callable[[], dict[str, Any]] = vars(type(found))["deltas"].__get__(found)
            return all(update.applied(torch.zeros(update.shape)).shape == update.shape for update in deltas().values())
        except CheckpointError:
            return False

    with Bounds() as bounds:
        for seed in range(1_000):
            (tmp_path / "adapter_config.json").write_bytes(in_the_text(random.Random(seed), raw))
            outcomes[bounds.timed(folded)] += 1
    assert outcomes[True] > 50 and outcomes[False] > 300


@pytest.mark.parametrize("archive", [True, False])
def test_damaged_pickles_are_refused_or_read_and_run_nothing(tmp_path: Path, archive: bool) -> None:
    path, mark = tmp_path / "m.bin", tmp_path / "ran"
    torch.save({"a": torch.ones(2, 3), "b": torch.arange(4)}, path, _use_new_zipfile_serialization=archive)
    raw = path.read_bytes()
    outcomes: Counter[type] = Counter()
    with Bounds() as bounds, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(500):
            rng = random.Random(seed)
            blob = flip(rng, raw, len(raw))
            if rng.random() < 0.1:
                act = b"cposix\nsystem\n" + pickle.dumps((f"touch {mark}",), 2)[2:-1] + b"R"
                blob = blob.replace(b"ctorch._utils\n", act + b"ctorch._utils\n")
            path.write_bytes(blob)
            outcomes[type(bounds.timed(lambda: attempt(path)))] += 1
    assert outcomes[CheckpointError] > 100 and not mark.exists()


@pytest.mark.parametrize("module", ["os", "builtins", "torch", "subprocess", "numpy"])
def test_no_module_lends_a_pickle_its_functions(tmp_path: Path, module: str) -> None:
    name = {"os": "system", "builtins": "eval", "torch": "load", "subprocess": "getoutput", "numpy": "load"}[module]
    path, mark = tmp_path / "m.bin", tmp_path / "ran"
    act = f"__import__('pathlib').Path({str(mark)!r}).touch()" if module == "builtins" else f"touch {mark}"
    path.write_bytes(b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps((act,), 2)[2:-1] + b"R.")
    assert isinstance(attempt(path), CheckpointError)
    torch.save({"a": torch.ones(1)}, path)
    assert not mark.exists()
