"""DARE (Language Models are Super Mario, arXiv 2311.03099)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from merge.cutting import State, family, largest_gap, merge_cut, same
from merge.methods.test_ties import elected, flat, unflat
from torch import Tensor

from poise.memory import rounding
from poise.merge import merge_tensors
from poise.merge.methods.dare import dare_linear, dare_ties
from poise.merge.methods.task_arithmetic import task_arithmetic

WHOLE: dict[str, Any] = {"density": 1.0}
EQUAL_dare_linear: dict[str, Any] = {"density": 1.0, "normalize": True}
CASES: list[dict[str, Any]] = [
    {"density": 0.5, "weight": (1.0, 0.3, 2.1), "lambda_": 0.7},
    {"density": (0.3, 0.9, 1.0), "rescale": "l1", "seed": 5},
    {"density": 0.4, "rescale": False, "seed": (3, 1, 4)},
]


def masked(models: list[State], base: State, density: Any, rescale: Any, seed: Any, scale: float = 1.0) -> list[State]:
    """Task vectors, tensor by tensor."""
    found = []
    for number, model in enumerate(models):
        k = density[number] if isinstance(density, tuple) else density
        own = (seed[number], 0) if isinstance(seed, tuple) else (seed, number)
        taus = {}
        for name, root in base.items():
            if root.is_floating_point():
                tau = model[name].double() - root.double()
                index = torch.arange(tau.numel(), dtype=torch.int32)
                u = rounding.uniform(rounding.key_of(own[0], name, salt=own[1]), index).view(tau.shape)
                left = torch.where(u < k, tau, 0.0)
                if rescale == "l1" and left.any():
                    left = left * tau.abs().sum() / left.abs().sum()
                taus[name] = left / k if rescale is True else left
        found.append(taus)
    return found


def reference_dare_linear(
    models: list[State],
    base: State,
    *,
    weight: Any = (1.0, 1.0, 1.0),
    density: Any = 1.0,
    rescale: Any = True,
    lambda_: float = 1.0,
    seed: Any = 0,
) -> State:
    taus = masked(models, base, density, rescale, seed)
    moved = sum(w * flat(t) for w, t in zip(weight, taus, strict=True))
    return unflat(flat(base) + lambda_ * moved, base)


def reference_dare_ties(
    models: list[State],
    base: State,
    *,
    weight: Any = (1.0, 1.0, 1.0),
    density: Any = 1.0,
    rescale: Any = True,
    lambda_: float = 1.0,
    seed: Any = 0,
) -> State:
    taus = [flat(t) for t in masked(models, base, density, rescale, seed)]
    return unflat(flat(base) + lambda_ * elected(taus, weight, "mean"), base)


def dropped(delta: Tensor, **settings: Any) -> Tensor:
    return merge_tensors(dare_linear, [{"w": delta}], {"w": torch.zeros_like(delta)}, **settings)["w"]


def test_over_seeds_the_mean_is_the_task_vector_and_squares_grow_by_the_inverse_of_the_density() -> None:
    delta = torch.linspace(0.5, 1.5, 50)
    rows = delta.expand(100, 50)
    draws = torch.cat([dropped(rows, density=0.1, seed=seed) for seed in range(20)])
    off = (draws.mean(0) - delta) / delta  # 2000 draws of standard deviation 3
    assert float(off.abs().max()) < 5 * 3 / math.sqrt(2000)
    assert float(draws.square().mean(0).div(delta.square()).mean()) == pytest.approx(10, abs=0.4)


def test_the_kept_fraction_is_that_of_a_fair_draw() -> None:
    kept = float((dropped(torch.ones(200_000), density=0.1) != 0).float().mean())
    assert abs(kept - 0.1) < 4 * math.sqrt(0.09 / 200_000)


def test_models_tensors_and_seeds_have_masks_of_their_own() -> None:
    ones = torch.ones(4000)
    base = {"a": torch.zeros(4000), "b": torch.zeros(4000)}
    model = {"a": ones, "b": ones}
    first = merge_tensors(dare_linear, [model, model], base, density=0.5, weight=(1.0, 0.0))
    second = merge_tensors(dare_linear, [model, model], base, density=0.5, weight=(0.0, 1.0))
    masks = [first["a"] != 0, first["b"] != 0, second["a"] != 0, dropped(ones, density=0.5, seed=1) != 0]
    for i, one in enumerate(masks):
        for other in masks[:i]:
            assert abs(float((one & other).float().mean()) - 0.25) < 0.04


@pytest.mark.parametrize("function", [dare_linear, dare_ties])
def test_masks_do_not_hang_on_the_cut_or_on_the_order_of_tensors(function: Any) -> None:
    base, models = family(2)
    whole = merge_tensors(function, models, base, density=0.3, seed=7)
    for sizes in ((1,), (3, 2)):
        assert same(merge_cut(function, models, base, sizes, True, density=0.3, seed=7), whole)


def test_with_seeds_of_their_own_models_may_stand_in_any_order() -> None:
    base, models = family(2)
    one = merge_tensors(dare_linear, models, base, density=0.3, seed=(7, 8))
    assert same(merge_tensors(dare_linear, models[::-1], base, density=0.3, seed=(8, 7)), one)
    assert not same(merge_tensors(dare_linear, models[::-1], base, density=0.3, seed=(7, 8)), one)


def test_nothing_dropped_is_task_arithmetic() -> None:
    base, models = family(3)
    assert same(merge_tensors(dare_linear, models, base), merge_tensors(task_arithmetic, models, base))


def test_rescaling_to_the_l1_norm_keeps_it_and_is_biased_for_small_tensors() -> None:
    delta = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.5
    many = {f"t{i}": delta for i in range(300)}
    base = {name: torch.zeros(16) for name in many}
    draws = torch.stack(list(merge_tensors(dare_linear, [many], base, density=0.1, rescale="l1").values()))
    sums = draws.sum(1)
    assert torch.allclose(sums[sums > 0], delta.sum().expand(int((sums > 0).sum())), rtol=1e-5)
    inverse = torch.stack(list(merge_tensors(dare_linear, [many], base, density=0.1).values()))
    assert float(inverse.mean() / delta.mean()) == pytest.approx(1, abs=0.15)
    assert float(draws.mean() / delta.mean()) < 0.88  # where nothing is left, nothing is scaled up


def test_dare_ties_elects_signs() -> None:
    base = {"w": torch.zeros(3)}
    models = [{"w": torch.tensor([3.0, -1.0, 1.0])}, {"w": torch.tensor([-1.0, -1.0, 1.0])}]
    assert merge_tensors(dare_ties, models, base)["w"].tolist() == [3.0, -1.0, 1.0]
    assert merge_tensors(dare_linear, models, base)["w"].tolist() == [2.0, -2.0, 2.0]


def test_to_drop_everything_is_refused() -> None:
    base, models = family(2)
    with pytest.raises(ValueError, match=r"density=0.0 at 'embed.weight': must be above 0"):
        merge_tensors(dare_linear, models, base, density=0.0)
    with pytest.raises(ValueError, match="rescale='l2'"):
        merge_tensors(dare_linear, models, base, rescale="l2")
    assert largest_gap(merge_tensors(dare_linear, models, base, lambda_=0.0), base) == 0
