"""The M-FAC pruner (M-FAC: Efficient Matrix-Free Approximations of Second-Order Information, arXiv 2107.03356)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.linalg.fisher_window import FisherWindow
from poise.training import MFACPruner
from poise.training.solvers.mfac_pruner import prune_once


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def trained() -> tuple[Any, Tensor, Tensor]:
    """837 weights that fit labels of which chance is a part."""
    x = normal(256, 20)
    scores = torch.tanh(x @ normal(20, 12, seed=1)) @ normal(12, 10, seed=2)
    y = (scores + 1.5 * normal(256, 10, seed=3)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 27), nn.Tanh(), nn.Linear(27, 10, bias=False)).double()
    opt = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(120):
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
    return model, x, y


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def losses(model: nn.Module, x: Tensor, y: Tensor, size: int = 2) -> Callable[[], Iterator[Tensor]]:
    def each() -> Iterator[Tensor]:
        for some, labels in zip(x.split(size), y.split(size), strict=True):
            yield nn.functional.cross_entropy(model(some), labels)

    return each


def pruned(sparsity: float, rounds: int, target: Any = MFACPruner, **settings: Any) -> tuple[float, nn.Module]:
    model, x, y = copy.deepcopy(trained())
    pruner = target(model, names=[name for name, _ in model.named_parameters()], **settings)
    pruner.prune(losses(model, x, y), sparsity, rounds)
    return loss_of(model, x, y), model


def by_magnitude(sparsity: float) -> float:
    model, x, y = copy.deepcopy(trained())
    flat = nn.utils.parameters_to_vector(model.parameters())
    flat = flat.detach().clone()
    flat[flat.abs().topk(round(sparsity * len(flat)), largest=False).indices] = 0.0
    nn.utils.vector_to_parameters(flat, model.parameters())
    return loss_of(model, x, y)


def test_many_rounds_lose_less_than_one_and_less_than_dropping_the_smallest() -> None:
    for sparsity in (0.5, 0.75):
        many, once, small = pruned(sparsity, 16)[0], pruned(sparsity, 1)[0], by_magnitude(sparsity)
        assert many < 0.95 * small
        assert many < once


def test_a_pruner_that_drops_what_matters_most_is_found_out() -> None:
    assert pruned(0.5, 4, mutated(catalog.get("m-fac-pruner")))[0] > 1.2 * pruned(0.5, 4)[0]


def test_one_dropped_weight_costs_its_saliency_in_the_quadratic_model() -> None:
    """The corrected weights are the best that F's parabola has with that weight at zero."""
    G, w, lam = normal(12, 30), normal(30, seed=1), 0.1
    F = lam * torch.eye(30, dtype=torch.float64) + G.mT @ G / 12
    new, dropped, saliency = prune_once(w, G, 1, lam)
    cost = 0.5 * (new - w) @ F @ (new - w)
    assert float(cost) == pytest.approx(float(saliency.min()), rel=1e-9)
    assert int(dropped) == int(saliency.argmin())
    rest = torch.arange(30) != dropped
    assert float((F @ (new - w))[rest].abs().max()) < 1e-9


def test_the_asked_share_is_dropped_by_the_same_factor_each_round_and_stays_dropped() -> None:
    model, x, y = copy.deepcopy(trained())
    pruner = MFACPruner(model, block=64)
    weights = [model[0].weight, model[2].weight]
    bias = model[0].bias.detach().clone()
    first = pruner.prune(losses(model, x, y, 32), 0.6, 4)
    left = [1 - one.sparsity for one in first]
    assert [one.gradients for one in first] == [8] * 4
    assert left == pytest.approx([0.4 ** (j / 4) for j in (1, 2, 3, 4)], abs=2e-3)
    assert sum(int((w == 0).sum()) for w in weights) == round(0.6 * 810)
    assert torch.equal(model[0].bias, bias)
    zeros = [(w == 0) for w in weights]
    with torch.no_grad():
        weights[0].add_(1.0)
    pruner.apply()
    assert torch.equal(weights[0] == 0, zeros[0])
    again = MFACPruner(model)
    assert again.sparsity == pytest.approx(0.6, abs=1e-3)
    assert again.prune(losses(model, x, y, 32), 0.5) == []
    again.prune(losses(model, x, y, 32), 0.8, 2)
    assert all(bool((w[z] == 0).all()) for w, z in zip(weights, zeros, strict=True))


def test_bad_settings_are_named() -> None:
    model, x, y = copy.deepcopy(trained())
    settings: list[dict[str, Any]] = [{"damping": 0.0}, {"block": 0}, {"names": ["strange"]}, {"names": []}]
    for wrong in settings:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MFACPruner(model, **wrong)
    with pytest.raises(ValueError, match="sparsity=1"):
        MFACPruner(model).prune(losses(model, x, y), 1.0)
    with pytest.raises(ValueError, match="rounds=0"):
        MFACPruner(model).prune(losses(model, x, y), 0.5, 0)


def test_the_correction_is_worth_having(monkeypatch: pytest.MonkeyPatch) -> None:
    corrected = pruned(0.5, 8)[0]
    monkeypatch.setattr(FisherWindow, "solve", lambda self, x: torch.zeros_like(x))
    assert corrected < 0.95 * pruned(0.5, 8)[0]
