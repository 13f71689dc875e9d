"""SimbaV2 (Hyperspherical Normalization for Scalable Deep Reinforcement Learning, arXiv 2502.15280)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.cases import build, mutated
from torch import Tensor, nn

from poise.catalog import Method, get
from poise.training import HyperBlock, HyperDense, HyperEmbedder, HyperHead, Scaler, keep_unit_rows

F64 = torch.float64


def network(dim: int = 16, blocks: int = 2) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(HyperEmbedder(5, dim), *(HyperBlock(dim, blocks) for _ in range(blocks)), HyperHead(dim, 3))


def weights(model: nn.Module) -> list[Tensor]:
    return [layer.weight for layer in model.modules() if isinstance(layer, HyperDense)]


def off_the_sphere(model: nn.Module) -> float:
    return max(float((w.detach().double().norm(dim=1) - 1).abs().max()) for w in weights(model))


def train(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 4, dtype: torch.dtype = torch.float32) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 5, generator=generator).to(dtype)
        opt.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        opt.step()


def reference(w: Tensor) -> Tensor:
    w = w.double().clone()
    for i in range(len(w)):
        w[i] /= max(math.sqrt(sum(float(x) ** 2 for x in w[i].flatten())), 1e-8)
    return w


def gap(keep: Any) -> float:
    w = nn.Parameter(torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(0)))
    opt = torch.optim.SGD([w], lr=0.1)
    keep(opt, [w])
    w.grad = torch.randn(6, 4, dtype=F64, generator=torch.Generator().manual_seed(1))
    wanted = reference(w.detach() - 0.1 * w.grad)
    opt.step()
    return float((w.detach() - wanted).abs().max())


def test_the_projection_divides_each_row_by_its_length() -> None:
    assert gap(keep_unit_rows) < 1e-15


def test_the_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("hyperspherical"))) > 1e-3


def test_rows_shorter_than_the_floor_are_divided_by_it() -> None:
    w = nn.Parameter(torch.tensor([[3e-9, 4e-9], [0.0, 0.0], [3.0, 4.0]], dtype=F64))
    keep_unit_rows(torch.optim.SGD([w], lr=0.1), [w])
    assert torch.allclose(w, torch.tensor([[0.3, 0.4], [0.0, 0.0], [0.6, 0.8]], dtype=F64), rtol=1e-14)


def test_after_each_step_of_any_optimizer_every_row_has_length_1(rule: Method) -> None:
    model = network()
    opt = build(rule, model, lr=0.02, backend="eager", weight_decay=0.0)
    keep_unit_rows(opt, model)
    before = [w.detach().clone() for w in weights(model)]
    for _ in range(3):
        train(model, opt, steps=1)
        assert off_the_sphere(model) < 1e-6
    train(model, opt, steps=1)
    assert all(not torch.equal(w, old) for w, old in zip(weights(model), before, strict=True))


def test_in_bfloat16_rows_have_length_1_up_to_its_spacing() -> None:
    model = network().bfloat16()
    opt = build(get("adamw"), model, lr=0.02, backend="eager")
    keep_unit_rows(opt, model)
    train(model, opt, steps=10, dtype=torch.bfloat16)
    assert off_the_sphere(model) < 2**-7


def test_the_output_of_every_block_has_length_1() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.5), steps=3)  # whatever the weights have become
    x = 10 * torch.randn(64, 5)
    for block in list(model)[:-1]:
        x = block(x)
        assert float((x.norm(dim=-1) - 1).abs().max()) < 1e-6


def test_sgd_and_projection_are_a_riemannian_step_up_to_second_order() -> None:
    generator = torch.Generator().manual_seed(0)
    w = reference(torch.randn(5, 8, dtype=F64, generator=generator))
    g = torch.randn(5, 8, dtype=F64, generator=generator)
    along = torch.randn(5, 1, dtype=F64, generator=generator) * w  # any multiple of each row
    tangent = g - w * (g * w).sum(1, keepdim=True)

    def step(gradient: Tensor, lr: float) -> Tensor:
        p = nn.Parameter(w.clone())
        opt = torch.optim.SGD([p], lr=lr)
        keep_unit_rows(opt, [p])
        p.grad = gradient.clone()
        opt.step()
        return p.detach()

    def exponential_map(lr: float) -> Tensor:
        speed = tangent.norm(dim=1, keepdim=True)
        return w * (lr * speed).cos() - tangent / speed * (lr * speed).sin()

    for error in (
        lambda lr: (step(g, lr) - step(g + along, lr)).norm(),
        lambda lr: (step(g, lr) - exponential_map(lr)).norm(),
        lambda lr: (step(g, lr) - (w - lr * tangent)).norm(),
    ):
        coarse, fine = float(error(1e-2)), float(error(1e-3))
        assert 50 < coarse / fine < 200  # a tenth of the step, a hundredth of the difference


def test_decay_of_rows_on_the_sphere_does_nothing_under_sgd_to_second_order() -> None:
    ends = []
    for decay in (0.0, 0.5):
        p = nn.Parameter(reference(torch.randn(5, 8, dtype=F64, generator=torch.Generator().manual_seed(0))))
        opt = torch.optim.SGD([p], lr=1e-4, weight_decay=decay)
        keep_unit_rows(opt, [p])
        p.grad = torch.ones_like(p)
        opt.step()
        ends.append(p.detach())
    assert float((ends[0] - ends[1]).abs().max()) < 1e-7


def test_the_handle_ends_it_and_the_optimizers_state_is_left_alone() -> None:
    model = network()
    opt = torch.optim.AdamW(model.parameters(), lr=0.05)
    handle = keep_unit_rows(opt, model)
    train(model, opt, steps=1)
    assert off_the_sphere(model) < 1e-6
    states = {name: [opt.state[w][name].clone() for w in weights(model)] for name in ("exp_avg", "exp_avg_sq")}
    for w, average in zip(weights(model), states["exp_avg"], strict=True):
        assert w.grad is not None and torch.allclose(average, 0.1 * w.grad)
    handle.remove()
    train(model, opt, steps=1)
    assert off_the_sphere(model) > 1e-3


def test_wrong_weights_are_refused() -> None:
    model, other = network(), network()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"weights\[0\].*not among the optimizer's parameters"):
        keep_unit_rows(opt, other)
    with pytest.raises(ValueError, match="no HyperDense"):
        keep_unit_rows(opt, nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"weights\[0\] must be a parameter of two dimensions"):
        keep_unit_rows(opt, [model[-1].bias])


# ---------------------------------------------------------------------------------------------------------------------- modules


def test_a_dense_layer_starts_orthogonal_with_rows_of_length_1_and_no_bias() -> None:
    wide, high = HyperDense(8, 5), HyperDense(5, 8)
    assert wide.bias is None
    assert torch.allclose(wide.weight @ wide.weight.T, torch.eye(5), atol=1e-6)
    assert torch.allclose(high.weight.norm(dim=1), torch.ones(8), atol=1e-6)
    with pytest.raises(TypeError):
        HyperDense(8, 5, bias=True)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("init, scale", [(1.0, 1.0), (0.25, 0.01), (0.1, 3.0)])
def test_a_scaler_multiplies_by_init_at_first_and_its_gradient_by_init_over_scale(init: float, scale: float) -> None:
    scaler, x = Scaler(4, init, scale).double(), torch.randn(6, 4, dtype=F64)
    assert torch.allclose(scaler(x), init * x, rtol=1e-7)
    assert torch.allclose(scaler.scale, torch.full((4,), scale, dtype=F64), rtol=1e-7)
    G = torch.randn(6, 4, dtype=F64)
    (scaler(x) * G).sum().backward()
    assert torch.allclose(scaler.scale.grad, init / scale * (G * x).sum(0), rtol=1e-12)  # pyright: ignore[reportArgumentType]


def test_the_embedder_keeps_the_length_of_its_input_in_the_direction() -> None:
    embed = HyperEmbedder(3, 32)
    assert embed.dense.weight.shape == (32, 4)
    assert torch.allclose(embed.scaler.scale, torch.tensor((2 / 32) ** 0.5)) and embed.scaler.ratio == 1
    x = torch.randn(1, 3)
    wanted = torch.cat([x, torch.tensor([[3.0]])], dim=1)
    y = embed.dense.weight @ (wanted / wanted.norm()).squeeze()
    assert torch.allclose(embed(x).squeeze(), y / y.norm(), atol=1e-6)
    assert float((embed(x) - embed(5 * x)).norm()) > 0.1


def test_a_block_is_the_published_interpolation_on_the_sphere() -> None:
    torch.manual_seed(0)
    block = HyperBlock(8, blocks=3).double()
    x = torch.nn.functional.normalize(torch.randn(8, dtype=F64), dim=0)
    s = math.sqrt(2 / 8) / 2
    hidden = (s * (block.up.weight @ x)).clamp_min(0) + 1e-8
    h = block.down.weight @ hidden
    y = x + 0.25 * (h / h.norm() - x)
    assert block.up.weight.shape == (32, 8)
    assert torch.allclose(block.scaler.scale, torch.tensor(s, dtype=F64)) and block.scaler.ratio == 1
    assert torch.allclose(block(x), y / y.norm(), atol=1e-7)
    assert torch.allclose(block.alpha.scale, torch.tensor(8**-0.5, dtype=F64)) and block.alpha.ratio == 0.25 * 8**0.5
    with torch.no_grad():
        block.alpha.scale.zero_()
    assert torch.allclose(block(x), x, atol=1e-12)


def test_a_head_is_dense_scaler_dense_and_bias() -> None:
    head = HyperHead(6, 3)
    x = torch.randn(4, 6)
    with torch.no_grad():
        head.bias.copy_(torch.tensor([1.0, -2.0, 3.0]))
        head.scaler.scale.copy_(torch.arange(6))
    assert torch.allclose(head(x), (x @ head.dense.weight.T * torch.arange(6)) @ head.out.weight.T + head.bias, atol=1e-5)


def test_a_scaler_of_scale_0_is_refused() -> None:
    with pytest.raises(ValueError, match="scale=0"):
        Scaler(4, 1.0, 0.0)
