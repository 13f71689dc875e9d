"""What a layer may hold in place of its weight, and how the weight, one row for each output, is made of it."""

from __future__ import annotations

from torch import Tensor, nn

from poise.linalg.lengths import wide
from poise.modules import Rows


class Reparameterization(nn.Module):
    """A weight made from what is stored. Subclasses say how: `make`, and `split` if something is stored beside a matrix.

    It is a parametrization of `torch.nn.utils.parametrize`. What is stored is a tensor of the weight's own shape and dtype and,
    before it, what `split` returns. Arithmetic is float32, or float64 for float64 weights, whatever dtype they are kept in.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def make(self, matrix: Tensor, *beside: Tensor) -> Tensor:
        """The weight as (outputs, rest), from the stored matrix seen in the same way and what is stored beside it."""
        raise NotImplementedError(f"{type(self).__name__}.make")

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """What to store beside a weight, given as (outputs, rest), so that `make` returns it."""
        return ()

    def attached(self, *stored: nn.Parameter) -> None:
        """Told of the parameters that hold what is stored, in the order of `forward`, once a layer has them: to freeze some."""

    def check(self, matrix: Tensor, name: str) -> None:
        """Raise ValueError if the weight called `name`, given as (outputs, rest), cannot be held like this."""

    def refuse_zeros(self, matrix: Tensor, dim: int, name: str) -> None:
        """Raise ValueError if a row (dim 1) or a column (dim 0) is zero: it has no direction, and so no useful gradient."""
        empty = (matrix == 0).all(dim)
        if empty.any():
            raise ValueError(
                f"{name!r}: {'row' if dim == 1 else 'column'} {int(empty.nonzero()[0])} of {len(empty)} is zero, and "
                f"{type(self).__name__} needs a direction; draw the weight at random first, or leave this layer out"
            )

    def forward(self, *stored: Tensor) -> Tensor:
        *beside, weight = stored
        made = self.make(self.rows.view(wide(weight)), *map(wide, beside))
        return self.rows.stored(made, weight.shape).to(weight.dtype)

    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        kept = weight.clone()  # torch would let what is stored share the memory of a tensor that belongs to the caller
        beside = self.split(self.rows.view(wide(kept)))
        return (*(t.to(kept.dtype) for t in beside), kept) if beside else kept
