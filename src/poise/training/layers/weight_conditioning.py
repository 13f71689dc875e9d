"""Weight conditioning: the forward pass uses a matrix whose rows, columns or both have been brought to one length."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from poise.catalog import Paper, choice, method
from poise.linalg.lengths import lengths
from poise.modules import Rows

from .reparameterization import Reparameterization

Sides = Literal["row", "column", "row_column"]


@method(
    "weight-conditioning",
    family="training",
    kind="parametrization",
    paper=Paper("Weight Conditioning for Smooth Optimization of Neural Networks", arxiv="2409.03424", year=2024),
    tune={"sides": choice("row", "column", "row_column"), "detach_preconditioner": choice(False, True)},
    mutant=("self._norms(matrix, 1)", "self._norms(matrix, 1).square()"),
)
class WeightConditioning(Reparameterization):
    """The layer uses `P W`, `P = diag(1 / ||W_i||)` made anew in every forward pass: a matrix with a lower condition number.

        row:         P W,       P = diag(1 / max(||row i of W||, 1e-12))
        column:      W Q,       Q = diag(1 / max(||column j of W||, 1e-12))
        row_column:  P W Q,     Q from P W; with `iterations` above 1 the two alternate

    By van der Sluis' theorem the condition number of `P W` is at most sqrt(outputs) times the lowest that any diagonal matrix
    before W can give. There is no gain to learn: that is the difference to `WeightNorm`, which it equals where g stays 1. The
    layer computes something else the moment it is reparameterized: do it before training, not to a trained model.

        reparameterize(model, WeightConditioning)
        ...
        fold(model)                                        # plain layers that hold P W

    Args:
        rows: how the layer stores its weight; `reparameterize` gives it. A convolution is (out, in * kernel).
        sides: "row".
        iterations: of "row_column": 1, rows and then columns.
        detach_preconditioner: whether P and Q count as constants in the backward pass. By default gradients flow through them,
            and the gradient of a row then stands at right angles to it.

    Raises:
        ValueError: an unknown setting; (from `reparameterize`) a zero row or column, which has no gradient.

    Source: "Weight Conditioning for Smooth Optimization of Neural Networks" (arXiv 2409.03424). Its authors' code
    was not found: rows, the floor and the gradient through P are as in two implementations written from the paper.
    """

    def __init__(self, rows: Rows, sides: Sides = "row", iterations: int = 1, detach_preconditioner: bool = False) -> None:
        super().__init__(rows)
        if sides not in get_args(Sides):
            raise ValueError(f"sides={sides!r}: must be one of {', '.join(get_args(Sides))}")
        if iterations < 1 or (iterations > 1 and sides != "row_column"):
            raise ValueError(f"iterations={iterations}: must be 1 or, where rows and columns alternate (row_column), more")
        self.sides: Sides = sides
        self.iterations, self.detach_preconditioner = iterations, detach_preconditioner

    def make(self, matrix: Tensor, *beside: Tensor) -> Tensor:
        for _ in range(self.iterations):
            if self.sides != "column":
                matrix = matrix / self._norms(matrix, 1)
            if self.sides != "row":
                matrix = matrix / self._norms(matrix, 0)
        return matrix

    def check(self, matrix: Tensor, name: str) -> None:
        for dim, spared in ((1, "column"), (0, "row")):
            if self.sides != spared:
                self.refuse_zeros(matrix, dim, name)

    def _norms(self, matrix: Tensor, dim: int) -> Tensor:
        return lengths(matrix.detach() if self.detach_preconditioner else matrix, dim)

    def extra_repr(self) -> str:
        return f"{self.sides!r}, iterations={self.iterations}, detach_preconditioner={self.detach_preconditioner}"
