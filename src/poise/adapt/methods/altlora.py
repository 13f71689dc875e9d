"""AltLoRA: each factor of a low-rank product moves by the part of the full gradient that its partner lets through."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, log_uniform, method
from poise.optim import Context, Optimizer, Param, Route, Slot, Transform, everything
from poise.optim.options import Options
from poise.optim.routing import collect
from poise.optim.skeleton import AdamWRest
from poise.optim.transform import State
from poise.optim.transforms.adaptive import adam, check_betas, check_eps

from ..registry import pairs

PAPER = Paper(
    "Towards Better Gradient Approximation in Low-Rank Adaptation with Alternating Projections", arxiv="2505.12455", year=2025
)


@dataclass(frozen=True)
class Factor:
    """One factor of a product s B A, and the other.

    Attributes:
        down: whether it is A.
        other: name of the other one.
        shape: of the other one.
        scale: s.
        leads: whether it moves in the very first step.
    """

    down: bool
    other: str
    shape: tuple[int, ...]
    scale: float
    leads: bool


class through_the_other(Transform):
    """Direction of one factor of a product, projected through the other. See `AltLoRA`.

    State: the momentum, and the other factor as it was at this one's last step, by which the momentum is carried over.

    Args:
        factors: by name of the parameter.
        betas: (b1,), or (b1, b2) of AltLoRA+.
        ridge, scaled: see `AltLoRA`.
        eps: of AltLoRA+.
    """

    unit = "tensor"
    feeds = ("other",)
    fed_by = "use AltLoRA, which does so"

    def __init__(self, factors: Mapping[str, Factor], ridge: float, scaled: bool, **hyper: Any) -> None:
        if not ridge >= 0.0:
            raise ValueError(f"ridge={ridge}: must not be negative")
        self.factors, self.scaled, self.adaptive = factors, scaled, "betas" in hyper
        self.defaults = {"ridge": ridge, **hyper}

    def fed_shapes(self, p: Param) -> dict[str, tuple[int, ...]]:
        return {"other": self.factors[p.name].shape}

    def slots(self, p: Param) -> dict[str, Slot]:
        # A basis is kept as it is: an error in it would be one of all that the momentum remembers.
        other = Slot(self.factors[p.name].shape, kind="exact", dims=(None, None))
        kept = {"exp_avg": Slot(tuple(p.shape)), "other": other}
        return kept | ({"exp_avg_sq": Slot(tuple(p.shape), kind="nonneg")} if self.adaptive else {})

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        b1, b2 = map(float, hyper["betas"]) if self.adaptive else (float(hyper["momentum"]), 0.0)
        eps = float(hyper["eps"]) if self.adaptive else 0.0
        return {"b1": b1, "b2": b2, "eps": eps, "ridge": float(hyper["ridge"]), "debias": 1 / (1 - b1**step)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        factor = self.factors[k.param.name]

        def turned(t: Tensor) -> Tensor:  # of a product's transpose, B is what A is of the product
            return t if factor.down else t.mT

        g, m, B, before = turned(u), turned(state["exp_avg"]), turned(k.other), turned(state["other"])
        gram = B.mT @ B
        L, failed = torch.linalg.cholesky_ex(gram + k.ridge * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
        sound = failed == 0  # asked on the device: a GPU is not waited for
        projected = torch.cholesky_solve(g, L) / (factor.scale**2 if self.scaled else 1.0)
        projected = torch.where(sound, projected, g)
        carried = torch.where(sound, torch.cholesky_solve(B.mT @ before, L) @ m, m)
        m = k.b1 * carried + (1 - k.b1) * projected
        state["exp_avg"], state["other"] = turned(m), k.other
        if not self.adaptive:
            return turned(k.debias * m)
        v = state["exp_avg_sq"] = k.b2 * state["exp_avg_sq"] + (1 - k.b2) * turned(projected * projected)
        return k.debias * turned(m) / (v.sqrt() + k.eps)


class _Alternating(Optimizer):
    """What AltLoRA and AltLoRA+ share: who moves in a step, and what it is told of the other."""

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        weight_decay: float,
        ridge: float,
        period: int,
        joint: bool,
        scaled: bool,
        rest: AdamWRest,
        options: Options,
        **hyper: Any,
    ) -> None:
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name}(model={type(model).__name__}): must be the adapted model, whose pairs A, B it looks for")
        if not isinstance(period, int) or period < 1:
            raise ValueError(f"period={period}: must be a whole number of at least 1")
        self.period, self.joint = period, joint
        self.factors = _factors(model, name)
        rule = through_the_other(self.factors, ridge, scaled, **hyper)
        chosen = {"lr": lr, "weight_decay": weight_decay}
        others = {"lr": rest.lr, "weight_decay": rest.weight_decay}
        routes = [
            Route(name.lower(), rule, self._taken, chosen),
            Route("adamw", adam(rest.betas, rest.eps), everything, others),
        ]
        super().__init__(model, routes, lr, weight_decay, "after", **options)

    def _taken(self, p: Param) -> str | None:
        factor = self.factors.get(p.name)
        return None if factor is None else f"{'A' if factor.down else 'B'}, beside {factor.other}"

    def _move(self, loss: Any) -> None:
        tensors = self._tensors()
        for movers in self._turns(tensors):
            self._tell(movers, tensors)
            with _still([t for name, t in tensors.items() if name not in movers]):
                super()._move(loss)

    def preview(self, grads: Any = None) -> dict[str, Tensor]:
        """The displacement that each parameter would get from `grads`, were it to move now; see `Optimizer.preview`."""
        tensors = self._tensors()
        self._tell(set(tensors), tensors)
        return super().preview(grads)

    def _tensors(self) -> dict[str, Tensor]:
        return {p.name: tensor for tensor, p, _ in self._roster.placed(self.param_groups)}

    def _turns(self, tensors: Mapping[str, Tensor]) -> list[set[str]]:
        """Names of those that may move, one set after another."""
        outside = set(tensors) - set(self.factors)
        if self.joint:
            down = {name for name, factor in self.factors.items() if factor.down}
            return [outside | down, set(self.factors) - down]
        return [outside | {name for name in self.factors if self._is_due(name, tensors)}]

    def _is_due(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        factor = self.factors[name]
        other = tensors[factor.other]
        if not other.requires_grad or other not in self.state:  # frozen, or left out by keep_only: it has no turn
            return True
        steps = sum(int(self.state[t]["step"]) for t in (tensors[name], other) if t in self.state)  # those of the pair
        return (steps // self.period % 2 == 0) == factor.leads

    def _tell(self, movers: set[str], tensors: Mapping[str, Tensor]) -> None:
        """Feed each of these factors the other one, whole; every rank takes part."""
        self.feed(other={tensors[name]: _whole(tensors[f.other]) for name, f in self.factors.items() if name in movers})

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {name: self.__dict__[name] for name in ("factors", "period", "joint")}


@method(
    "altlora",
    family="adapt",
    paper=PAPER,
    tune={"lr": log_uniform(1e-2, 10.0), "momentum": choice(0.9, 0.95)},
    mutant=("torch.cholesky_solve(B.mT @ before, L) @ m", "m"),
)
class AltLoRA(_Alternating):
    """LoRA's factors in turn, each by what is nearest to the full gradient; how the product is factored does not matter.

    Of a product s B A beside a weight, with gA = s B^T G, gB = s G A^T for the gradient G of the weight, one factor moves in
    a step and the other in the next, B first:

        A:   C <- (B^T B + d I)^-1;   M <- b C B^T B' M + (1 - b) s^-2 C gA;   A <- A - lr M / (1 - b^t);   B' <- B
        B:   C <- (A A^T + d I)^-1;   M <- b M A' A^T C + (1 - b) s^-2 gB C;   B <- B - lr M / (1 - b^t);   A' <- A

    then `x <- x - lr * weight_decay * x`. With d = 0 and b = 0 the product moves by -lr G projected onto the rows of A, or the
    columns of B. B' and A' are the other factor at a factor's own last step, which carry its momentum over to the basis that
    there is now; t counts its own steps. Then (A, B) and (Q A, B Q^-1) are trained alike for every invertible Q.

        attach(model, "lora", rank=16)
        opt = AltLoRA(model, lr=0.1)

    Everything else that trains goes to AdamW, in groups of its own; there, too, weights decay after they have moved.

    Args:
        model: adapted, with low-rank pairs; wrap it (DDP, FSDP2) first.
        lr: 0.1, of a gradient that is not normalized: as of SGD on the whole weights.
        momentum: b, 0.9.
        weight_decay: 1e-5, of what has moved.
        ridge: d, 1e-5, which is not in proportion to the factors.
        period: steps after which the other factor has its turn, 1.
        joint: both move in each step, A and then B with the new A, by gradients taken at once. Off.
        scaled: with the factor s^-2, without which the learning rate depends on s. On.
        adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay: of the rest: 1e-3, (0.9, 0.999), 1e-8, 0.
        options: see `Optimizer`.

    Raises:
        TypeError: for anything but a module.
        ValueError: the model has no pairs of which one factor trains; settings out of range.

    Of an embedding's pair A moves first, since that is where LoRA begins with A = 0. A factor whose partner is frozen moves in
    every step; a pair with a matrix between its factors is left to AdamW. Where the Cholesky decomposition fails the gradient
    is taken as it is, and the momentum stays.

    The other factor's gradient is computed and not used. State: for each factor its momentum, and the other factor as it was,
    which is not encoded, and whole on every rank. Source: "Towards Better Gradient Approximation in Low-Rank Adaptation with
    Alternating Projections" (arXiv 2505.12455). Its release moves both factors in each step, without s^-2: `joint=True,
    scaled=False`; `period` there is 10 where it alternates.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-5,
        *,
        ridge: float = 1e-5,
        period: int = 1,
        joint: bool = False,
        scaled: bool = True,
        adamw_lr: float | Tensor = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum}: must be in [0, 1)")
        rest = AdamWRest(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        super().__init__(model, lr, weight_decay, ridge, period, joint, scaled, rest, options, momentum=momentum)


@method(
    "altlora-plus",
    family="adapt",
    paper=PAPER,
    tune={"lr": log_uniform(1e-5, 1e-2), "ridge": log_uniform(1e-6, 1e-3)},
    mutant=("(v.sqrt() + k.eps)", "1.0"),
)
class AltLoRAPlus(_Alternating):
    """AltLoRA whose steps are divided by the root of a running mean square of the projected gradients.

    With g the projected gradient of a factor, `s^-2 C gA` or `s^-2 gB C`, and M its momentum, both as of `AltLoRA`:

        v <- b2 v + (1 - b2) g^2;   x <- x - lr M / (1 - b1^t) / (sqrt(v) + eps)

    v is not corrected for its beginning, so that first steps are up to sqrt(1 / (1 - b2)) times as large as later ones: warm
    up. It is not carried over to other bases, which squares do not allow: how the product is factored matters again.

    Args:
        lr: 1e-3.
        betas, eps: (0.9, 0.999), 1e-4.
        other arguments: as of `AltLoRA`.

    State: that of AltLoRA and one more value for each entry. Source: as of AltLoRA. Its release takes the step along the
    carried momentum, but keeps b1 M + (1 - b1) g without carrying it over; here the carried one is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 1e-5,
        *,
        ridge: float = 1e-5,
        period: int = 1,
        joint: bool = False,
        scaled: bool = True,
        adamw_lr: float | Tensor = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        check_betas(betas)
        check_eps(eps)
        rest = AdamWRest(adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        super().__init__(model, lr, weight_decay, ridge, period, joint, scaled, rest, options, betas=tuple(betas), eps=eps)


def _factors(model: nn.Module, name: str) -> dict[str, Factor]:
    """Both factors of every pair of which one trains, by the optimizer's names for them."""
    names = {id(t): p.name for group in collect(model) for t, p in zip(group.tensors, group.described, strict=True)}
    found: dict[str, Factor] = {}
    for pair in pairs(model):
        if pair.core is None and (pair.A.requires_grad or pair.B.requires_grad):
            A, B = names[id(pair.A)], names[id(pair.B)]
            found[A] = Factor(True, B, tuple(pair.B.shape), pair.scale, pair.starts_at_B)
            found[B] = Factor(False, A, tuple(pair.A.shape), pair.scale, not pair.starts_at_B)
    if not found:
        raise ValueError(f"{name}: no pair of the model has a factor that trains; use another optimizer for these adapters")
    return found


def _whole(t: Tensor) -> Tensor:
    full = getattr(t, "full_tensor", None)  # of a sharded one
    return t.detach() if full is None else full().detach()


@contextmanager
def _still(tensors: list[Tensor]) -> Iterator[None]:
    """Within it these have no gradient, so that no rule moves them."""
    held = [t.grad for t in tensors]
    for t in tensors:
        t.grad = None
    try:
        yield
    finally:
        for t, grad in zip(tensors, held, strict=True):
            t.grad = grad
