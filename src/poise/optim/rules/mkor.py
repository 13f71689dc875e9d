"""MKOR: gradients between inverses of Kronecker factors that one vector a step keeps up to date."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from poise.catalog import Paper, choice, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params, Route, everything
from ..routing.tree import clean
from ..transform import Param, Transform, chain
from ..transforms.adaptive import adam
from ..transforms.blocks import matches
from ..transforms.momentum import momentum as momentum_link
from ..transforms.rank_one_factors import Form, Reset, rank_one_factors, until_slow
from ..transforms.step import Decay

Base = Literal["sgd", "adamw"]

WEIGHTS = ("matrix", "head", "conv")


class _taken:
    """Takes weights and biases of linear layers and 2-D convolutions, but for those of `skip`."""

    def __init__(self, params: Any, skip: Sequence[str]) -> None:
        self.skip = tuple(skip)
        self.layers = _working(params) if isinstance(params, nn.Module) else None

    def __call__(self, p: Param) -> str | None:
        names = [p.name] if p.layer is None else [p.name, p.layer]
        if any(matches(pattern, name) for pattern in self.skip for name in names):
            return None
        if self.layers is not None and p.layer not in self.layers:
            return None
        if p.role == "bias":
            return "bias of a layer" if p.layer is not None and len(p.shape) == 1 else None
        reads_data = self.layers is not None and p.role == "embedding" and len(p.shape) == 4  # the first convolution
        fits = len(p.shape) == (4 if p.role in ("conv", "embedding") else 2)
        if not (p.role in WEIGHTS or reads_data) or not fits or p.inputs_first or not p.shape.numel():
            return None
        return f"{p.role} as {p.matrix[0]} x {p.matrix[1]}"


def _working(model: nn.Module) -> set[str]:
    """Paths of the layers whose own forward pass is run: not those that nn.MultiheadAttention only keeps weights in."""
    inside = {m for one in model.modules() if isinstance(one, nn.MultiheadAttention) for m in one.modules()}
    return {
        clean(f"{path}.weight").removesuffix("weight").removesuffix(".")
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and getattr(module, "groups", 1) == 1 and module not in inside
    }


@method(
    "mkor",
    family="optim",
    paper=Paper(
        "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1 Updates",
        arxiv="2306.01685",
        year=2023,
    ),
    tune={"lr": log_uniform(1e-3, 1.0), "weight_decay": log_uniform(1e-5, 1e-1), "stat_decay": choice(0.9, 0.95, 0.99)},
    mutant=("chain(factors, rest)", "chain(rest, factors)"),
    exempt={
        "the_state_of_a_large_matrix_takes_the_bytes_it_should": "inverse factors, which are most of it, are not encoded: what "
        "is lost of them does not come back, as no factor is ever computed anew",
    },
)
class MKOR(Optimizer):
    """K-FAC with inverse factors that are updated by one vector each, in front of SGD or AdamW.

    For each linear layer and 2-D convolution (as (out, in * kernel)), every f steps, with a the mean of its inputs, 1 for the
    bias, and g the mean of the gradients at its outputs, each row's own:

        R <- c R + (1 - c) a a^T;   L <- c L + (1 - c) g g^T       from I on; only the inverses are kept:
        u = L^-1 g;   L^-1 <- L^-1 / c - (1 - c) / (c^2 (1 + (1 - c) / c g.u)) u u^T

    and in each step, with D = [dW | db],

        P = L^-1 D R^-1;   P <- P (||dW|| + ||db||) / (||P_W|| + ||P_b||);   SGD or AdamW on P

    All other parameters, and layers of `skip`, go to SGD or AdamW as they are.

    The means come from hooks: `poise.training.LayerMeans(model, opt)` attaches them. Without it, give them before each step by
    `opt.feed(input_mean=..., grad_mean=...)`, in the shape of the parameters; else step() raises RuntimeError.

    Args:
        lr: 0.1.
        stat_decay: c, 0.95.
        base: "sgd" with heavy-ball momentum, "adamw", or any rule, which sees P as its gradient.
        momentum: 0.9. betas, eps: (0.9, 0.999), 1e-8, of AdamW.
        weight_decay: 0, decoupled.
        inv_freq: f, 10: factors are updated in steps 1, f + 1, ... None: never, which is the base rule alone.
        form: "exact". "official", as in the release: `P = c L^-1 + (1 - c) I;   L^-1 <- P - P g (P g)^T / (1 + g.P g)`, the
            inverse of `P^-1 + g g^T`; its first refresh leaves I. "printed", as in the paper: `L^-1 <- c L^-1 + (1 - c) /
            (c^2 (1 + c (1 - c) g.u)) u u^T`, which stays positive definite but is the inverse of nothing.
        stabilization_factor, stabilization_limit: where an entry of an inverse exceeds the limit in size, 1000, it is first
            brought nearer to I, by a tenth (by 2 (1 - c) if that is more): directions that no vector has shown for long grow as
            c^-t. The limit of the "official" form is 2, and a factor beyond it flags both of its layer, to be reset.
        reset: of the "official" form: to the "identity", or "blend", by stabilization_factor, which its code never does.
        half_precision: inverses kept in float16, as in the release.
        hybrid: MKOR-H: once the loss falls too slowly, all layers go to the base rule as they are, for good. Every `window`
            steps (100) the fall of the smoothed loss per step is compared with that of the window before; less than
            `switch_threshold` of it, 0.1, is too slow. Step with a closure that returns the loss, the same on every rank.
        skip: patterns, as of `by_name`, of layers or parameters that are left to the base rule: those whose forward pass is not
            their own. From a module, the insides of nn.MultiheadAttention and grouped convolutions are left out by themselves.
        options: see `Optimizer`.

    State: that of the base rule, and 4 bytes for each entry of L^-1 and R^-1, `rows^2 + (columns + 1)^2`; not encoded. Source:
    "MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1 Updates" (arXiv 2306.01685) and its release. Exact is
    what their derivation aims at. The rule of MKOR-H is not in the release, and its numbers are ours.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.1,
        stat_decay: float = 0.95,
        base: Base | Transform = "sgd",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        inv_freq: int | None = 10,
        form: Form = "exact",
        stabilization_factor: float = 0.1,
        stabilization_limit: float | None = None,
        reset: Reset = "identity",
        half_precision: bool = False,
        hybrid: bool = False,
        window: int = 100,
        switch_threshold: float = 0.1,
        skip: Sequence[str] = (),
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        if base == "sgd":
            rest: Transform = momentum_link(momentum)
        elif base == "adamw":
            rest = adam(betas, eps)
        elif isinstance(base, Transform):
            rest = base
        else:
            raise ValueError(f"base={base!r}: must be 'sgd', 'adamw' or a rule")
        settings = (stat_decay, inv_freq, form, stabilization_factor, stabilization_limit, reset, half_precision)
        factors = until_slow(window, switch_threshold, *settings) if hybrid else rank_one_factors(*settings)
        routes = [Route("mkor", chain(factors, rest), _taken(params, skip)), Route("rest", rest, everything)]
        super().__init__(params, routes, lr, weight_decay, decay, **options)
