"""DoRA (arXiv 2402.09353), alone and with the scale of rsLoRA (arXiv 2312.03732), against its mathematics and against peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt.cases import Conv1D, Mixed, gpt, output, stirred
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import DoRA, LoRA, adapters, attach, detach, fold, pairs


def layer(inputs: int = 12, outputs: int = 7, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype))


def normal(*shape: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def magnitude(model: nn.Module, path: str = "0") -> nn.Parameter:
    adapter: Any = adapters(model)[path]
    return adapter.magnitude


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_forward_is_the_decomposed_weight(rank_stabilized: bool) -> None:
    model = layer()
    attach(model, DoRA(rank=4, alpha=6.0, rank_stabilized=rank_stabilized), "0")
    stirred(model)
    (pair,) = pairs(model)
    assert pair.scale == (3.0 if rank_stabilized else 1.5)
    plain: Any = model[0]
    moved = plain.weight + pair.scale * pair.B @ pair.A
    weight = (magnitude(model) / moved.norm(dim=1))[:, None] * moved
    x = normal(5, 12)
    torch.testing.assert_close(model(x), x @ weight.T + plain.bias, rtol=1e-12, atol=1e-12)
    fold(model)
    torch.testing.assert_close(plain.weight, weight, rtol=1e-12, atol=1e-12)


def test_what_it_folds_to_tells_it_from_its_mutant() -> None:
    for method, same in ((DoRA(rank=4), True), (mutated(catalog.get("dora"))(rank=4), False)):
        model = layer()
        attach(model, method, "0")
        stirred(model)
        magnitude(model).data.mul_(3)
        before = model(normal(5, 12))
        assert torch.allclose(fold(model)(normal(5, 12)), before, rtol=1e-9) == same


def test_it_starts_with_the_rows_lengths_and_as_the_base() -> None:
    model = layer(dtype=torch.float32)
    x = normal(5, 12, dtype=torch.float32)
    before = model(x)
    attach(model, DoRA(), "0")
    plain: Any = model[0]
    torch.testing.assert_close(magnitude(model), plain.weight.norm(dim=1))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("c", [1e-3, 0.5, 7.0, -40.0])
def test_however_long_the_product_the_rows_of_the_weight_keep_their_lengths(c: float) -> None:
    model = layer()
    attach(model, DoRA(rank=3), "0")
    stirred(model)
    (pair,) = pairs(model)
    pair.B.data *= c
    fold(model)
    plain: Any = model[0]
    torch.testing.assert_close(plain.weight.norm(dim=1), magnitude(model).abs(), rtol=1e-12, atol=1e-12)


def test_lengths_are_constants_in_the_backward_pass() -> None:
    model = layer()
    attach(model, DoRA(rank=3, alpha=4.5), "0")
    stirred(model)
    (pair,) = pairs(model)
    m, plain = magnitude(model), model[0]
    assert isinstance(plain, nn.Linear)
    x, target = normal(5, 12), normal(5, 7, seed=4)
    nn.functional.mse_loss(model(x), target).backward()
    down, up, length = (t.detach().clone().requires_grad_() for t in (pair.A, pair.B, m))
    moved = plain.weight + 1.5 * up @ down
    weight = (length / moved.norm(dim=1).detach())[:, None] * moved
    nn.functional.mse_loss(nn.functional.linear(x, weight, plain.bias), target).backward()
    for mine, wanted in ((pair.A, down), (pair.B, up), (m, length)):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-12, atol=1e-14)
    # and they are not what the whole derivative is, which the lengths would be part of
    moved = plain.weight + 1.5 * up @ down
    weight = (length / moved.norm(dim=1))[:, None] * moved
    whole = torch.autograd.grad(nn.functional.mse_loss(nn.functional.linear(x, weight, plain.bias), target), up)[0]
    assert up.grad is not None
    assert float((whole - up.grad).norm() / whole.norm()) > 0.01


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv1D(5, 6),
        lambda: nn.Embedding(6, 5),
        lambda: nn.Conv1d(6, 5, 3, stride=2, padding=1),
        lambda: nn.Conv2d(6, 5, (3, 2), padding=1, bias=False),
    ],
)
def test_every_kind_of_layer_does_what_its_folded_weight_does(make: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make()).double()
    one: Any = model[0]
    if isinstance(one, nn.Embedding):
        x = torch.tensor([[0, 3, 5], [1, 1, 2]])
    elif isinstance(one, nn.modules.conv._ConvNd):
        x = normal(2, one.in_channels, *[7] * (one.weight.ndim - 2))
    else:
        x = normal(2, 3, 6)
    attach(model, DoRA(rank=2), "0")
    stirred(model)
    wanted = model(x)
    torch.testing.assert_close(detach(fold(model))(x), wanted, rtol=1e-12, atol=1e-12)


def test_dropout_acts_on_the_adapters_input_alone() -> None:
    model = layer()
    attach(model, DoRA(rank=3, dropout=0.5), "0")
    x = normal(5, 12)
    plain: Any = model[0]
    magnitude(model).data *= 2.0
    model.train()  # the product is zero, so that what is dropped is not seen
    torch.testing.assert_close(model(x), 2 * x @ plain.weight.T + plain.bias, rtol=1e-12, atol=1e-12)
    stirred(model)
    assert not torch.allclose(model(x), model(x))


def test_bfloat16_weights_have_their_lengths_in_float32() -> None:
    model = layer(300, 7).to(torch.bfloat16)
    attach(model, DoRA(rank=2), "0")
    plain: Any = model[0]
    assert magnitude(model).dtype == torch.float32
    torch.testing.assert_close(magnitude(model).detach(), plain.weight.detach().float().norm(dim=1), rtol=1e-6, atol=0.0)


def test_a_row_without_direction_is_named() -> None:
    model = layer()
    plain: Any = model[0]
    plain.weight.data[4] = 0
    with pytest.raises(ValueError, match=r"row 4 of '0.weight' is zero"):
        attach(model, DoRA(), "0")
    assert type(plain) is nn.Linear
    assert plain.weight.requires_grad


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_rank_stabilized_steps_have_one_size_at_every_rank(kind: Any) -> None:
    """One step of Adam, seen on inputs that it was not taken on; with alpha / rank it shrinks with the root of the rank."""
    width = 1024
    x, unseen = normal(64, width, dtype=torch.float32), normal(64, width, seed=5, dtype=torch.float32)
    target = normal(64, width, seed=6, dtype=torch.float32)

    def moved(rank: int, rank_stabilized: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, width))
        before = model(unseen).detach()
        attach(model, kind(rank=rank, alpha=16.0, rank_stabilized=rank_stabilized), "0", seed=0)
        opt = torch.optim.Adam([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-4)
        nn.functional.mse_loss(model(x), target).backward()
        opt.step()
        return float((model(unseen) - before).std().detach())

    stable, plain = ([moved(rank, one) for rank in (4, 16, 64, 256)] for one in (True, False))
    assert max(stable) / min(stable) < 1.6
    assert plain[0] / plain[3] > 5
    assert plain == sorted(plain, reverse=True)


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 5, bias=False))


def zero_padded() -> Mixed:
    """peft's convolutions have no other padding, whatever that of the layer is."""
    model = Mixed()
    torch.manual_seed(1)
    model.mix = nn.Conv1d(16, 16, 3, padding=1)
    return model


