"""Whether the terms of a loss pull together once an optimizer has made updates of them, and how far out single values lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from poise.catalog import Paper, method
from poise.linalg.lengths import wide
from poise.optim import Optimizer

from .. import weights


@dataclass(frozen=True)
class Alignment:
    """Cosines between the terms of a loss: float64, a row and a column for each term; nan where one is zero."""

    gradients: Tensor
    updates: Tensor


@dataclass(frozen=True)
class Outliers:
    """How far out the largest of many values lie; 0-d tensors."""

    kurtosis: Tensor  # E (x - mean)^4 / variance^2: 3 of normal numbers
    max_to_median: Tensor  # largest over median absolute value


@method(
    "alignment",
    family="training",
    kind="diagnostic",
    paper=Paper("Leveraging Second-Order Curvature for Efficient Learned Image Compression", arxiv="2601.20769", year=2026),
    mutant=("whole[name] - u for name, u in rest.items()", "u for name, u in rest.items()"),
)
def intra_step_alignment(opt: Optimizer, terms: Sequence[Tensor]) -> Alignment:
    """Cosines between what each term of a loss adds to the next step of `opt`, beside those between their gradients.

        D_k = U(g) - U(g - g_k),   g = sum_k g_k          U(g): the displacement that gradients g would give, from `preview`
        updates_jk = <D_j, D_k> / (||D_j|| ||D_k||),      gradients_jk = <g_j, g_k> / (||g_j|| ||g_k||)

    over all parameters together. A step of fixed preconditioner P is `U(g) = P g` plus what earlier steps and weight decay add,
    and then `D_k = P g_k`, whatever those are: terms whose gradients are at odds may still agree on where to go once the
    curvature is taken out. Adam and its kin move their preconditioner a little with each gradient; take more than the first few
    steps before you look, and of SOAP look between two refreshes.

        distortion, rate = terms(model(x))
        found = intra_step_alignment(opt, [distortion, weight * rate])
        (distortion + weight * rate).backward()

    Nothing is changed: neither weights, state, nor gradients that stand in the parameters. It costs a backward pass and a
    preview for each term: for every hundredth step or so.

    Args:
        opt: a poise optimizer, at work.
        terms: two or more, each a tensor of one number with a graph, weighted as they are in the loss.

    Raises:
        ValueError: fewer than two terms, or one that hangs on no parameter of `opt`.

    Source: "Leveraging Second-Order Curvature for Efficient Learned Image Compression" (arXiv 2601.20769), which finds that
    SOAP aligns rate and distortion better than Adam. Its exact score was not at hand: this definition is ours.
    """
    terms = list(terms)
    if len(terms) < 2:
        raise ValueError(f"terms: {len(terms)} given, two or more are needed")
    params = [p for group in opt.param_groups for p in group["params"] if p.requires_grad]
    single = []
    for number, term in enumerate(terms):
        slopes = torch.autograd.grad(term, params, retain_graph=True, allow_unused=True) if term.requires_grad else []
        single.append({p: g for p, g in zip(params, slopes, strict=False) if g is not None})
        if not single[-1]:
            raise ValueError(f"terms[{number}]: hangs on no parameter of the optimizer")
    whole_gradient = {p: _sum([g[p] for g in single if p in g]) for p in params if any(p in g for g in single)}
    whole = opt.preview(whole_gradient)
    shares = []
    for gradient in single:
        rest = opt.preview({p: g - gradient[p] if p in gradient else g for p, g in whole_gradient.items()})
        shares.append({name: whole[name] - u for name, u in rest.items()})
    return Alignment(__cosines(single), __cosines(shares))


def log_step_alignment(opt: torch.optim.Optimizer, log: Callable[[float], object]) -> RemovableHandle:
    """After every step of `opt` but the first, call `log` with the cosine between the last two displacements of all weights.

        cosines = []
        handle = log_step_alignment(opt, cosines.append)

    Near 1 steps go on in one direction, near -1 they go to and fro. Any optimizer or driver will do. It keeps the weights and
    the displacement of the step before, two values for each parameter, until `handle.remove()`.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    before = [weights.local(p).clone() for p in params]
    last: list[Tensor] = []

    def look(*_: object) -> None:
        moved = [wide(weights.local(p)) - wide(old) for p, old in zip(params, before, strict=True)]
        if last:
            log(float(__cosines([dict(enumerate(last)), dict(enumerate(moved))])[0, 1]))
        last[:] = moved
        for p, old in zip(params, before, strict=True):
            old.copy_(weights.local(p))

    return opt.register_step_post_hook(look)


def outliers(x: Tensor) -> Outliers:
    """Kurtosis, and the largest over the median absolute value, of all entries: of activations, latents, weights or updates.

    A few values far out cost all others their precision when they are quantized together. Both are of float32 or better; a
    constant has kurtosis nan, and a median of 0 gives infinity.
    """
    x = wide(x.detach()).flatten()
    if not x.numel():
        raise ValueError("x: has no entries")
    away = (x - x.mean()).square()
    return Outliers(away.square().mean() / away.mean().square(), x.abs().max() / x.abs().median())


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0) if len(tensors) > 1 else tensors[0]


def __cosines(vectors: Sequence[Mapping[object, Tensor]]) -> Tensor:
    """Between vectors in pieces; a piece that one of them lacks is zero."""
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    for key in dict.fromkeys(key for v in vectors for key in v):
        at = [i for i, v in enumerate(vectors) if key in v]
        rows = torch.stack([weights.local(vectors[i][key]).double().flatten() for i in at])
        gram[torch.tensor(at)[:, None], torch.tensor(at)] += (rows @ rows.T).cpu()
    lengths = gram.diagonal().sqrt()
    return gram / (lengths[:, None] * lengths)
