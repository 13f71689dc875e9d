"""GGUF files: block formats element by element, names and rows as transformers has them, and headers that lie."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoint.forging import as_f32, bits, gguf, refused
from poise.checkpoint import CheckpointError, GGUFFile
from poise.checkpoint.gguf import file as gguf_file
from poise.checkpoint.gguf.blocks import KINDS

F = np.float32
Block = Sequence[int]


def half(b: Block, at: int) -> Any:
    return F(struct.unpack("<e", bytes(b[at : at + 2]))[0])


def signed(value: int) -> int:
    return value - 256 if value > 127 else value


def of_32(b: Block, at: int, fifth: int | None) -> list[int]:
    """4 bits of 32 entries, and a fifth from the four bytes at `fifth`."""
    high = 0 if fifth is None else int.from_bytes(bytes(b[fifth : fifth + 4]), "little")
    return [((b[at + i % 16] >> (4 if i >= 16 else 0)) & 15) + 16 * ((high >> i) & 1) for i in range(32)]


def six_bits(b: Block, j: int) -> tuple[Any, Any]:
    """Scale and minimum of group j, from the twelve bytes at 4."""
    q = b[4:16]
    if j < 4:
        return F(q[j] & 63), F(q[j + 4] & 63)
    return F((q[j + 4] & 15) | (q[j - 4] >> 6 << 4)), F((q[j + 4] >> 4) | (q[j] >> 6 << 4))


def q2_k(b: Block) -> list[Any]:
    found = []
    for i in range(256):
        part, shift, place = i // 128, i % 128 // 32, i % 32
        scale = b[i // 16]
        q = (b[16 + 32 * part + place] >> 2 * shift) & 3
        found.append(half(b, 80) * F(scale & 15) * F(q) - half(b, 82) * F(scale >> 4))
    return found


def q3_k(b: Block) -> list[Any]:
    found = []
    for i in range(256):
        part, shift, place, group = i // 128, i % 128 // 32, i % 32, i // 16
        low = b[96 + group] & 15 if group < 8 else b[96 + group - 8] >> 4
        scale = (low | ((b[104 + group % 4] >> 2 * (group // 4)) & 3) << 4) - 32
        q = ((b[32 + 32 * part + place] >> 2 * shift) & 3) - (0 if b[place] & (1 << (4 * part + shift)) else 4)
        found.append(half(b, 108) * F(scale) * F(q))
    return found


def k_of_32(b: Block, at: int, fifth: int | None) -> list[Any]:
    found = []
    for i in range(256):
        group, place = i // 32, i % 32
        scale, minimum = six_bits(b, group)
        q = (b[at + 32 * (group // 2) + place] >> 4 * (group % 2)) & 15
        if fifth is not None:
            q += 16 * ((b[fifth + place] >> group) & 1)
        found.append(half(b, 0) * scale * F(q) - half(b, 2) * minimum)
    return found


def q6_k(b: Block) -> list[Any]:
    found = []
    for i in range(256):
        part, quarter, place = i // 128, i % 128 // 32, i % 32
        low = b[64 * part + 32 * (quarter % 2) + place] >> (4 if quarter > 1 else 0)
        high = (b[128 + 32 * part + place] >> 2 * quarter) & 3
        found.append(half(b, 208) * F(signed(b[192 + i // 16])) * F(((low & 15) | high << 4) - 32))
    return found


# By name: where the block has float16, and its entries one by one.
REFERENCES: dict[str, tuple[Sequence[int], Callable[[Block], list[Any]]]] = {
    "Q8_0": ((0,), lambda b: [half(b, 0) * F(signed(q)) for q in b[2:]]),
    "Q4_0": ((0,), lambda b: [half(b, 0) * F(q - 8) for q in of_32(b, 2, None)]),
    "Q4_1": ((0, 2), lambda b: [half(b, 0) * F(q) + half(b, 2) for q in of_32(b, 4, None)]),
    "Q5_0": ((0,), lambda b: [half(b, 0) * F(q - 16) for q in of_32(b, 6, 2)]),
    "Q5_1": ((0, 2), lambda b: [half(b, 0) * F(q) + half(b, 2) for q in of_32(b, 8, 4)]),
    "Q2_K": ((80, 82), q2_k),
    "Q3_K": ((108,), q3_k),
    "Q4_K": ((0, 2), lambda b: k_of_32(b, 16, None)),
    "Q5_K": ((0, 2), lambda b: k_of_32(b, 48, 16)),
    "Q6_K": ((208,), q6_k),
}
NUMBER = {kind.name: number for number, kind in KINDS.items()}


def drawn(name: str, count: int) -> bytes:
    """Blocks of random bits, with scales that are numbers."""
    rng = np.random.default_rng(count)
    raw = rng.integers(0, 256, (count, KINDS[NUMBER[name]].nbytes), dtype=np.uint8)
    for at in REFERENCES[name][0]:
        raw[:, at : at + 2] = rng.standard_normal(count).astype(np.float16).reshape(-1, 1).view(np.uint8)
    return raw.tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("name", REFERENCES)
def test_a_block_is_its_entries_one_by_one_to_the_last_bit(path: Path, name: str) -> None:
    kind = KINDS[NUMBER[name]]
    raw = drawn(name, 8)
    found = GGUFFile(gguf(path, {"a": (NUMBER[name], [4, 2 * kind.entries], raw)}))["a"]
    entries = [x for n in range(8) for x in REFERENCES[name][1](raw[n * kind.nbytes : (n + 1) * kind.nbytes])]
    assert found.dtype == torch.float32
    assert found.reshape(-1).tolist() == [float(x) for x in entries]


PLAIN = {"float32": 0, "float16": 1, "bfloat16": 30, "int8": 24, "int16": 25, "int32": 26, "int64": 27, "float64": 28}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_numbers_are_read_and_halves_widened(path: Path, name: str) -> None:
    dtype = getattr(torch, name)
    whole = (torch.randn(4, 6) * 10).to(dtype)
    found = GGUFFile(gguf(path, {"a": (PLAIN[name], [4, 6], bytes(bits(whole)))}))
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    assert found.info("a").dtype == wide and found.info("a").shape == (4, 6)
    assert torch.equal(found["a"], whole.to(wide))


@pytest.mark.parametrize("stride", [2**20, 256, 1024])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K"])
def test_rows_are_slices_whatever_is_decoded_at_a_time(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stride: int
) -> None:
    kind = KINDS[NUMBER[name]]
    shapes = {"m": [5, kind.entries], "v": [3 * kind.entries], "t": [2, 3, kind.entries]}
    tensors = {n: (NUMBER[name], s, drawn(name, int(np.prod(s)) // kind.entries)) for n, s in shapes.items()}
    whole = dict(GGUFFile(gguf(path, tensors)))
    monkeypatch.setattr(gguf_file, "STRIDE", stride)
    found = GGUFFile(path)
    for key, tensor in whole.items():
        for start, stop in [
            (0, 0),
            (0, 1),
            (1, 2),
            (0, len(tensor)),
            (len(tensor) // 2, len(tensor)),
            (len(tensor), len(tensor)),
        ]:
            assert torch.equal(found.rows(key, start, stop), tensor[start:stop])
    assert torch.equal(found.rows("v", 5, 2 * kind.entries + 3), whole["v"][5 : 2 * kind.entries + 3])


def test_only_the_blocks_of_the_rows_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf(path, {f"t{i}": (8, [64, 1024], bytes(64 * 32 * 34)) for i in range(8)})
    found = GGUFFile(path)
    read: list[int] = []
    pread = os.preadv

    def counted(fd: int, buffers: Any, offset: int) -> int:
        read.append(pread(fd, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    found.rows("t5", 3, 5)
    assert sum(read) == 2 * 32 * 34


LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
GEMMA = {
    **LAYER, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp stores queries and keys: the rows that are rotated together, i and i + d/2 of a head, side by side."""
    width = len(weight) // heads
    rows = [h * width + i + j * width // 2 for h in range(heads) for i in range(width // 2) for j in range(2)]
    return weight[rows]


def convert(state: dict[str, Tensor], layer: dict[str, str], shifted: bool, heads: tuple[int, int] | None) -> dict[str, Any]:
    """A model's weights as llama.cpp's converter writes them, in float32."""
    back = {renamed: own for own, renamed in {**OUTER, **layer}.items()}
    tensors = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        prefix = ""
        if ".layers." in stem:
            _, _, number, stem = stem.split(".", 3)
            prefix = f"blk.{number}."
        if heads and stem.endswith("q_proj"):
            tensor = interleaved(tensor, heads[0])
        if heads and stem.endswith("k_proj"):
            tensor = interleaved(tensor, heads[1])
        if shifted and stem.endswith("norm"):
            tensor = tensor + 1
        tensors[f"{prefix}{back[stem]}.{kind}"] = as_f32(tensor)
    return tensors


def metadata(family: str, **more: Any) -> dict[str, Any]:
    common = {"context_length": 64, "block_count": 2, "embedding_length": 16, "feed_forward_length": 24}
    common |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 0.5}
    return {"general.architecture": family, **{f"{family}.{key}": value for key, value in {**common, **more}.items()}}


