"""Turbo-Muon (Turbo-Muon: Accelerating Orthogonality-Based Optimization with Pre-Conditioning, arXiv 2512.04632)."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play, same
from optim.references import polar
from optim.rules import test_muon
from torch import Tensor

from poise.optim import Muon, TurboMuon

turbo = partial(TurboMuon, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"steps": 3, "weight_decay": 0.1, "adamw_weight_decay": 0.3, "nesterov": False},
    {"momentum": 0.5, "scale_rule": "match_rms", "adamw_lr": 1e-2, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-3},
]
reference = partial(test_muon.reference, method="turbo4")


def update(matrix: Tensor, **hyper: Any) -> Tensor:
    """What a step without memory adds to a zero weight at lr 1, negated."""
    params = leaves([torch.zeros_like(matrix)])
    return -play(turbo(params, lr=1.0, momentum=0.0, nesterov=False, scale_rule="none", **hyper), params, [[matrix]])[0]


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "three steps", "others"])
def test_twelve_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 40), (40, 24), (24,), (8, 4, 3, 3), ()], 12)
    params = leaves(start)
    assert distance(play(turbo(params, lr=0.02, **hyper), params, grads), reference(start, grads, lr=0.02, **hyper)) < 1e-9


def test_it_is_muon_with_another_orthogonalizer_bit_for_bit() -> None:
    start, grads = draw([(24, 40), (24,)], 8, dtype=torch.float32)
    ours, muons = leaves(start), leaves(start)
    found = play(turbo(ours, lr=0.02, weight_decay=0.1), ours, grads)
    assert same(found, play(Muon(muons, lr=0.02, weight_decay=0.1, method="turbo4", backend="eager"), muons, grads))


def test_rows_at_right_angles_are_orthonormal_after_the_scaling_alone_whatever_their_lengths() -> None:
    """So that the polynomials see singular values of 1 only, and the update has equal ones."""
    (square,), _ = draw([(32, 32)], 0)
    rows = torch.linalg.qr(square).Q[:16] * torch.logspace(-1, 1, 16, dtype=torch.float64).unsqueeze(1)
    values = torch.linalg.svdvals(update(rows))
    assert float((values - values[0]).abs().max()) < 1e-12
    exact = polar(rows, "svd", None)
    assert distance([update(rows) / values[0]], [exact]) < 1e-9


def test_four_steps_come_as_near_as_the_five_they_are_taken_from() -> None:
    (matrix,), _ = draw([(256, 256)], 0)
    exact = polar(matrix, "svd", None)
    gaps = {}
    for name, found in (("turbo", update(matrix)), ("dyn5", _muon(matrix, "dyn5", 5)), ("dyn4", _muon(matrix, "dyn5", 4))):
        gaps[name] = float((found - exact).norm() / exact.norm())
    assert gaps["turbo"] < 1.1 * gaps["dyn5"]
    assert gaps["turbo"] < 0.7 * gaps["dyn4"]


def _muon(matrix: Tensor, method: str, steps: int) -> Tensor:
    return test_muon.orthogonal_update(matrix, method=method, steps=steps)


@pytest.mark.parametrize(
    "name, value", [("lr", -0.1), ("momentum", 1.5), ("steps", 0), ("scale_rule", "huge"), ("adamw_lr", -1.0)]
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        turbo(leaves(draw([(4, 4)], 0)[0]), **hyper)
