"""LoRA-GGPO (arXiv 2502.14538v1): noise in the weights whose rows are as large as weights and gradients say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt.cases import gpt, loss_of, stirred, tokens
from conformance.cases import mutated
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise import catalog
from poise.adapt import LoRA, LoRAGGPO, attach

STEPS = 4


def layer(**settings: Any) -> tuple[nn.Sequential, Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 7, dtype=torch.float64))
    attach(model, LoRAGGPO(rank=3, alpha=4.5, **settings), "0", seed=0)
    stirred(model)
    plain: Any = model[0]
    return model.train(), plain, plain.adapter


def inputs(seed: int = 3) -> Tensor:
    return torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", ["paper", "port"])
def test_without_noise_it_is_lora_bit_for_bit(form: Any) -> None:
    found = []
    for method in (LoRA(rank=2), LoRAGGPO(rank=2, sigma=0.0, beta=0.01 if form == "paper" else 0.0, form=form)):
        model = gpt()
        attach(model, method, seed=0)
        opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(STEPS):
            opt.zero_grad()
            loss_of(model.train(), tokens(model)).backward()
            opt.step()
        found.append(dict(model.named_parameters()))
    assert all(torch.equal(p, found[1][n]) for n, p in found[0].items())


def test_without_gradients_each_rows_noise_is_a_share_of_the_row() -> None:
    _, plain, adapter = layer(sigma=0.05, beta=0.0)
    moved = plain.weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(12**0.5 * adapter.spread(plain) / moved.norm(dim=1), torch.full((7,), 0.05, dtype=torch.float64))


@pytest.mark.parametrize("form", ["paper", "port"])
def test_the_implied_gradient_and_the_spread_are_their_formulas(form: Any) -> None:
    model, plain, adapter = layer(sigma=0.05, beta=0.7, form=form)
    model(inputs()).square().sum().backward()
    a, b = adapter.lora_A, adapter.lora_B
    gamma = (1.5 * (b @ a.grad + b.grad @ a)).norm(dim=1)
    torch.testing.assert_close(adapter.gamma, gamma.detach(), rtol=1e-12, atol=1e-12)
    assert float(gamma.detach().min()) > 0
    change = 1.5 * b @ a
    if form == "paper":
        wanted = 0.05 / 12**0.5 * ((plain.weight + change).square().sum(1) + 0.7 * gamma**2).sqrt()
    else:
        lengths = (plain.weight.norm(dim=1).mean() ** 2 + change.square().sum(1)).sqrt()
        wanted = 7**-0.5 * (0.05 * lengths + 0.7 * gamma**2)
    torch.testing.assert_close(adapter.spread(plain), wanted.detach(), rtol=1e-12, atol=1e-12)


def test_the_implied_gradient_tells_it_from_its_mutant() -> None:
    for kind, same in ((LoRAGGPO, True), (mutated(catalog.get("lora-ggpo")), False)):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(12, 7, dtype=torch.float64))
        attach(model, kind(rank=3, alpha=4.5), "0", seed=0)
        stirred(model)
        model.train()(inputs()).square().sum().backward()
        adapter = model[0].adapter
        a, b = adapter.lora_A, adapter.lora_B
        gamma = (1.5 * (b @ a.grad + b.grad @ a)).norm(dim=1)
        assert torch.allclose(adapter.gamma, gamma.detach(), rtol=1e-9) == same


def noise_of(model: nn.Module, x: Tensor) -> Tensor:
    return model.train()(x).detach() - model.eval()(x).detach()


def test_noise_has_its_deviation_and_is_there_in_training_after_a_backward_pass_alone() -> None:
    model, plain, adapter = layer(sigma=0.3, beta=0.1)
    eye = torch.eye(12, dtype=torch.float64)
    assert not noise_of(model, eye).any()
    model.train()(inputs()).square().sum().backward()
    drawn = []
    for _ in range(600):
        drawn.append(noise_of(model, eye))
        adapter.count += 1
    deviation = torch.cat(drawn).std(0)
    torch.testing.assert_close(deviation, adapter.spread(plain), rtol=0.03, atol=0.0)
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(model.eval()(eye), model.eval()(eye))


@pytest.mark.parametrize("through", [True, False])
def test_layers_below_see_the_noisy_weight_unless_told_otherwise(through: bool) -> None:
    model, plain, adapter = layer(sigma=0.3, through=through)
    model(inputs()).square().sum().backward()
    noise = adapter.spread(plain)[:, None] * adapter.normal(1)
    x = inputs(4).requires_grad_()
    model(x).sum().backward()
    weight = plain.weight + adapter.scale * adapter.lora_B @ adapter.lora_A + (noise if through else 0)
    torch.testing.assert_close(x.grad, weight.sum(0).detach().expand(5, -1))


def test_checkpointing_draws_the_same_noise_again() -> None:
    grads = []
    for again in (False, True):
        model, _, adapter = layer(sigma=0.3)
        x = inputs().requires_grad_()
        for _ in range(3):
            model.zero_grad()
            y: Any = checkpoint(model, x, use_reentrant=False) if again else model(x)
            y.square().sum().backward()
        grads.append([adapter.lora_A.grad.clone(), adapter.lora_B.grad.clone(), x.grad, adapter.gamma])
        assert int(adapter.count) == 3
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def sharpness(method: LoRA) -> float:
    """The largest eigenvalue of the Hessian in A and B at the end of fitting noise."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 10, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    attach(model, method, nn.Linear, seed=0)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.Adam(params, lr=0.01)
    for _ in range(400):
        opt.zero_grad()
        nn.functional.mse_loss(model.train()(x), y).backward()
        opt.step()
    model.eval()
    v = [torch.randn_like(p) for p in params]
    top = 0.0
    for _ in range(50):
        size = sum(float(t.square().sum()) for t in v) ** 0.5
        v = [t / size for t in v]
        grads = torch.autograd.grad(nn.functional.mse_loss(model(x), y), params, create_graph=True)
        slope: Any = sum((g * t).sum() for g, t in zip(grads, v, strict=True))
        v = list(torch.autograd.grad(slope, params))
        top = sum(float(t.square().sum()) for t in v) ** 0.5
    return top


def test_where_it_ends_is_flatter_than_where_lora_does() -> None:
    plain, noisy = sharpness(LoRA(rank=4, alpha=4.0)), sharpness(LoRAGGPO(rank=4, alpha=4.0, sigma=0.2))
    assert noisy < 0.7 * plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": -0.1}, r"sigma=-0\.1"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"form": "v2"}, "form='v2'"),
        ({"rank": 0}, "rank=0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAGGPO(**settings)
