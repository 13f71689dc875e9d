"""ECO: weights on a low-precision grid without a master copy; what rounding kept from them goes into the momentum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack, get_args

from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options, check_rate
from ..routing import Params
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import adam
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import Decay

Base = Literal["adam", "sgdm"]


class _Injecting(Transform):
    """The error of the write, divided by what the step multiplied the momentum by, handed to the momentum.

    `m <- m + (1 - 1 / b) e / a`, with `two_errors` exactly: `m <- m + (e_before - e / b) / a`.
    """

    key: str  # state of the momentum
    two_errors: bool
    decay_in_injection: bool
    min_lr: float

    def settings(self, two_errors: bool, decay_in_injection: bool, min_lr: float) -> None:
        check_rate("min_lr", min_lr)
        self.two_errors, self.decay_in_injection, self.min_lr = two_errors, decay_in_injection, min_lr

    def with_error(self, p: Param, slots: dict[str, Slot]) -> dict[str, Slot]:
        return slots | ({"last_error": Slot(tuple(p.shape))} if self.two_errors else {})

    def injection(self, hyper: Mapping[str, Any], b: float) -> dict[str, float]:
        lr = float(hyper["lr"]) * float(hyper.get("update_scale", 1.0))
        shrink = 1 - float(hyper["lr"]) * float(hyper["weight_decay"]) if self.decay_in_injection else 1.0
        by = shrink / lr if lr > self.min_lr and b > 0 else 0.0
        return {"before": by, "after": -by / b if b > 0 else 0.0}

    def inject(self, scaled: Tensor, error: Tensor, state: State, k: Context) -> None:
        """`scaled`: what a unit of displacement is of momentum, times lr."""
        before = error
        if self.two_errors:
            before = state["last_error"]
            state["last_error"] = error
        state[self.key] = state[self.key] + (k.before * before + k.after * error) * scaled


class eco_momentum(_Injecting, momentum_link):
    """`m <- mu m + (1 - mu) u`, result m; after the write `m <- m + (1 - 1 / mu) e / lr`."""

    key = "momentum_buffer"

    def __init__(self, momentum: float, two_errors: bool, decay_in_injection: bool, min_lr: float) -> None:
        momentum_link.__init__(self, momentum, average=True)
        self.settings(two_errors, decay_in_injection, min_lr)

    def slots(self, p: Param) -> dict[str, Slot]:
        return self.with_error(p, momentum_link.slots(self, p))

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return momentum_link.scalars(self, step, hyper) | self.injection(hyper, float(hyper["momentum"]))

    def written(self, error: Tensor, state: State, x: Tensor, k: Context) -> None:
        self.inject(error.new_ones(()), error, state, k)


class eco_adam(_Injecting, adam):
    """Adam's direction; after the write `m <- m + (1 - 1 / b1) e (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps) / lr`."""

    key = "exp_avg"

    def __init__(
        self, betas: tuple[float, float], eps: float, two_errors: bool, decay_in_injection: bool, min_lr: float
    ) -> None:
        adam.__init__(self, betas, eps)
        self.settings(two_errors, decay_in_injection, min_lr)

    def slots(self, p: Param) -> dict[str, Slot]:
        return self.with_error(p, adam.slots(self, p))

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return adam.scalars(self, step, hyper) | self.injection(hyper, float(hyper["betas"][0]))

    def written(self, error: Tensor, state: State, x: Tensor, k: Context) -> None:
        self.inject((state["exp_avg_sq"].sqrt() * k.debias2 + k.eps) / k.debias1, error, state, k)


@method(
    "eco",
    family="optim",
    paper=Paper("ECO: Quantized Training without Full-Precision Master Weights", arxiv="2601.22101", year=2026),
    tune={
        "lr": log_uniform(1e-5, 3e-2),
        "weight_decay": log_uniform(1e-3, 1.0),
        "betas": choice((0.9, 0.95), (0.9, 0.99), (0.9, 0.999)),
    },
    mutant=('"after": -by / b if', '"after": by / b if'),
)
class ECO(Optimizer):
    """AdamW, or SGD with momentum, on weights that exist in low precision only: no float32 master copy is kept.

    With q the rounding of weights to their grid and W its values, on which gradients are taken,

        m  <- b1 m + (1 - b1) G;   v <- b2 v + (1 - b2) G^2
        a   = lr / ((1 - b1^t) (sqrt(v / (1 - b2^t)) + eps))          base="sgdm": a = lr, b1 = momentum
        W~  = (1 - lr * weight_decay) W - a m
        W  <- q(W~);   e = W~ - W
        m  <- m + (1 - lr * weight_decay) (1 - 1 / b1) e / a

    The factor is negative: the momentum, which is subtracted, pays the error out over the following steps, with weights
    `(1 - b1) b1^j`, which add up to e. A master copy would be followed exactly with the errors of two steps,
    `(e_before - e / b1) / a`; that the two are alike is what saves keeping one (`two_errors=True` keeps it, and with
    base="sgdm" and a constant lr the weights are those of a float32 master, rounded).

    Args:
        lr: 1e-3. betas: (0.9, 0.999). eps: 1e-8. weight_decay: 0.01.
        base: "adam" or "sgdm". momentum: of "sgdm", 0.9.
        weights: the grid, of tensors of two and more dimensions but output heads: "int8" (a scale for each row), "int4" (one
            for 128 entries of a row), "fp8" (e4m3, a scale for each row), or a `poise.memory.grid.Grid`. Rounded stochastically
            unless the grid says otherwise; any other of `Optimizer`'s choices is that choice, with its errors fed back.
        two_errors: off; see above. 1 value more of state.
        decay_in_injection: the factor `1 - lr * weight_decay` of the injection, without which decay pulls at the error too; the
            paper's algorithms leave it out.
        min_lr: 1e-8. Below it nothing is injected: e / lr would grow without bound.
        options: see `Optimizer`.

    The parameters stay tensors of their own dtype and hold values of the grid; codes and scales follow from them. State: as of
    the base. Source: "ECO: Quantized Training without Full-Precision Master Weights" (arXiv 2601.22101). Scales are found anew
    in every step.

    Raises:
        ValueError: for a base that is not known, and for b1 or momentum 0, which hands nothing on.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        base: Base = "adam",
        momentum: float = 0.9,
        two_errors: bool = False,
        decay_in_injection: bool = True,
        min_lr: float = 1e-8,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        if base not in get_args(Base):
            raise ValueError(f"base={base!r}: must be one of {', '.join(map(repr, get_args(Base)))}")
        if (betas[0] if base == "adam" else momentum) <= 0:
            raise ValueError(
                f"{'betas' if base == 'adam' else 'momentum'}: without momentum there is nothing to hand an error to"
            )
        rule: Transform
        if base == "adam":
            rule = eco_adam(betas, eps, two_errors, decay_in_injection, min_lr)
        else:
            rule = eco_momentum(momentum, two_errors, decay_in_injection, min_lr)
        options.setdefault("weights", "int8")
        super().__init__(params, chain(rule), lr, weight_decay, decay, **options)
