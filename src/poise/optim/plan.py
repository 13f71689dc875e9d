"""What an optimizer will do, before it does it: one line for each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine import shards, storage

if TYPE_CHECKING:
    from .engine.members import Member


@dataclass(frozen=True)
class Line:
    """One parameter: its rule and why, its state, and the root mean square of its update at the current learning rate."""

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    why: str
    lr: float
    state: str
    state_bytes: int
    update_rms: float


@dataclass(frozen=True)
class Plan:
    """The lines of all parameters; `print` shows them as a table, or iterate them."""

    lines: tuple[Line, ...]
    previewed_on: str

    @classmethod
    def of(
        cls,
        members: Sequence[Member],
        why: Mapping[str, str],
        preview: Callable[..., dict[str, Tensor]],
        grads: Mapping[Any, Tensor] | Sequence[Tensor] | None,
    ) -> Plan:
        """Describe `members`, previewing their updates on `grads`; `why` says by name what its rule took each for."""
        what = "the given gradients"
        if grads is None and any(m.tensor.grad is not None for m in members):
            what = "the current gradients"
        elif grads is None:
            what = "standard normal gradients"
            generator = torch.Generator().manual_seed(0)
            grads = {m.tensor: _normal(m.tensor, generator) for m in members if m.awake}
        updates = preview(grads)
        lines = []
        for m in members:
            formats = [
                store.codec.name if store.codec else str(store.dtype).removeprefix("torch.") for store in m.stores.values()
            ]
            u = updates.get(m.spec.name)
            rms = float(u.double().square().mean().sqrt()) if u is not None and u.numel() else 0.0
            held = sum(storage.nbytes(value) for key, value in m.state.items() if key != "step")
            lines.append(
                Line(m.spec.name, tuple(m.spec.shape), m.spec.role, m.group["rule"], why[m.spec.name], float(m.group["lr"]),
                     ("+".join(formats) or "none") if m.awake else "none (frozen)", held, rms)
            )  # fmt: skip
        return cls(tuple(lines), what)

    def __iter__(self) -> Any:
        return iter(self.lines)

    def __len__(self) -> int:
        return len(self.lines)

    def __str__(self) -> str:
        head = ("parameter", "shape", "role", "rule", "why", "lr", "state", "bytes", "update RMS")
        rows = [
            (line.name, "x".join(map(str, line.shape)) or "-", line.role, line.rule, line.why, f"{line.lr:.3g}", line.state,
             f"{line.state_bytes:,}", f"{line.update_rms:.3g}")
            for line in self.lines
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        right = (5, 7, 8)

        def text(row: Sequence[str]) -> str:
            cells = [
                cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            return "  ".join(cells).rstrip()

        total = sum(line.state_bytes for line in self.lines)
        elements = sum(torch.Size(line.shape).numel() for line in self.lines)
        foot = f"{elements:,} parameters, {total:,} bytes of state; update RMS on {self.previewed_on}"
        return "\n".join([text(head), text(tuple("-" * w for w in widths)), *map(text, rows), foot])


def _normal(p: Tensor, generator: torch.Generator) -> Tensor:
    local = shards.local(p)
    drawn = torch.randn(local.shape, generator=generator).to(device=local.device, dtype=local.dtype)
    return shards.like(p, drawn, tuple(p.shape), tuple(range(p.ndim)))
