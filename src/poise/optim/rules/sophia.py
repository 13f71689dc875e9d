"""Sophia: momentum over the diagonal of the Hessian, clipped entry by entry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method

from ..engine import shards
from ..optimizer import Optimizer
from ..options import Options, check_rate
from ..routing import Params
from ..transform import Context, Param, Slot, State, Transform
from ..transforms.adaptive import check_betas
from ..transforms.step import Decay

TINY = 1e-15  # the authors'


class sophia(Transform):
    """Sophia's direction: `clip(m / (rho samples max(h, 0) + 1e-15), -1, 1)`.

    `m <- b1 m + (1 - b1) u`; where `opt.feed(hessian=...)` gave an estimate, first `h <- b2 h + (1 - b2) hessian`.

    Args:
        betas: `(b1, b2)`, each in [0, 1).
        rho: not negative; 0 is the sign of m.
        samples: positive.
    """

    may_feed = ("hessian",)

    def __init__(self, betas: tuple[float, float] = (0.965, 0.99), rho: float = 0.04, samples: float = 1.0) -> None:
        check_betas(betas)
        check_rate("rho", rho)
        if not samples > 0:
            raise ValueError(f"samples={samples}: must be positive")
        self.defaults = {"betas": tuple(betas), "rho": rho, "samples": samples}

    def slots(self, p: Param) -> dict[str, Slot]:
        # h is signed: estimates by Hutchinson are, and an average of them without its negative ones would be too large
        return {"exp_avg": Slot(tuple(p.shape)), "hessian": Slot(tuple(p.shape))}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        return {"b1": b1, "c1": 1 - b1, "b2": b2, "c2": 1 - b2, "scale": float(hyper["rho"]) * float(hyper["samples"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        m = state["exp_avg"] = k.b1 * state["exp_avg"] + k.c1 * u
        if k.hessian is not None:
            state["hessian"] = k.b2 * state["hessian"] + k.c2 * k.hessian
        return (m / (k.scale * state["hessian"].clamp(min=0.0) + TINY)).clamp(-1.0, 1.0)


@method(
    "sophia",
    family="optim",
    paper=Paper("Sophia: A Scalable Stochastic Second-order Optimizer", arxiv="2305.14342", year=2023),
    tune={
        "lr": log_uniform(1e-5, 1e-2),
        "rho": log_uniform(1e-3, 1.0),
        "weight_decay": log_uniform(1e-3, 1.0),
        "betas": choice((0.9, 0.99), (0.965, 0.99)),
    },
    mutant=("k.c2 * k.hessian", "k.hessian"),
)
class Sophia(Optimizer):
    """Momentum over a cheap estimate of the diagonal Hessian, clipped so that no entry moves by more than lr.

        h <- b2 h + (1 - b2) hessian                    in steps before which `opt.feed(hessian=...)` gave an estimate
        m <- b1 m + (1 - b1) g                          no bias correction
        x <- (1 - lr * weight_decay) x - lr * clip(m / (rho samples max(h, 0) + 1e-15), -1, 1)

    Where the curvature is large against m it is a step of Newton's method with learning rate lr / rho; everywhere else, and in
    every entry before the first estimate, it is `lr sign(m)`. Estimates are taken every 10 steps or so, at the weights of the
    step that they are fed to. `poise.training.curvature` has those of the paper:

        opt = Sophia(model, lr=1e-4)
        feed_hessian(opt, lambda step: gauss_newton_bartlett(model, lambda: model(inputs), seed=step), every=10)

    is Sophia-G, and with `hutchinson(model, lambda: loss(model(inputs)), seed=step)` it is Sophia-H. Without estimates it is
    signed momentum.

    Args:
        lr: 1e-4; some 0.8 of AdamW's for language models.
        betas: (0.965, 0.99). b2 counts estimates, not steps.
        rho: 0.04, gamma of the paper, which has 0.05 for G and 0.01 for H. Tune it until `win_rate()` is 0.1 to 0.5.
        weight_decay: 0.1; 0.2 in the authors' GPT-2 runs.
        samples: 1 for estimates of the Hessian's diagonal, such as poise's. B if what is fed are bare squares of the mean
            gradient over B sampled labels, as the authors' code averages them.
        options: see `Optimizer`.

    Raises:
        ValueError: for betas outside [0, 1), a negative rho, samples that are not positive.

    The authors' runs clip the norm of all gradients to 1 before the step. State: 2 values per element. Source: "Sophia: A
    Scalable Stochastic Second-order Optimizer" (arXiv 2305.14342) and its code, which is followed where they differ: in rho, in
    adding 1e-15 where the paper takes a maximum, and in the first estimate, which comes after some steps. A negative h, which
    only Hutchinson's estimates give, counts as 0: the paper's maximum does that, the code, which is for G alone, would walk
    uphill.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.965, 0.99),
        rho: float = 0.04,
        weight_decay: float = 0.1,
        *,
        samples: float = 1.0,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, sophia(betas, rho, samples), lr, weight_decay, decay, **options)

    @torch.no_grad()
    def win_rate(self) -> float:
        """The share of entries that the last step did not clip, 0 before the first estimate: the measure to set rho by."""
        inside = entries = 0
        for m in self._current().members:
            average, curvature = (m.stores[name].read(m.state) for name in ("exp_avg", "hessian"))
            scale = float(m.group["rho"]) * float(m.group["samples"])
            won = (average.abs() < scale * curvature.clamp(min=0.0) + TINY) & (curvature > 0)
            counted = torch.tensor([int(won.sum()), won.numel()], device=m.device)
            counted = shards.add_up(counted, shards.groups(m.tensor))
            inside, entries = inside + int(counted[0]), entries + int(counted[1])
        return inside / max(entries, 1)
