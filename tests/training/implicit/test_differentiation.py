"""Implicit differentiation (Efficient and Modular Implicit Differentiation, arXiv 2105.15183)."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from poise import catalog
from poise.linalg.krylov import gmres, lu
from poise.training.implicit.conditions import kkt, proximal_gradient, stationary
from poise.training.implicit.differentiation import custom_fixed_point, custom_root, root_jvp, root_vjp


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, XV = normal(30, 5), normal(20, 5, seed=1)
TRUE = torch.tensor([1.0, -2.0, 0.0, 0.5, 0.0], dtype=torch.float64)
Y, YV = X @ TRUE + normal(30, seed=2), XV @ TRUE + normal(20, seed=3)


def ridge_loss(w: Tensor, lam: Tensor) -> Tensor:
    return ((X @ w - Y).square().sum() + lam.exp() * w.square().sum()) / 2


def closed(lam: Tensor) -> Tensor:
    return torch.linalg.solve(X.mT @ X + lam.exp() * torch.eye(5, dtype=torch.float64), X.mT @ Y)


def valid(w: Tensor) -> Tensor:
    return (XV @ w - YV).square().mean()


def descended(init: Tensor, lam: Tensor, steps: int = 400) -> Tensor:
    """Gradient descent, which autograd could follow too."""
    w = init
    for _ in range(steps):
        w = w - 0.01 * (X.mT @ (X @ w - Y) + lam.exp() * w)
    return w


ridge = custom_root(stationary(ridge_loss))(descended)
LAM = torch.tensor(0.7, dtype=torch.float64)
START = torch.zeros(5, dtype=torch.float64)


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.detach().requires_grad_()
    (found,) = torch.autograd.grad(function(at), at)
    return found


def differences(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-5) -> Tensor:
    """Central finite differences of all outputs by each entry of `at`: (entries, *outputs)."""
    rows = []
    for i in range(at.numel()):
        step = torch.zeros(at.numel(), dtype=at.dtype)
        step[i] = h
        step = step.reshape(at.shape)
        rows.append((function(at + step) - function(at - step)) / (2 * h))
    return torch.stack(rows)


# -- against other ways to the same derivatives --------------------------------------------------------------------------


def test_ridge_has_the_derivative_of_its_closed_form() -> None:
    wanted = slope(lambda lam: valid(closed(lam)), LAM)
    assert abs(slope(lambda lam: valid(ridge(START, lam)), LAM) - wanted) < 1e-10
    unrolled = slope(lambda lam: valid(descended(START, lam)), LAM)
    assert abs(unrolled - wanted) < 1e-10
    assert abs(differences(lambda lam: valid(closed(lam)), LAM)[0] - wanted) < 1e-5


def test_the_reference_tells_it_from_its_mutant() -> None:
    wrong = mutated(catalog.get("implicit-differentiation"))(stationary(ridge_loss))(descended)
    wanted = slope(lambda lam: valid(closed(lam)), LAM)
    assert abs(slope(lambda lam: valid(wrong(START, lam)), LAM) - wanted) > 0.1 * abs(wanted)


def test_the_error_of_a_derivative_is_proportional_to_that_of_the_solution() -> None:
    exact, wanted = closed(LAM), slope(lambda lam: valid(closed(lam)), LAM)
    away = normal(5, seed=4)
    wrong = []
    for size in (1e-3, 5e-4, 2.5e-4):
        near = custom_root(stationary(ridge_loss))(lambda init, lam, size=size: exact + size * away)
        wrong.append(float(slope(lambda lam, near=near: valid(near(None, lam)), LAM) - wanted))
    assert wrong[0] / wrong[1] == pytest.approx(2, rel=0.02) and wrong[1] / wrong[2] == pytest.approx(2, rel=0.02)

    ratios = []
    for steps in (40, 50, 60, 70):  # and of a solver that is stopped early
        left = descended(START, LAM, steps) - exact
        found = slope(lambda lam, steps=steps: valid(ridge(START, lam, steps=steps)), LAM)
        ratios.append(float((found - wanted).abs() / left.norm()))
    assert max(ratios) < 1.3 * min(ratios)
    assert float(left.norm()) < 0.1 * float((descended(START, LAM, 40) - exact).norm())


WIDE, SPARSE = normal(25, 12, seed=5), torch.zeros(12, dtype=torch.float64)
SPARSE[:3] = torch.tensor([2.0, -1.5, 1.0])
SEEN = WIDE @ SPARSE + 0.1 * normal(25, seed=6)


def soft(y: Tensor, lr: float, lam: Tensor, *_: Any) -> Tensor:
    return y.sign() * (y.abs() - lr * lam).relu()


def squares(w: Tensor, lam: Tensor, seen: Tensor) -> Tensor:
    return (WIDE @ w - seen).square().sum() / 2


def ista(init: Tensor, lam: Tensor, seen: Tensor) -> Tensor:
    w = init
    for _ in range(800):
        w = soft(w - 0.015 * (WIDE.mT @ (WIDE @ w - seen)), 0.015, lam)
    return w


PENALTY, NONE = torch.tensor(2.0, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
FOUND = ista(NONE, PENALTY, SEEN)


@pytest.fixture(scope="module")
def path() -> Tensor:
    """Slopes of the solution by the penalty and by one of the targets: finite differences, (2, 12)."""
    by_penalty = differences(lambda lam: ista(NONE, lam, SEEN), PENALTY)
    by_target = differences(lambda t: ista(NONE, PENALTY, torch.cat([t, SEEN[1:]])), SEEN[:1])
    return torch.cat([by_penalty, by_target])


@pytest.mark.parametrize("solve", ["normal_cg", gmres, lu, "bicgstab"])
def test_lasso_moves_on_its_active_set_and_nowhere_else(solve: Any, path: Tensor) -> None:
    lasso = custom_fixed_point(proximal_gradient(squares, soft, 0.015), solve=solve)(lambda *_: FOUND)
    active = FOUND != 0
    assert 2 <= int(active.sum()) <= 6
    by_penalty, by_targets = torch.func.jacrev(lasso, argnums=(1, 2))(NONE, PENALTY, SEEN)
    assert (by_penalty - path[0]).abs().max() < 1e-5 and (by_targets[:, 0] - path[1]).abs().max() < 1e-5
    if solve is gmres:
        assert (by_penalty[~active] == 0).all() and (by_targets[~active] == 0).all()
    else:
        assert by_penalty[~active].abs().max() < 1e-13 and by_targets[~active].abs().max() < 1e-13


def test_lasso_moves_as_its_unrolled_iterations_do() -> None:
    lasso = custom_fixed_point(proximal_gradient(squares, soft, 0.015))(ista)
    weights = normal(12, seed=7)
    found = slope(lambda lam: weights @ lasso(NONE, lam, SEEN), PENALTY)
    assert abs(found - slope(lambda lam: weights @ ista(NONE, lam, SEEN), PENALTY)) < 1e-9


def qp_objective(z: Tensor, p: dict[str, Tensor]) -> Tensor:
    return z @ (p["Q"] @ p["Q"].mT + torch.eye(4, dtype=torch.float64)) @ z / 2 + p["c"] @ z


def qp_solver(init: None, p: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tries all sets of inequalities that could be active: nothing that autograd could follow."""
    hessian = p["Q"] @ p["Q"].mT + torch.eye(4, dtype=torch.float64)
    for bits in range(8):
        held = [i for i in range(3) if bits >> i & 1]
        J = torch.cat([p["A"], p["G"][held]])
        blocks = torch.cat([torch.cat([hessian, J.mT], 1), torch.cat([J, torch.zeros(len(J), len(J)).double()], 1)])
        found = torch.linalg.solve(blocks, torch.cat([-p["c"], p["b"], p["h"][held]]))
        lam = torch.zeros(3, dtype=torch.float64)
        lam[held] = found[5:]
        if (lam >= 0).all() and (p["G"] @ found[:4] <= p["h"] + 1e-9).all():
            return found[:4], found[4:5], lam
    raise AssertionError("no active set fits")


