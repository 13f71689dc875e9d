"""Symmetric polynomials of eigenvalues, and matrix polynomials made of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from poise.linalg.symmetric_polynomials import Preconditioner, elementary, largest, polynomial, power_sums

# Two gaps above twenty eigenvalues that lie together.
GAPS = torch.cat([torch.tensor([1e4, 1e3]), 1 + 0.1 * torch.arange(20)]).double()


def rotated(values: Tensor, seed: int = 0) -> Tensor:
    n = len(values)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    return Q @ torch.diag(values) @ Q.mT


def dense(P: Preconditioner) -> Tensor:
    return torch.stack([P(e) for e in torch.eye(len(P.like), dtype=torch.float64)], 1)


def test_newtons_identities_give_the_sums_of_products() -> None:
    values = [0.5, 2.0, 3.0, 7.0]
    sums = torch.tensor([sum(v**i for v in values) for i in range(1, 5)], dtype=torch.float64)
    wanted = [sum(math.prod(some) for some in itertools.combinations(values, k)) for k in range(5)]
    assert elementary(sums).tolist() == pytest.approx(wanted, rel=1e-13)


def test_recursion_horner_and_eigenvalues_are_one_polynomial() -> None:
    B = rotated(torch.linspace(0.3, 3, 7, dtype=torch.float64))
    for tau in range(7):
        P = [polynomial(B, tau, form) for form in ("horner", "recursion", "eigenvalues")]
        applied = dense(Preconditioner(B, tau))
        for other in (P[1], P[2], applied * (P[0].trace() / applied.trace())):
            assert (other - P[0]).abs().max() < 1e-11 * P[0].abs().max()
        if tau == 1:
            assert torch.allclose(P[0], B.trace() * torch.eye(7, dtype=torch.float64) - B)
    assert torch.allclose(P[0], torch.linalg.det(B) * torch.linalg.inv(B), rtol=1e-10)  # pyright: ignore[reportPossiblyUnboundVariable]


@pytest.mark.parametrize("tau, wanted", [(0, 1e4), (1, 941), (2, 38.1), (3, 18.8)])
def test_each_degree_cuts_one_gap_of_the_spectrum(tau: int, wanted: float) -> None:
    B = rotated(GAPS)
    values = torch.linalg.eigvals(B @ polynomial(B, tau, "eigenvalues")).real
    assert float(values.max() / values.min()) == pytest.approx(wanted, rel=5e-3)
    values = torch.linalg.eigvals(B @ dense(Preconditioner(B, tau))).real
    assert float(values.max() / values.min()) == pytest.approx(wanted, rel=5e-3)
    assert float(values.max()) == pytest.approx(1, rel=0.02)


def test_traces_come_from_products_alone() -> None:
    B = rotated(torch.linspace(0.3, 3, 7, dtype=torch.float64))
    wanted = [float(torch.linalg.matrix_power(B, i).trace()) for i in range(1, 6)]
    asked: list[int] = []

    def product(v: Tensor) -> Tensor:
        asked.append(1)
        return (B @ v.reshape(7)).reshape(v.shape)

    assert power_sums(product, torch.zeros(7, 1).double(), 5).tolist() == pytest.approx(wanted, rel=1e-12)
    assert len(asked) == 7 * 3  # half of the powers are enough
    estimates = torch.stack([power_sums(product, B[0], 5, 50, torch.Generator().manual_seed(i)) for i in range(40)])
    error = estimates.std(0) / 40**0.5
    assert ((estimates.mean(0) - torch.tensor(wanted).double()).abs() < 4 * error).all() and (error > 0).all()
    diagonal = torch.diag(torch.arange(1.0, 5.0))
    assert power_sums(diagonal, diagonal[0], 3, probes=1).tolist() == [10, 30, 100]  # signs see a diagonal exactly


def test_known_traces_are_taken() -> None:
    B = rotated(GAPS)
    P = Preconditioner(lambda v: B @ v, 2, like=B[0], sums=torch.stack([B.trace(), (B @ B).trace()]))
    assert torch.allclose(dense(P), dense(Preconditioner(B, 2)))


def test_power_iteration_finds_the_largest_eigenvalue() -> None:
    B = rotated(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    assert largest(lambda v: B @ v, B[0]) == pytest.approx(5, rel=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    B = torch.eye(3)
    with pytest.raises(ValueError, match=r"tau=3: must lie in 0 \.\. 2"):
        Preconditioner(B, 3)
    with pytest.raises(ValueError, match="B: must be a square matrix, or a function"):
        Preconditioner(lambda v: v, 1)
    with pytest.raises(ValueError, match="sums: 2 traces are needed, got 1"):
        Preconditioner(B, 2, sums=torch.ones(1))
    with pytest.raises(ValueError, match="probes=0"):
        Preconditioner(B, 2, probes=0)
    with pytest.raises(ValueError, match="no positive eigenvalue"):
        Preconditioner(-B, 0)
    with pytest.raises(ValueError, match="form='newton'"):
        polynomial(B, 1, "newton")  # pyright: ignore[reportArgumentType]
