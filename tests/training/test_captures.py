"""What layers take in and are told, averaged for the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.optim import MKOR, AdamW, Optimizer, Transform, chain
from poise.training import SAM, LayerMeans, captures


class noted(Transform):
    """Plain descent that remembers what it was fed."""

    feeds = ("input_mean", "grad_mean")
    unit = "tensor"

    def __init__(self) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}

    def update(self, u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
        self.seen[k.param.name] = k.input_mean.clone(), k.grad_mean.clone()
        return u


class only_numbers(Transform):
    def update(self, u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
        return u


def watched(model: nn.Module, **options: Any) -> tuple[Optimizer, noted, LayerMeans]:
    rule = noted()
    opt = Optimizer(model, chain(rule, only_numbers()), lr=0.0, backend="eager")
    return opt, rule, LayerMeans(model, opt, **options)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def per_sample(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The gradient of each sample's own loss at the output."""
    found = []
    for one in x:
        y = model(one[None]).detach().requires_grad_()
        y.square().sum().backward()
        assert y.grad is not None
        found.append(y.grad[0])
    return found


def test_a_linear_layer_is_fed_the_means_of_its_inputs_and_of_each_rows_own_gradient() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    opt, rule, _ = watched(model)
    x = draw(7, 5)
    own = torch.stack(per_sample(model, x))
    model(x).square().sum(1).mean().backward()
    opt.step()
    a, g = rule.seen["0.weight"]
    assert torch.allclose(a, x.mean(0).expand(3, 5))
    assert torch.allclose(g, own.mean(0)[:, None].expand(3, 5), atol=1e-6)
    a, g = rule.seen["0.bias"]
    assert torch.equal(a, torch.ones(3))
    assert torch.allclose(g, own.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": (2, 0), "padding_mode": "circular"}],
)
def test_a_convolution_is_fed_the_means_of_its_patches_and_positions(settings: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, (3, 2), bias=False, **settings))
    opt, rule, _ = watched(model)
    x = draw(3, 2, 7, 6)
    conv: Any = model[0]
    model(x).square().sum((1, 2, 3)).mean().backward()
    gradients = torch.stack([g.mean((1, 2)) for g in per_sample(model, x)])
    opt.step()
    mode = conv.padding_mode if conv.padding_mode != "zeros" else "constant"
    padded = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode)
    patches = nn.functional.unfold(padded, conv.kernel_size, conv.dilation, 0, conv.stride)
    a, g = rule.seen["0.weight"]
    assert torch.allclose(a, patches.mean((0, 2)).reshape(1, 2, 3, 2).expand(4, 2, 3, 2), atol=1e-6)
    assert torch.allclose(g[:, 0, 0, 0], gradients.mean(0), atol=1e-6)


def test_rows_are_clamped_before_they_are_averaged() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    opt, rule, _ = watched(model, clip=10.0)
    (1e-3 * model(torch.tensor([[1e6], [2.0]]))).sum().backward()
    opt.step()
    assert float(rule.seen["0.weight"][0]) == 6.0


def test_positions_of_a_sequence_are_rows_and_passes_before_one_step_count_alike() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    opt, rule, _ = watched(model, grad_scale=lambda: 4.0)
    xs = draw(2, 6, 5), draw(4, 2, 5, seed=1)
    for x in xs:
        (4.0 * model(x).sum(-1).mean()).backward()
        with torch.no_grad():
            model(100 * x)  # leaves no trace
    opt.step()
    a, g = rule.seen["0.weight"]
    assert torch.allclose(a[0], (xs[0].mean((0, 1)) + xs[1].mean((0, 1))) / 2, atol=1e-6)
    assert torch.allclose(g, torch.ones(3, 5))
    model(xs[0]).sum(-1).mean().backward()
    opt.step()
    assert torch.allclose(rule.seen["0.weight"][0][0], xs[0].mean((0, 1)), atol=1e-6)


@pytest.mark.parametrize("driven", [False, True])
def test_a_step_with_a_closure_is_fed_after_it(driven: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    opt: Any = MKOR(model, lr=0.1, inv_freq=1, backend="eager")
    opt = SAM(opt) if driven else opt
    LayerMeans(model, opt)
    x = draw(7, 5)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    losses = [float(opt.step(closure).detach()) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_removed_it_feeds_no_more() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    opt = MKOR(model, backend="eager")
    with LayerMeans(model, opt):
        model(draw(4, 5)).sum().backward()
        opt.step()
    model(draw(4, 5)).sum().backward()
    with pytest.raises(RuntimeError, match="LayerMeans"):
        opt.step()


def test_it_is_wanted_where_a_rule_reads_the_means() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    assert captures.wanted(MKOR(model, backend="eager")) and captures.wanted(SAM(MKOR(model, backend="eager")))
    assert not captures.wanted(AdamW(model, backend="eager")) and not captures.wanted(torch.optim.SGD(model.parameters()))


def test_a_model_of_another_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the model's layers"):
        LayerMeans(nn.Linear(5, 3), AdamW(nn.Linear(5, 3), backend="eager"))
    model = nn.Linear(5, 3)
    with pytest.raises(ValueError, match="clip=0"):
        LayerMeans(model, AdamW(model, backend="eager"), clip=0.0)