def test_rows_of_queries_and_keys_are_put_back_in_their_order_row_by_row(path: Path) -> None:
    torch.manual_seed(0)
    # heads of 6 rows: of 4, the order there and the order back would be one
    state = {f"model.layers.0.self_attn.{p}_proj.weight": torch.randn(n, 16) for p, n in (("q", 24), ("k", 12), ("v", 12))}
    found = GGUFFile(gguf(path, convert(state, LAYER, False, (4, 2)), metadata("llama")))
    assert set(found) == set(state)
    for name, tensor in state.items():
        for start in range(len(tensor) + 1):
            for stop in range(start, len(tensor) + 1):
                assert torch.equal(found.rows(name, start, stop), tensor[start:stop])


def test_heads_that_do_not_divide_the_rows_are_refused(path: Path) -> None:
    tensors = convert({"model.layers.0.self_attn.q_proj.weight": torch.randn(16, 16)}, LAYER, False, None)
    with pytest.raises(CheckpointError) as error:
        GGUFFile(gguf(path, tensors, metadata("llama", **{"attention.head_count": 3})))
    refused(error, "16 rows, which are no even number for each of 3 heads", tensor="model.layers.0.self_attn.q_proj.weight")


@pytest.mark.hf
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma2", "gemma3"])
def test_a_model_written_as_llama_cpp_does_computes_in_transformers_what_it_did(path: Path, family: str) -> None:
    import transformers

    extra: dict[str, Any] = {}
    if family.startswith("gemma"):
        extra = {"attention.key_length": 8}
    if family in ("gemma2", "gemma3"):
        extra |= {"attention.sliding_window": 8}
    given = {**metadata(family, **extra), "tokenizer.ggml.eos_token_id": 3}
    empty = GGUFFile(
        gguf(path, {"token_embd.weight": as_f32(torch.zeros(32, 16)), "output.weight": as_f32(torch.zeros(32, 16))}, given)
    )
    kind = getattr(transformers, empty.config["architectures"][0])
    tied = family.startswith("gemma")
    torch.manual_seed(1)
    net = kind(kind.config_class(**{**empty.config, "tie_word_embeddings": tied})).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    state = {name: tensor for name, tensor in net.state_dict().items() if not (tied and name == "lm_head.weight")}
    layer = GEMMA if family in ("gemma2", "gemma3") else LAYER
    heads = (4, 2) if family == "llama" else None
    found = GGUFFile(gguf(path, convert(state, layer, family.startswith("gemma"), heads), given))
    assert not found.warnings and found.config["tie_word_embeddings"] is tied
    assert found.config["eos_token_id"] == 3 and found.config["rms_norm_eps"] == 0.5 and found.config["vocab_size"] == 32
    assert found.ties == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    again = kind(kind.config_class(**found.config)).eval()
    again.load_state_dict({**found, **{other: found[name] for other, name in found.ties.items()}})
    tokens = torch.arange(12).reshape(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, net(tokens).logits, rtol=1e-5, atol=1e-5)


