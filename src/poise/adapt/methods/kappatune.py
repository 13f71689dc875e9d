"""KappaTune: what is fine-tuned are the weights with the smallest condition numbers, in which less is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, method
from poise.checkpoint.atomic import put
from poise.linalg.lengths import wide
from poise.modules import Rows

from ..targets import Place
from .lora import LoRA


@dataclass(frozen=True)
class Condition:
    """Of one weight as a matrix with one row for each output.

    Attributes:
        kappa: largest singular value over the smallest; infinite where the smallest is 0. The weight's scale does not matter.
        log_volume: sum of the logarithms of the singular values: what a linear unit with Gaussian input adds to its entropy.
    """

    kappa: float
    log_volume: float


@method(
    "kappatune",
    family="adapt",
    kind="adapter",
    paper=Paper(
        "The Condition Number as a Scale-Invariant Proxy for Information Encoding in Neural Units",
        arxiv="2506.16289",
        year=2025,
    ),
    tune={"alpha": choice(16.0, 32.0, 64.0)},
    mutant=("key=lambda place: known[place.path].kappa", "key=lambda place: -known[place.path].kappa"),
)
@dataclass(frozen=True)
class KappaTune(LoRA):
    """LoRA beside those layers alone whose weights have the smallest condition numbers, so that less is forgotten.

        kappa = s_max / s_min of each weight, by an SVD in float32 or better;  the N layers with the smallest are adapted

    `kappa_tune` trains the weights themselves instead.

    Args:
        rank, alpha, dropout: as of LoRA; 16, 32 and 0.05.
        rank_stabilized: as of LoRA.
        layers: N, 50; of fewer all are adapted.
        max_dim: layers whose weight has a longer side are left out, as those of large vocabularies; 16384.

    Raises:
        ValueError: settings out of range.

    Ties go to the layer that comes first. The authors' code passes the ranking through a set and so loses it, and leaves out
    convolutions, whose SVD fails there; here they are matrices, and the order holds. Source: "The Condition Number as a
    Scale-Invariant Proxy for Information Encoding in Neural Units" (arXiv 2506.16289).
    """

    rank: int = 16
    alpha: float | None = 32.0
    dropout: float = 0.05
    layers: int = 50
    max_dim: int | None = 16384

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.layers, self.max_dim, "layers")

    def choose(self, model: nn.Module, places: Sequence[Place]) -> Sequence[Place]:
        fit = [place for place in places if _fits(place.layer.weight, self.max_dim)]
        known = {place.path: condition(place.layout.rows.view(place.layer.weight.detach())) for place in fit}
        least = {place.path for place in sorted(fit, key=lambda place: known[place.path].kappa)[: self.layers]}
        return [place for place in fit if place.path in least]


def condition(matrix: Tensor) -> Condition:
    """Of a matrix; computed in float32, or float64 where it is float64."""
    values = torch.linalg.svdvals(wide(matrix.detach()))
    smallest = float(values[-1])
    # What rounding leaves of a zero is no singular value, and a weight without full rank comes last.
    if not smallest > torch.finfo(values.dtype).eps * max(matrix.shape) * float(values[0]):
        return Condition(math.inf, -math.inf)
    return Condition(float(values[0]) / smallest, float(values.double().log().sum()))


def conditions(model: nn.Module, max_dim: int | None = None, cache: str | Path | None = None) -> dict[str, Condition]:
    """By name, of every parameter of two or more dimensions, the smallest kappa first.

    Args:
        max_dim: parameters with a longer side are left out; None: none are.
        cache: a JSON file, written when it is not there; what it holds is not computed again. It is of the model of then.

    Raises:
        ValueError: a cache that is of other parameters.
    """
    _check(1, max_dim, "layers")
    holders = {f"{path}.{own}".removeprefix("."): layer for path, layer in model.named_modules() for own in layer._parameters}
    wanted = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and _fits(p, max_dim)}
    known = _read(Path(cache), wanted) if cache is not None and Path(cache).exists() else {}
    found = {name: known.get(name) or condition(Rows.of(holders[name], p).view(p.detach())) for name, p in wanted.items()}
    if cache is not None and len(known) < len(found):
        said = {
            n: {"kappa": _plain(c.kappa), "log_volume": _plain(c.log_volume), "shape": list(wanted[n].shape)}
            for n, c in found.items()
        }
        put(Path(cache), (json.dumps(said, indent=2) + "\n").encode())
    return dict(sorted(found.items(), key=lambda item: item[1].kappa))


def kappa_tune(model: nn.Module, count: int = 100, *, max_dim: int | None = None, cache: str | Path | None = None) -> list[str]:
    """Let the `count` parameters with the smallest condition numbers train and freeze all others; returns their names.

        kappa_tune(model, 100, cache="conditions.json")
        opt = AdamW(model, lr=1e-5)                        # what is frozen has no gradient and is left alone

    Args:
        count: 100; the paper's experiments have 20 to 100.
        max_dim, cache: as of `conditions`.

    Raises:
        ValueError: settings out of range; no parameter of two dimensions.
    """
    _check(count, max_dim, "count")
    names = list(conditions(model, max_dim, cache))[:count]
    if not names:
        raise ValueError(f"model: has no parameter of two dimensions, none longer than max_dim={max_dim}")
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    return names


def _fits(weight: Tensor, max_dim: int | None) -> bool:
    return max_dim is None or max(weight.shape) <= max_dim


def _check(count: int, max_dim: int | None, name: str) -> None:
    if count < 1:
        raise ValueError(f"{name}={count}: must be at least 1")
    if max_dim is not None and max_dim < 1:
        raise ValueError(f"max_dim={max_dim}: must be at least 1, or None")


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def _read(file: Path, wanted: Mapping[str, Tensor]) -> dict[str, Condition]:
    try:
        said: dict[str, Any] = json.loads(file.read_text())
        known = {
            name: Condition(math.inf, -math.inf) if one["kappa"] is None else Condition(one["kappa"], one["log_volume"])
            for name, one in said.items()
        }
        shapes = {name: tuple(one["shape"]) for name, one in said.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"cache={str(file)!r}: is no file of condition numbers ({error}); delete it") from None
    for name, p in wanted.items():
        if name in shapes and shapes[name] != tuple(p.shape):
            raise ValueError(f"cache={str(file)!r}: {name!r} is {list(shapes[name])} there and {list(p.shape)} here; delete it")
    return known
