"""Files of weights written by hand, true ones and false ones, so that readers are held to the formats and not to a library."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from poise.checkpoint import CheckpointError

FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def forge(path: Path, header: Mapping[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with whatever header; `length` is what it claims its header has."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def refused(error: pytest.ExceptionInfo[CheckpointError], *said: str, tensor: str | None = None) -> None:
    """The message says all of that, names the file and the tensor, and ends with a cure."""
    message = str(error.value)
    for words in said:
        assert words in message
    assert error.value.file is not None and str(error.value.file) in message
    assert error.value.tensor == tensor
    assert len(error.value.cure) > 10 and message.endswith(error.value.cure)


def _text(words: str) -> bytes:
    return struct.pack("<Q", len(words.encode())) + words.encode()


def _value(value: Any) -> bytes:
    """type, value: whole numbers as u32, others as float32."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    first = _value(value[0])[:4] if value else struct.pack("<I", 4)
    return struct.pack("<I", 9) + first + struct.pack("<Q", len(value)) + b"".join(_value(v)[4:] for v in value)


def gguf(
    path: Path,
    tensors: Mapping[str, tuple[int, Sequence[int], bytes]],
    metadata: Mapping[str, Any] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
    offsets: Mapping[str, int] | None = None,
    extra: bytes = b"",
) -> Path:
    """A GGUF file of tensors name -> (type, shape as torch has it, bytes). `offsets` are lies about where they begin."""
    values = dict(metadata or {})
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values))
    head += b"".join(_text(key) + _value(value) for key, value in values.items())
    data = b""
    for name, (kind, shape, raw) in tensors.items():
        place = (offsets or {}).get(name, len(data))
        head += _text(name) + struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", n) for n in reversed(shape))
        head += struct.pack("<IQ", kind, place)
        data += raw + b"\0" * (-len(raw) % alignment)
    path.write_bytes(head + b"\0" * (-len(head) % alignment) + data + extra)
    return path


def as_f32(tensor: Tensor) -> tuple[int, list[int], bytes]:
    return 0, list(tensor.shape), tensor.contiguous().float().numpy().tobytes()


def bits(tensor: Tensor) -> list[int]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
