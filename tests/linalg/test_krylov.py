"""Matrix-free linear solvers."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from poise.linalg import krylov
from poise.linalg.krylov import SOLVERS, bicgstab, cg, cholesky, gmres, lu, normal_cg

EVERY = pytest.mark.parametrize("name", SOLVERS)
GENERAL = pytest.mark.parametrize("name", ["normal_cg", "gmres", "bicgstab", "lu"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definite(n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    root = normal(*batch, n, n, seed=seed)
    return root @ root.mT / n + 0.2 * torch.eye(n, dtype=torch.float64)


def by(A: Tensor) -> Any:
    return lambda v: (A @ v[..., None])[..., 0]


@EVERY
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-3)])
def test_every_solver_solves_a_definite_system(name: str, dtype: torch.dtype, tolerance: float) -> None:
    A, x = definite(12), normal(12, seed=1)
    b = (A @ x).to(dtype)
    found = SOLVERS[name](by(A.to(dtype)), b)
    assert found.dtype == dtype
    assert (found.double() - x).abs().max() < tolerance


@GENERAL
def test_general_solvers_need_no_symmetry(name: str) -> None:
    A = normal(10, 10) / 6 + torch.eye(10, dtype=torch.float64)
    x = normal(10, seed=1)
    assert (SOLVERS[name](by(A), A @ x) - x).abs().max() < 1e-10


def test_conjugate_gradients_take_negative_definite_systems() -> None:
    A, x = -definite(9), normal(9, seed=1)
    assert (cg(by(A), A @ x) - x).abs().max() < 1e-11


@EVERY
def test_a_batch_is_solved_one_by_one(name: str) -> None:
    """With systems of unlike conditions and sizes, one of which is solved from the start."""
    A = definite(6, batch=(3,)) * torch.tensor([1.0, 1e3, 1e-3], dtype=torch.float64)[:, None, None]
    A[1] += torch.diag(torch.logspace(0, 4, 6, dtype=torch.float64))
    b = normal(3, 6, seed=1)
    b[2] = 0
    found = SOLVERS[name](by(A), b, batch_dims=1)  # pyright: ignore[reportCallIssue]
    assert torch.allclose(found, torch.linalg.solve(A, b[..., None])[..., 0], rtol=1e-9, atol=1e-12)
    assert (found[2] == 0).all()


def test_systems_of_a_batch_are_independent() -> None:
    """Three steps for a system that needs three, beside one that needs many: taken as one vector they would not do."""
    A = torch.stack([torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]).double()), definite(6)])
    b = normal(2, 6, seed=1)
    with pytest.warns(RuntimeWarning, match="cg: after 3 steps"):
        found = cg(by(A), b, batch_dims=1, maxiter=3)
    assert (A[0] @ found[0] - b[0]).abs().max() < 1e-13
    assert (A[1] @ found[1] - b[1]).abs().max() > 1e-4


@EVERY
def test_trees_are_solved_as_vectors_are(name: str) -> None:
    A, b = definite(7), normal(7, seed=1)

    def matvec(tree: dict[str, Any]) -> dict[str, Any]:
        y = A @ torch.cat([tree["a"].reshape(-1), tree["b"][0], tree["b"][1].reshape(1)])
        return {"a": y[:4].reshape(2, 2), "b": (y[4:6], y[6])}

    found = SOLVERS[name](matvec, {"a": b[:4].reshape(2, 2), "b": (b[4:6], b[6])})
    flat = torch.cat([found["a"].reshape(-1), found["b"][0], found["b"][1].reshape(1)])
    assert (flat - torch.linalg.solve(A, b)).abs().max() < 1e-11


@EVERY
def test_a_ridge_is_added_to_the_matrix_and_for_normal_cg_to_its_square(name: str) -> None:
    A, b, one = definite(8), normal(8, seed=1), torch.eye(8, dtype=torch.float64)
    if name == "normal_cg":
        wanted = torch.linalg.solve(A.mT @ A + 0.3 * one, A.mT @ b)
    else:
        wanted = torch.linalg.solve(A + 0.3 * one, b)
    assert (SOLVERS[name](by(A), b, ridge=0.3) - wanted).abs().max() < 1e-11  # pyright: ignore[reportCallIssue]


def test_normal_equations_find_the_least_squares_where_there_is_no_solution() -> None:
    A = normal(6, 3) @ normal(3, 6, seed=1)
    b = normal(6, seed=2)
    assert (normal_cg(by(A), b) - torch.linalg.pinv(A, rtol=1e-10) @ b).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["cg", "normal_cg", "gmres", "bicgstab"])
def test_as_many_steps_as_there_are_distinct_eigenvalues_are_enough(name: str) -> None:
    A = torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0, 9.0], dtype=torch.float64))
    count = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return A @ v

    found = SOLVERS[name](matvec, torch.ones(6, dtype=torch.float64), rmatvec=lambda v: A @ v)
    assert (A @ found - 1).abs().max() < 1e-12
    assert count <= {"cg": 3, "normal_cg": 4, "gmres": 4, "bicgstab": 6}[name]


def test_a_given_transpose_is_used() -> None:
    A, used = normal(5, 5), []

    def back(v: Tensor) -> Tensor:
        used.append(1)
        return A.mT @ v

    x = normal(5, seed=1)
    assert (normal_cg(by(A), A @ x, rmatvec=back) - x).abs().max() < 1e-9
    assert used


def test_restarted_gmres_gets_there_too() -> None:
    A, x = definite(30), normal(30, seed=1)
    assert (gmres(by(A), A @ x, restart=5, maxiter=3000) - x).abs().max() < 1e-10


def test_bicgstab_begins_anew_where_its_shadow_is_lost() -> None:
    """A rotation by 90 degrees: every product is orthogonal to the residual, and the first step breaks down."""
    A = torch.tensor([[0.01, 1.0], [-1.0, 0.01]], dtype=torch.float64)
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert (bicgstab(by(A), A @ x) - x).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["cg", "normal_cg", "gmres", "bicgstab"])
def test_the_solution_as_a_start_is_left_at_once(name: str) -> None:
    A, x, count = definite(8), normal(8, seed=1), 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return A @ v

    solve: Any = SOLVERS[name]
    found = solve(matvec, A @ x, rmatvec=by(A.mT), x0=x)
    assert count <= 1 and torch.equal(found, x)


@pytest.mark.parametrize("name", ["cg", "normal_cg", "gmres", "bicgstab"])
def test_it_ends_at_the_tolerance_asked_for(name: str) -> None:
    A = definite(60)
    b, back = normal(60, seed=1), A.mT if name == "normal_cg" else torch.eye(60, dtype=torch.float64)
    solve: Any = SOLVERS[name]
    for settings, wanted in (({"rtol": 1e-3}, 1e-3 * (back @ b).norm()), ({"rtol": 0.0, "atol": 0.05}, 0.05)):
        left = (back @ (b - A @ solve(by(A), b, **settings))).norm()
        assert 0.01 * wanted < left <= 1.001 * wanted


def test_what_is_not_solved_warns() -> None:
    A = torch.diag(torch.logspace(0, 8, 40, dtype=torch.float64))
    for solve in (cg, gmres, partial(gmres, restart=3), normal_cg):
        with pytest.warns(RuntimeWarning, match=r"cg|gmres: after 5 steps a residual of"):
            solve(by(A), torch.ones(40, dtype=torch.float64), maxiter=5)
    with pytest.warns(RuntimeWarning, match="nan"):
        cg(by(A), torch.full((40,), torch.nan, dtype=torch.float64))


def test_the_transpose_is_that_of_the_map() -> None:
    A = normal(5, 5)
    assert torch.allclose(krylov.transposed(by(A), normal(5))(normal(5, seed=2)), A.mT @ normal(5, seed=2))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda A, b: cg(by(A), b, ridge=-1.0), "ridge=-1.0"),
        (lambda A, b: cg(by(A), b, rtol=-1.0), "rtol=-1.0"),
        (lambda A, b: cg(by(A), b, maxiter=-1), "maxiter=-1"),
        (lambda A, b: cg(by(A), b, x0=torch.ones(4)), "x0: must be a tree like b"),
        (lambda A, b: cg(lambda v: v[:2], b), "matvec: must give a tree like b"),
        (lambda A, b: gmres(by(A), b, restart=0), "restart=0"),
        (lambda A, b: cholesky(by(-A), b), "symmetric and positive definite"),
        (lambda A, b: krylov.solver(cast(Any, "qr")), "solve='qr': must be a function or one of cg"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(definite(3), normal(3, seed=1))


def test_a_singular_matrix_has_no_solution_by_elimination() -> None:
    with pytest.raises(RuntimeError, match="singular"):
        lu(lambda v: 0 * v, torch.ones(3))
