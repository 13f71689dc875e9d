"""GradNormLoRP (Gradient Weight-normalized Low-rank Projection, arXiv 2412.19616)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from conformance.problems import distance, draw, leaves, play, same
from torch import Tensor, nn

from poise.catalog import get
from poise.linalg.projectors import Projector
from poise.optim import Optimizer, Route, chain, everything, hidden_matrices
from poise.optim.transforms.adaptive import adam
from poise.training import GradNormLoRP, WeightNorm, fold, reparameterize
from poise.training.layers.gradnormlorp import projected_adam, projected_adamw

F64 = torch.float64


def layers() -> list[Any]:
    torch.manual_seed(0)
    return [nn.Linear(7, 5).double(), nn.Conv1d(4, 6, 3, groups=2).double(), nn.Conv2d(3, 5, 3).double()]


def inputs(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(9, 7, dtype=F64)
    return torch.randn(3, 4, 8, dtype=F64) if isinstance(layer, nn.Conv1d) else torch.randn(3, 3, 6, 6, dtype=F64)


def held(layer: Any) -> tuple[Any, Any, Any, Any]:
    """M, I, J and W0."""
    kept = layer.parametrizations.weight
    return kept.original0, kept.original1, kept.original2, kept.original3


def randomized(layer: Any) -> Any:
    with torch.no_grad():
        for t in held(layer)[:3]:
            t.copy_(torch.randn_like(t))
    return layer


def reference(layer: Any, scale: float, norm: str) -> Tensor:
    """Row by row, or column by column: the direction of W0 + s I J at the length M."""
    magnitude, left, right, base = (t.detach() for t in held(layer))
    v = base.flatten(1) + scale * left @ right
    v = v if norm == "row" else v.T
    w = torch.zeros_like(v)
    for i in range(len(v)):
        w[i] = float(magnitude[i]) * v[i] / math.sqrt(sum(float(x) ** 2 for x in v[i]))
    return (w if norm == "row" else w.T).reshape(base.shape)


def gap(kind: Any) -> float:
    worst = 0.0
    for norm in ("row", "column"):
        for layer in layers():
            randomized(reparameterize(layer, kind, rank=2, alpha=6.0, norm=norm))
            worst = max(worst, float((layer.weight - reference(layer, 3.0, norm)).detach().abs().max()))
    return worst


def test_the_weight_is_the_direction_of_the_sum_at_the_learned_length() -> None:
    assert gap(GradNormLoRP) < 1e-13


def test_the_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("gradnormlorp"))) > 1e-3


@pytest.mark.parametrize("norm", ["row", "column"])
def test_attaching_it_changes_no_weight_and_freezes_it(norm: Any) -> None:
    for layer in layers():
        before = layer.weight.detach().clone()
        reparameterize(layer, GradNormLoRP, rank=3, norm=norm)
        assert float((layer.weight - before).detach().abs().max()) < 1e-15
        assert [t.requires_grad for t in held(layer)] == [True, True, True, False]
        assert float(held(layer)[2].detach().abs().max()) > 0
    single = nn.Linear(64, 48)
    before = single.weight.detach().clone()
    assert float((reparameterize(single, GradNormLoRP).weight - before).detach().abs().max()) < 1e-7


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_are_the_formulas_and_that_of_the_direction_is_at_right_angles_to_each_row(which: int) -> None:
    layer = randomized(reparameterize(layers()[which], GradNormLoRP, rank=2, alpha=1.0))
    magnitude, left, right, base = held(layer)
    seen: list[Tensor] = []
    x = inputs(layer)
    with torch.nn.utils.parametrize.cached():
        layer.weight.register_hook(seen.append)
        layer(x).tanh().sum().backward()
    dW = seen[0].flatten(1)
    V = (base.flatten(1) + 0.5 * left @ right).detach()
    n = V.norm(dim=1, keepdim=True)
    dV = magnitude.detach()[:, None] / n * (dW - V * (dW * V).sum(1, keepdim=True) / n**2)
    assert float((dV * V).sum(1).abs().max()) < 1e-12
    wanted = [(dW * V).sum(1) / n[:, 0], 0.5 * dV @ right.detach().T, 0.5 * left.detach().T @ dV]
    assert distance([magnitude.grad, left.grad, right.grad], wanted) < 1e-12
    assert base.grad is None


@pytest.mark.parametrize("norm", ["row", "column"])
def test_folding_gives_a_plain_layer_with_identical_outputs(norm: Any) -> None:
    for layer in layers():
        randomized(reparameterize(layer, GradNormLoRP, rank=2, norm=norm))
        x = inputs(layer)
        wanted = layer(x)
        fold(layer)
        assert torch.equal(layer(x), wanted)
        assert type(layer) in (nn.Linear, nn.Conv1d, nn.Conv2d)
        assert layer.weight.requires_grad
        assert set(layer.state_dict()) == {"weight", "bias"}


def adapted(rank: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 6))
    return reparameterize(model, GradNormLoRP, rank=rank, alpha=16.0)


def test_state_of_the_factors_is_as_large_as_the_subspace_and_there_is_none_for_frozen_weights() -> None:
    model = adapted()
    opt = projected_adamw(model, rank=2, backend="eager")
    sizes = {}
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            sizes[name] = {key.rpartition(".")[2]: tuple(t.shape) for key, t in opt.state[p].items() if key != "step"}
    first = "0.parametrizations.weight."
    assert sizes[f"{first}original1"] == {"basis": (2, 40), "exp_avg": (2, 4), "exp_avg_sq": (2, 4)}
    assert sizes[f"{first}original2"] == {"basis": (2, 24), "exp_avg": (4, 2), "exp_avg_sq": (4, 2)}
    assert sizes[f"{first}original0"] == {"exp_avg": (40,), "exp_avg_sq": (40,)}
    assert f"{first}original3" not in sizes
    assert {group["rule"] for group in opt.param_groups} == {"projected", "adam"}


def test_only_magnitudes_factors_and_biases_move_and_each_factor_within_its_subspace() -> None:
    model = adapted()
    opt = projected_adamw(model, lr=0.01, rank=2, update_every=100, backend="eager")
    x, y = torch.randn(16, 24), torch.randn(16, 6)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(8):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    assert {name.rpartition(".")[2] for name, move in moved.items() if not move.any()} == {"original3"}
    right = moved["0.parametrizations.weight.original2"]  # at rest in the first step, then in one subspace
    assert int(torch.linalg.matrix_rank(right, rtol=1e-4)) == 2
    assert float(right.abs().max()) > 0.01


def test_in_a_subspace_that_is_everything_it_is_adam_in_the_basis_of_the_gradient() -> None:
    start, grads = draw([(6, 4)], 5)
    params = leaves(start)
    opt = Optimizer(params, chain(projected_adam(Projector("svd", 4, "right"), every=100, scale=0.5)), lr=0.1, backend="eager")
    found = play(opt, params, grads)
    first, second = (torch.linalg.svd(row[0]).Vh for row in grads[:2])
    basis = second * (first * second).sum(1, keepdim=True).sign()  # each vector turned towards the one that was in its place
    x, m, v = start[0], torch.zeros(6, 4, dtype=F64), torch.zeros(6, 4, dtype=F64)
    for t, (g,) in enumerate(grads, 1):
        assert g is not None
        B = first if t == 1 else basis
        small = g @ B.T
        m, v = 0.9 * m + 0.1 * small, 0.999 * v + 0.001 * small**2
        x = x - 0.1 * 0.5 * (m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)) @ B
    assert distance(found, [x]) < 1e-12


def test_with_all_rows_and_no_low_rank_factor_it_is_weight_normalization_under_adam() -> None:
    ends = []
    for low in (True, False):
        torch.manual_seed(0)
        layer: Any = reparameterize(nn.Linear(6, 4).double(), WeightNorm)
        rule = projected_adam(Projector("rows", 1.0), every=3) if low else adam()
        stored = layer.parametrizations.weight
        routes = [Route("directions", chain(rule), hidden_matrices), Route("rest", chain(adam()), everything)]
        opt = Optimizer([("v.weight", stored.original1), ("g.bias", stored.original0)], routes, lr=0.01, backend="eager")
        x, y = torch.randn(8, 6, dtype=F64), torch.randn(8, 4, dtype=F64)
        for _ in range(7):
            opt.zero_grad()
            (layer(x) - y).square().mean().backward()
            opt.step()
        ends.append([layer.weight.detach(), stored.original0.detach()])
    assert same(*ends)


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 6}, r"rank=6.*\(5, 7\)"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"norm": "both"}, "norm='both'"),
    ],
)
def test_an_impossible_setting_is_refused_and_changes_nothing(hyper: dict[str, Any], message: str) -> None:
    layer = layers()[0]
    with pytest.raises(ValueError, match=message):
        reparameterize(layer, GradNormLoRP, **hyper)
    assert type(layer) is nn.Linear


def test_a_zero_row_and_a_model_without_such_layers_are_refused() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight[1])
    with pytest.raises(ValueError, match="row 1 of 3 is zero"):
        reparameterize(layer, GradNormLoRP, rank=1)
    with pytest.raises(ValueError, match="GradNormLoRP"):
        projected_adamw(nn.Linear(4, 3))
    settings: list[tuple[dict[str, Any], str]] = [({"every": 0}, "gap=0"), ({"scale": -1.0}, "scale=-1.0")]
    for wrong, message in settings:
        with pytest.raises(ValueError, match=message):
            projected_adam(Projector("svd", 2), **wrong)
