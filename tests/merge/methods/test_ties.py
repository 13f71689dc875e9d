"""TIES-Merging (Resolving Interference When Merging Models, arXiv 2306.01708)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import permutations
from typing import Any

import pytest
import torch
from merge.cutting import State, family, largest_gap, merge_cut, same
from torch import Tensor

from poise.merge import merge_tensors
from poise.merge.methods.linear import linear
from poise.merge.methods.ties import ties

NAN = "refused"
WHOLE: dict[str, Any] = {"density": 1.0}
CASES: list[dict[str, Any]] = [
    {},
    {"density": (0.5, 0.1, 1.0), "lambda_": 0.7, "weight": (1.0, 0.3, 2.1)},
    {"trim_scope": "tensor", "disjoint": "sum"},
    {"density": 0.4, "disjoint": "max"},
]


def flat(state: State) -> Tensor:
    return torch.cat([state[n].double().reshape(-1) for n in sorted(state) if state[n].is_floating_point()])


def unflat(vector: Tensor, like: State) -> State:
    found, start = dict(like), 0
    for name in sorted(like):
        if like[name].is_floating_point():
            found[name] = vector[start : start + like[name].numel()].view(like[name].shape)
            start += like[name].numel()
    return found


def trimmed(tau: Tensor, density: float) -> Tensor:
    order = sorted(range(len(tau)), key=lambda i: (-abs(tau[i].float().item()), i))
    kept = order[: math.floor(Fraction(str(density)) * len(tau))]
    found = torch.zeros_like(tau)
    found[kept] = tau[kept]
    return found


def elected(taus: Sequence[Tensor], weights: Sequence[float], disjoint: str) -> Tensor:
    votes = torch.stack([w * t for w, t in zip(weights, taus, strict=True)])
    gamma = votes.sum(0).sign()
    gamma = torch.where(gamma == 0, gamma.sum().sign(), gamma)
    agree = (votes.sign() == gamma) & (votes != 0)
    if disjoint == "max":
        return gamma * (votes.abs() * agree).amax(0)
    total = (votes * agree).sum(0)
    share = (agree * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0)
    return total / torch.where(share == 0, 1, share) if disjoint == "mean" else total


def reference(
    models: list[State],
    base: State,
    *,
    weight: Any = (1.0, 1.0, 1.0),
    density: Any = 0.2,
    lambda_: float = 1.0,
    disjoint: str = "mean",
    trim_scope: str = "model",
) -> State:
    densities = density if isinstance(density, tuple) else (density,) * len(models)
    taus = []
    for model, k in zip(models, densities, strict=True):
        tau = flat(model) - flat(base)
        if trim_scope == "tensor":
            parts = unflat(tau, base)
            names = [n for n in sorted(base) if base[n].is_floating_point()]
            taus.append(torch.cat([trimmed(parts[n].reshape(-1), k) for n in names]))
        else:
            taus.append(trimmed(tau, k))
    return unflat(flat(base) + lambda_ * elected(taus, weight, disjoint), base)


def vectors(*rows: Sequence[float], **settings: Any) -> list[float]:
    """The merged task vector of these, from a base of zeros."""
    base = {"w": torch.zeros(len(rows[0]))}
    return merge_tensors(ties, [{"w": torch.tensor(row)} for row in rows], base, **settings)["w"].tolist()


def test_a_case_worked_by_hand() -> None:
    """Plain averaging gives (1, 4/3, .13, -.67), a vote by count (3, 2.5, 0, 2)."""
    found = vectors([4, -1, 0.5, 2], [-3, 2, 0.1, 1], [2, 3, -0.2, -5], density=0.5)
    assert found == [4.0, 2.5, 0.0, -5.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_order_of_tasks_does_not_matter(dtype: torch.dtype) -> None:
    base, models = family(3, dtype)
    for disjoint in ("mean", "sum", "max"):
        found = [merge_tensors(ties, list(some), base, disjoint=disjoint) for some in permutations(models)]
        assert all(same(one, found[0]) for one in found)


def test_exactly_so_many_entries_are_kept() -> None:
    """0.29 * 100 is 28.999999999999996 in floating point; a threshold with >= would keep all of the equal ones."""
    base = {"a": torch.zeros(60), "b": torch.zeros(40)}
    equal = {"a": torch.ones(60), "b": torch.ones(40)}
    for density, kept in ((0.29, 29), (0.615, 61), (1 / 3, 33), (0.07, 7), (0.0, 0), (1.0, 100)):
        found = merge_tensors(ties, [equal], base, density=density)
        assert int(flat(found).count_nonzero()) == kept
        assert torch.equal(flat(found)[:kept], torch.ones(kept, dtype=torch.float64))  # of equal ones, the first
    assert vectors([1.0, 2.0, 3.0], density=1 / 3) == [0, 0, 3]


def test_the_threshold_is_one_over_the_whole_model_unless_told() -> None:
    base = {"large": torch.zeros(4), "small": torch.zeros(4)}
    model = {"large": torch.tensor([5.0, 6.0, 7.0, 8.0]), "small": torch.tensor([0.1, 0.4, 0.3, 0.2])}
    whole = merge_tensors(ties, [model], base, density=0.5)
    assert torch.equal(whole["large"], model["large"]) and not whole["small"].any()
    apart = merge_tensors(ties, [model], base, density=0.5, trim_scope="tensor")
    assert apart["large"].tolist() == [0, 0, 7, 8] and apart["small"].count_nonzero() == 2


def test_thresholds_are_exact_where_numbers_differ_in_their_last_bit() -> None:
    close = (torch.arange(1000) + (127 << 23)).to(torch.int32).view(torch.float32)  # 1, and the 999 next above it
    shuffled = close[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    found = merge_tensors(ties, [{"w": shuffled}], {"w": torch.zeros(1000)}, density=0.123)["w"]
    assert torch.equal(found[found != 0].sort().values, close[-123:])


def test_a_sum_of_zero_goes_with_the_sign_of_the_whole_vector() -> None:
    """Entry 0 is +2 and -2; most of the others are negative, or positive."""
    assert vectors([2, -1, -1, 1], [-2, -1, -1, 1], density=1.0) == [-2, -1, -1, 1]
    assert vectors([2, 1, 1, -1], [-2, 1, 1, -1], density=1.0) == [2, 1, 1, -1]
    assert vectors([2, 1, -1], [-2, 1, -1], density=1.0) == [0, 1, -1]  # no majority, no sign


def test_large_entries_that_disagree_do_not_cancel() -> None:
    one, two = torch.tensor([3.0, 3.0, 0.1]), torch.tensor([-2.9, 0.1, 3.0])
    merged = torch.tensor(vectors(one.tolist(), two.tolist(), density=1.0))
    assert merged.norm() > 1.6 * ((one + two) / 2).norm()


def test_two_classifiers_of_disjoint_features_keep_more_than_in_their_average() -> None:
    """Each task reads a few features of its own; fine-tuning moved all of the others a little."""
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(3, 40)}
    truths = [torch.randn(3, 20, generator=generator) * (torch.arange(20) < 5) for _ in range(2)]
    models, data = [], []
    for task, truth in enumerate(truths):
        w = 0.8 * torch.randn(3, 40, generator=generator)
        w[:, 20 * task : 20 * task + 20] += 2 * truth
        models.append({"w": w})
        x = torch.zeros(400, 40)
        x[:, 20 * task : 20 * task + 20] = torch.randn(400, 20, generator=generator)
        data.append((x, (x[:, 20 * task : 20 * task + 20] @ truth.mT).argmax(1)))

    def accuracy(state: State) -> float:
        return sum(float(((x @ state["w"].mT).argmax(1) == y).float().mean()) for x, y in data) / 2

    average = accuracy(merge_tensors(linear, models))
    assert accuracy(merge_tensors(ties, models, base, density=0.2)) > average + 0.05


def test_tensors_may_be_written_in_any_order_and_cut_anywhere() -> None:
    base, models = family(3)
    tied = [{n: (t * 4).round() / 4 if t.is_floating_point() else t for n, t in m.items()} for m in models]  # many equal ones
    whole = merge_tensors(ties, tied, base, density=0.35)
    for sizes in ((1,), (2, 5), (100,)):
        for backwards in (False, True):
            assert same(merge_cut(ties, tied, base, sizes, backwards, density=0.35), whole)


def test_bad_settings_are_refused() -> None:
    base, models = family(2)
    with pytest.raises(ValueError, match=r"density=1.5 at 'embed.weight': must be from 0 to 1"):
        merge_tensors(ties, models, base, density=1.5)
    with pytest.raises(ValueError, match="trim_scope='row'"):
        merge_tensors(ties, models, base, trim_scope="row")
    with pytest.raises(ValueError, match="disjoint='median'"):
        merge_tensors(ties, models, base, disjoint="median")
    with pytest.raises(ValueError, match="a base model is needed"):
        merge_tensors(ties, models)


def test_scaling_a_task_vector_scales_the_result() -> None:
    base, models = family(1, torch.float64)
    once = merge_tensors(ties, models, base)
    twice = merge_tensors(ties, models, base, lambda_=2.0)
    moved = {n: base[n] + 2 * (once[n] - base[n]) if base[n].is_floating_point() else base[n] for n in base}
    assert largest_gap(twice, moved) < 1e-14
