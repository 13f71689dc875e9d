"""WARP's merge (On the Benefits of Weight Averaged Rewarded Policies, arXiv 2406.16768)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from merge.cutting import State, family, largest_gap, same
from torch import Tensor

from poise.merge import merge_tensors
from poise.merge.methods.linear import linear
from poise.merge.methods.warp import spherical_mean, turned, warp

WHOLE: dict[str, Any] = {"eta": 1.0}
CASES: list[dict[str, Any]] = [{}, {"eta": 0.8, "scope": "tensor"}]
GROUPS = [["embed.weight"], ["layers.0.conv.weight", "layers.0.norm.weight"], ["layers.1.proj.weight", "layers.1.scale"]]


def reference(models: list[State], base: State, *, eta: float = 0.3, scope: str = "layer") -> State:
    found = dict(base)
    for names in GROUPS if scope == "layer" else [[name] for group in GROUPS for name in group]:
        deltas = [torch.cat([(m[n].double() - base[n].double()).reshape(-1) for n in names]) for m in models]
        mean = deltas[0]
        for number, delta in enumerate(deltas[1:], 2):
            mean = between(mean, delta, 1 / number)
        for name, part in zip(names, mean.split([base[n].numel() for n in names]), strict=True):
            found[name] = base[name] + eta * part.view(base[name].shape)
    return found


def between(a: Tensor, b: Tensor, share: float) -> Tensor:
    omega = torch.arccos(((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1))
    if omega.sin() < 1e-6:
        return (1 - share) * a + share * b
    return (torch.sin((1 - share) * omega) * a + torch.sin(share * omega) * b) / torch.sin(omega)


@pytest.mark.parametrize("angle", [0.3, 1.2, 2.5])
def test_unit_vectors_stay_so_where_their_linear_mean_is_shorter(angle: float) -> None:
    cos = math.cos(angle)
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        x, y = turned(1.0, cos, 1.0, share)
        assert math.sqrt(x * x + y * y + 2 * x * y * cos) == pytest.approx(1, abs=1e-12)
    base = {"w": torch.zeros(1, 2, dtype=torch.float64)}
    models = [
        {"w": torch.tensor([[1.0, 0.0]], dtype=torch.float64)},
        {"w": torch.tensor([[cos, math.sin(angle)]], dtype=torch.float64)},
    ]
    assert float(merge_tensors(warp, models, base, eta=1.0)["w"].norm()) == pytest.approx(1, abs=1e-12)
    assert float(merge_tensors(linear, models)["w"].norm()) == pytest.approx(math.cos(angle / 2), abs=1e-12)


def test_equal_runs_give_that_run_and_no_pull_the_start() -> None:
    base, models = family(1)
    assert same({**merge_tensors(warp, models * 2, base, eta=1.0), "steps": models[0]["steps"]}, models[0])
    assert same(merge_tensors(warp, family(2)[1], base, eta=0.0), base)


def test_many_orthogonal_runs_keep_their_length_and_weigh_the_same() -> None:
    shares = spherical_mean(torch.eye(4, dtype=torch.float64))
    assert math.sqrt(sum(s * s for s in shares)) == pytest.approx(1, abs=1e-12)
    two = spherical_mean(torch.eye(2, dtype=torch.float64))
    assert two == pytest.approx([math.sqrt(0.5)] * 2)


def test_the_angle_is_one_of_a_whole_layer() -> None:
    """In one layer, a tensor that both runs moved alike and one that they moved oppositely."""
    base = {"layers.0.a": torch.zeros(2), "layers.0.b": torch.zeros(2), "head.weight": torch.zeros(2)}
    one = {
        "layers.0.a": torch.tensor([1.0, 0.0]),
        "layers.0.b": torch.tensor([0.0, 1.0]),
        "head.weight": torch.tensor([1.0, 0.0]),
    }
    two = {
        "layers.0.a": torch.tensor([1.0, 0.0]),
        "layers.0.b": torch.tensor([0.0, -1.0]),
        "head.weight": torch.tensor([0.0, 1.0]),
    }
    whole = merge_tensors(warp, [one, two], base, eta=1.0)  # the two are orthogonal as a layer: each with 1 / sqrt 2
    assert whole["layers.0.a"].tolist() == pytest.approx([math.sqrt(2), 0.0])
    assert whole["head.weight"].tolist() == pytest.approx([math.sqrt(0.5)] * 2)
    apart = merge_tensors(warp, [one, two], base, eta=1.0, scope="tensor")
    assert apart["layers.0.a"].tolist() == pytest.approx([1.0, 0.0])
    assert apart["layers.0.b"].tolist() == pytest.approx([0.0, 0.0])  # opposite: linear


def test_a_run_that_did_not_move_is_averaged_linearly() -> None:
    base, models = family(1, torch.float64)
    found = merge_tensors(warp, [models[0], base], base, eta=1.0)
    assert largest_gap(found, merge_tensors(linear, [base, *models], base)) < 1e-15


def test_bad_settings_are_refused() -> None:
    base, models = family(2)
    with pytest.raises(ValueError, match="scope='model'"):
        merge_tensors(warp, models, base, scope="model")
    with pytest.raises(ValueError, match="a base model is needed"):
        merge_tensors(warp, models)
