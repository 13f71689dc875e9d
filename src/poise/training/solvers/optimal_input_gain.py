"""Optimal input gain: output weights by least squares, hidden weights by steps whose sizes Newton's method finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.catalog import Paper, choice, method
from poise.linalg.least_squares import least_squares, symmetric_pinv

from .bypass_mlp import BypassMLP

Direction = Literal["hwo", "bp"]
Gains = Literal["input", "scalar"]
CHUNK = 2**22  # entries of v that are held at once
HALVINGS = 30  # after these a step is below float32's rounding of a weight


@dataclass(frozen=True)
class Iteration:
    """What one iteration did."""

    solved: float  # E once the output weights are solved,
    moved: float  # and after the hidden weights have moved: never more
    gains: Tensor  # r, one per input (the last is the bias's) or equal ones; as applied, so after halving
    halvings: int  # times the step was halved; HALVINGS: no step lowered E, and none was taken


@method(
    "optimal-input-gain",
    family="training",
    kind="solver",
    paper=Paper("Optimal Input Gain: All You Need to Supercharge a Feed-Forward Neural Network", arxiv="2303.17732", year=2023),
    tune={"direction": choice("hwo", "bp")},
    mutant=("x[:, None, :] * ", ""),
)
class OptimalInputGain:
    """Trains a network of one hidden layer on all data at once, without a learning rate.

    With inputs x that end in a constant 1, `n = W x`, outputs `y = W_o [x; f(n)]` and `E = 1/Nv sum_p ||t_p - y_p||^2` over
    the Nv samples, one iteration is

        W_o <- argmin E                                             linear least squares (output weight optimization, OWO)
        G = -dE/dW,   D = G ("bp")  or  D = G R^+,  R = 1/Nv sum_p x_p x_p^T ("hwo", hidden weight optimization)
        v_p(i, m) = x_p(m) sum_k W_oh(i, k) f'(n_p(k)) D(k, m)      how output i moves with the gain of input m
        H = 2/Nv sum_p v_p^T v_p,   g(m) = sum_k G(k, m) D(k, m)    Gauss-Newton Hessian and -dE/dr at r = 0
        r = H^+ g ("input")  or  r(m) = sum g / sum H for all m ("scalar": one optimal learning factor)
        W <- W + D diag(r)

    Inputs may have any scale, singly: with "hwo" or with "input" gains the errors stay the same if an input is measured in
    other units. Where data are many and hidden units few this comes near Levenberg-Marquardt at the price of a gradient
    and a solve in the number of inputs.

        solver = OptimalInputGain(nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 1)))
        history = solver.fit(x, t, iterations=50)

    Safeguards: if E rises, the step is halved until it does not, or given up, so E never rises. Every system is solved by a
    pseudo-inverse after its unknowns were scaled alike: inputs that are constant, repeated or always zero do no harm, and
    units do not decide what counts as zero.

    Args:
        model: `nn.Sequential(Linear, activation, Linear)` or a `BypassMLP`, whose inputs also go straight to the outputs
            (the bypass weights of the equations above; a Sequential has only the constant of x there). float32 or float64, any
            activation that acts on each unit by itself and that autograd can differentiate. Trained in place.
        direction: "hwo" (default: seldom slower than "bp", and whitens the inputs) or "bp".
        gains: "input" (default) or "scalar".

    Raises:
        TypeError, ValueError: if the model is of another form or the data do not fit it.

    Kept from step to step: nothing but the model's weights, so a run resumes from its `state_dict`.

    Source: "Optimal Input Gain: All You Need to Supercharge a Feed-Forward Neural Network" (arXiv 2303.17732).
    Reconstructed from its abstract and from what is known of the family (OWO, HWO, the optimal learning factor), not from the
    paper's own text: the safeguards and the pseudo-inverses are ours.
    """

    def __init__(self, model: nn.Module, direction: Direction = "hwo", gains: Gains = "input") -> None:
        if direction not in get_args(Direction):
            raise ValueError(f"direction={direction!r}: must be one of {', '.join(get_args(Direction))}")
        if gains not in get_args(Gains):
            raise ValueError(f"gains={gains!r}: must be one of {', '.join(get_args(Gains))}")
        self.model, self.direction, self.gains = model, direction, gains
        self.hidden, self.activation, self.output, self.bypass = _parts(model)
        if self.hidden.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"model: must be float32 or float64 to solve in, got {self.hidden.weight.dtype}")

    def fit(self, x: Tensor, t: Tensor, iterations: int) -> list[Iteration]:
        """Take `iterations` steps, and solve the output weights once more for where they lead.

        Args:
            x: inputs, (samples, inputs).
            t: targets, (samples, outputs); (samples,) if there is one output; or classes, (samples,) of integers, which become
                one-hot.
        """
        if iterations < 0:
            raise ValueError(f"iterations={iterations}: must be 0 or more")
        history = [self.step(x, t) for _ in range(iterations)]
        self.solve_output(x, t)
        return history

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor) -> Iteration:
        """One iteration: solve the output weights, then move the hidden ones."""
        solved = self.solve_output(x, t)
        x, t = self.data(x, t)
        ahead = _augmented(x, self.hidden)
        slope = _derivative(self.activation, self.hidden(x))
        residual = t - self.model(x)
        count = len(x)
        G = 2 / count * ((residual @ self.output.weight) * slope).mT @ ahead
        D = G
        if self.direction == "hwo":
            D = G @ symmetric_pinv(ahead.mT @ ahead / count)
        H = self.curvature(ahead, slope, D)
        g = (G * D).sum(0)
        if self.gains == "input":
            r = symmetric_pinv(H) @ g
        else:
            r = torch.where(H.sum() > 0, g.sum() / H.sum(), 0.0).expand_as(g)
        return self.move(x, t, D * r, r, solved)

    @torch.no_grad()
    def solve_output(self, x: Tensor, t: Tensor) -> float:
        """Output weights, bypass and constant included, by least squares; returns E."""
        x, t = self.data(x, t)
        straight = [x] if self.bypass is not None else []
        constant = [torch.ones_like(x[:, :1])] if self.output.bias is not None else []
        columns = [self.activation(self.hidden(x)), *straight, *constant]
        weights = list(least_squares(torch.cat(columns, 1), t).split([part.shape[1] for part in columns]))
        self.output.weight.copy_(weights[0].mT)
        if self.bypass is not None:
            self.bypass.weight.copy_(weights[1].mT)
        if self.output.bias is not None:
            self.output.bias.copy_(weights[-1][0])
        return self.error(x, t)

    @torch.no_grad()
    def error(self, x: Tensor, t: Tensor) -> float:
        """E, the mean over samples of the squared distance to the target."""
        x, t = self.data(x, t)
        return float((t - self.model(x)).square().sum(1).mean())

    def curvature(self, x: Tensor, slope: Tensor, D: Tensor) -> Tensor:
        """H, over chunks of samples: v has an entry for every sample, output and input."""
        H = x.new_zeros(x.shape[1], x.shape[1])
        size = max(1, CHUNK // (self.output.out_features * x.shape[1]))
        for some, slopes in zip(x.split(size), slope.split(size), strict=True):
            v = self.response(some, slopes, D).flatten(0, 1)
            H += 2 / len(x) * v.mT @ v
        return H

    def response(self, x: Tensor, slope: Tensor, D: Tensor) -> Tensor:
        """v, (samples, outputs, inputs)."""
        return x[:, None, :] * ((self.output.weight * slope[:, None, :]) @ D)

    def move(self, x: Tensor, t: Tensor, change: Tensor, r: Tensor, solved: float) -> Iteration:
        """Add to the hidden weights what does not raise E: the change, or the first half of a half of it that does not."""
        layer, halvings = self.hidden, 0
        W, b = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
        while True:
            factor = 0.5**halvings if halvings < HALVINGS else 0.0
            layer.weight.copy_(W + factor * change[:, : W.shape[1]])
            if b is not None:
                layer.bias.copy_(b + factor * change[:, -1])
            moved = self.error(x, t)
            if moved <= solved or halvings == HALVINGS:
                return Iteration(solved, moved, factor * r, halvings)
            halvings += 1

    def data(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets as matrices of the model's dtype, checked."""
        like, outputs = self.hidden.weight, self.output.out_features
        if x.ndim != 2 or x.shape[1] != self.hidden.in_features or len(x) == 0:
            raise ValueError(f"x: must have shape (samples, {self.hidden.in_features}), got {tuple(x.shape)}")
        if t.ndim == 1 and not t.is_floating_point():
            if len(t) and not 0 <= int(t.min()) <= int(t.max()) < outputs:
                raise ValueError(f"t: classes must lie in 0 .. {outputs - 1}, got {int(t.min())} .. {int(t.max())}")
            t = F.one_hot(t.long(), outputs)
        elif t.ndim == 1 and outputs == 1:
            t = t[:, None]
        if t.shape != (len(x), outputs):
            raise ValueError(f"t: must have shape ({len(x)}, {outputs}), or be {len(x)} classes, got {tuple(t.shape)}")
        for name, value in (("x", x), ("t", t)):
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name}: must be finite")
        return x.to(like), t.to(like)


