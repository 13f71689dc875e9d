"""Hyper-parameters through hypernetworks (Stochastic Hyperparameter Optimization through Hypernetworks, arXiv 1802.09419)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.training import Hypernetwork, HypernetworkTuner
from poise.training.implicit.conditions import stationary
from poise.training.implicit.differentiation import custom_root

FORMS = pytest.mark.parametrize("form", ["linear", "factorized", "mlp"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(inputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, 1, bias=False).double()
    nn.init.zeros_(layer.weight)
    return layer


X, XV = normal(12, 5), normal(40, 5, seed=1)
TRUE = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0], dtype=torch.float64)
Y, YV = X @ TRUE + 1.5 * normal(12, seed=2), XV @ TRUE + 1.5 * normal(40, seed=3)
TRAIN, VALID = (X, Y), (XV, YV)


def error(net: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return (net(batch[0])[:, 0] - batch[1]).square().mean()


def penalized(net: Any, lam: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    (w,) = net.parameters()
    return error(net, batch) + (lam.exp() * w.square()).sum()


def closed(lam: Tensor, X: Tensor = X, Y: Tensor = Y) -> Tensor:
    """The best response of ridge regression."""
    penalty = torch.diag(lam.exp().expand(X.shape[1]))
    return torch.linalg.solve(X.mT @ X / len(X) + penalty, X.mT @ Y / len(X))


def best(lam: Tensor) -> Tensor:
    return (XV @ closed(lam) - YV).square().mean()


def fitted(tuner: HypernetworkTuner, sigma: float) -> None:
    """phi at the minimum of its objective, which is quadratic: one step of Newton's method over the quantiles of lam'."""
    quantiles = torch.special.ndtri((torch.arange(40, dtype=torch.float64) + 0.5) / 40)
    lams = [tuner.lam.detach() + sigma * q / quantiles.square().mean().sqrt() for q in quantiles]
    phi = list(tuner.hypernetwork.parameters())
    grads = torch.autograd.grad(tuner.objective(lams, TRAIN), phi, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(g, phi, retain_graph=True, materialize_grads=True) for g in flat]
    H = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    moves = torch.linalg.lstsq(H, -flat, driver="gelsd").solution.split([p.numel() for p in phi])
    with torch.no_grad():
        for p, move in zip(phi, moves, strict=True):
            p += move.reshape(p.shape)


def ridge(lam: float = -0.5, **settings: Any) -> HypernetworkTuner:
    return HypernetworkTuner(linear(5), torch.tensor(lam), penalized, error, **settings)


def implicit(lam: Tensor) -> Tensor:
    """The same derivative, by implicit differentiation."""
    F = stationary(lambda w, lam: (X @ w - Y).square().mean() + lam.exp() * w.square().sum())
    fit = custom_root(F, solve="cg")(lambda init, lam: closed(lam))
    return torch.func.grad(lambda lam: (XV @ fit(None, lam) - YV).square().mean())(lam)


def test_the_hypergradient_tends_to_the_implicit_one_as_sigma_goes_to_zero() -> None:
    wanted = implicit(torch.tensor(-0.5, dtype=torch.float64))
    assert abs(wanted - torch.func.grad(best)(torch.tensor(-0.5, dtype=torch.float64))) < 1e-10
    wrong = []
    for sigma in (0.3, 0.1, 0.03, 0.01):
        tuner = ridge()
        fitted(tuner, sigma)
        wrong.append(float((tuner.hypergradient(VALID) - wanted).abs() / wanted.abs()))
    assert wrong[0] > 1e-3
    for larger, smaller, share in zip(wrong, wrong[1:], (9, 11, 9), strict=False):
        assert larger / smaller == pytest.approx(share, rel=0.15)


def test_its_tests_tell_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("hypernetwork-tuning"))
    tuner = wrong(linear(5), torch.tensor(-0.5), penalized, error)
    fitted(tuner, 0.01)
    wanted = implicit(torch.tensor(-0.5, dtype=torch.float64))
    assert abs(tuner.hypergradient(VALID) - wanted) > 0.5 * abs(wanted)


def sgd(lr: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return lambda params: torch.optim.SGD(params, lr=lr)


GRID = min(float(best(lam)) for lam in torch.linspace(-6, 4, 1001, dtype=torch.float64))


def found(tuner: HypernetworkTuner) -> tuple[float, float]:
    """The validation loss with the generated weights, and with those that are best at the lam found."""
    return float(error(tuner.at(tuner.lam), VALID).detach()), float(best(tuner.lam.detach()))


def test_joint_training_reaches_the_validation_loss_of_a_fine_grid() -> None:
    tuner = ridge(-4.0, sigma=0.3, samples=2, lr=0.02, hyper_lr=0.02)
    assert float(best(tuner.lam.detach())) > 1.5 * GRID
    for _ in range(600):
        tuner.step(TRAIN, VALID)
    generated, retrained = found(tuner)
    assert generated < 1.01 * GRID and retrained < 1.01 * GRID


def test_without_drawing_the_motion_of_lam_explores_and_as_it_ends_so_does_the_learning() -> None:
    tuner = ridge(-4.0, sigma=0.0, samples=1, lr=0.02, hyper_lr=0.02)
    for _ in range(600):
        tuner.step(TRAIN, VALID)
    assert 1.01 * GRID < found(tuner)[1] < 1.05 * GRID
    assert all(torch.equal(near, tuner.lam.detach()) for near in tuner.draw())


def test_the_global_version_learns_the_whole_response_first() -> None:
    tuner = ridge(-1.0, version="global", form="mlp", samples=4, lr=0.01, hyper_lr=0.05)
    for _ in range(600):
        tuner.fit(TRAIN)
    for lam in torch.tensor([-3.0, -1.0, 1.0], dtype=torch.float64):
        learned = float(error(tuner.at(lam), VALID).detach())
        assert learned == pytest.approx(float(best(lam)), rel=0.05)
    for _ in range(200):
        tuner.tune(VALID)
    assert found(tuner)[1] < 1.01 * GRID


@pytest.mark.parametrize("form, width, steps", [("linear", 1, 500), ("factorized", 30, 1000)])
def test_fifty_penalties_tuned_at_once_beat_the_best_one_for_all(form: Any, width: int, steps: int) -> None:
    X, XV = normal(60, 50, seed=5), normal(300, 50, seed=6)
    true = torch.cat([normal(15, seed=7), torch.zeros(35, dtype=torch.float64)])
    Y, YV = X @ true + normal(60, seed=8), XV @ true + normal(300, seed=9)
    shared = min(float((XV @ closed(lam, X, Y) - YV).square().mean()) for lam in torch.linspace(-8, 3, 221).double())
    tuner = HypernetworkTuner(
        linear(50), torch.full((50,), -2.0), penalized, error,
        form=form, width=width, sigma=0.3, samples=2, hyper_lr=0.03,
        optimizer=lambda params: torch.optim.Adam(params, lr=0.01),
    )  # fmt: skip
    for _ in range(steps):
        tuner.step((X, Y), (XV, YV))
    retrained = float((XV @ closed(tuner.lam.detach(), X, Y) - YV).square().mean())
    assert retrained < 0.95 * shared
    assert float(error(tuner.at(tuner.lam), (XV, YV)).detach()) < 0.95 * shared
    assert tuner.lam[:15].mean() < tuner.lam[15:].mean() - 0.5


# -- the parts -------------------------------------------------------------------------------------------------------------


def test_steps_are_the_formula() -> None:
    """Two steps by hand, of SGD for phi and for lam, with the lam' that were drawn."""
    tuner = ridge(0.2, sigma=0.5, samples=2, lr=0.05, hyper_optimizer=sgd(0.1))
    twin = copy.deepcopy(tuner)
    b, A, lam = (t.detach().clone() for t in (tuner.hypernetwork.b, tuner.hypernetwork.U[:, 0], tuner.lam))
    for _ in range(2):
        drawn = twin.draw()
        db, dA = torch.zeros_like(b), torch.zeros_like(A)
        for near in drawn:
            w = b + A * near
            g = 2 * X.mT @ (X @ w - Y) / len(X) + 2 * near.exp() * w
            db, dA = db + g / 2, dA + near * g / 2
        b, A = b - 0.05 * db, A - 0.05 * dA
        lam = lam - 0.1 * (A @ (2 * XV.mT @ (XV @ (b + A * lam) - YV) / len(XV)))
        done = tuner.step(TRAIN, VALID)
        with torch.no_grad():
            twin.lam.copy_(lam)
        assert abs(done.lam - lam) < 1e-12
    assert (tuner.hypernetwork.b - b).abs().max() < 1e-12 and (tuner.hypernetwork.U[:, 0] - A).abs().max() < 1e-12


