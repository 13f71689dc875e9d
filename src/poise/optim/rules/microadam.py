"""MicroAdam: Adam's averages from a window of sparse gradients, with what was left out fed back from 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method
from poise.memory import asymmetric
from poise.memory.sparse import TopK, check_kept

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import check_betas, check_eps
from ..transforms.gradient_window import check_window
from ..transforms.step import Decay


class micro_adam(Transform):
    """The link of `MicroAdam`, which has the formula and the arguments."""

    unit = "tensor"
    blind = True

    def __init__(
        self,
        betas: tuple[float, float],
        eps: float,
        window: int,
        top: TopK,
        quant_block: int,
        alpha: float,
        value_dtype: torch.dtype,
        error_feedback: bool,
    ) -> None:
        self.window, self.top, self.quant_block = window, top, quant_block
        self.value_dtype, self.error_feedback = value_dtype, error_feedback
        self.defaults = {"betas": tuple(betas), "eps": eps, "alpha": alpha}

    def slots(self, p: Param) -> dict[str, Slot]:
        d = p.shape.numel()
        kept = (self.window, self.top.kept(d))
        ring = {
            "places": Slot(kept, torch.int16, kind="exact"),
            "values": Slot(kept, self.value_dtype, kind="exact"),
        }
        if not self.error_feedback:
            return ring
        count, size = asymmetric.shape(d, self.quant_block)
        error = {
            "error": Slot((count, size // 2), torch.uint8, kind="exact"),
            "error_lo": Slot((count,), torch.bfloat16, kind="exact"),
            "error_hi": Slot((count,), torch.bfloat16, kind="exact"),
        }
        return ring | error

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"])
        return {
            "b1": b1,
            "b2": b2,
            "scale1": (1 - b1) / (1 - b1**step),
            "scale2": (1 - b2) / (1 - b2**step),
            "eps": float(hyper["eps"]),
            "alpha": float(hyper["alpha"]),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        d = u.numel()
        a = (u + self.fed_back(state, u)).reshape(-1)
        chosen = self.top.choose(a)
        where = self.top.where(chosen, d)
        places, values = state["places"], state["values"]
        newest = (k.step - 1) % self.window
        places[newest], values[newest] = chosen, a[where].to(values.dtype)
        state["places"], state["values"] = places, values
        a[where] = 0.0
        self.keep(a, state)
        out = self.direction(places, values, d, u.dtype, k).reshape(u.shape)
        if k.alpha > 0:
            e = self.fed_back(state, u)
            out = out + k.alpha * e
            self.keep((1 - k.alpha) * e.reshape(-1), state)
        return out

    def direction(self, places: Tensor, values: Tensor, d: int, dtype: torch.dtype, k: Context) -> Tensor:
        """Adam's, of the gradients in the window."""
        m, v = torch.zeros(2, d, dtype=dtype, device=values.device)
        filled = min(k.step, self.window)
        where = self.top.where(places[:filled], d)
        for row in range(filled):
            age, g = (k.step - 1 - row) % self.window, values[row].to(dtype)
            m.index_add_(0, where[row], g, alpha=k.b1**age)
            v.index_add_(0, where[row], g.square(), alpha=k.b2**age)
        # only what a row holds is not zero; one that several hold is written as often, with the same number
        there = where.reshape(-1)
        moved = k.scale1 * m[there] / ((k.scale2 * v[there]).sqrt() + k.eps)
        return m.zero_().index_put_((there,), moved)

    def fed_back(self, state: State, u: Tensor) -> Tensor:
        """The error as it is kept, in the shape of the update."""
        if not self.error_feedback:
            return torch.zeros_like(u)
        error = asymmetric.decode(state["error"], state["error_lo"], state["error_hi"], u.numel(), u.dtype)
        return error.reshape(u.shape)

    def keep(self, error: Tensor, state: State) -> None:
        """Keep what was not chosen."""
        if self.error_feedback:
            state["error"], state["error_lo"], state["error_hi"] = asymmetric.encode(error, self.quant_block)


@method(
    "micro-adam",
    family="optim",
    paper=Paper(
        "MicroAdam: Accurate Adaptive Optimization with Low Space Overhead",
        arxiv="2405.15593",
        year=2024,
    ),
    tune={
        "lr": log_uniform(1e-5, 1e-2),
        "density": choice(0.01, 0.03, 0.1),
        "weight_decay": log_uniform(1e-3, 1.0),
    },
    mutant=("a[where] = 0.0", "pass"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "it is in few bits already, 16 for "
        "places, 16 for values and 4 for errors, less than a byte an element in all",
        "hyper_parameters_changed_in_a_group_take_effect": "density decides the sizes of the state and can be no entry of a "
        "group; its own file tests those that are",
    },
)
class MicroAdam(Optimizer):
    """Adam whose averages are made anew in every step from the last m gradients, of each of which 1% is kept.

    For each parameter, flattened, with e the error as kept in 4 bits:

        a = g + e
        ring row t mod m <- the largest of a, the same share of every block;   those entries of a <- 0;   e <- a in 4 bits
        m = (1 - b1) / (1 - b1^t) sum_s b1^s V_s,   v = (1 - b2) / (1 - b2^t) sum_s b2^s V_s^2   over rows V_s of age s < m
        u = m / (sqrt(v) + eps)  + alpha * e;       with alpha > 0 then  e <- (1 - alpha) e
        x <- x - lr * ( u + weight_decay * x )

    What is not among the largest waits in e until it is. With alpha = 0 only entries that a row of the window holds move.

    The corrections `1 - b^t` are Adam's, though the window forgets: for t far above m, v is about m / t of Adam's, until t is
    1 / (1 - b2), and steps are larger for it. This is as published.

    Args:
        lr: 1e-3. betas: (0.9, 0.999). eps: 1e-8. weight_decay: 0.
        window: m, 10.
        density: 0.01, the share kept; at least one entry of each block.
        block: 4096 neighbours, at most 32768, since a place within its block is an int16. The release takes what fits its GPU.
        quant_block: 64 neighbours share the ends of their 16 levels; even.
        alpha: 0, in [0, 1). The authors' later addition, which makes updates dense.
        value_dtype: of kept gradients, torch.bfloat16 or torch.float32.
        error_feedback: off drops what is not kept, and the entries that are never among the largest never move.
        options: see `Optimizer`.

    State: 4 m density + 0.5 + 4 / quant_block bytes an element, 0.96 with the defaults. Under FSDP2 each rank keeps all of it.

    Source: "MicroAdam: Accurate Adaptive Optimization with Low Space Overhead" (arXiv 2405.15593) and its release. Unlike
    there, what is not stored is computed in float32, and the ends of the levels are rounded outwards.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        window: int = 10,
        density: float = 0.01,
        block: int = 4096,
        quant_block: int = 64,
        alpha: float = 0.0,
        value_dtype: torch.dtype = torch.bfloat16,
        error_feedback: bool = True,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        check_betas(betas)
        check_eps(eps)
        check_window(window)
        check_kept("value_dtype", value_dtype)
        if quant_block < 2 or quant_block % 2:
            raise ValueError(f"quant_block={quant_block}: must be even, from 2 on")
        if not 0.0 <= alpha < 1.0:
            raise ValueError(f"alpha={alpha}: must be in [0, 1)")
        if alpha and not error_feedback:
            raise ValueError(f"alpha={alpha}: is a share of the error, which error_feedback=False does not keep")
        top = TopK(density, block)
        rule = micro_adam(betas, eps, window, top, quant_block, alpha, value_dtype, error_feedback)
        super().__init__(params, chain(rule), lr, weight_decay, decay, **options)
