"""Teleportation: along the level set of the loss, to where its gradient, its sharpness or the orbit's curvature is another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..weights import computing, local
from .functional import Loss, Network, Weights, looked_at
from .landscape import along, curve_curvature, gradient_norm, sharpness
from .symmetries import Group, Named, Pair, check_group, mix_outputs, mix_units, pairs_of, scale_units

Objective = Literal["gradient", "sharpness", "curvature"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the loss, relative; 0.05 where weights have fewer bits


@dataclass(frozen=True)
class Arrival:
    """Where a teleportation led: all weights, the loss before and after, and the objective before each of its steps."""

    weights: Weights
    loss: tuple[float, float]
    objective: list[float]


@dataclass(frozen=True)
class Teleportation:
    """The settings of a teleportation; what they mean stands at `Teleport`."""

    pairs: Sequence[Named] | None = None
    group: Group = "diagonal"
    objective: Objective = "gradient"
    direction: Literal["up", "down"] = "up"
    lr_tele: float = 1e-4
    steps: int = 10
    cap: float = 100.0
    directions: int = 100
    project: bool = False
    tolerance: float | None = None
    check: Literal["raise", "warn"] = "raise"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("group", get_args(Group)),
            ("objective", get_args(Objective)),
            ("direction", ("up", "down")),
            ("check", ("raise", "warn")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(map(repr, allowed))}")
        for name, least in (("lr_tele", 0.0), ("steps", 0), ("directions", 1), ("tolerance", 0.0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name}={value}: must be at least {least}")

    def search(self, model: nn.Module, loss: Loss, weights: Weights | None = None, skip: Sequence[str] = ()) -> Arrival:
        """Teleport from `weights` (default: the model's), changing nothing; pairs with a layer in `skip` stay."""
        pairs = [p for p in pairs_of(model, self.pairs) if p.lower not in skip and p.upper not in skip]
        check_group(pairs, self.group)
        network = Network(model, loss)
        if weights is None:
            weights = {name: local(p).to(computing(p.dtype)) for name, p in model.named_parameters()}
        with looked_at(model), torch.enable_grad():
            with torch.no_grad():
                before = float(network.loss(weights))
                for pair in pairs:
                    _stands_between(network, weights, pair)
            values: list[float] = []
            start, after = weights, before
            try:
                for _ in range(self.steps if pairs else 0):
                    value, moves = self._ascent(network, weights, pairs)
                    values.append(value)
                    if self.direction == "up" and value > self.cap:
                        break
                    rate = self.lr_tele if self.direction == "up" else -self.lr_tele
                    moves = [rate * move for move in moves]
                    if any(bool(move.any()) for move in moves):  # else a no-op to the last bit, whatever pinv makes of it
                        with torch.no_grad():
                            weights = self.act(network, weights, pairs, moves)
                if weights is not start:
                    with torch.no_grad():
                        after = float(network.loss(weights))
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                after = math.nan  # activations that are no numbers have no pseudo-inverse
        self._check(before, after, network)
        return Arrival(weights, (before, after), values)

    def act(self, network: Network, weights: Weights, pairs: Sequence[Pair], moves: Sequence[Tensor]) -> Weights:
        """The weights moved by T: `g = 1 + T`, or `diag(exp(T))`, pair by pair from the input on.

        The lower layers of a pair have moved when it is its turn, so that what it takes in is computed anew.
        """
        weights = dict(weights)
        for pair, T in zip(pairs, moves, strict=True):
            names = f"{pair.lower}.weight", f"{pair.lower}.bias", f"{pair.upper}.weight"
            V, b, U = weights[names[0]], weights.get(names[1]), weights[names[2]]
            if self.group == "diagonal":
                V, b, U = scale_units(V, b, U, T.exp())
            else:
                h, g = network.seen(weights, pair.lower)[0], torch.eye(len(T), dtype=T.dtype, device=T.device) + T
                if self.group == "data":
                    V, b, U = mix_units(V, b, U, h, g, pair.s, self.project)
                else:
                    V, b, U = mix_outputs(V, b, U, h, g, pair)
            weights |= {name: value for name, value in zip(names, (V, b, U), strict=True) if value is not None}
        return weights

    def _ascent(self, network: Network, weights: Weights, pairs: Sequence[Pair]) -> tuple[float, list[Tensor]]:
        """The objective, and its gradient with respect to T at T = 0."""
        zeros = [self._zero(weights[f"{pair.lower}.weight"]) for pair in pairs]
        if self.objective == "curvature":
            return self._along_the_orbit(network, weights, pairs, zeros)
        moves = [T.requires_grad_() for T in zeros]
        moved = self.act(network, weights, pairs, moves)
        leaves = {name: w.detach().requires_grad_() for name, w in moved.items()}
        if self.objective == "gradient":
            value, slopes = gradient_norm(network, leaves)
        else:
            value, slopes = sharpness(network, leaves, self.directions, self.seed)
        linked = [(moved[name], slope) for name, slope in slopes.items() if moved[name].requires_grad]
        found = torch.autograd.grad([w for w, _ in linked], moves, [slope for _, slope in linked])
        return value, list(found)

    def _along_the_orbit(
        self, network: Network, weights: Weights, pairs: Sequence[Pair], zeros: Sequence[Tensor]
    ) -> tuple[float, list[Tensor]]:
        """The curvature of t -> exp(t M).W at t = 0 for a random M, and M times its derivative."""
        generator = torch.Generator().manual_seed(self.seed)
        M = [torch.rand(zero.shape, generator=generator, dtype=torch.float64).to(zero) for zero in zeros]

        def curve(t: Tensor) -> Tensor:
            moved = self.act(network, weights, pairs, [t * m if m.ndim == 1 else _exp_minus_one(t, m) for m in M])
            return torch.cat([moved[name].flatten() for name in moved])

        value, slope = along(lambda t: curve_curvature(curve, t), zeros[0].new_zeros(()))
        return float(value), [slope * m for m in M]

    def _zero(self, V: Tensor) -> Tensor:
        return V.new_zeros(len(V)) if self.group == "diagonal" else V.new_zeros(len(V), len(V))

    def _check(self, before: float, after: float, network: Network) -> None:
        """Refuse, or warn of, a loss that moved; what is no number is always refused."""
        tolerance = self.tolerance
        if tolerance is None:
            tolerance = max(TOLERANCE.get(dtype, 0.05) for dtype in network.dtypes.values())
        if not abs(after - before) <= tolerance * max(abs(before), 1e-12):
            text = (
                f"teleportation moved the loss from {before:.8g} to {after:.8g}, more than tolerance={tolerance:g} allows; "
                "group='data' is exact only while the batch of `loss` has no more rows than the layers have units, "
                "group='inverse' than they have inputs: give a smaller batch or lr_tele, or take group='diagonal'"
            )
            if self.check == "raise" or not math.isfinite(after):
                raise ValueError(text)
            warnings.warn(text, stacklevel=2)


def teleport(model: nn.Module, loss: Loss, **how: Any) -> Arrival:
    """Teleport a model's weights in place, once; `how` holds settings of `Teleportation`, which stand at `Teleport`.

    Raises:
        ValueError: see `Teleport`; the model is as it was then.
    """
    found = Teleportation(**how).search(model, loss)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(found.weights[name])
    return found


def _exp_minus_one(t: Tensor, M: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(t * M) - torch.eye(len(M), dtype=M.dtype, device=M.device)


def _stands_between(network: Network, weights: Weights, pair: Pair) -> None:
    """Raise ValueError if the upper layer takes in anything but the activations of the lower one."""
    z, x = network.seen(weights, pair.lower)[1], network.seen(weights, pair.upper)[0]
    y = pair.s(z.to(network.dtypes[f"{pair.lower}.weight"])).to(x)
    if y.shape != x.shape or not torch.allclose(
        x, y, rtol=0.05 if network.dtypes[f"{pair.upper}.weight"].itemsize < 4 else 1e-4
    ):
        raise ValueError(f"pairs: what {pair.upper!r} takes in is not the given function of what {pair.lower!r} gives out")
