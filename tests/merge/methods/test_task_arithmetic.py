"""Task arithmetic (Editing Models with Task Arithmetic, arXiv 2212.04089)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merge.cutting import State, family, largest_gap, same

from poise.merge import merge_tensors
from poise.merge.methods.task_arithmetic import task_arithmetic

CASES: list[dict[str, Any]] = [{}, {"weight": (0.5, 2.0, -1.0), "lambda_": 0.4, "normalize": True}]
EQUAL = {"normalize": True}


def reference(
    models: list[State], base: State, *, weight: Any = (1.0, 1.0, 1.0), lambda_: float = 1.0, normalize: bool = False
) -> State:
    found = dict(base)
    for name, root in base.items():
        if root.is_floating_point():
            moves = [w * (m[name].double() - root.double()) for w, m in zip(weight, models, strict=True)]
            found[name] = root.double() + lambda_ * sum(moves) / (sum(weight) if normalize else 1.0)
    return found


def test_a_tiny_weight_beside_a_large_base_comes_back_bit_for_bit() -> None:
    """theta_0 + (theta_1 - theta_0) would not give it."""
    base, model = {"w": torch.tensor([1e8, 3.0])}, {"w": torch.tensor([1e-12, 0.1])}
    assert torch.equal(merge_tensors(task_arithmetic, [model], base)["w"], model["w"])


def test_a_negative_lambda_moves_away_and_zero_stays() -> None:
    base, models = family(1, torch.float64)
    away = merge_tensors(task_arithmetic, models, base, lambda_=-1.0)
    back = {n: 2 * base[n] - models[0][n] if base[n].is_floating_point() else base[n] for n in base}
    assert largest_gap(away, back) < 1e-15
    assert same(merge_tensors(task_arithmetic, models, base, lambda_=0.0), base)


def test_the_order_of_models_does_not_matter() -> None:
    base, models = family(4)
    found = merge_tensors(task_arithmetic, models, base, weight=(0.1, 0.2, 0.3, 0.4))
    backwards = merge_tensors(task_arithmetic, models[::-1], base, weight=(0.4, 0.3, 0.2, 0.1))
    assert largest_gap(backwards, found) < 2.5e-7


def test_integers_and_booleans_are_the_bases() -> None:
    base, models = family(2)
    found = merge_tensors(task_arithmetic, models, base)
    assert torch.equal(found["steps"], base["steps"]) and found["used"].dtype == torch.bool


def test_without_a_base_it_is_refused() -> None:
    with pytest.raises(ValueError, match="task_arithmetic: a base model is needed"):
        merge_tensors(task_arithmetic, family(2)[1])
