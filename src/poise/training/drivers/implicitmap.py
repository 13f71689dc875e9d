"""Implicit MAP filtering: on every observation a few steps, by an optimizer that remembers nothing of those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.catalog import Paper, choice, method

from .. import keeping, weights
from ..driver import Driver

Predict = Callable[[list[Tensor], int], Sequence[Tensor]]


@method(
    "implicit-map",
    family="training",
    kind="driver",
    paper=Paper("Implicit Maximum a Posteriori Filtering via Adaptive Optimization", arxiv="2311.10580", year=2023),
    tune={"steps": choice(1, 2, 5, 10, 20, 50)},
    mutant=("range(self.steps - 1)", "range(self.steps)"),
)
class ImplicitMAP(Driver):
    """A filter for data that arrive in time: predict, then K steps of a fresh optimizer on the newest observation alone.

        w <- F(w, t)                        t observations after the first
        forget the optimizer's state
        K times: w <- one step of the inner optimizer, on the loss of this observation

    A `step(closure)` takes one observation in: the closure's loss is its negative log-likelihood, such as
    `(y - h(w))^T R^-1 (y - h(w)) / 2` or any loss of a batch. No prior is written down: the optimizer, its settings and K
    are the prior, narrow for few steps and small rates. For linear Gaussian models `poise.linalg.kalman` has the preconditioner
    with which gradient descent is the Kalman filter.

    Args:
        opt: any optimizer; gradient descent, Adam, RMSprop, Adagrad and Adadelta in the paper.
        steps: K, 50, with Adam at lr 1e-3, the paper's for classification. Each is a pass.
        predict: F, given the weights in the order of the groups, in full precision, and t, which is 0 at first; returns the new
            ones. None: the weights stay.
        fresh: False lets the optimizer's state run on, to see what forgetting does.

    The returned loss is that of the first pass, before the observation was used. What drivers inside keep runs on, averages for
    instance. The noise that rounds bfloat16 weights begins anew with the state, so keep them with weights="split".
    State: a count. Source: "Implicit Maximum a Posteriori Filtering via Adaptive Optimization" (arXiv 2311.10580). The released
    Adam for its nonlinear problems corrects its bias by one constant factor; here the inner optimizer is what it is.
    """

    needs_closure = True

    def __init__(
        self, opt: torch.optim.Optimizer, steps: int = 50, predict: Predict | None = None, *, fresh: bool = True
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1")
        if predict is not None and not callable(predict):
            raise TypeError(f"predict={predict!r}: must be a function of the weights and t, or None")
        self.steps, self.predict, self.fresh = steps, predict, fresh
        super().__init__(opt, own={"step": 0})

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        if self.predict is not None:
            self._move(self.predict)
        self.own["step"] += 1
        if self.fresh:
            keeping.begin_anew(self.base)
        loss = self.inner_step(closure)
        for _ in range(self.steps - 1):
            self.inner_step(closure)
        return loss

    def _move(self, predict: Predict) -> None:
        params = self.parameters()
        moved = list(predict([weights.read(self, p).clone() for p in params], self.own["step"]))
        shapes, wanted = ([tuple(t.shape) for t in some] for some in (moved, map(weights.local, params)))
        if shapes != wanted:
            raise ValueError(f"predict: gave tensors of shapes {shapes}; the weights have {wanted}")
        for p, value in zip(params, moved, strict=True):
            weights.write(self, p, value)
