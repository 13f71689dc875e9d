"""Linear (Model soups, arXiv 2203.05482)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from merge.cutting import State, family, largest_gap, same, total

from poise.merge import merge_tensors
from poise.merge.methods.linear import linear
from poise.merge.methods.task_arithmetic import task_arithmetic

CASES: list[dict[str, Any]] = [{}, {"weight": (0.5, 2.0, -1.0)}, {"weight": (0.5, 2.0, -1.0), "normalize": False}]


def reference(models: list[State], base: State, *, weight: Any = (1.0, 1.0, 1.0), normalize: bool = True) -> State:
    divisor = sum(weight) if normalize else 1.0
    found = {n: total(w * m[n].double() for w, m in zip(weight, models, strict=True)) / divisor for n in base if n != "used"}
    return {**found, "steps": base["steps"], "used": base["used"]}


def test_a_weight_on_one_model_alone_gives_it_bit_for_bit() -> None:
    _, models = family(3)
    assert same(merge_tensors(linear, models, weight=(0.0, 3.7, 0.0)), {**models[1], "steps": models[0]["steps"]})


def test_normalized_weights_may_be_scaled() -> None:
    _, models = family(3)
    one = merge_tensors(linear, models, weight=(1.0, 2.0, 3.0))
    assert largest_gap(one, merge_tensors(linear, models, weight=(10.0, 20.0, 30.0))) == 0


def test_the_order_of_models_does_not_matter() -> None:
    _, models = family(4)
    weights = (0.1, 0.2, 0.3, 0.4)
    backwards = merge_tensors(linear, models[::-1], weight=weights[::-1])
    gap = largest_gap({**backwards, "steps": models[0]["steps"]}, merge_tensors(linear, models, weight=weights))
    assert gap < 2.5e-7  # tenths of float32 numbers are often in the middle of two


def test_it_is_task_arithmetic_with_the_same_normalized_weights() -> None:
    base, models = family(3, torch.float64)
    weights = (0.2, 0.5, 0.3)
    arithmetic = merge_tensors(task_arithmetic, models, base, weight=weights)
    assert largest_gap(merge_tensors(linear, models, base, weight=weights), arithmetic) < 1e-15


def test_the_mean_of_many_models_is_rounded_once() -> None:
    models = [{"w": torch.randn(50, generator=torch.Generator().manual_seed(i))} for i in range(300)]
    exact = sum(m["w"].double() for m in models) / 300
    assert torch.equal(merge_tensors(linear, models)["w"], exact.float())  # pyright: ignore[reportAttributeAccessIssue]


def test_a_model_of_weight_zero_is_not_looked_at() -> None:
    _, models = family(2)
    models[1]["embed.weight"].fill_(torch.nan)
    assert torch.equal(merge_tensors(linear, models, weight=(1.0, 0.0))["embed.weight"], models[0]["embed.weight"])


def test_bad_weights_are_refused() -> None:
    _, models = family(2)
    with pytest.raises(ValueError, match=r"\(1.0, -1.0\) sum to 0"):
        merge_tensors(linear, models, weight=(1.0, -1.0))
    with pytest.raises(ValueError, match="3 values for 2 models"):
        merge_tensors(linear, models, weight=(1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="at least one"):
        merge_tensors(linear, [])
