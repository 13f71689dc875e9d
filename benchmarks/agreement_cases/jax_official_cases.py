"""Against the authors' repositories for JAX: steps on predicted gradients, and derivatives of solutions."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from poise.optim import SGD, AdamW
from poise.training import OptEx
from poise.training.implicit.conditions import proximal_gradient, stationary
from poise.training.implicit.differentiation import custom_fixed_point, custom_root

from .case import Case, Problem, Side, Trajectory, copies, stepping

PARALLEL = 3


def wide() -> Any:
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    return jax


def optex(steps: int, settings: str, make: Any, theirs: str, length_scale: float) -> Case:
    """`theirs` is what the reference evaluates to make its optimizer."""
    return Case(
        "optex",
        "youyve/OptEx",
        "run_optex",
        stepping(lambda p, o: OptEx(make(p, o), PARALLEL, length_scale=length_scale), closure=True),
        predicted(theirs, length_scale),
        1e-11,
        f"parallelism={PARALLEL}, {length_scale=}, over {settings}",
        problem=Problem(((6, 4), (5,)), steps=steps),
    )


def predicted(optimizer: str, length_scale: float) -> Side:
    """Their loop, one iteration at a time, on the function whose gradients are the problem's."""

    def run(problem: Problem, module: Any) -> Trajectory:
        jax = wide()
        params = [p.detach() for p in problem.start()]
        sizes = [p.numel() for p in params]

        def flat(tensors: Any) -> Any:
            return jax.numpy.asarray(torch.cat([t.reshape(-1) for t in tensors]).numpy())

        def back(x: Any) -> list[Tensor]:
            parts = torch.from_numpy(np.array(x)).split(sizes)
            return [part.reshape(p.shape) for part, p in zip(parts, params, strict=True)]

        def function(x: Any, drawn: Any) -> Any:
            return drawn @ x + problem.pull * jax.numpy.log(jax.numpy.cosh(x)).sum()

        x, state, kept = flat(params), None, {"length_scale": length_scale}
        found = [copies(params)]
        for t in range(problem.steps):
            drawn = flat(problem.gradients(t, [torch.zeros_like(p) for p in params]))
            if not t:
                kept |= {"x_history": [], "g_history": [], "selector": None}
            with jax.disable_jit():  # it would compile anew in every iteration
                x, _, state = module.run_optex(
                    function, optimizer, 0.05, x, 1, PARALLEL, [(drawn,)] * PARALLEL, state, inter_results=kept
                )
            found.append(copies(back(x)))
        return found

    return run


def ridge(x: Any, theta: Any, A: Any, b: Any) -> Any:
    return ((A @ x - b) ** 2).sum() / 2 + (theta**2 * x**2).sum() / 2


def squares(x: Any, theta: Any, A: Any, b: Any) -> Any:
    return ((A @ x - b) ** 2).sum() / 2


RATE, STEPS = 0.03, 400  # of the proximal steps


def tuned(solve: str) -> Side:
    """Descent on penalties, by the loss of the fitted weights on other data."""

    def run(problem: Problem, _: Any) -> Trajectory:
        theta, A, b, C, d = (p.detach() for p in problem.start())

        @custom_root(stationary(ridge), solve=solve)  # pyright: ignore[reportArgumentType]
        def fit(init: Any, theta: Tensor, A: Tensor, b: Tensor) -> Tensor:
            return torch.linalg.solve(A.mT @ A + torch.diag(theta**2), A.mT @ b)

        def prox(y: Tensor, lr: float, theta: Tensor, A: Tensor, b: Tensor) -> Tensor:
            return y - torch.clamp(y, -lr * theta.abs(), lr * theta.abs())

        step = proximal_gradient(squares, prox, RATE)

        @custom_fixed_point(step, solve="normal_cg")
        def sparse(init: Any, theta: Tensor, A: Tensor, b: Tensor) -> Tensor:
            x = torch.zeros_like(theta)
            for _ in range(STEPS):
                x = prox(x - RATE * A.mT @ (A @ x - b), RATE, theta, A, b)
            return x

        found = [copies([theta])]
        for _ in range(problem.steps):
            theta = theta.clone().requires_grad_()
            loss = ((C @ (sparse if solve == "lasso" else fit)(None, theta, A, b) - d) ** 2).mean()
            theta = theta.detach() - 0.05 * torch.autograd.grad(loss, theta)[0]
            found.append(copies([theta]))
        return found

    return run


def tuned_by_authors(solve: str) -> Side:
    def run(problem: Problem, module: Any) -> Trajectory:
        jax = wide()
        jnp, linear = jax.numpy, importlib.import_module("jaxopt.linear_solve")
        theta, A, b, C, d = (jnp.asarray(p.detach().numpy()) for p in problem.start())

        def sparse(theta: Any) -> Any:
            jaxopt = importlib.import_module("jaxopt")
            lasso = jaxopt.ProximalGradient(
                lambda x, data: squares(x, None, *data),
                jaxopt.prox.prox_lasso,
                stepsize=RATE,
                tol=1e-14,
                maxiter=STEPS,
                acceleration=False,
                implicit_diff_solve=normal,
            )
            return lasso.run(jnp.zeros_like(theta), jnp.abs(theta), (A, b)).params

        def fit(theta: Any) -> Any:
            systems = {"lu": linear.solve_lu, "normal_cg": normal}

            @module.custom_root(jax.grad(ridge), solve=systems[solve])
            def solver(init: Any, theta: Any, A: Any, b: Any) -> Any:
                return jnp.linalg.solve(A.T @ A + jnp.diag(theta**2), A.T @ b)

            return solver(None, theta, A, b)

        def normal(matvec: Any, rhs: Any) -> Any:
            return linear.solve_normal_cg(matvec, rhs, tol=1e-13)

        def loss(theta: Any) -> Any:
            return ((C @ (sparse if solve == "lasso" else fit)(theta) - d) ** 2).mean()

        slope = jax.jit(jax.grad(loss))
        found = [copies([torch.from_numpy(np.array(theta))])]
        for _ in range(problem.steps):
            theta = theta - 0.05 * slope(theta)
            found.append(copies([torch.from_numpy(np.array(theta))]))
        return found

    return run


def implicit(reference: str, solve: str, bound: float, settings: str, note: str) -> Case:
    return Case(
        "implicit-differentiation",
        "google/jaxopt",
        reference,
        tuned(solve),
        tuned_by_authors(solve),
        bound,
        settings,
        note,
        Problem(((6,), (12, 6), (12,), (8, 6), (8,)), steps=10),
    )


CASES = (
    optex(
        20,
        "SGD with momentum",
        lambda p, o: SGD(p, lr=0.05, momentum=0.9, **o),
        "lambda learning_rate: optax.sgd(learning_rate, momentum=0.9)",
        10.0,
    ),
    optex(8, "Adam", lambda p, o: AdamW(p, lr=0.05, weight_decay=0.0, **o), "optax.adam", 0.1),
    implicit("custom_root", "lu", 1e-13, "stationary, solve='lu'; descent on the penalties of a ridge regression", "rounding"),
    implicit(
        "custom_root",
        "normal_cg",
        1e-12,
        "stationary, solve='normal_cg'; the same",
        "rounding; the reference's systems are solved to 1e-13 here, by default to 1e-5",
    ),
    implicit(
        "ProximalGradient",
        "lasso",
        1e-12,
        "proximal_gradient, custom_fixed_point; descent on the penalties of a lasso",
        "rounding; systems as above",
    ),
)
