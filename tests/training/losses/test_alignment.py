"""Alignment (Leveraging Second-Order Curvature for Efficient Learned Image Compression, arXiv 2601.20769)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from conformance.problems import same
from optim.toys import apply
from torch import Tensor, nn

from poise.catalog import get
from poise.optim import SGD, SOAP, AdamW, Optimizer, Sophia, chain
from poise.optim.transforms.momentum import momentum
from poise.training import SAM
from poise.training.losses.alignment import intra_step_alignment, log_step_alignment, outliers

H = torch.tensor([100.0, 1.0], dtype=torch.float64)
TOWARDS = [torch.tensor([0.1, 1.0], dtype=torch.float64), torch.tensor([-0.1, 1.0], dtype=torch.float64)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def pair(x: Tensor) -> list[Tensor]:
    """Two quadratics of Hessian H/2 each: minima that lie in nearly one direction, gradients at an obtuse angle."""
    return [(H * (x - 2 * d).square()).sum() / 4 for d in TOWARDS]


def newton() -> Any:
    return apply(lambda u, state, x, k: u / torch.tensor([100.0, 1.0], dtype=torch.float64))


def gap(measure: Any) -> float:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    opt = Optimizer([x], chain(newton(), momentum(0.9)), lr=0.1, weight_decay=0.5, backend="eager")
    for _ in range(3):
        opt.zero_grad()
        sum(pair(x), torch.zeros(())).backward()
        opt.step()
    gradients = [torch.autograd.grad(term, x)[0] for term in pair(x)]
    found = measure(opt, pair(x))
    wanted = cosine(gradients[0], gradients[1]), cosine(gradients[0] / H, gradients[1] / H)
    return max(abs(float(a[0, 1]) - b) for a, b in zip((found.gradients, found.updates), wanted, strict=True))


def test_of_a_fixed_preconditioner_it_is_the_cosine_of_preconditioned_gradients_whatever_momentum_and_decay_add() -> None:
    assert gap(intra_step_alignment) < 1e-12


def test_its_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("alignment"))) > 1e-3


def test_gradients_at_an_obtuse_angle_agree_once_the_curvature_is_taken_out() -> None:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    gradients = [-H * d for d in TOWARDS]
    assert cosine(*gradients) < -0.9
    assert cosine(*TOWARDS) > 0.9
    sgd = intra_step_alignment(SGD([x], lr=0.1, momentum=0.9, backend="eager"), pair(x))
    assert float(sgd.gradients[0, 1]) == pytest.approx(cosine(*gradients), abs=1e-12)
    assert float(sgd.updates[0, 1]) == pytest.approx(cosine(*gradients), abs=1e-12)
    sophia = Sophia([x], lr=0.1, rho=10.0, backend="eager")
    sophia.feed(hessian=[H])
    found = intra_step_alignment(sophia, pair(x))
    assert float(found.updates[0, 1]) == pytest.approx(cosine(*TOWARDS), abs=1e-9)
    assert torch.equal(found.gradients, sgd.gradients)


def test_looking_changes_nothing() -> None:
    model = nn.Linear(3, 4)
    opt = AdamW(model, lr=0.1, backend="eager")
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    model(x).square().mean().backward()
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    state = [t.clone() for p in model.parameters() for t in opt.state[p].values()]
    y = model(x)
    terms = [y.square().mean(), y.abs().mean(), y[0].sum()]
    found = intra_step_alignment(opt, terms)
    assert found.updates.shape == (3, 3)
    assert torch.allclose(found.updates.diagonal(), torch.ones(3, dtype=torch.float64))
    assert same(list(model.parameters()), before)
    assert same([p.grad for p in model.parameters() if p.grad is not None], grads)
    assert same([t for p in model.parameters() for t in opt.state[p].values()], state)
    terms[0].backward()  # the graph is still there


def test_terms_that_meet_in_no_parameter_are_at_right_angles() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    opt = AdamW(model, backend="eager")
    x = torch.ones(1, 2)
    found = intra_step_alignment(opt, [layer(x).square().sum() for layer in model])
    assert float(found.gradients[0, 1]) == float(found.updates[0, 1]) == 0.0


@pytest.mark.parametrize("driven", [False, True])
def test_between_steps_it_is_the_cosine_of_consecutive_displacements(driven: bool) -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    bare = SGD([x], lr=0.015, backend="eager")
    opt: Any = SAM(bare, rho=0.0) if driven else bare
    seen: list[float] = []
    handle = log_step_alignment(opt, seen.append)
    at = [x.detach().clone()]

    def closure() -> Tensor:
        opt.zero_grad()
        loss = (H * x**2).sum() / 2
        loss.backward()
        return loss

    for _ in range(4):
        opt.step(closure)
        at.append(x.detach().clone())
    moves = [b - a for a, b in pairwise(at)]
    wanted = [cosine(a, b) for a, b in pairwise(moves)]
    assert seen == pytest.approx(wanted, abs=1e-12)
    assert max(wanted) < 0, "a step too long for the steep direction goes to and fro"
    handle.remove()
    opt.step(closure)
    assert len(seen) == 3


def test_outliers_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(200_000, generator=generator)
    assert float(outliers(normal).kurtosis) == pytest.approx(3.0, abs=0.1)
    assert float(outliers(torch.rand(200_000, generator=generator)).kurtosis) == pytest.approx(1.8, abs=0.02)
    spiked = torch.cat([torch.tensor([-500.0]), torch.ones(50), -torch.ones(50)])
    assert float(outliers(spiked).max_to_median) == 500.0
    assert float(outliers(spiked).kurtosis) > 50
    assert float(outliers(3 * normal + 7).kurtosis) == pytest.approx(float(outliers(normal).kurtosis), rel=1e-3)


def rate_distortion(model: Any, covariance: Tensor, weight: float = 0.3) -> list[Tensor]:
    """Of a linear autoencoder, over data and rounding noise: the squared error, and the bits of independent normal latents."""
    encoder, decoder = (layer.weight for layer in model)
    left = decoder @ encoder - torch.eye(len(covariance))
    distortion = (left @ covariance * left).sum() + decoder.square().sum() / 12
    rate = 0.5 * torch.log2(1 + 12 * ((encoder @ covariance) * encoder).sum(1)).sum()
    return [distortion, weight * rate]


def steps_of(kind: Any, lr: float, target: float, most: int, **options: Any) -> int:
    """Steps on 16 numbers with standard deviations from 30 to 1/30 that go through 8, until the loss is at most the target."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.Linear(8, 16, bias=False))
        mixing = torch.linalg.qr(torch.randn(16, 16))[0] * torch.logspace(1.5, -1.5, 16)
    opt = kind(model, lr=lr, weight_decay=0.0, backend="eager", **options)
    for step in range(most):
        loss = torch.stack(rate_distortion(model, mixing @ mixing.T)).sum()
        if float(loss.detach()) <= target:
            return step
        opt.zero_grad()
        loss.backward()
        opt.step()
    return most


def test_soap_reaches_a_rate_and_distortion_of_a_linear_autoencoder_in_fewer_steps_than_adam() -> None:
    """Adam at the better of the two learning rates between which its best lies."""
    soap = steps_of(SOAP, 0.1, 13.0, 300, form="full", betas=(0.95, 0.95))
    adam = min(steps_of(AdamW, lr, 13.0, 300) for lr in (0.05, 0.1))
    assert soap < 0.8 * adam, (soap, adam)


@pytest.mark.parametrize(
    "terms, message",
    [(lambda x: [x.sum()], "1 given"), (lambda x: [x.sum(), torch.ones(())], r"terms\[1\]"), (lambda x: [], "0 given")],
)
def test_what_cannot_be_compared_is_refused(terms: Any, message: str) -> None:
    x = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        intra_step_alignment(SGD([x]), terms(x))
    with pytest.raises(ValueError, match="no entries"):
        outliers(torch.zeros(0))
