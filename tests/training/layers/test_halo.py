"""HALO (HALO: Hadamard-Assisted Lower-Precision Optimization for LLMs, arXiv 2501.02625)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn

from poise.catalog import get
from poise.linalg.hadamard import hadamard_matrix, padded
from poise.models.gpt import GPT, GPTConfig
from poise.optim import AdamW
from poise.training import HALO, kept_bytes

F64 = torch.float64
LEVELS: list[Any] = [0, 1, 2]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def passes(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx, and the gradients of the parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


def layer_of(kind: Any, W: Tensor, **options: Any) -> Any:
    layer = kind(W.shape[1], W.shape[0], False, dtype=F64, **options)
    with torch.no_grad():
        layer.weight.copy_(W)
    return layer


def int8(t: Tensor) -> Tensor:
    scale = float(t.abs().max()) / 127
    return torch.round(t / scale) * scale


def reference(level: int, x: Tensor, W: Tensor, dy: Tensor) -> list[Tensor]:
    """The three products in int8, with the Hadamard matrices written out."""
    H = hadamard_matrix(W.shape[1]).mT if level else torch.eye(W.shape[1], dtype=F64)  # rows are rotated: x H
    T = hadamard_matrix(len(x)) if level == 2 else torch.eye(len(x), dtype=F64)
    X, V = int8(x @ H), int8(W @ H)
    return [X @ V.T, T.T @ (int8(T @ dy) @ V) @ H.T, int8(dy).T @ X @ H.T]


def gap(kind: Any, level: Any, tokens: int = 12, features: int = 28) -> float:
    x, W, dy = draw(tokens, features), draw(16, features, seed=1), draw(tokens, 16, seed=2)
    found = passes(layer_of(kind, W, level=level), x, dy)
    return max(float((a - b).abs().max()) for a, b in zip(found, reference(level, x, W, dy), strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_the_products_are_the_papers(level: Any) -> None:
    assert gap(HALO, level) < 1e-12
    assert gap(HALO, level, tokens=64, features=96) < 1e-12


def test_the_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("halo")), 2) > 1e-2


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape, outputs", [((32, 64), 16), ((2, 7, 24), 5), ((13, 43), 3), ((28,), 4), ((3, 100), 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_without_rounding_every_level_is_nn_linear(level: Any, shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(shape[-1], outputs, bias).double()
    mine = HALO.attach(copy.deepcopy(plain), "*", precision="none", level=level)
    x, dy = draw(*shape), draw(*shape[:-1], outputs, seed=1)
    for a, b in zip(passes(plain, x, dy), passes(mine, x, dy), strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) < 1e-10


def errors(which: int, levels: tuple[Any, Any]) -> list[float]:
    """Relative errors of y (0) or dx (1) at two levels, in the mean over five draws with an outlier in x or in dy."""
    found = [0.0, 0.0]
    for seed in range(0, 15, 3):
        x, W, dy = draw(64, 128, seed=seed), draw(128, 128, seed=seed + 1), draw(64, 128, seed=seed + 2)
        if which == 0:
            x[:, 7] *= 60
        else:
            dy[9] *= 200
        exact = [x @ W.T, dy @ W][which]
        for i, level in enumerate(levels):
            rounded = passes(layer_of(HALO, W, level=level), x, dy)[which]
            found[i] += float((rounded - exact).norm() / exact.norm()) / 5
    return found


def test_a_rotation_takes_the_outlier_feature_out_of_the_output() -> None:
    assert errors(0, (0, 1)) == [pytest.approx(0.057, rel=0.2), pytest.approx(0.012, rel=0.2)]


def test_the_token_rotation_takes_the_outlier_row_out_of_the_input_gradient() -> None:
    assert errors(1, (1, 2)) == [pytest.approx(0.040, rel=0.2), pytest.approx(0.011, rel=0.2)]


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp6"])
def test_the_bias_and_its_gradient_are_in_full_precision(precision: Any) -> None:
    layer: Any = HALO(16, 4, precision=precision, dtype=F64)
    x, dy = draw(8, 16), draw(8, 4, seed=1)
    dy[0] *= 1e6
    y, _, _, db = passes(layer, x, dy)
    assert torch.allclose(db, dy.sum(0), rtol=1e-14)
    with torch.no_grad():
        layer.bias += 1e-9
    assert torch.allclose(layer(x) - y, torch.full((8, 4), 1e-9, dtype=F64), rtol=1e-4, atol=0)


def fine_tuned(model: Any, x: Tensor, target: Tensor, steps: int = 100, **options: Any) -> float:
    """The mean squared error after training a copy of `model` in some precision; it is measured in full precision."""
    model = copy.deepcopy(model)
    if options:
        HALO.attach(model, "*", **options)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(steps):
        at = torch.randint(len(x), (64,), generator=torch.Generator().manual_seed(step))
        opt.zero_grad()
        (model(x[at]) - target[at]).square().mean().backward()
        opt.step()
    HALO.detach(model)
    with torch.no_grad():
        return float((model(x) - target).square().mean())


def test_fine_tuning_with_outlier_features_needs_the_rotation() -> None:
    torch.manual_seed(0)
    x = torch.randn(1024, 64)
    target = 0.5 * torch.tanh(x[:, :8] * x[:, 8:16]) + x[:, 16:24]
    x[:, [60, 62]] *= 100
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    with torch.no_grad():
        model[0].weight[:, [60, 62]] /= 100  # pyright: ignore[reportIndexIssue]
    full = fine_tuned(model, x, target)
    plain, rotated = (fine_tuned(model, x, target, precision="int8", level=level) / full for level in (0, 2))
    assert abs(rotated - 1) < 0.03
    assert plain > 1.08


def test_a_frozen_weight_gets_no_gradient_and_no_input_is_kept() -> None:
    layer: Any = HALO(64, 32, bias=False, dtype=F64)
    x, dy = draw(24, 64), draw(24, 32, seed=1)
    whole = passes(layer, x, dy)
    everything = kept_bytes(lambda: layer(x.clone().requires_grad_()), layer)
    layer.weight.requires_grad_(False)
    frozen = passes(layer, x, dy)
    assert len(frozen) == 2 and all(torch.equal(a, b) for a, b in zip(frozen, whole[:2], strict=True))
    assert everything - kept_bytes(lambda: layer(x.clone().requires_grad_()), layer) == 24 * 64 + 8


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp6"])
def test_a_byte_is_kept_for_each_entry_of_input_and_weight(precision: Any) -> None:
    plain, x = nn.Linear(64, 32), torch.randn(5, 24, 64, requires_grad=True)
    whole = kept_bytes(lambda: plain(x), plain)
    mine = HALO.attach(plain, "*", precision=precision)
    assert kept_bytes(lambda: mine(x), mine) == whole // 4 + 64 * 32 + 2 * 4  # two scales


def test_what_comes_out_has_the_dtype_that_nn_linear_gives() -> None:
    for dtype in (torch.bfloat16, torch.float32, F64):
        layer = HALO(12, 8, dtype=dtype)
        x = torch.randn(3, 12, dtype=dtype, requires_grad=True)
        layer(x).sum().backward()
        assert layer(x).dtype == dtype
        assert all(t.grad is not None and t.grad.dtype == dtype for t in (x, layer.weight, layer.bias))
    layer, x = HALO(12, 8), torch.randn(3, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x).bfloat16())


def test_the_levels_that_go_with_the_formats() -> None:
    found = [(layer.precision, layer.level) for layer in (HALO(4, 4, precision=p) for p in ("int8", "fp8", "fp6"))]
    assert found == [("int8", 2), ("fp8", 0), ("fp6", 2)]


def test_attached_to_a_model_it_leaves_the_head_alone_and_parameters_as_they_are() -> None:
    model = GPT(GPTConfig(hidden_size=24, intermediate_size=44))
    params, x = dict(model.named_parameters()), torch.arange(20).reshape(2, 10)
    y = model(x)
    HALO.attach(model)
    linears = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert linears - {path for path, layer in model.named_modules() if isinstance(layer, HALO)} == {"lm_head"}
    assert 0 < float((model(x) - y).detach().abs().max()) < 0.05 * float(y.detach().abs().max())
    opt = AdamW(model, lr=1e-3, backend="eager")
    model(x).square().mean().backward()
    opt.step()
    assert all(p is params[name] for name, p in model.named_parameters())
    HALO.detach(model)
    assert not any(isinstance(layer, HALO) for layer in model.modules())
    assert repr(model) == repr(GPT(GPTConfig(hidden_size=24, intermediate_size=44)))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_sizes_without_a_hadamard_matrix_are_filled_up_with_zeros() -> None:
    """What rounding then does is what it does to the larger layer whose other inputs are zero."""
    x, W, dy = draw(13, 43), draw(6, 43, seed=1), draw(13, 6, seed=2)
    T, n = padded(13), padded(43)
    assert (T, n) == (16, 44)
    wide_x, wide_W, wide_dy = (
        nn.functional.pad(x, (0, 1, 0, 3)),
        nn.functional.pad(W, (0, 1)),
        nn.functional.pad(dy, (0, 0, 0, 3)),
    )
    y, dx, dW = passes(layer_of(HALO, wide_W), wide_x, wide_dy)
    for a, b in zip(passes(layer_of(HALO, W), x, dy), (y[:13], dx[:13, :43], dW[:, :43]), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="precision='int4'"):
        HALO(4, 4, precision="int4")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="level=3"):
        HALO.attach(nn.Linear(4, 4), "*", level=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"no such nn\.Linear"):
        HALO.attach(nn.Sequential(nn.Tanh()))


def test_no_tokens_at_all_give_no_output_and_no_gradient() -> None:
    found = passes(layer_of(HALO, draw(6, 12)), draw(0, 12), draw(0, 6))
    assert [tuple(t.shape) for t in found] == [(0, 6), (0, 12), (6, 12)] and not found[2].any()