def _parts(model: nn.Module) -> tuple[nn.Linear, Callable[[Tensor], Tensor], nn.Linear, nn.Linear | None]:
    """Hidden layer, activation, output layer and bypass of a network of one hidden layer.

    Raises:
        TypeError: if it is none.
        ValueError: if the activation mixes units.
    """
    if isinstance(model, BypassMLP):
        found = model.hidden, model.activation, model.output, model.bypass
    else:
        layers = list(model) if isinstance(model, nn.Sequential) else []
        if len(layers) < 3 or not isinstance(layers[0], nn.Linear) or not isinstance(layers[-1], nn.Linear):
            raise TypeError(f"model: must be Sequential(Linear, activation, Linear) or BypassMLP, got {type(model).__name__}")
        found = layers[0], nn.Sequential(*layers[1:-1]), layers[-1], None
    hidden, activation, output, _ = found
    if hidden.out_features != output.in_features:
        raise ValueError(f"model: {hidden.out_features} hidden units, but the output layer reads {output.in_features}")
    probe = torch.linspace(-1, 1, hidden.out_features).to(hidden.weight).repeat(2, 1)
    probe[1, 0] += 1
    with torch.no_grad():
        first, second = activation(probe)
    if not torch.equal(first[1:], second[1:]):
        raise ValueError("model: its activation must act on each hidden unit by itself, without chance; this one does not")
    return found


def _augmented(x: Tensor, layer: nn.Linear) -> Tensor:
    """The inputs that the layer's weights see: with a constant 1 at the end for its bias."""
    return x if layer.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)


def _derivative(activation: Callable[[Tensor], Tensor], n: Tensor) -> Tensor:
    """f'(n), each unit by itself."""
    with torch.enable_grad():
        n = n.detach().requires_grad_()
        return torch.autograd.grad(activation(n).sum(), n)[0]
