"""OTA merging with Fast Fisher Grafting (Harnessing Optimization Dynamics for Curvature-Informed Model Merging)."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from merge.cutting import State, family, largest_gap, moments, same, total
from torch import Tensor

from poise.merge import merge_tensors
from poise.merge.methods.linear import linear
from poise.merge.methods.ota import ota
from poise.merge.methods.ties import ties

CASES: list[dict[str, Any]] = [
    {},
    {"density": (0.3, 0.6, 1.0), "power": 1.0, "scale": (1.0, 2.0, 0.5), "divide_by_mean": True},
    {"density": 0.4, "compress": "rank1", "rescale": True, "fallback": "mean"},
    {"density": 0.5, "compress": 2, "average": "ties", "trim": 0.7, "rescale": True},
    {"threshold": 1e-10, "average": "linear"},
]


def compressed(name: str, v: Tensor, compress: Any) -> Tensor:
    if v.ndim != 2 or compress == "none" or not v.numel():
        return v
    if compress == "rank1":
        return v.sum(1, keepdim=True) * v.sum(0, keepdim=True) / v.sum()
    if "embed" in name:
        return v
    U, S, Vh = torch.linalg.svd(v, full_matrices=False)
    return ((U[:, :compress] * S[:compress]) @ Vh[:compress]).clamp(min=0)


def norm(name: str, tau: Tensor) -> float:
    if tau.ndim < 2:
        return float(tau.square().mean().sqrt())
    if "embed" in name:
        return float(tau.norm(dim=0).max()) / math.sqrt(tau.shape[0])
    matrix = tau.flatten(1)
    return math.sqrt(matrix.shape[1] / matrix.shape[0]) * float(torch.linalg.matrix_norm(matrix, 2))


def top(scores: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """True for the largest of all."""
    flat = torch.cat([scores[n].reshape(-1) for n in sorted(scores)])
    keep = math.floor(Fraction(str(density)) * len(flat))
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
    parts = chosen.split([scores[n].numel() for n in sorted(scores)])
    return {n: part.view(scores[n].shape) for n, part in zip(sorted(scores), parts, strict=True)}


def reference(
    models: list[State],
    base: State,
    *,
    moments: list[State],
    density: Any = 1.0,
    threshold: float = 0.0,
    power: float = 0.5,
    scale: Any = (1.0, 1.0, 1.0),
    divide_by_mean: bool = False,
    compress: Any = "none",
    fallback: str = "base",
    average: str = "precond",
    rescale: bool = False,
    trim: float = 1.0,
) -> State:
    densities = density if isinstance(density, tuple) else (density,) * len(models)
    names = [n for n in base if base[n].is_floating_point() and base[n].numel()]
    vs = [{n: compressed(n, v[n].double(), compress) for n in names} for v in moments]
    taus = [{n: m[n].double() - base[n].double() for n in names} for m in models]
    scores = [{n: v[n] * tau[n].square() for n in names} for v, tau in zip(vs, taus, strict=True)]
    masks = [top(score, k) for score, k in zip(scores, densities, strict=True)]
    found = dict(base)
    for n in names:
        kept = [mask[n] & (score[n] >= threshold) for mask, score in zip(masks, scores, strict=True)]
        moved = [tau[n] * keep for tau, keep in zip(taus, kept, strict=True)]
        if rescale:
            norms = [(norm(n, tau[n]), norm(n, move)) for tau, move in zip(taus, moved, strict=True)]
            moved = [m * (a / b if b > 1e-6 * a else 0.0) for m, (a, b) in zip(moved, norms, strict=True)]
        if average == "precond":
            ps = []
            for v, s, keep in zip(vs, scale, kept, strict=True):
                p = v[n].pow(power)
                ps.append((s * p / (s * 0 + p.mean() if divide_by_mean else 1.0) + 1e-26) * keep)
            weight = total(ps)
            step = total(p * m for p, m in zip(ps, moved, strict=True)) / torch.where(weight > 0, weight, 1.0)
        else:
            if average == "ties":
                moved = [m * top({n: m.abs()}, trim)[n] for m in moved]
                sign = torch.where(total(moved) >= 0, 1.0, -1.0)
                moved = [torch.where(m.sign() == sign, m, 0.0) for m in moved]
            step = total(moved) / len(moved)
        if fallback == "mean":
            alone = ~torch.stack(kept).any(0)
            step = torch.where(alone, total(tau[n] for tau in taus) / len(taus), step)
        found[n] = base[n].double() + step
    return found


def quadratic(count: int) -> tuple[State, list[State], list[State]]:
    """Tasks whose losses are sum v (w - w_i)^2 / 2."""
    base, models = family(count, torch.float64)
    curvature = [{n: t.double() * 1e8 for n, t in one.items()} for one in moments(count)]
    return base, models, curvature


def loss(state: State, models: list[State], curvature: list[State]) -> float:
    return sum(float((v[n] * (state[n] - m[n]).square()).sum()) for m, v in zip(models, curvature, strict=True) for n in v) / 2


def test_equal_moments_give_the_plain_mean() -> None:
    base, models = family(3, torch.float64)
    same_v = moments(1) * 3
    assert largest_gap(merge_tensors(ota, models, base, moments=same_v), merge_tensors(linear, models, base)) < 1e-14


def test_one_factor_on_all_moments_changes_nothing() -> None:
    base, models = family(3, torch.float64)
    v = [{n: t.double() for n, t in one.items()} for one in moments(3)]
    larger = [{n: 1e6 * t for n, t in one.items()} for one in v]
    one, other = (merge_tensors(ota, models, base, moments=m) for m in (v, larger))
    assert largest_gap(one, other) < 1e-14
    assert largest_gap(one, merge_tensors(linear, models, base)) > 0.01


def test_a_moment_that_is_an_outer_product_is_compressed_without_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    base, models = family(2, torch.float64)
    outer = [{n: t.double() for n, t in one.items()} for one in moments(2)]
    for one in outer:
        for n in ("embed.weight", "layers.1.proj.weight"):
            rows, columns = (torch.rand(size, generator=generator).double() for size in one[n].shape)
            one[n] = rows[:, None] * columns
    exact = merge_tensors(ota, models, base, moments=outer, density=0.5)
    for compress in ("rank1", 1):
        assert largest_gap(merge_tensors(ota, models, base, moments=outer, density=0.5, compress=compress), exact) < 1e-12


def test_with_the_true_curvature_it_is_the_minimum_of_the_summed_quadratics() -> None:
    base, models, curvature = quadratic(3)
    best = merge_tensors(ota, models, base, moments=curvature, power=1.0)
    minimum = {
        n: total(v[n] * m[n] for v, m in zip(curvature, models, strict=True)) / total(v[n] for v in curvature)
        for n in curvature[0]
    }
    assert largest_gap({n: best[n] for n in minimum}, minimum) < 1e-13
    others = [
        merge_tensors(linear, models, base),
        merge_tensors(ties, models, base, density=1.0),
        merge_tensors(ties, models, base),
    ]
    assert all(loss(best, models, curvature) < 0.8 * loss(other, models, curvature) for other in others)
    assert loss(best, models, curvature) < loss(merge_tensors(ota, models, base, moments=curvature), models, curvature)


def test_full_density_masks_nothing_and_none_gives_the_base() -> None:
    base, models = family(3)
    v = moments(3)
    assert same(merge_tensors(ota, models, base, moments=v, density=1.0), merge_tensors(ota, models, base, moments=v))
    assert same(merge_tensors(ota, models, base, moments=v, density=0.0), base)
    means = merge_tensors(ota, models, base, moments=v, density=0.0, fallback="mean")
    assert largest_gap(means, merge_tensors(linear, models, base)) < 1e-7


def test_it_is_the_fisher_score_of_the_whole_model_that_decides() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(2)}
    model = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 1e-3])}
    v = {"a": torch.tensor([1.0, 1.0]), "b": torch.tensor([1e-3, 1e9])}  # scores 1, 4, 0.1, 1000
    found = merge_tensors(ota, [model], base, moments=[v], density=0.5)
    assert found["a"].tolist() == [0.0, 2.0] and found["b"].tolist() == [0.0, pytest.approx(1e-3)]
    assert same(merge_tensors(ota, [model], base, moments=[v], threshold=2.0), found)


def test_a_large_eps_does_not_pass_for_a_mask() -> None:
    """Entries are masked by their mask, however small their weights."""
    base, models = family(2, torch.float64)
    tiny = [{n: 1e-30 * t.double() for n, t in one.items()} for one in moments(2)]
    assert largest_gap(merge_tensors(ota, models, base, moments=tiny, eps=1e-8), merge_tensors(linear, models, base)) < 1e-6


def test_without_a_base_models_are_averaged_and_masked_by_their_moments() -> None:
    _, models = family(2, torch.float64)
    v = moments(2)
    found = merge_tensors(ota, models, moments=v, density=0.5)
    masks = [top(one, 0.5) for one in v]
    for n in v[0]:
        ps = [one[n].double().sqrt() * mask[n] for one, mask in zip(v, masks, strict=True)]
        weight = total(ps)
        mean = (models[0][n] + models[1][n]) / 2
        wanted = torch.where(weight > 0, total(p * m[n] for p, m in zip(ps, models, strict=True)) / weight, mean)
        assert not wanted.numel() or float((found[n] - wanted).abs().max()) < 1e-12


def test_moments_of_zero_are_not_divided_by() -> None:
    base, models = family(2)
    zeros = [{n: torch.zeros_like(t) for n, t in one.items()} for one in moments(2)]
    for eps in (0.0, 1e-26):
        found = merge_tensors(ota, models, base, moments=zeros, eps=eps, compress="rank1", divide_by_mean=True)
        assert largest_gap(found, merge_tensors(linear, models, base)) < 1e-7


def test_next_to_nothing_that_is_left_of_a_task_vector_is_not_blown_up_to_its_length() -> None:
    base, model = {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 1e-8])}
    v = [{"w": torch.tensor([1e-30, 1e10])}]  # by which the small entry is the one that counts
    assert merge_tensors(ota, [model], base, moments=v, density=0.5)["w"].tolist() == [0.0, pytest.approx(1e-8)]
    assert merge_tensors(ota, [model], base, moments=v, density=0.5, rescale=True)["w"].tolist() == [0.0, 0.0]


def test_bad_input_is_refused() -> None:
    base, models = family(2)
    v = moments(2)
    with pytest.raises(ValueError, match="moments: one mapping of second moments for each of 2 models"):
        merge_tensors(ota, models, base)
    with pytest.raises(ValueError, match="moments: 1 mappings, but 2 models"):
        merge_tensors(ota, models, base, moments=v[:1])
    v[1]["embed.weight"][0, 0] = -1.0
    with pytest.raises(ValueError, match=r"moments of model 1: 'embed.weight' has entries below 0"):
        merge_tensors(ota, models, base, moments=v)
    with pytest.raises(ValueError, match="without a base"):
        merge_tensors(ota, models, moments=moments(2), rescale=True)
    del v[1]["embed.weight"]
    with pytest.raises(ValueError, match=r"moments of model 1: tensor 'embed.weight' is missing"):
        merge_tensors(ota, models, base, moments=v)
    with pytest.raises(ValueError, match="compress=0"):
        merge_tensors(ota, models, base, moments=moments(2), compress=0)