@pytest.mark.hf
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("targets", [["0", "2"], ["words", "mix", "twice", "blocks.0.2"]])
def test_outputs_and_gradients_are_pefts(dora: bool, stable: bool, targets: list[str]) -> None:
    from peft import LoraConfig, get_peft_model

    made = small if targets == ["0", "2"] else zero_padded
    x = normal(6, 12, dtype=torch.float32) if made is small else torch.randint(0, 20, (3, 8))
    mine, theirs = made(), made()
    attach(mine, (DoRA if dora else LoRA)(rank=4, alpha=6.0, rank_stabilized=stable), targets)
    stirred(mine)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_dora=dora, use_rslora=stable)
    other: Any = get_peft_model(theirs, config)
    beside: dict[str, tuple[nn.Parameter, Any]] = {}
    for path, adapter in adapters(mine).items():
        one: Any = adapter
        layer = other.base_model.model.get_submodule(path)
        turned = type(layer).__name__ == "Embedding"
        down, up = (
            (layer.lora_embedding_A["default"], layer.lora_embedding_B["default"])
            if turned
            else (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        )
        beside[f"{path} A"], beside[f"{path} B"] = (one.lora_A, down), (one.lora_B, up)
        if dora:
            beside[f"{path} m"] = one.magnitude, layer.lora_magnitude_vector["default"].weight
    for a, b in beside.values():
        b.data.copy_(a.detach().reshape(b.shape))
    found, wanted = mine(x), other(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    wanted.square().sum().backward()
    for name, (a, b) in beside.items():
        assert a.grad is not None
        gap = (a.grad - b.grad.reshape(a.shape)).norm() / b.grad.norm()
        assert float(gap) < 1e-5, (name, float(gap))


def test_it_trains_where_the_base_is_frozen() -> None:
    model = gpt()
    before = output(model)
    attach(model, DoRA(rank=2))
    assert torch.equal(output(model), before)
    stirred(model)
    wanted = output(model)
    torch.testing.assert_close(output(fold(model)), wanted, rtol=1e-5, atol=1e-5)