def test_another_architecture_keeps_its_names_and_says_so(path: Path) -> None:
    found = GGUFFile(gguf(path, {"blk.0.ssm_a.weight": as_f32(torch.ones(4))}, {"general.architecture": "mamba"}))
    assert list(found) == ["blk.0.ssm_a.weight"] and not found.config
    assert "architecture 'mamba': its tensors keep the names of GGUF" in str(found.warnings[0])


def test_a_tensor_that_the_family_does_not_have_keeps_all_names_and_rows_as_they_are(path: Path) -> None:
    q = torch.randn(16, 16)
    tensors = {"blk.0.attn_q.weight": as_f32(q), "blk.0.ffn_gate_exps.weight": as_f32(torch.ones(2, 4, 4))}
    found = GGUFFile(gguf(path, tensors, metadata("llama")))
    assert torch.equal(found["blk.0.attn_q.weight"], q) and not found.config
    assert found.warnings[0].tensor == "blk.0.ffn_gate_exps.weight"


def test_factors_of_the_rotation_are_left_out_and_told_of(path: Path) -> None:
    tensors = {"token_embd.weight": as_f32(torch.ones(4, 16)), "rope_freqs.weight": as_f32(torch.ones(2))}
    found = GGUFFile(gguf(path, tensors, metadata("llama")))
    assert list(found) == ["model.embed_tokens.weight"]
    assert found.warnings[0].tensor == "rope_freqs.weight" and "rope_scaling" in found.warnings[0].cure


