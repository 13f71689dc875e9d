"""The JSON of a safetensors header, scanned.

It is not given to a parser of JSON: of a hundred megabytes of `[[[[` that makes gigabytes of lists. Headers have one form
only, and a scanner that knows it stops at the first byte that does not fit. Work is linear in the header's length, and memory
some ten times it at most.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from .dtypes import DTYPES, SUB_BYTE
from .errors import CheckpointError
from .files import AGAIN

MAX_DIMS = 64
DAMAGED = f"the header is damaged or forged: {AGAIN}"

_SPACE = rb"[ \t\r\n]*+"
# A string as JSON has it; possessive throughout, so that of a long one no places are kept to go back to.
_STRING = rb'"[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+"'
_KEY = re.compile(rb"%s(%s)%s:%s" % (_SPACE, _STRING, _SPACE, _SPACE), re.DOTALL)
_GAP = re.compile(_SPACE)
_OPEN = re.compile(rb"\{%s(\}?)" % _SPACE)
_TEXT = re.compile(rb"(%s)%s" % (_STRING, _SPACE), re.DOTALL)
_LIST = re.compile(rb'\[([^\[\]{}"]*+)\]%s' % _SPACE)
_NUMBER = re.compile(rb"0|[1-9][0-9]{0,18}")
_FIELDS = ("dtype", "shape", "data_offsets")


class HeaderScanner:
    """Walks along the one form a header can have."""

    def __init__(self, raw: bytes, path: Path | str | None) -> None:
        self.raw, self.path, self.at = raw, path, 0
        self.metadata: dict[str, str] = {}
        self.entries: dict[str, tuple[torch.dtype, torch.Size, int, int]] = {}

    def read(self) -> None:
        if not self.raw.startswith(b"{"):
            self.fail(f"its header starts with {self.raw[:1]!r}, not with '{{'")
        described = False
        for name in self.keys(None):
            if name == "__metadata__":
                if described:
                    self.fail("its header has '__metadata__' twice")
                described = True
                self.strings()
            elif name in self.entries:
                self.fail("is in the header twice", tensor=name)
            else:
                self.entries[name] = self.entry(name)
        rest = self.raw[self.at :]
        if rest.strip(b" \t\r\n"):
            self.fail(f"its header goes on after its end, with {rest.lstrip()[:20]!r}")

    def keys(self, tensor: str | None) -> Iterator[str]:
        """The keys of the object that begins here. Whoever asks for the next has moved behind the value of the last."""
        opening = _OPEN.match(self.raw, self.at)
        if opening is None:
            self.fail("is not described by a JSON object" if tensor else "its '__metadata__' is not a JSON object", tensor)
        self.at = opening.end()
        if opening[1]:
            return
        while True:
            found = _KEY.match(self.raw, self.at)
            if found is None:
                self.fail(f"its header is no JSON at byte {self.at}: {self.raw[self.at : self.at + 20]!r}", tensor)
            self.at = found.end()
            yield self.text(found[1], tensor)
            after = self.raw[self.at : self.at + 1]
            self.at += 1
            if after == b"}":
                return
            if after != b",":
                self.fail(f"its header is no JSON at byte {self.at - 1}: {self.raw[self.at - 1 : self.at + 19]!r}", tensor)

    def strings(self) -> None:
        for key in self.keys(None):
            found = _TEXT.match(self.raw, self.at)
            if found is None:
                self.fail(f"its '__metadata__' must map strings to strings, and {short(key)!r} is something else")
            if key in self.metadata:
                self.fail(f"its '__metadata__' has {short(key)!r} twice")
            self.at = found.end()
            self.metadata[key] = self.text(found[1], None)
        self.skip()

    def entry(self, name: str) -> tuple[torch.dtype, torch.Size, int, int]:
        given: dict[str, str | list[int]] = {}
        for key in self.keys(name):
            if key not in _FIELDS:
                self.fail(f"has a field {short(key)!r}, which the format does not know", name)
            if key in given:
                self.fail(f"has {key!r} twice", name)
            found = (_TEXT if key == "dtype" else _LIST).match(self.raw, self.at)
            if found is None:
                kind = "a string" if key == "dtype" else "a list of integers"
                self.fail(f"{key!r} must be {kind}", name)
            self.at = found.end()
            given[key] = self.text(found[1], name) if key == "dtype" else self.numbers(found[1], key, name)
        for key in _FIELDS:
            if key not in given:
                self.fail(f"has no {key!r}", name)
        self.skip()
        return self.checked(name, given["dtype"], given["shape"], given["data_offsets"])

    def checked(self, name: str, kind: object, shape: object, offsets: object) -> tuple[torch.dtype, torch.Size, int, int]:
        assert isinstance(kind, str) and isinstance(shape, list) and isinstance(offsets, list)
        if kind in SUB_BYTE:
            cure = "convert it to F8_E4M3, BF16 or F32 first"
            self.fail(f"has dtype {kind}, of less than a byte, which torch cannot hold", name, cure)
        if kind not in DTYPES:
            self.fail(f"has dtype {kind[:40]!r}, which is not one of {', '.join(DTYPES)}", name)
        dtype = DTYPES[kind]
        # torch computes strides as if no dimension were empty, and they must fit as well.
        if math.prod(n or 1 for n in shape) * dtype.itemsize >= 2**63:
            self.fail(f"has shape {shape}, more than memory can address", name)
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self.fail(f"has data_offsets {offsets}, which are not [begin, end]", name)
        start, stop = offsets
        wanted = math.prod(shape) * dtype.itemsize
        if stop - start != wanted:
            problem = f"of shape {shape} and {kind} takes {wanted} bytes, and its data_offsets {offsets} hold {stop - start}"
            self.fail(problem, name)
        return dtype, torch.Size(shape), start, stop

    def numbers(self, listed: bytes, key: str, name: str) -> list[int]:
        if not listed.strip(b" \t\r\n"):
            return []
        # Of a list that is too long no more is cut up than shows that it is.
        items = [item.strip(b" \t\r\n") for item in listed.split(b",", MAX_DIMS + 1)]
        if len(items) > MAX_DIMS:
            self.fail(f"{key!r} has more than {MAX_DIMS} entries", name)
        for item in items:
            if _NUMBER.fullmatch(item) is None or int(item) >= 2**63:
                self.fail(f"{key!r} must hold integers of 0 to 2**63 - 1, not {item[:40].decode(errors='replace')}", name)
        return [int(item) for item in items]

    def text(self, quoted: bytes, tensor: str | None) -> str:
        try:
            found = json.loads(quoted) if b"\\" in quoted else quoted[1:-1].decode()
            found.encode()  # half of a surrogate pair is no text
        except ValueError:
            self.fail(f"its header has a string that is no text, {quoted[:40]!r}", tensor)
        return found

    def skip(self) -> None:
        gap = _GAP.match(self.raw, self.at)
        self.at = self.at if gap is None else gap.end()

    def fail(self, problem: str, tensor: str | None = None, cure: str | None = None) -> NoReturn:
        named = None if tensor is None else short(tensor)
        raise CheckpointError(problem, cure=cure or DAMAGED, file=self.path, tensor=named)


def short(name: str) -> str:
    """A name may be as long as the header, and a message should not."""
    return name if len(name) <= 200 else f"{name[:200]}..."