def test_a_quadratic_program_moves_as_its_kkt_conditions_say() -> None:
    program = kkt(qp_objective, lambda z, p: p["A"] @ z - p["b"], lambda z, p: p["G"] @ z - p["h"])
    solve = custom_root(program)(qp_solver)
    shapes = {"Q": (4, 4), "c": (4,), "A": (1, 4), "b": (1,), "G": (3, 4), "h": (3,)}
    p = {name: normal(*shape, seed=10 + i) for i, (name, shape) in enumerate(shapes.items())}
    p["c"] = 3 * p["c"]
    _, _, lam = qp_solver(None, p)
    assert 1 <= int((lam > 0.05).sum()) <= 2, "some of the inequalities are to hold with equality"
    weights = [normal(4, seed=20), normal(1, seed=21), normal(3, seed=22)]

    def score(found: tuple[Tensor, ...]) -> Tensor:
        return torch.stack([w @ part for w, part in zip(weights, found, strict=True)]).sum()

    leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
    score(solve(None, leaves)).backward()
    for name, value in p.items():
        wanted = differences(lambda v, name=name: score(qp_solver(None, {**p, name: v})), value).reshape(value.shape)
        grad = leaves[name].grad
        assert grad is not None
        assert (grad - wanted).abs().max() < 1e-5 * max(1.0, float(wanted.abs().max())), name


