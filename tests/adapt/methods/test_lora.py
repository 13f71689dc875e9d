"""LoRA (arXiv 2106.09685), with the scale of arXiv 2312.03732."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt.cases import Conv1D, Mixed, gpt, losses, output, stirred, tokens
from conformance.cases import mutated
from torch import Tensor, nn

from poise import adapt, catalog
from poise.adapt import LoRA, adapters, attach, detach, fold, pairs


def layer(inputs: int = 12, outputs: int = 7, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype))


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def test_it_adds_its_scaled_product() -> None:
    model = layer()
    attach(model, LoRA(rank=3, alpha=5.0), "0")
    stirred(model)
    plain: Any = model[0]
    (pair,) = pairs(model)
    x = inputs(4, 12)
    wanted = x @ (plain.weight + 5.0 / 3 * pair.B @ pair.A).T + plain.bias
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-12)


def test_at_first_only_the_upper_factor_has_a_gradient_and_it_is_that_of_the_weight_seen_through_the_lower() -> None:
    model = layer()
    x, target = inputs(5, 12), inputs(5, 7)
    nn.functional.mse_loss(model(x), target).backward()
    plain: Any = model[0]
    whole = plain.weight.grad.clone()
    attach(model, LoRA(rank=3, alpha=4.5), "0", seed=1)
    nn.functional.mse_loss(model(x), target).backward()
    (pair,) = pairs(model)
    assert pair.A.grad is not None
    assert not pair.A.grad.any()
    torch.testing.assert_close(pair.B.grad, 1.5 * whole @ pair.A.T, rtol=1e-12, atol=1e-14)


def test_gradients_of_both_factors_are_those_of_the_product() -> None:
    model = layer()
    attach(model, LoRA(rank=3, alpha=4.5), "0", seed=1)
    stirred(model)
    (pair,) = pairs(model)
    x, target = inputs(5, 12), inputs(5, 7)
    nn.functional.mse_loss(model(x), target).backward()
    plain: Any = model[0]
    weight = (plain.weight + 1.5 * pair.B @ pair.A).detach().requires_grad_()
    nn.functional.mse_loss(nn.functional.linear(x, weight, plain.bias), target).backward()
    assert weight.grad is not None
    torch.testing.assert_close(pair.B.grad, 1.5 * weight.grad @ pair.A.T, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pair.A.grad, 1.5 * pair.B.T @ weight.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rank_and_alpha_times_the_same_keep_the_scale(k: int) -> None:
    assert LoRA(rank=4, alpha=6.0).scale == LoRA(rank=4 * k, alpha=6.0 * k).scale == 1.5
    assert LoRA(rank=4, alpha=6.0, rank_stabilized=True).scale == 3.0
    assert LoRA(rank=16, alpha=None).scale == 1.0


def test_the_scale_tells_it_from_its_mutant() -> None:
    settings: dict[str, Any] = {"rank": 4, "alpha": 8.0, "rank_stabilized": True}
    assert LoRA(**settings).scale == 4.0
    assert mutated(catalog.get("lora"))(**settings).scale != 4.0


def test_the_defaults_are_the_papers_code() -> None:
    method = LoRA()
    assert (method.rank, method.alpha, method.scale, method.dropout) == (8, 8.0, 1.0, 0.0)
    model = layer(400, 300, torch.float32)
    attach(model, targets="0")
    (pair,) = pairs(model)
    assert pair.A.shape == (8, 400)
    assert pair.B.shape == (300, 8)
    assert not pair.B.any()
    bound = 400**-0.5
    assert 0.98 * bound < float(pair.A.detach().abs().max()) < bound
    torch.testing.assert_close(float(pair.A.detach().std()), bound / 3**0.5, rtol=0.05, atol=0.0)


def test_an_embedding_begins_the_other_way_round() -> None:
    model = Mixed()
    attach(model, LoRA(rank=8), "words")
    (pair,) = pairs(model)
    assert pair.A.shape == (8, 20)
    assert pair.B.shape == (16, 8)
    assert not pair.A.any()
    assert 0.8 < float(pair.B.detach().std()) < 1.2


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 5, bias=False),
        lambda: Conv1D(5, 6),
        lambda: nn.Embedding(6, 5),
        lambda: nn.Conv1d(6, 5, 3, stride=2, padding=1),
        lambda: nn.Conv2d(6, 5, (3, 2), padding=(2, 0), dilation=(2, 1), padding_mode="reflect"),
        lambda: nn.Conv3d(2, 3, 2, padding="same"),
    ],
)
def test_every_kind_of_layer_does_what_its_weight_and_the_product_would(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    one: Any = model[0]
    turned = isinstance(one, nn.Embedding | Conv1D)
    if isinstance(one, nn.Embedding):
        x = torch.tensor([[0, 3, 5], [1, 1, 2]])
    elif isinstance(one, nn.modules.conv._ConvNd):
        x = inputs(2, one.in_channels, *[7] * (one.weight.ndim - 2))
    else:
        x = inputs(2, 3, 6)
    attach(model, LoRA(rank=2, alpha=3.0), "0")
    stirred(model)
    found = model(x)
    (pair,) = pairs(model)
    change = 1.5 * (pair.B @ pair.A).detach()
    plain = detach(model)
    with torch.no_grad():
        stored: Any = one.weight
        stored += (change.T if turned else change).reshape(stored.shape)
    torch.testing.assert_close(found, plain(x), rtol=1e-12, atol=1e-12)


def test_folded_is_unfolded_to_rounding_and_not_with_dropout_on() -> None:
    model = gpt()
    attach(model, LoRA(rank=4, alpha=16.0, dropout=0.5))
    stirred(model)
    model.train()
    x = tokens(model)
    assert not torch.allclose(model(x), model(x))
    wanted = output(model)
    assert not torch.allclose(model.train()(x), wanted)
    fold(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.train()(x), output(model))  # what is folded has no dropout


def test_dropout_drops_inputs_of_the_adapter_alone_and_keeps_their_mean() -> None:
    model = layer(1, 1)
    attach(model, LoRA(rank=1, alpha=1.0, dropout=0.25), "0")
    stirred(model)
    model.train()
    (pair,) = pairs(model)
    base: Any = model[0]
    x = torch.ones(4000, 1, dtype=torch.float64)
    beside = (model(x) - nn.functional.linear(x, base.weight, base.bias)) / (pair.B @ pair.A)
    dropped = beside.abs() < 1e-9
    torch.testing.assert_close(beside[~dropped], torch.full_like(beside[~dropped], 4 / 3))
    assert 0.2 < float(dropped.double().mean()) < 0.3


def test_bfloat16_sums_are_rounded_once() -> None:
    model = layer(32, 32).to(torch.bfloat16)
    attach(model, LoRA(rank=2), "0")
    stirred(model)
    (pair,) = pairs(model)
    x = inputs(6, 32).to(torch.bfloat16)
    base: Any = model[0]
    y = nn.functional.linear(x, base.weight, base.bias)
    wanted = (y.float() + pair.scale * (x.float() @ pair.A.T @ pair.B.T)).to(torch.bfloat16)
    assert pair.A.dtype == torch.float32
    assert torch.equal(model(x), wanted)
    fold(model)
    weight = base.weight.detach().clone()
    plain = layer(32, 32).to(torch.bfloat16).state_dict()["0.weight"].float()
    assert torch.equal(weight, (plain + pair.scale * pair.B @ pair.A).to(torch.bfloat16))


def test_a_weight_that_is_not_contiguous_and_a_batch_without_rows() -> None:
    model = layer()
    plain: Any = model[0]
    plain.weight = nn.Parameter(inputs(12, 7).T)
    attach(model, LoRA(rank=2), "0")
    stirred(model)
    wanted = model(inputs(4, 12))
    assert model(inputs(0, 12)).shape == (0, 7)
    assert model(inputs(12)).shape == (7,)
    fold(model)
    torch.testing.assert_close(model(inputs(4, 12)), wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: must be a whole number"),
        ({"rank": 2.0}, r"rank=2\.0"),
        ({"alpha": 0.0}, r"alpha=0\.0: must be above 0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"dropout": -0.1}, r"dropout=-0\.1"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**settings)


def test_it_lowers_a_loss_and_touches_nothing_else() -> None:
    model = gpt()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    attach(model, LoRA(rank=4))
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    found = []
    for _, loss in zip(range(30), losses(model), strict=False):
        opt.zero_grad()
        loss().backward()
        opt.step()
        found.append(float(loss().detach()))
    assert found[-1] < 0.8 * found[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert len(adapters(model)) == len(adapt.pairs(model)) == 14