@FORMS
def test_forms_are_what_they_say(form: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    net = Hypernetwork(model, 6, form, width=7)
    lam = normal(2, 3)
    made = net(lam)
    assert [(name, w.shape) for name, w in made.items()] == [(name, p.shape) for name, p in model.named_parameters()]
    flat, z = torch.cat([w.reshape(-1) for w in made.values()]), lam.reshape(-1)
    if form == "linear":
        assert torch.equal(net(torch.zeros(2, 3).double())["0.weight"], model.get_parameter("0.weight"))
        wanted = net.b + net.U @ z
    else:
        inner = net.V @ z
        wanted = net.b + net.U @ (inner if form == "factorized" else torch.clamp(inner + net.c, min=0))
    assert torch.allclose(flat, wanted)
    numbers = {"linear": 26 + 26 * 6, "factorized": 26 + 26 * 7 + 42, "mlp": 26 + 26 * 7 + 42 + 7}[form]
    assert sum(p.numel() for p in net.parameters()) == numbers


def test_draws_follow_lam_or_stay_where_it_began() -> None:
    for version, centre in (("local", 5.0), ("global", 1.0)):
        tuner = ridge(1.0, version=version, sigma=0.1, samples=2000)
        with torch.no_grad():
            tuner.lam.fill_(5.0)
        drawn = torch.stack(tuner.draw())
        assert float(drawn.mean()) == pytest.approx(centre, abs=0.01) and float(drawn.std()) == pytest.approx(0.1, rel=0.05)
        assert not torch.equal(drawn, torch.stack(tuner.draw()))


@FORMS
def test_any_module_can_be_generated_and_is_untouched_until_written(form: Any) -> None:
    """One with a convolution, batch statistics and dropout probabilities that are no parameters; lam a matrix."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    before = copy.deepcopy(model.state_dict())
    batch = (torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1, 2]))

    def loss(net: Any, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    tuner = HypernetworkTuner(
        model,
        torch.zeros(2, 3),
        lambda net, lam, batch: loss(net, batch) + sum(lam.exp().mean() * w.square().sum() for w in net.parameters()),
        loss,
        form=form,
        width=4,
        lr=0.1,
    )
    for _ in range(3):
        done = tuner.step(batch, batch)
    assert done.lam.shape == (2, 3)  # pyright: ignore[reportPossiblyUnboundVariable]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    tuner.write()
    model.eval()
    assert torch.equal(model(batch[0]), tuner.at(tuner.lam)(batch[0]))
    assert not torch.equal(model.get_parameter("0.weight"), before["0.weight"])


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    for version in ("local", "global"):
        one = ridge(version=version, lr=0.01)
        for _ in range(3):
            one.step(TRAIN, VALID)
        other = ridge(2.0, version=version, lr=0.01, seed=9)
        other.load_state_dict(copy.deepcopy(one.state_dict()))
        for _ in range(3):
            assert one.step(TRAIN, VALID) == other.step(TRAIN, VALID)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": "near"}, "version='near': must be one of local, global"),
        ({"form": "conv"}, "form='conv': must be one of linear"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"samples": 0}, "samples=0"),
        ({"width": 0, "form": "mlp"}, "width=0"),
        ({"lam": torch.zeros(0)}, "hypers=0"),
        ({"model": nn.ReLU()}, "model: has no parameters"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"model": linear(5), "lam": torch.zeros(()), "train_loss": penalized, "valid_loss": error, **change}
    with pytest.raises(ValueError, match=message):
        HypernetworkTuner(**given)


def test_losses_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train_loss: must give a tensor of one number, got \(12, 1\)"):
        HypernetworkTuner(linear(5), torch.zeros(()), lambda net, lam, batch: net(batch[0]), error).fit(TRAIN)
    with pytest.raises(ValueError, match="valid_loss: must give a tensor of one number, got float"):
        HypernetworkTuner(linear(5), torch.zeros(()), penalized, lambda net, batch: 1.0).tune(VALID)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="train_loss: does not depend on the weights"):
        HypernetworkTuner(linear(5), torch.zeros(()), lambda net, lam, batch: lam, error).fit(TRAIN)


def test_the_catalog_knows_it_as_a_solver_with_a_path_that_imports() -> None:
    entry = catalog.get("hypernetwork-tuning")
    assert (entry.family, entry.kind, entry.target) == ("training", "solver", HypernetworkTuner)