def test_a_scaled_rotation_is_told_of(path: Path) -> None:
    tensors = {"token_embd.weight": as_f32(torch.ones(4, 16))}
    for kind, count in {"none": 0, "yarn": 1}.items():
        found = GGUFFile(gguf(path, tensors, metadata("llama", **{"rope.scaling.type": kind})))
        assert len(found.warnings) == count


def test_metadata_is_read_and_long_lists_are_passed_over(path: Path) -> None:
    given = {"general.architecture": "x", "n": 7, "x": 0.5, "yes": True, "few": [1, 2], "names": ["a", "ü"], "none": []}
    given |= {"tokens": ["ab"] * 2000, "scores": [0.5] * 2000, "last": "z"}
    found = GGUFFile(gguf(path, {"a": as_f32(torch.ones(1))}, given))
    assert {key: found.fields[key] for key in ("n", "x", "yes", "few", "names", "none", "last")} == {
        "n": 7, "x": 0.5, "yes": True, "few": [1, 2], "names": ["a", "ü"], "none": [], "last": "z"
    }  # fmt: skip
    assert (found.fields["tokens"].length, found.fields["scores"].kind) == (2000, 6)
    assert found.metadata == {"general.architecture": "x", "last": "z"}


ONE = {"a": as_f32(torch.ones(8)), "b": as_f32(torch.ones(8))}
LIES: dict[str, tuple[Callable[[Path], object], str, str | None]] = {
    "magic": (lambda p: p.write_bytes(b"GGML" + bytes(40)), "does not begin with 'GGUF'", None),
    "version 1": (lambda p: gguf(p, ONE, version=1), "has version 1, and 2 and 3 are known", None),
    "big-endian": (lambda p: gguf(p, ONE, version=3 << 24), "is big-endian", None),
    "overlap": (lambda p: gguf(p, ONE, offsets={"b": 0}), "overlaps the tensor before it", "b"),
    "hole": (lambda p: gguf(p, ONE, offsets={"b": 64}), "leaves 32 bytes before it unused", "b"),
    "unaligned": (lambda p: gguf(p, ONE, offsets={"b": 33}), "begins at 33, no multiple of the alignment 32", "b"),
    "added": (lambda p: gguf(p, ONE, extra=bytes(32)), "has 32 bytes after its last tensor", None),
    "rows": (lambda p: gguf(p, {"a": (8, [33], bytes(64))}), "rows of 33 entries, no multiple of the 32 of Q8_0", "a"),
    "type": (lambda p: gguf(p, {"a": (19, [256], bytes(64))}), "has type 19, and known are F32", "a"),
    "dimensions": (lambda p: gguf(p, {"a": (0, [1] * 5, bytes(4))}), "has 5 dimensions", "a"),
    "overflow": (lambda p: gguf(p, {"a": (0, [2**40, 2**40], bytes(4))}), "more than memory can address", "a"),
    "overflow behind zero": (lambda p: gguf(p, {"a": (0, [2**40, 2**40, 0], bytes(4))}), "more than memory", "a"),
    "beyond": (lambda p: gguf(p, {"a": (0, [100], bytes(4))}), "and the file at", "a"),
    "alignment": (lambda p: gguf(p, ONE, {"general.alignment": 24}), "alignment 24, which is no power of two", None),
    "alignment of text": (lambda p: gguf(p, ONE, {"general.alignment": "32"}), "alignment '32'", None),
    "parts": (lambda p: gguf(p, ONE, {"split.count": 3}), "is one of 3 parts", None),
    "two names": (
        lambda p: gguf(p, {f"blk.{n}.attn_norm.weight": as_f32(torch.ones(8)) for n in ("0", "00")}, metadata("llama")),
        "two tensors for one name", None),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_header_that_lies_is_refused(path: Path, case: str) -> None:
    write, said, tensor = LIES[case]
    write(path)
    with pytest.raises(CheckpointError) as error:
        GGUFFile(path)
    refused(error, said, tensor=tensor)


HEAD = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (HEAD + struct.pack("<QQ", 2**60, 0) + bytes(64), "claims 1152921504606846976 entries"),
        (HEAD + struct.pack("<QQ", 0, 2**64 - 1) + bytes(64), "claims 18446744073709551615 entries"),
        (HEAD + struct.pack("<QQQ", 0, 1, 2**62) + bytes(64), "entries, more than its"),
        (HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**61) + bytes(64), "entries, more than its"),
        (HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 1) + bytes(64), "an array of unknown type 9"),
        (HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<I", 77) + bytes(64), "a value of unknown type 77"),
        (HEAD + struct.pack("<QQQ", 0, 1, 1) + b"\xff" + struct.pack("<I", 4) + bytes(64), "a string that is no UTF-8"),
        (
            HEAD + struct.pack("<QQ", 0, 2) + 2 * (struct.pack("<Q", 1) + b"k" + struct.pack("<II", 4, 0)) + bytes(9),
            "'k' twice",
        ),
        (
            HEAD + struct.pack("<QQ", 2, 0) + 2 * (struct.pack("<Q", 1) + b"t" + struct.pack("<IIQ", 0, 0, 0)) + bytes(64),
            "twice",
        ),
    ],
)
def test_counts_are_held_against_the_bytes_that_are_there(path: Path, raw: bytes, said: str) -> None:
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=said):
        GGUFFile(path)
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


