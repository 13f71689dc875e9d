"""Weights that exist on the grid of a low-precision format only: rounding to it and back, row by row or group by group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The values that weights of one format can have.

    A tensor is seen as rows, its first dimension apart; each row, or each group of `group` consecutive entries of it, has a
    scale of its own, by which its largest magnitude becomes the largest value of the format:

        int8, int4:   round(x / s) s with s = max |x| / n,  n = 127 or 7
        fp8:          the nearest e4m3 number to x / s, times s,  s = max |x| / 448

    Args:
        bits: 8 or 4. floating: e4m3, of 8 bits. group: None for whole rows.
        scale: one s for all, fixed; what is too large for it becomes the largest value.
        stochastic: optimizers round to it stochastically, else to nearest.
    """

    bits: int = 8
    floating: bool = False
    group: int | None = None
    scale: float | None = None
    stochastic: bool = True

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"Grid(scale={self.scale}): must be positive, or None for the scale of each row or group")
        if self.bits not in (4, 8) or (self.floating and self.bits != 8):
            raise ValueError(f"Grid(bits={self.bits}, floating={self.floating}): 8 or 4 bits, of which floating ones are 8")
        if self.group is not None and self.group < 1:
            raise ValueError(f"Grid(group={self.group}): must be at least 1, or None for whole rows")

    @property
    def largest(self) -> float:
        """The format's largest value."""
        return 448.0 if self.floating else 2.0 ** (self.bits - 1) - 1

    def rounded(self, x: Tensor, uniform: Tensor | None = None) -> Tensor:
        """x on the grid, in the dtype and shape of x.

        Scales follow from x itself. What is on a grid already may move by a rounding of its scale, no further.

        Args:
            x: (rows, ...), float32 or float64; not of fewer than two dimensions.
            uniform: numbers in [0, 1) of x's shape: rounds up or down with the probabilities that make the mean x. None: to
                nearest.
        """
        if x.numel() == 0:
            return x.clone()
        rows = x.reshape(len(x), -1)
        length = rows.shape[1]
        group = min(self.group or length, length)
        short = -length % group
        cells = torch.nn.functional.pad(rows, (0, short)).view(-1, group)
        noise = None
        if uniform is not None:
            noise = torch.nn.functional.pad(uniform.reshape(rows.shape).to(x.dtype), (0, short)).view(-1, group)
        return self.cells(cells, noise).view(len(x), -1)[:, :length].reshape(x.shape)

    def cells(self, cells: Tensor, uniform: Tensor | None = None) -> Tensor:
        """As `rounded`, for a matrix whose rows have a scale each."""
        scale = cells.abs().amax(1, keepdim=True) / self.largest
        if self.scale is not None:
            scale = torch.full_like(scale, self.scale)
        y = cells / torch.where(scale > 0, scale, 1.0)
        spacing = self._spacing(y)
        # to nearest, halves to even, as a cast would
        turned = torch.round(y / spacing) if uniform is None else torch.floor(y / spacing + uniform)
        return (turned * spacing).clamp(-self.largest, self.largest) * scale

    def runs(self, rows: int, length: int) -> tuple[tuple[int, int], ...] | None:
        """Numbers and lengths of the pieces with a scale each, of so many rows; None where they are not alike."""
        group = min(self.group or length, length)
        if not rows * length:
            return ()
        return None if length % group else ((rows * length // group, group),)

    def _spacing(self, y: Tensor) -> Tensor:
        """Distance of the grid's values around y."""
        if not self.floating:
            return torch.ones((), dtype=y.dtype, device=y.device)
        _, exponent = torch.frexp(y)  # |y| in [2^(e-1), 2^e): three bits after the leading one, down to the subnormal 2^-9
        return torch.ldexp(torch.ones_like(y), (exponent - 4).clamp_min(-9))


GRIDS = {"int8": Grid(), "int4": Grid(4, group=128), "fp8": Grid(floating=True)}

__all__ = ["GRIDS", "Grid"]
