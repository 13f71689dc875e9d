"""Products with the Hessian and estimates of its diagonal, against Hessians written out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import poise.training.curvature as c
from poise.optim import AdamW, Sophia


def net(*more: nn.Module) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 5), *more, nn.Tanh(), nn.Linear(5, 4)).double()


def data(rows: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 3, generator=generator, dtype=torch.float64), torch.randint(4, (rows,), generator=generator)


def flat(found: dict[Tensor, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in found.values()])


def cut(v: Tensor, model: nn.Module) -> dict[Tensor, Tensor]:
    params: list[Tensor] = list(model.parameters())
    pieces = v.split([p.numel() for p in params])
    return {p: piece.reshape(p.shape) for p, piece in zip(params, pieces, strict=True)}


def of_weights(model: nn.Module, f: Callable[[nn.Module], Tensor]) -> Callable[[Tensor], Tensor]:
    """`f` of the model as a function of its weights in one vector."""
    names, params = zip(*model.named_parameters(), strict=True)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return f(self.model)

    def function(v: Tensor) -> Tensor:
        pieces = v.split([p.numel() for p in params])
        given = {f"model.{n}": t.reshape(p.shape) for n, p, t in zip(names, params, pieces, strict=True)}
        return torch.func.functional_call(Call(), given, ())

    return function


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_products_are_those_with_the_hessian_written_out() -> None:
    model, (x, y) = net(), data()
    H: Any = torch.autograd.functional.hessian(of_weights(model, lambda m: cross_entropy(m(x), y)), weights(model))
    v = torch.randn(len(H), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = c.hessian_vector_product(model, lambda: cross_entropy(model(x), y), cut(v, model))
    assert float((flat(found) - H @ v).abs().max()) < 1e-13
    some = {model[0].weight: cut(v, model)[model[0].weight]}
    v[15:] = 0.0
    assert float((flat(c.hessian_vector_product(model, lambda: cross_entropy(model(x), y), some)) - H @ v).abs().max()) < 1e-13


def gauss_newton(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """J^T H J written out."""
    z = model(x).detach()
    J: Any = torch.autograd.functional.jacobian(of_weights(model, lambda m: m(x).reshape(-1)), weights(model))
    H: Any = torch.autograd.functional.hessian(lambda t: loss(t.reshape(z.shape)), z.reshape(-1))
    return J.T @ H @ J


def test_gauss_newton_products_are_those_with_the_matrix_written_out_which_is_not_the_hessian() -> None:
    model, (x, y) = net(), data()
    losses: list[Callable[[Tensor], Tensor]] = [lambda z: cross_entropy(z, y), lambda z: (z - 1).square().mean()]
    for loss in losses:
        G = gauss_newton(model, x, loss)
        v = torch.randn(len(G), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        found = flat(c.gauss_newton_product(model, lambda: model(x), loss, cut(v, model)))
        assert float((found - G @ v).abs().max()) < 1e-13
        other = flat(c.hessian_vector_product(model, lambda loss=loss: loss(model(x)), cut(v, model)))
        assert float((found - other).abs().max()) > 1e-3


def test_over_all_labels_of_softmax_regression_the_estimate_is_the_exact_diagonal_of_the_hessian() -> None:
    """4 rows of 4 classes: 256 sets of labels, each as likely as the model says."""
    model = nn.Linear(3, 4).double()
    nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(4))
    x, _ = data(4)
    p = model(x).detach().softmax(1)
    expected = torch.zeros(16, dtype=torch.float64)
    for labels in itertools.product(range(4), repeat=4):
        chance = math.prod(float(p[i, k]) for i, k in enumerate(labels))
        found = c.gauss_newton_bartlett(model, lambda: model(x), seed=0, labels=torch.tensor(labels))
        expected += chance * flat(found)
    wanted = torch.cat([(p * (1 - p)).T @ x.square() / 4, (p * (1 - p)).mean(0)[:, None]], 1)
    wanted = torch.cat([wanted[:, :3].reshape(-1), wanted[:, 3]])
    assert float((expected - wanted).abs().max()) < 1e-15


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
def test_drawn_labels_give_the_diagonal_of_the_gauss_newton_matrix_on_average(likelihood: Any) -> None:
    model, (x, y) = net(), data()
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "categorical": lambda z: cross_entropy(z, y),
        "normal": lambda z: z.square().sum() / (2 * len(z)),
    }
    wanted = gauss_newton(model, x, losses[likelihood]).diagonal()
    many = flat(c.gauss_newton_bartlett(model, lambda: model(x), seed=0, samples=500, likelihood=likelihood))
    assert float(((many - wanted).abs() / wanted.clamp_min(1e-3)).mean()) < 0.1  # chi-squared: 2^.5 / 500^.5 = 0.063


def test_labels_are_drawn_as_often_as_the_model_predicts_them() -> None:
    z = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log().expand(20_000, 4)
    counts = c._labels(z, "categorical", torch.Generator().manual_seed(0)).bincount(minlength=4) / 20_000
    assert float((counts - torch.tensor([0.1, 0.2, 0.3, 0.4])).abs().max()) < 0.01


@pytest.mark.parametrize("noise", ["normal", "rademacher"])
def test_hutchinsons_estimate_is_the_diagonal_of_the_hessian_on_average_and_has_the_variance_it_says(noise: Any) -> None:
    model, (x, y) = net(), data()
    H: Any = torch.autograd.functional.hessian(of_weights(model, lambda m: cross_entropy(m(x), y)), weights(model))
    loss = lambda: cross_entropy(model(x), y)  # noqa: E731
    draws = torch.stack([flat(c.hutchinson(model, loss, seed=seed, noise=noise)) for seed in range(150)])
    own = 2 * H.diagonal().square() if noise == "normal" else 0.0
    variance = H.square().sum(1) - H.diagonal().square() + own
    assert float((draws.mean(0) - H.diagonal()).abs().div((variance / 150).sqrt()).max()) < 5
    assert float((draws.var(0).sum() / variance.sum()) - 1) == pytest.approx(0.0, abs=0.35)


def test_of_a_diagonal_hessian_random_signs_give_the_diagonal_itself() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    h = torch.tensor([[1.0, -2.0, 30.0, 0.0]], dtype=torch.float64)
    found = c.hutchinson(model, lambda: (h * model.weight**2).sum() / 2, seed=5, noise="rademacher")
    assert torch.equal(found[model.weight], h)


def test_one_seed_gives_one_estimate_and_another_another_one() -> None:
    model, (x, y) = net(nn.Dropout(0.5)), data()
    estimates: list[Callable[[int], Tensor]] = [
        lambda seed: flat(c.gauss_newton_bartlett(model, lambda: model(x), seed=seed)),
        lambda seed: flat(c.hutchinson(model, lambda: cross_entropy(model(x), y), seed=seed)),
    ]
    for estimate in estimates:
        assert torch.equal(estimate(3), estimate(3))
        assert not torch.equal(estimate(3), estimate(4))


def test_gradients_statistics_and_random_numbers_are_left_as_they_were() -> None:
    norm = nn.BatchNorm1d(5)
    model, (x, y) = net(norm, nn.Dropout(0.5)), data()
    cross_entropy(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    mean, noise = norm.running_mean, torch.get_rng_state()
    assert mean is not None
    before = mean.clone()
    c.gauss_newton_bartlett(model, lambda: model(x), seed=0)
    c.hutchinson(model, lambda: cross_entropy(model(x), y), seed=0)
    c.gauss_newton_product(model, lambda: model(x), lambda z: z.square().mean(), {})
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True) if p.grad is not None)
    assert torch.equal(mean, before)
    assert int(norm.num_batches_tracked or 0) == 1
    assert torch.equal(torch.get_rng_state(), noise)


def test_attention_has_a_second_derivative() -> None:
    """The fused kernels, which torch takes by itself, have none."""
    model = nn.Linear(8, 24)
    x = torch.randn(1, 2, 5, 8, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        q, k, v = model(x).chunk(3, -1)
        return scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()

    assert all(bool(t.isfinite().all()) and float(t.abs().max()) > 0 for t in c.hutchinson(model, loss, seed=0).values())


def test_a_clipped_sample_has_the_norm_that_was_asked_for() -> None:
    model, (x, _) = net(), data()
    plain = flat(c.gauss_newton_bartlett(model, lambda: model(x), seed=0))
    norm = float((plain.sum() / 6).sqrt())  # of the mean gradient
    clipped = flat(c.gauss_newton_bartlett(model, lambda: model(x), seed=0, max_norm=norm / 2))
    assert float((clipped - plain / 4).abs().max()) < 1e-6
    loose = flat(c.gauss_newton_bartlett(model, lambda: model(x), seed=0, max_norm=2 * norm))
    assert torch.equal(loose, plain)


def test_frozen_parameters_are_left_out_and_those_that_the_loss_does_not_reach_get_zeros() -> None:
    model, (x, _) = net(), data()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Linear(2, 2).double()
    found = c.gauss_newton_bartlett(model, lambda: model[2](torch.tanh(model[0](x))), seed=0)
    assert set(found) == {p for p in model.parameters() if p.requires_grad}
    assert float(found[model.unused.weight].abs().max()) == 0.0


def test_sophia_is_fed_from_the_step_after_every_k_on_and_a_resumed_run_in_the_same_steps() -> None:
    asked: list[int] = []

    def run(model: nn.Sequential, opt: Any, steps: int) -> None:
        x, y = data()

        def estimate(step: int) -> dict[Tensor, Tensor]:
            asked.append(step)
            return c.gauss_newton_bartlett(model, lambda: model(x), seed=step)

        handle = c.feed_hessian(opt, estimate, every=3)
        for _ in range(steps):
            opt.zero_grad()
            cross_entropy(model(x), y).backward()
            opt.step()
        handle.remove()

    whole, parts, again = net(), net(), net()
    run(whole, Sophia(whole, lr=0.01, backend="eager"), 8)
    assert asked == [3, 6]
    first = Sophia(parts, lr=0.01, backend="eager")
    run(parts, first, 5)
    again.load_state_dict(parts.state_dict())
    second = Sophia(again, lr=0.5, backend="eager")
    second.load_state_dict(first.state_dict())
    run(again, second, 3)
    assert asked == [3, 6, 3, 6]
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x: c.hutchinson(m, lambda: m(x), seed=0), "one number"),
        (lambda m, x: c.hutchinson(m, lambda: m(x).mean(), seed=0, samples=0), "samples=0"),
        (lambda m, x: c.hutchinson(m, lambda: m(x).mean(), seed=0, noise=cast(Any, "uniform")), "noise='uniform'"),
        (lambda m, x: c.hutchinson(m, lambda: torch.ones(()), seed=0), "loss"),
        (
            lambda m, x: c.gauss_newton_bartlett(m, lambda: m(x), seed=0, likelihood=cast(Any, "poisson")),
            "likelihood='poisson'",
        ),
        (lambda m, x: c.gauss_newton_bartlett(m, lambda: m(x), seed=0, max_norm=0.0), "max_norm=0.0"),
        (lambda m, x: c.hessian_vector_product(m, lambda: m(x).mean(), {m[0].weight: x}), "vectors"),
        (lambda m, x: c.gauss_newton_bartlett(m.requires_grad_(False), lambda: m(x), seed=0), "model"),
        (lambda m, x: c.feed_hessian(AdamW(m), lambda step: {}), "AdamW"),
        (lambda m, x: c.feed_hessian(Sophia(m), lambda step: {}, every=0), "every=0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call: Callable[[Any, Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(net(), data()[0])
