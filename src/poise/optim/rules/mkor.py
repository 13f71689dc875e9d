"""MKOR: gradients between inverses of Kronecker factors that one vector a step keeps up to date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params, Route, everything
from ..routing.tree import clean
from ..transform import Context, Param, Slot, State, Transform, chain
from ..transforms.adaptive import adam
from ..transforms.blocks import matches
from ..transforms.momentum import momentum as momentum_link
from ..transforms.step import Decay

Form = Literal["exact", "official", "printed"]
Base = Literal["sgd", "adamw"]
Reset = Literal["identity", "blend"]

WEIGHTS = ("matrix", "head", "conv")
LIMITS: dict[Form, float] = {"exact": 1e3, "official": 2.0, "printed": 1e3}


class rank_one_factors(Transform):
    """A layer's gradient between two inverse factors, with its own length. See `MKOR`, whose options it has.

    It reads `k.input_mean` and `k.grad_mean`, fed in the shape of the joint matrix: a in each row, g in each column.
    """

    unit = "layer"
    fed_by = "attach poise.training.LayerMeans(model, opt)"

    def __init__(
        self,
        stat_decay: float = 0.95,
        every: int | None = 10,
        form: Form = "exact",
        stabilization_factor: float = 0.1,
        limit: float | None = None,
        reset: Reset = "identity",
        half_precision: bool = False,
    ) -> None:
        if not 0.0 < stat_decay < 1.0:
            raise ValueError(f"stat_decay={stat_decay}: must be in (0, 1)")
        if every is not None and every < 1:
            raise ValueError(f"inv_freq={every}: must be at least 1, or None for never")
        if form not in get_args(Form):
            raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(Form))}")
        if not 0.0 <= stabilization_factor <= 1.0:
            raise ValueError(f"stabilization_factor={stabilization_factor}: must be in [0, 1]")
        if limit is not None and not limit > 1.0:
            raise ValueError(f"stabilization_limit={limit}: must be above 1, or None")
        if reset not in get_args(Reset):
            raise ValueError(f"reset={reset!r}: must be 'identity' or 'blend'")
        self.inv_freq, self.reset, self.half_precision = every, reset, half_precision
        self.form: Form = form
        self.limit = LIMITS[form] if limit is None else limit
        self.feeds = () if every is None else ("input_mean", "grad_mean")
        self.defaults = {"stat_decay": stat_decay, "stabilization_factor": stabilization_factor}

    def slots(self, p: Param) -> dict[str, Slot]:
        if p.role == "bias":  # whose weight is elsewhere
            return {}
        dtype = torch.float16 if self.half_precision else torch.float32
        sizes = zip(("L_inv", "R_inv"), p.shape, strict=True)
        made = {name: Slot((n, n), dtype, init="eye", kind="exact", dims=(None, None)) for name, n in sizes}
        return made | ({"flagged": Slot((2,), init=1.0, kind="exact")} if self.form == "official" else {})

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        decay, blend = float(hyper["stat_decay"]), float(hyper["stabilization_factor"])
        return {
            "decay": decay,
            "blend": blend,
            "pull": min(1.0, max(blend, 2 * (1 - decay))),  # a refresh makes it 1 / decay times as large again
            "due": float(self.inv_freq is not None and (step - 1) % self.inv_freq == 0),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if "L_inv" not in state:
            return u
        if k.due:
            given = (("R_inv", k.input_mean[0]), ("L_inv", k.grad_mean[:, 0]))
            (self._either if self.form == "official" else self._follow)(given, state, k)
        D = state["L_inv"].to(u.dtype) @ u @ state["R_inv"].to(u.dtype)
        scale = _length(u, k.param.bias) / _length(D, k.param.bias)
        return torch.where(scale.isnan(), u, scale * D)

    def _follow(self, given: Sequence[tuple[str, Tensor]], state: State, k: Context) -> None:
        """Each factor takes its vector in."""
        for name, v in given:
            F = state[name].to(v.dtype)
            F = torch.where(F.abs().amax() > self.limit, _towards_identity(F, k.pull), F)
            u, rest = F @ v, 1 - k.decay
            if self.form == "exact":
                c = rest / (k.decay**2 * (1 + rest / k.decay * (v @ u)))
                state[name] = F / k.decay - c * torch.outer(u, u)
            else:
                c = rest / (k.decay**2 * (1 + k.decay * rest * (v @ u)))
                state[name] = k.decay * F + c * torch.outer(u, u)

    def _either(self, given: Sequence[tuple[str, Tensor]], state: State, k: Context) -> None:
        """The release's refresh: a flagged factor is reset, another takes its vector in; one that grew too large flags both."""
        flagged = [bool(flag) for flag in state["flagged"]]
        for i, (name, v) in enumerate(given):
            F = state[name].to(v.dtype)
            if flagged[i]:
                state[name] = _towards_identity(F, 1.0 if self.reset == "identity" else k.blend)
                flagged[i] = False
                continue
            P = _towards_identity(F, 1 - k.decay)
            u = P @ v
            F = state[name] = P - torch.outer(u, u) / (1 + v @ u)
            if bool(F.abs().amax() > self.limit):
                flagged = [True, True]
        state["flagged"] = torch.tensor(flagged, dtype=state["flagged"].dtype, device=state["flagged"].device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form!r}, inv_freq={self.inv_freq})"


class until_slow(rank_one_factors):
    """`rank_one_factors` until the loss falls too slowly for their price, then the plain gradient, for good.

    Every `window` steps, with r the fall per step of the smoothed loss in this window and r' that in the one before, the last
    refresh has been when `r < threshold r'`. The loss is smoothed with `2 / (window + 1)`.
    """

    needs_loss = True

    def __init__(self, window: int = 100, threshold: float = 0.1, *settings: Any) -> None:
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        super().__init__(*settings)
        self.window = window
        self.defaults = {**self.defaults, "switch_threshold": threshold}

    def slots(self, p: Param) -> dict[str, Slot]:
        made = super().slots(p)  # smoothed loss, its value at the beginning of the window, the last fall, whether it is over
        return made | ({"progress": Slot((4,), kind="exact")} if made else {})

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return super().scalars(step, hyper) | {
            "first": float(step == 1),
            "ends": float(step % self.window == 0),
            "compares": float(step >= 2 * self.window),
            "threshold": float(hyper["switch_threshold"]),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if "progress" not in state:
            return u
        smoothed, begin, before, over = state["progress"].unbind()
        assert k.loss is not None
        loss = k.loss.to(device=u.device, dtype=u.dtype)
        smoothed = loss if k.first else smoothed + 2 / (self.window + 1) * (loss - smoothed)
        begin = loss if k.first else begin
        if k.ends:
            fall = (begin - smoothed) / self.window
            over = torch.where(fall < k.threshold * before, torch.ones_like(over), over) if k.compares else over
            begin, before = smoothed, fall
        state["progress"] = torch.stack([smoothed, begin, before, over])
        return u if bool(over) else super().update(u, state, x, k)


def _towards_identity(F: Tensor, share: float) -> Tensor:
    return (1 - share) * F + share * torch.eye(len(F), dtype=F.dtype, device=F.device)


def _length(joint: Tensor, bias: bool) -> Tensor:
    """`||W|| + ||b||`."""
    return joint[:, :-1].norm() + joint[:, -1].norm() if bias else joint.norm()


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
    mutant=("F / k.decay - c", "k.decay * F + c"),
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
