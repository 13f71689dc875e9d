"""Plain tensor math without a compiler, as fast as torch's own operations allow.

Evaluating a rule on whole tensors allocates and streams a temporary for every operation. Here the traced operations are
written out once as calls with `out=` buffers, products folded into the sums they go to, and run over pieces that stay in the
processor's shared cache and are still large enough for torch to share out among its threads.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from .lines import Lines
from .program import Program

# Elements of a piece: a rule's tensors take some 10 MB of it, which shared caches hold. Measured on two threads, the ratio of
# AdamW to torch's fused one: 4.3 with a quarter of it, as calls cost more than they do, 3.4 with half, 3.1, 3.6 with double.
PIECE = 524288


class Pieces:
    """A program run over pieces; a result that replaces an input overwrites it."""

    def __init__(self, program: Program, compute: torch.dtype) -> None:
        self.program, self.written = program, program.results()
        self.inputs = ["g", *([] if program.begins else ["u"]), "x", *program.keys, *(f"feed:{f}" for f in program.feeds)]
        self.lines = Lines(self.inputs, self.written, self._trace(compute))
        self.run = self.lines.compiled()

    def _trace(self, compute: torch.dtype) -> fx.Graph:
        from torch.fx.experimental.proxy_tensor import make_fx

        def flat(*values: Tensor) -> tuple[Tensor, ...]:
            made = self.program(dict(zip([*self.inputs, "row", "noise"], values[:-1], strict=True)), None, values[-1])
            return tuple(made[name] for name in self.written)

        example = [torch.ones(8, dtype=compute) for _ in self.inputs]
        example += [
            torch.ones(len(self.program.names), dtype=compute),
            torch.zeros(2, dtype=torch.int32),
            torch.zeros(8, dtype=torch.int32),
        ]
        return make_fx(flat)(*example).graph

    def __call__(self, tensors: Mapping[str, Tensor], row: Mapping[str, float], index: Tensor) -> dict[str, Tensor]:
        """The results for flat `tensors`."""
        used = {name: tensors[name] for name in self.inputs}
        if self.run is None or not all(t.is_contiguous() for t in used.values()):
            numbers = torch.tensor(list(row.values()), dtype=tensors["x"].dtype)
            return self.program({**tensors, "row": numbers}, None, index)
        size = tensors["x"].numel()
        results = {name: used[name] if name in used else torch.empty_like(tensors["x"]) for name in self.written}
        numbers = [float(row[name]) for name in self.program.names]
        buffers = _buffers(tensors["x"].dtype, self.lines.buffers, min(size, PIECE))
        for start in range(0, size, PIECE):
            end = min(start + PIECE, size)
            window = {name: t[start:end] for name, t in used.items()}
            made = {name: window.get(name, results[name][start:end]) for name in results}
            self.run(window, made, numbers, [b[: end - start] for b in buffers])
        return results


_local = threading.local()


def _buffers(dtype: torch.dtype, count: int, size: int) -> list[Tensor]:
    """This thread's scratch, at least of the wanted size."""
    held: list[Tensor] = _local.__dict__.setdefault(str(dtype), [])
    if held and held[0].numel() < size:
        held.clear()
    held += [torch.empty(held[0].numel() if held else size, dtype=dtype) for _ in range(count - len(held))]
    return held[:count]
