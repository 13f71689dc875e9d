"""Signum: the sign of a momentum."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from poise.catalog import Paper, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import chain
from ..transforms.momentum import momentum as momentum_link
from ..transforms.sign import sign
from ..transforms.step import Decay


@method(
    "signum",
    family="optim",
    paper=Paper("signSGD: Compressed Optimisation for Non-Convex Problems", arxiv="1802.04434", year=2018),
    tune={"lr": log_uniform(1e-5, 1e-2), "weight_decay": log_uniform(1e-3, 3.0)},
    mutant=("average=True), sign()", "average=True)"),
)
class Signum(Optimizer):
    """signSGD with momentum: every entry moves by lr, in the direction of an average gradient.

        m <- beta m + (1 - beta) g
        x <- x - lr * ( sign(m) + weight_decay * x )

    Args:
        lr: 1e-4, the paper's; every entry moves by it.
        momentum: `beta`, 0.9; 0 is signSGD.
        weight_decay: 0.
        options: see `Optimizer`.

    State: 1 value per element. With `momentum=beta` it is Lion with both betas equal to beta. Source: "signSGD: Compressed
    Optimisation for Non-Convex Problems" (arXiv 1802.04434), whose decay is added to sign(m) as here.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, chain(momentum_link(momentum, average=True), sign()), lr, weight_decay, decay, **options)