def classify(weights: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(x @ weights["w"] + weights["b"], t)


T, TV = (Y > 0).double(), (YV > 0).double()


def penalized(weights: dict[str, Tensor], lam: Tensor) -> Tensor:
    return classify(weights, X, T) + (lam.exp() * weights["w"].square()).sum() + 0.01 * weights["b"].square()


def lbfgs(init: Any, lam: Tensor) -> dict[str, Tensor]:
    w = {
        "w": torch.zeros(5, dtype=torch.float64, requires_grad=True),
        "b": torch.zeros((), dtype=torch.float64, requires_grad=True),
    }
    opt = torch.optim.LBFGS(w.values(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        opt.zero_grad()
        loss = penalized(w, lam)
        loss.backward()
        return loss

    opt.step(closure)
    return w


@pytest.mark.parametrize("solve", ["normal_cg", "cg", "lu", "cholesky", "gmres", "bicgstab"])
def test_five_penalties_of_a_classifier_have_the_gradient_of_the_validation_loss(solve: Any) -> None:
    """The inner solver is a torch optimizer with backward passes of its own."""
    fit = custom_root(stationary(penalized), solve=solve)(lbfgs)
    lam = torch.linspace(-4, -2, 5, dtype=torch.float64)
    found = slope(lambda lam: classify(fit(None, lam), XV, TV), lam)
    wanted = differences(lambda lam: classify(lbfgs(None, lam), XV, TV).detach(), lam, 1e-3)
    assert (found - wanted).abs().max() < 1e-6
    assert wanted.abs().min() > 1e-5

    def unrolled(lam: Tensor) -> Tensor:
        w, b = torch.zeros(5, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for _ in range(600):
            wrong = (torch.sigmoid(X @ w + b) - T) / len(T)
            w, b = w - 2 * (X.mT @ wrong + 2 * lam.exp() * w), b - 2 * (wrong.sum() + 0.02 * b)
        return classify({"w": w, "b": b}, XV, TV)

    if solve == "normal_cg":
        assert (found - slope(unrolled, lam)).abs().max() < 1e-8


# -- nothing of the path is kept -----------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves(found):
            if isinstance(t, Tensor):
                size = t.numel() * t.element_size()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(t, self.freed, size)
        return found

    def freed(self, size: int) -> None:
        self.now -= size


def peak(run: Callable[[], Any]) -> int:
    gc.collect()
    with Peak() as seen:
        run()
    return seen.most


def test_memory_does_not_grow_with_the_iterations_of_the_solver() -> None:
    def differentiated(function: Callable[..., Tensor], steps: int) -> Callable[[], None]:
        return lambda: valid(function(START, LAM.clone().requires_grad_(), steps=steps)).backward()

    few, many = (peak(differentiated(ridge, steps)) for steps in (40, 400))
    assert many <= few
    few_kept, many_kept = (peak(differentiated(descended, steps)) for steps in (40, 400))
    assert many_kept > 4 * few_kept > 4 * few


def test_the_graph_holds_the_solution_and_theta_only() -> None:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ridge(START, LAM.clone().requires_grad_(), steps=500)
    assert sorted(t.numel() for t in kept) == [1, 5]


def test_an_aux_made_with_a_graph_does_not_hold_the_path() -> None:
    def solver(init: Tensor, lam: Tensor) -> tuple[Tensor, dict[str, Any]]:
        path = init.clone().requires_grad_()
        watched.append(weakref.ref(path))
        return closed(lam), {"path": path.exp(), "steps": 3, "none": None}

    watched: list[Any] = []
    w, aux = custom_root(stationary(ridge_loss), has_aux=True)(solver)(START, LAM.clone().requires_grad_())
    gc.collect()
    assert watched[0]() is None
    assert w.requires_grad and not aux["path"].requires_grad
    assert aux["steps"] == 3 and aux["none"] is None and aux["path"].shape == (5,)


# -- the surface -----------------------------------------------------------------------------------------------------------


def test_the_initial_point_gets_no_gradient() -> None:
    start, lam = START.clone().requires_grad_(), LAM.clone().requires_grad_()
    valid(ridge(start, lam, steps=5)).backward()
    assert start.grad is None and lam.grad is not None


def test_trees_of_any_form_with_other_values_between() -> None:
    """Weights in a dict and a list, hyper-parameters beside a string and None, and integers that have no gradient."""

    def loss(w: dict[str, Any], p: dict[str, Any], rows: Tensor) -> Tensor:
        fit = (X[rows] @ w["a"] + w["rest"][0] - Y[rows]).square().sum()
        assert p["name"] == "ridge" and p["none"] is None
        return fit + p["lam"][0].exp() * w["a"].square().sum() + p["lam"][1].exp() * w["rest"][0].square()

    @custom_root(stationary(loss))
    def solver(init: Any, p: dict[str, Any], rows: Tensor) -> dict[str, Any]:
        A = torch.cat([X, torch.ones(30, 1).double()], 1)[rows]
        shift = torch.cat([p["lam"][0].exp().expand(5), p["lam"][1].exp().reshape(1)])
        found = torch.linalg.solve(A.mT @ A + torch.diag(shift), A.mT @ Y[rows])
        return {"a": found[:5], "rest": [found[5]]}

    rows = torch.arange(25)
    plain: Any = solver.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]

    def score(solver: Any, lam: Tensor) -> Tensor:
        w = solver({"any": 1}, {"name": "ridge", "lam": (lam[0], lam[1]), "none": None}, rows)
        return valid(w["a"]) + w["rest"][0]

    lam = torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert (slope(partial(score, solver), lam) - slope(partial(score, plain), lam)).abs().max() < 1e-11


def test_gradients_are_right_both_ways_and_twice() -> None:
    """torch's own finite differences: reverse, forward, and second derivatives."""

    def solution(lam: Tensor, seen: Tensor) -> Tensor:
        def loss(w: Tensor, lam: Tensor, seen: Tensor) -> Tensor:
            return (X @ w - seen).square().sum() / 2 + (lam.exp() * w.square()).sum() / 2 + w.pow(4).sum() / 4

        @custom_root(stationary(loss))
        def solver(init: Any, lam: Tensor, seen: Tensor) -> Tensor:
            w = torch.zeros(5, dtype=torch.float64)
            for _ in range(30):
                H = X.mT @ X + torch.diag(lam.exp() + 3 * w**2)
                w = w - torch.linalg.solve(H, X.mT @ (X @ w - seen) + lam.exp() * w + w**3)
            return w

        return solver(None, lam, seen)

    given = (normal(5, seed=7).requires_grad_(), Y.clone().requires_grad_())
    assert torch.autograd.gradcheck(solution, given, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(solution, given, fast_mode=True)


def test_functional_transformations_go_through_it() -> None:
    def score(lam: Tensor) -> Tensor:
        return valid(ridge(START, lam))

    def exact(lam: Tensor) -> Tensor:
        return valid(closed(lam))

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.jacrev, torch.func.hessian):
        assert abs(transform(score)(LAM) - transform(exact)(LAM)) < 1e-9
    lams = torch.tensor([0.1, 0.9, -1.0], dtype=torch.float64)
    found = torch.func.vmap(torch.func.grad(score))(lams)
    assert (found - torch.stack([torch.func.grad(exact)(lam) for lam in lams])).abs().max() < 1e-10
    tangent = torch.func.jvp(lambda lam: ridge(START, lam), (LAM,), (torch.ones_like(LAM),))[1]
    assert (tangent - torch.func.jacrev(closed)(LAM)).abs().max() < 1e-10


def test_a_root_found_elsewhere_has_derivatives_too() -> None:
    J, v = torch.func.jacrev(closed)(LAM), normal(5, seed=8)
    F = stationary(ridge_loss)
    (found,) = root_vjp(F, closed(LAM), (LAM,), v)
    assert abs(found - v @ J) < 1e-12
    assert (root_jvp(F, closed(LAM), (LAM,), (torch.ones_like(LAM),)) - J).abs().max() < 1e-12


def test_float32_is_as_exact_as_float32_is() -> None:
    def loss(w: Tensor, lam: Tensor) -> Tensor:
        return ((X.float() @ w - Y.float()).square().sum() + lam.exp() * w.square().sum()) / 2

    single = custom_root(stationary(loss))(lambda init, lam: closed(lam.double()).float())
    found = slope(lambda lam: valid(single(None, lam).double()), LAM.float())
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(slope(lambda lam: valid(closed(lam)), LAM)), rel=1e-4)


def test_a_solver_of_linear_systems_may_be_the_users() -> None:
    asked: list[int] = []

    def solve(matvec: Any, b: Tensor, rmatvec: Any = None) -> Tensor:
        asked.append(1)
        A = torch.stack([matvec(e) for e in torch.eye(5, dtype=torch.float64)], 1)
        assert torch.allclose(A.mT, torch.stack([rmatvec(e) for e in torch.eye(5, dtype=torch.float64)], 1))
        return torch.linalg.solve(A, b)

    own = custom_root(stationary(ridge_loss), solve=solve)(descended)
    wanted = slope(lambda lam: valid(closed(lam)), LAM)
    assert abs(slope(lambda lam: valid(own(START, lam)), LAM) - wanted) < 1e-10
    assert asked


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="solve='nothing': must be a function or one of cg"):
        custom_root(stationary(ridge_loss), solve="nothing")(descended)(START, LAM)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="module's parameters would not be seen"):
        ridge(START, nn.Linear(2, 2))
    with pytest.raises(TypeError, match="must return a tree of floating-point tensors, got float"):
        custom_root(stationary(ridge_loss))(lambda init, lam: 1.0)(START, LAM)
    lam = LAM.clone().requires_grad_()
    with pytest.raises(ValueError, match="F: must give a tree like x"):
        custom_root(lambda w, lam: w[:2] * lam)(lambda init, lam: closed(lam))(START, lam).sum().backward()


def test_the_catalog_knows_it_as_a_solver_with_a_path_that_imports() -> None:
    from poise import training

    found = catalog.get("implicit-differentiation")
    assert (found.family, found.kind) == ("training", "solver")
    assert found in catalog.methods("training")
    assert found.target is custom_root is training.custom_root
