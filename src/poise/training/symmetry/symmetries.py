"""Moves of the weights that leave what a network computes as it is: which layers they act on, and what they do to them.

A pair is two linear layers with nothing but an elementwise function s between them, `y = U s(V h + b) + c`. In `nn.Linear`'s
layout h is (n, in), the units' inputs `z = h V^T + b` are (n, k), V is (k, in) and U is (out, k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]
Group = Literal["diagonal", "data", "inverse"]
# Named in the order lower layer, upper layer, what stands between them: a function, or the name of a module.
Named = tuple[str, str, "Activation | str"]

# What may stand between two layers. In eval mode, in which networks are looked at here, dropout is the identity.
BETWEEN = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus, nn.Tanh, nn.Sigmoid),
    *(nn.Identity, nn.Dropout),
)


@dataclass(frozen=True)
class Pair:
    """The names of two `nn.Linear` of a model, and what stands between them."""

    lower: str
    upper: str
    between: Sequence[Activation]

    def s(self, z: Tensor) -> Tensor:
        for function in self.between:
            z = nn.functional.prelu(z, function.weight.to(z)) if isinstance(function, nn.PReLU) else function(z)
        return z

    def s_inverse(self, y: Tensor) -> Tensor:
        for function in reversed(self.between):
            y = _inverse(function)(y)
        return y


def pairs_of(model: nn.Module, named: Sequence[Named] | None = None) -> list[Pair]:
    """The pairs of a model, from the input on: those named, or those that its `nn.Sequential`s show.

    Raises:
        ValueError: if there are none, or one is not two linear layers with plain weights of their own.
    """
    if named is None:
        pairs = [
            pair for name, part in model.named_modules() if isinstance(part, nn.Sequential) for pair in _within(name, part)
        ]
        if not pairs:
            raise ValueError(
                "model: no nn.Sequential in it has two nn.Linear with only elementwise activations between them; name them: "
                "pairs=[('fc1', 'fc2', torch.relu)]"
            )
    else:
        pairs = [Pair(low, up, (model.get_submodule(s) if isinstance(s, str) else s,)) for low, up, s in named]
        if not pairs:
            raise ValueError("pairs=[]: at least one is needed, or None for those that the model shows")
    names: dict[int, list[str]] = {}
    for name, part in model.named_modules(remove_duplicate=False):
        for key, p in part.named_parameters(recurse=False):
            names.setdefault(id(p), []).append(f"{name}.{key}" if name else key)
    for pair in pairs:
        layers = []
        for name in (pair.lower, pair.upper):
            layer: Any = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                raise ValueError(f"pairs: {name!r} is a {type(layer).__name__}; only nn.Linear can be teleported")
            if "weight" not in layer._parameters:
                raise ValueError(f"pairs: the weight of {name!r} is computed from others; fold it back first")
            if len(names[id(layer.weight)]) > 1:
                raise ValueError(f"pairs: {' and '.join(names[id(layer.weight)])} are one tensor; tied weights cannot be moved")
            layers.append(layer)
        if layers[0].out_features != layers[1].in_features:
            raise ValueError(
                f"pairs: {pair.lower!r} gives {layers[0].out_features} values, {pair.upper!r} takes {layers[1].in_features}"
            )
    return pairs


def check_group(pairs: Sequence[Pair], group: Group) -> None:
    """Raise ValueError where a pair's function does not allow the group.

    That s(a z) = a s(z) for a > 0 is seen on numbers: with a power of two it holds to the last bit or not at all.
    """
    for pair in pairs:
        for function in pair.between:
            if group == "inverse":
                _inverse(function)
            if group == "diagonal" and not _scales(function):
                raise ValueError(
                    f"group='diagonal': between {pair.lower!r} and {pair.upper!r} stands {_text(function)}, and only ReLU and "
                    "its leaky kin may be scaled; use group='data'"
                )


def scale_units(V: Tensor, b: Tensor | None, U: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """`V' = D V, b' = D b, U' = U D^-1` for D = diag(d) > 0: exact for every input if s(a z) = a s(z) for a > 0."""
    return V * d[:, None], None if b is None else b * d, U / d


def mix_units(
    V: Tensor, b: Tensor | None, U: Tensor, h: Tensor, g: Tensor, s: Activation, project: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`V' = g V, b' = g b, U' = U + U (s(z) - s(g z)) s(g z)^+`: the least change of U that keeps the outputs on the inputs h.

    Exact on h if `s(g z)`, (k, n) there, has full column rank: n <= k, and no two inputs alike. `project` is the published form
    `U' = U s(z) s(g z)^+`, the same for n >= k; for n < k it also projects U on the span of the activations, at g = 1 too.
    """
    z = nn.functional.linear(h, V, b)
    old, new = s(z).mT, s(z @ g.mT).mT
    kept = U @ old @ torch.linalg.pinv(new) if project else U + U @ (old - new) @ torch.linalg.pinv(new)
    return g @ V, None if b is None else g @ b, kept


def mix_outputs(
    V: Tensor, b: Tensor | None, U: Tensor, h: Tensor, g: Tensor, pair: Pair
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`U' = U g^-1, V' = V + (s^-1(g s(z)) - z) h^+`, b as it is, for invertible s.

    Exact on h if h, (in, n) there, has full column rank and `g s(z)` lies in the range of s. The published code has `U (1 - T)`
    for `g = 1 + T`, which is the inverse to first order only.
    """
    z = nn.functional.linear(h, V, b)
    wanted = pair.s_inverse(pair.s(z) @ g.mT)
    return V + (wanted - z).mT @ torch.linalg.pinv(h.mT), b, torch.linalg.solve(g, U, left=False)


def _within(name: str, part: nn.Sequential) -> list[Pair]:
    """The pairs among the children of one nn.Sequential."""
    pairs: list[Pair] = []
    lower: str | None = None
    between: list[Activation] = []
    for key, child in part._modules.items():  # one activation may stand several times; named_children() gives it once
        full = f"{name}.{key}" if name else key
        if isinstance(child, nn.Linear):
            if lower is not None:
                pairs.append(Pair(lower, full, tuple(between)))
            lower, between = full, []
        elif isinstance(child, BETWEEN):
            between.append(child)
        else:
            lower = None
    return pairs


def _inverse(function: Activation) -> Activation:
    if isinstance(function, nn.LeakyReLU) and function.negative_slope > 0:
        slope = function.negative_slope
        return lambda y: torch.where(y >= 0, y, y / slope)
    if isinstance(function, nn.Tanh) or function is torch.tanh:
        return torch.atanh
    if isinstance(function, nn.Sigmoid) or function is torch.sigmoid:
        return torch.logit
    if isinstance(function, nn.Identity | nn.Dropout):
        return lambda y: y
    raise ValueError(f"group='inverse': {function} has no inverse known here; nn.LeakyReLU, nn.Tanh and nn.Sigmoid have one")


def _scales(function: Activation) -> bool:
    """Whether s(a z) = a s(z) for a > 0."""
    if isinstance(function, nn.PReLU | nn.Identity | nn.Dropout):
        return True
    probe = torch.linspace(-4.0, 4.0, 33)
    return all(torch.equal(function(probe * a), function(probe) * a) for a in (0.125, 2.0))


def _text(function: Activation) -> str:
    return getattr(function, "__name__", str(function))
