"""Slerp (Animating Rotation with Quaternion Curves)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from merge.cutting import State, draw, family, largest_gap, same
from torch import Tensor

from poise.merge import merge_tensors
from poise.merge.methods.slerp import slerp

COUNT = 2
WHOLE = {"t": 1.0}
EQUAL = {"t": 0.4}
CASES: list[dict[str, Any]] = [{"t": 0.3}, {"t": 0.6, "norm": "geodesic", "vectors": "slerp"}]


def reference(models: list[State], base: State, *, t: float, norm: str = "raw", vectors: str = "linear") -> State:
    found = {name: between(models[0][name], models[1][name], t, norm, vectors) for name in models[0]}
    return {**found, "steps": base["steps"]}


def between(a: Tensor, b: Tensor, t: float, norm: str, vectors: str) -> Tensor:
    if not a.is_floating_point() or not a.numel():
        return a
    straight = (1 - t) * a + t * b
    cos = (a * b).sum() / (a.norm() * b.norm())
    if (a.ndim < 2 and vectors == "linear") or cos > 0.9995:
        return straight
    omega = torch.arccos(cos)
    if norm == "raw":
        return (torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b) / torch.sin(omega)
    turned = (torch.sin((1 - t) * omega) * a / a.norm() + torch.sin(t * omega) * b / b.norm()) / torch.sin(omega)
    return turned * ((1 - t) * a.norm() + t * b.norm())


def between_two(a: Tensor, b: Tensor, **settings: Any) -> Tensor:
    return merge_tensors(slerp, [{"w": a}, {"w": b}], **settings)["w"]


def two() -> tuple[Tensor, Tensor]:
    return draw(1)["embed.weight"], draw(2)["embed.weight"]


@pytest.mark.parametrize("norm", ["raw", "geodesic"])
def test_both_ends_are_exact(norm: str) -> None:
    a, b = two()
    assert torch.equal(between_two(a, b, t=0.0, norm=norm), a)
    assert torch.equal(between_two(a, b, t=1.0, norm=norm), b)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_equal_lengths_are_kept(t: float) -> None:
    a, b = two()
    b = b * (a.norm() / b.norm())
    assert float(between_two(a, b, t=t).norm() / a.norm()) == pytest.approx(1, abs=1e-6)
    assert float(((1 - t) * a + t * b).norm() / a.norm()) < 0.99


def test_seen_from_the_other_end_it_is_the_same() -> None:
    a, b = two()
    assert torch.allclose(between_two(a, b, t=0.3), between_two(b, a, t=0.7), atol=1e-7)
    assert torch.equal(between_two(a, a, t=0.3), a)


def test_raw_and_geodesic_differ_in_length_alone() -> None:
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert float(between_two(a, b).norm()) == pytest.approx(math.sqrt(5), abs=1e-6)  # 2.236
    assert float(between_two(a, b, norm="geodesic").norm()) == pytest.approx(2, abs=1e-6)


def test_opposite_tensors_are_refused_by_name() -> None:
    a, _ = two()
    with pytest.raises(ValueError, match=r"tensor 'w': the two models are opposite \(cosine -1.00000\)"):
        between_two(a, -2 * a)


def test_nearly_opposite_tensors_are_warned_of() -> None:
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[-0.99, math.sqrt(1 - 0.99**2)]])
    with pytest.warns(UserWarning, match="'w' has cosine -0.9900"):
        found = between_two(a, b, t=0.5)
    assert float(found.norm()) == pytest.approx(1, abs=1e-5)


def test_a_zero_tensor_has_no_direction_and_is_interpolated() -> None:
    _, b = two()
    assert torch.equal(between_two(torch.zeros_like(b), b, t=0.25), 0.25 * b)
    assert torch.equal(between_two(torch.zeros_like(b), torch.zeros_like(b)), torch.zeros_like(b))


def test_vectors_go_straight_unless_told() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(between_two(a, b), torch.tensor([0.5, 0.5]))
    assert torch.allclose(between_two(a, b, vectors="slerp"), torch.tensor([math.sqrt(0.5)] * 2))


def test_one_model_and_a_base_are_two_models() -> None:
    base, models = family(1)
    assert same(merge_tensors(slerp, models, base, t=0.3), merge_tensors(slerp, [base, *models], t=0.3))
    assert largest_gap(merge_tensors(slerp, models, base, t=0.3), base) > 0.01


def test_bad_settings_are_refused() -> None:
    _, models = family(3)
    with pytest.raises(ValueError, match="takes two models"):
        merge_tensors(slerp, models)
    with pytest.raises(ValueError, match=r"t=1.5: must be from 0 to 1"):
        merge_tensors(slerp, models[:2], t=1.5)
    with pytest.raises(ValueError, match="norm='flat'"):
        merge_tensors(slerp, models[:2], norm="flat")