def test_a_file_cut_off_at_any_byte_is_refused(path: Path) -> None:
    gguf(path, {"a": as_f32(torch.ones(8)), "b": as_f32(torch.ones(5))}, {"general.architecture": "x", "list": [1, 2]})
    raw = path.read_bytes()
    # What pads the end is nobody's.
    for size in range(len(raw) - 12):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"cut off|begin with"):
            GGUFFile(path)


def test_a_vocabulary_without_end_costs_no_more_than_its_bytes(path: Path) -> None:
    count = 300_000
    raw = HEAD + struct.pack("<QQQ", 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, count) + struct.pack("<Q", 0) * (count - 1)
    path.write_bytes(raw + struct.pack("<Q", 2**63))
    began = time.process_time()
    with pytest.raises(CheckpointError, match="ends within its header"):
        GGUFFile(path)
    assert time.process_time() - began < 3


def test_the_fingerprint_changes_with_the_header_and_the_time(path: Path) -> None:
    prints = []
    for value, stamp in ((1, 1), (2, 1), (2, 2)):
        os.utime(gguf(path, ONE, {"n": value}), ns=(stamp, stamp))
        prints.append(GGUFFile(path).fingerprint())
    assert len(set(prints)) == 3
    found = GGUFFile(path)
    os.utime(path, ns=(3, 3))
    with pytest.raises(CheckpointError, match="has changed since it was opened"):
        found["a"]
