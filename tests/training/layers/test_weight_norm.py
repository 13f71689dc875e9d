"""Weight normalization (A Simple Reparameterization to Accelerate Training of Deep Neural Networks, arXiv 1602.07868)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from poise.catalog import get
from poise.training import MeanOnlyBatchNorm, WeightNorm, data_dependent_init, fold, reparameterize

F64 = torch.float64


def reference(v: Tensor, g: Tensor) -> Tensor:
    """Row by row: the direction of v at the length g."""
    w = torch.zeros_like(v)
    for i in range(len(v)):
        length = math.sqrt(sum(float(x) ** 2 for x in v[i].flatten()))
        w[i] = float(g[i]) * v[i] / length
    return w


def held(layer: Any) -> Any:
    """g (or s) and v of a layer."""
    return layer.parametrizations.weight.original0, layer.parametrizations.weight.original1


def layers() -> list[Any]:
    torch.manual_seed(0)
    return [nn.Linear(7, 5).double(), nn.Conv1d(4, 6, 3, groups=2).double(), nn.Conv2d(3, 5, 3).double()]


def inputs(layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Linear):
        return torch.randn(9, 7, dtype=F64)
    return torch.randn(3, 4, 8, dtype=F64) if isinstance(layer, nn.Conv1d) else torch.randn(3, 3, 6, 6, dtype=F64)


def randomized(layer: Any) -> Any:
    g, v = held(layer)
    with torch.no_grad():
        g.copy_(torch.randn_like(g))
        v.copy_(torch.randn_like(v))
    return layer


def gap(kind: Any) -> float:
    worst = 0.0
    for layer in layers():
        randomized(reparameterize(layer, kind))
        worst = max(worst, float((layer.weight - reference(held(layer)[1], held(layer)[0])).abs().max()))
    return worst


def test_the_weight_is_the_direction_of_v_at_the_length_g() -> None:
    assert gap(WeightNorm) < 1e-13


def test_the_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("weight-norm"))) > 1e-3


def test_attaching_it_changes_no_weight() -> None:
    for exponential in (False, True):
        for layer in layers():
            before = layer.weight.detach().clone()
            reparameterize(layer, WeightNorm, exponential=exponential)
            assert torch.allclose(layer.weight, before, rtol=1e-14, atol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_and_backward_equal_torchs_weight_norm(which: int) -> None:
    ours, torchs = randomized(reparameterize(layers()[which], WeightNorm)), layers()[which]
    weight_norm(torchs)
    with torch.no_grad():
        g, v = held(torchs)
        g.copy_(held(ours)[0].reshape(g.shape))
        v.copy_(held(ours)[1])
    x = inputs(ours)
    weights = torch.randn_like(ours(x))
    for layer in (ours, torchs):
        (layer(x).tanh() * weights).sum().backward()
    assert float((ours(x) - torchs(x)).abs().max()) < 1e-12
    for a, b in zip((*held(ours), ours.bias), (*held(torchs), torchs.bias), strict=True):
        assert float((a.grad - b.grad.reshape(a.shape)).abs().max()) < 1e-12


def test_the_gradients_are_the_papers() -> None:
    layer = randomized(reparameterize(nn.Linear(7, 5).double(), WeightNorm))
    g, v = held(layer)
    dw = torch.randn(5, 7, dtype=F64)
    (layer.weight * dw).sum().backward()
    for i in range(5):
        length = v[i].norm()
        dg = (dw[i] @ v[i]) / length
        dv = g[i] / length * dw[i] - g[i] * dg / length**2 * v[i]
        assert abs(float(g.grad[i] - dg)) < 1e-13
        assert float((v.grad[i] - dv).abs().max()) < 1e-13
        assert abs(float(v.grad[i] @ v[i])) < 1e-13


@pytest.mark.parametrize("exponential", [False, True])
def test_under_sgd_the_length_of_v_only_grows_and_by_pythagoras(exponential: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    reparameterize(model, WeightNorm, exponential=exponential)
    opt = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        x = torch.randn(16, 6, dtype=F64)
        opt.zero_grad()
        (model(x) - x[:, :3] * x[:, 3:]).square().mean().backward()
        before = [held(model[i])[1].detach().clone() for i in (0, 2)]
        opt.step()
        for i, old in zip((0, 2), before, strict=True):
            v = held(model[i])[1]
            grown = old.square().sum(1) + 0.25 * v.grad.square().sum(1)
            assert torch.allclose(v.detach().square().sum(1), grown, rtol=1e-12)
            assert (v.detach().norm(dim=1) > old.norm(dim=1)).all()


def test_with_g_an_exponential_lengths_stay_positive_and_move_by_factors() -> None:
    layer = reparameterize(nn.Linear(7, 5).double(), WeightNorm, exponential=True)
    s, _ = held(layer)
    before = layer.weight.detach().norm(dim=1)
    with torch.no_grad():
        s.sub_(3.0)
    assert torch.allclose(layer.weight.norm(dim=1), before * math.exp(-3.0), rtol=1e-13)
    layer.weight[2].norm().backward()
    assert s.grad is not None
    assert torch.allclose(s.grad, layer.weight.norm(dim=1) * (torch.arange(5) == 2), atol=1e-14)  # d exp(s) / ds = g


# ------------------------------------------------------------------------------------------------ data-dependent initialization


def deep(dtype: torch.dtype = F64) -> Any:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2), nn.ELU(), nn.Flatten()]
    return nn.Sequential(*convolutions, nn.Linear(54, 20), nn.Tanh(), nn.Linear(20, 4)).to(dtype)


def before_activations(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    found = []
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found.append(x.movedim(1, 0).flatten(1).double())
    return found


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize("init_scale", [1.0, 0.1])
def test_after_initialization_every_output_has_mean_0_and_variance_1(exponential: bool, init_scale: float) -> None:
    model = reparameterize(deep(), WeightNorm, exponential=exponential)
    x = 3 + 5 * torch.randn(32, 3, 9, 9, dtype=F64)
    assert data_dependent_init(model, x, init_scale=init_scale) == ["0", "2", "5", "7"]
    for t in before_activations(model, x):
        assert float(t.mean(1).abs().max()) < 1e-12
        assert float((t.var(1, correction=0) / init_scale**2 - 1).abs().max()) < 1e-7 / init_scale**2  # eps under the root
    for i in (0, 2, 5, 7):
        v = held(model[i])[1]
        assert 0.04 < float(v.detach().std()) < 0.06


def test_in_float32_means_are_below_a_millionth() -> None:
    model = reparameterize(deep(torch.float32), WeightNorm)
    x = torch.randn(64, 3, 9, 9)
    data_dependent_init(model, x)
    for t in before_activations(model, x):
        assert float(t.mean(1).abs().max()) < 1e-6
        assert float((t.var(1, correction=0) - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("convolution, eps", [(False, 1e-10), (True, 1e-8)])
def test_the_guard_on_the_variance_is_1e_10_of_dense_layers_and_1e_8_of_convolutions(convolution: bool, eps: float) -> None:
    layer: Any = (nn.Conv1d(4, 3, 1) if convolution else nn.Linear(4, 3)).double()
    reparameterize(layer, WeightNorm)
    x = eps**0.5 * torch.randn(50, 4, *([2] if convolution else []), dtype=F64)
    data_dependent_init(layer, x)
    g, v = held(layer)
    unit = (v / v.flatten(1).norm(dim=1).reshape(-1, *[1] * (v.ndim - 1))).detach().flatten(1)
    t = torch.einsum("of,bf...->bo...", unit, x).movedim(1, 0).flatten(1)
    assert torch.allclose(g.detach(), 1 / (t.var(1, correction=0) + eps).sqrt(), rtol=1e-12)


def test_the_directions_may_be_kept_and_a_generator_draws_them() -> None:
    model = reparameterize(deep(), WeightNorm)
    x = torch.randn(8, 3, 9, 9, dtype=F64)
    before = [held(model[i])[1].detach().clone() for i in (0, 2, 5, 7)]
    data_dependent_init(model, x, std=None)
    assert all(torch.equal(held(model[i])[1], old) for i, old in zip((0, 2, 5, 7), before, strict=True))
    drawn = []
    for _ in range(2):
        data_dependent_init(model, x, generator=torch.Generator().manual_seed(5))
        drawn.append(held(model[0])[1].detach().clone())
    assert torch.equal(*drawn)


def test_a_layer_without_bias_gets_its_variance_and_mean_only_batch_norm_its_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=False), MeanOnlyBatchNorm(10), nn.ReLU(), nn.Linear(10, 4, bias=False)).double()
    reparameterize(model, WeightNorm)
    x = 2 + torch.randn(40, 6, dtype=F64)
    data_dependent_init(model, x)
    first = model[0](x)
    assert torch.allclose(first.var(0, correction=0), torch.ones(10, dtype=F64), atol=1e-7)
    assert float(first.mean(0).abs().min()) > 1e-3
    assert float(model[1](first).mean(0).abs().max()) < 1e-12
    assert torch.allclose(model(x).var(0, correction=0), torch.ones(4, dtype=F64), atol=1e-7)


def test_layers_that_the_batch_does_not_reach_and_embeddings_are_left_as_they_were() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.used, self.unused = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.used(self.table(tokens))

    model = reparameterize(Partly(), WeightNorm, (nn.Embedding, nn.Linear))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert data_dependent_init(model, torch.arange(9).reshape(3, 3)) == ["used"]
    changed = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"used"}


def test_a_layer_used_twice_is_set_at_its_first_use() -> None:
    layer = reparameterize(nn.Linear(4, 4).double(), WeightNorm)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = 3 * torch.randn(30, 4, dtype=F64)
    assert data_dependent_init(model, x) == ["0"]
    assert float(layer(x).mean(0).abs().max()) < 1e-12


def test_it_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="reparameterize"):
        data_dependent_init(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="one value for each output"):
        data_dependent_init(reparameterize(nn.Linear(3, 3), WeightNorm), torch.ones(1, 3))


def test_folding_changes_no_output() -> None:
    model = reparameterize(deep(torch.float32), WeightNorm, exponential=True)
    x = torch.randn(8, 3, 9, 9)
    data_dependent_init(model, x)
    wanted = model(x)
    assert float((fold(model)(x) - wanted).abs().max()) == 0.0
