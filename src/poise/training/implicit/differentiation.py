"""Implicit differentiation: derivatives of any solver's solution, from the conditions that it satisfies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Paper, method
from poise.linalg.krylov import Name, Solve, solver, transposed
from poise.linalg.trees import Tree, flatten, tree_map, unflatten

Condition = Callable[..., Tree]  # F(x, *theta) or T(x, *theta), a tree like x


@method(
    "implicit-differentiation",
    family="training",
    kind="solver",
    paper=Paper("Efficient and Modular Implicit Differentiation", arxiv="2105.15183", year=2021),
    mutant=("tree_map(torch.neg, v)", "v"),
)
def custom_root(
    F: Condition, *, has_aux: bool = False, solve: Name | Solve = "normal_cg"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes `solver(init, *theta)` differentiable in theta, where what it returns is a root of `F(x, *theta) = 0`.

        d1F dx + d2F dtheta = 0      at x, so that with u the solution of (d1F)^T u = -v
        reverse, of a cotangent v:   (d2F)^T u
        forward, of a tangent dt:    the solution z of d1F z = -d2F dt

    Only products with d1F and its transpose are formed, by autograd through one evaluation of F at the solution. The solver
    runs without a graph: it may take any number of steps, be written in anything, use autograd itself or look at values, and
    nothing of its path is kept.

        @custom_root(stationary(train_loss))
        def fit(init, lam):
            ...
            return weights

        valid_loss(fit(None, lam)).backward()  # lam.grad

    Derivatives are as exact as the solution: their error is at most a constant times `||x - x*||`. They may be differentiated
    again, and torch.func's transformations go through them (`vmap` as a loop: each solver run is one problem).

    Args:
        F: the optimality condition, a tree like x; see `poise.training.implicit.conditions`. What is not among its arguments
            counts as constant.
        has_aux: the solver returns `(x, aux)`; aux is handed on and has no derivatives.
        solve: of the linear systems. A name or a function of `poise.linalg.krylov`: "normal_cg" (default: d1F may be any
            invertible matrix), "cg" where F is the gradient of a convex function, "lu" for small x;
            `partial(gmres, ridge=1e-6)` and functions of your own of the same form.

    The decorated solver takes trees of tensors: dicts, lists and tuples, with other values in between; x must be of floating
    point. Keyword arguments go to the solver alone. There is no gradient to `init`.

    Raises:
        TypeError: a module among theta, whose parameters would not be seen.
        ValueError: an F that is not like x.

    Source: "Efficient and Modular Implicit Differentiation" (arXiv 2105.15183).
    """

    def decorate(run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def differentiable(init: Tree, *theta: Tree, **options: Any) -> Any:
            def solution(init: Tree, *theta: Tree) -> tuple[Tree, Tree]:
                found = run(init, *theta, **options)
                return found if has_aux else (found, ())

            x, aux = root(F, solution, solve, init, theta)
            return (x, aux) if has_aux else x

        return differentiable

    return decorate


def custom_fixed_point(
    T: Condition, *, has_aux: bool = False, solve: Name | Solve = "normal_cg"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As `custom_root`, where what the solver returns is a fixed point of `T(x, *theta) = x`: the root of `T - x`."""
    return custom_root(_residual(T), has_aux=has_aux, solve=solve)


def root_vjp(F: Condition, x: Tree, theta: Sequence[Tree], v: Tree, solve: Name | Solve = "normal_cg") -> tuple[Tree, ...]:
    """`v^T dx/dtheta`, trees like theta, at a root x of F that was found by whatever means. None for what cannot have any."""
    tensors, place = _tensors(tuple(theta))
    slopes = _pulled(F, x, tensors, place, _solved(F, x, tuple(theta), v, solve, transpose=True))
    return place(slopes, None)


def root_jvp(F: Condition, x: Tree, theta: Sequence[Tree], dt: Sequence[Tree], solve: Name | Solve = "normal_cg") -> Tree:
    """`dx/dtheta dt`, a tree like x, at a root x of F found by whatever means. dt is like theta; None stands for zero."""
    tensors, place = _tensors(tuple(theta))
    moved = [t for t, leaf in zip(flatten(tuple(dt))[0], flatten(tuple(theta))[0], strict=True) if isinstance(leaf, Tensor)]
    return _solved(F, x, tuple(theta), _pushed(F, x, tensors, place, moved), solve, transpose=False)


def root(F: Condition, run: Callable[..., tuple[Tree, Tree]], solve: Name | Solve, init: Tree, theta: tuple[Tree, ...]) -> Any:
    """x and aux of `run(init, *theta)`, where x has the derivatives of a root of F."""
    solver(solve)
    if any(isinstance(leaf, nn.Module) for leaf in flatten(theta)[0]):
        raise TypeError(
            "theta: a module's parameters would not be seen; give dict(module.named_parameters()) for functional_call"
        )
    first, begin = _tensors(init)
    others, settings = _tensors(theta)
    problem = _Problem(F, run, solve, begin, settings, len(first))
    found = _Root.apply(problem, *first, *others)
    return unflatten(list(found[: problem.size]), problem.spec), problem.aux(found[problem.size :])


Placing = Callable[..., Tree]  # (tensors, what stands in all other places) -> tree


@dataclass
class _Problem:
    """What `_Root` works on, beside the tensors. The last three are known when it has run."""

    F: Condition
    run: Callable[..., tuple[Tree, Tree]]
    solve: Name | Solve
    init: Placing
    theta: Placing
    inits: int  # the tensors of init
    size: int = 0  # the leaves of x
    spec: Any = None
    aux: Placing = tuple


class _Root(torch.autograd.Function):
    """(problem, tensors of init, tensors of theta) -> (leaves of x, tensors of aux)."""

    @staticmethod
    def forward(problem: _Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = tuple(t.detach() for t in tensors)
        with torch.enable_grad():  # for solvers that use gradients of their own
            x, aux = problem.run(problem.init(tensors[: problem.inits]), *problem.theta(tensors[problem.inits :]))
        leaves, problem.spec = flatten(x)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
            raise TypeError(f"solver: must return a tree of floating-point tensors, got {type(x).__name__}")
        extra, problem.aux = _tensors(aux)
        problem.size = len(leaves)
        return tuple(leaf.detach().clone() for leaf in (*leaves, *extra))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem = problem = inputs[0]
        theta = inputs[1 + problem.inits :]
        ctx.parameters, ctx.extra = len(theta), len(output) - problem.size
        ctx.mark_non_differentiable(*output[problem.size :])
        ctx.save_for_backward(*theta, *output[: problem.size])
        ctx.save_for_forward(*theta, *output[: problem.size])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        problem, theta, x = _saved(ctx)
        v = unflatten(list(cotangents[: problem.size]), problem.spec)
        u = _solved(problem.F, x, problem.theta(theta), v, problem.solve, transpose=True)
        wanted = ctx.needs_input_grad[1 + problem.inits :]
        return (*[None] * (1 + problem.inits), *_pulled(problem.F, x, theta, problem.theta, u, wanted))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem, theta, x = _saved(ctx)
        moved = _pushed(problem.F, x, theta, problem.theta, tangents[1 + problem.inits :])
        z = _solved(problem.F, x, problem.theta(theta), moved, problem.solve, transpose=False)
        return (*flatten(z)[0], *[None] * ctx.extra)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        problem, *tensors = inputs
        found = []
        for i in range(info.batch_size):
            one = [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims[1:], strict=True)]
            found.append(_Root.apply(problem, *one))
        return tuple(torch.stack(some) for some in zip(*found, strict=True)), (0,) * len(found[0])


def _saved(ctx: Any) -> tuple[_Problem, Sequence[Tensor], Tree]:
    kept = ctx.saved_tensors
    return ctx.problem, kept[: ctx.parameters], unflatten(list(kept[ctx.parameters :]), ctx.problem.spec)


def _solved(F: Condition, x: Tree, theta: tuple[Tree, ...], v: Tree, solve: Name | Solve, transpose: bool) -> Tree:
    """The solution u of `(d1F)^T u = -v`, or of `d1F u = -v`: a root itself, so that it has derivatives too."""

    def products(x: Tree, theta: tuple[Tree, ...]) -> tuple[Callable[[Tree], Tree], Callable[[Tree], Tree]]:
        """With (d1F)^T and with d1F, from one evaluation of F, without forward-mode formulas, which some operations lack."""
        pull = torch.func.vjp(lambda x: _like(F(x, *theta), x), x)[1]
        back = lambda u: pull(u)[0]  # noqa: E731
        return back, transposed(back, x)

    def condition(u: Tree, x: Tree, theta: tuple[Tree, ...], v: Tree) -> Tree:
        return tree_map(torch.add, products(x, theta)[0 if transpose else 1](u), v)

    def run(_: Tree, x: Tree, theta: tuple[Tree, ...], v: Tree) -> tuple[Tree, Tree]:
        with torch.no_grad():  # else every product would keep a graph
            back, forth = products(x, theta)
            matvec, rmatvec = (back, forth) if transpose else (forth, back)
            return solver(solve)(matvec, tree_map(torch.neg, v), rmatvec), ()

    return root(condition, run, solve, None, (x, theta, v))[0]


def _pulled(
    F: Condition, x: Tree, tensors: Sequence[Tensor], place: Placing, u: Tree, wanted: Sequence[bool] | None = None
) -> list[Tensor | None]:
    """`(d2F)^T u` for those of theta's tensors that are wanted."""
    chosen = [i for i, t in enumerate(tensors) if t.is_floating_point() and (wanted is None or wanted[i])]
    slopes: list[Tensor | None] = [None] * len(tensors)
    if chosen:
        pull = torch.func.vjp(_of_some(F, x, tensors, place, chosen), *(tensors[i] for i in chosen))[1]
        for i, slope in zip(chosen, pull(u), strict=True):
            slopes[i] = slope
    return slopes


def _pushed(F: Condition, x: Tree, tensors: Sequence[Tensor], place: Placing, moved: Sequence[Tensor | None]) -> Tree:
    """`d2F dt`, by the transpose of its transpose."""
    chosen = [i for i, t in enumerate(moved) if t is not None and tensors[i].is_floating_point()]
    if not chosen:
        return tree_map(torch.zeros_like, x)
    pull = torch.func.vjp(_of_some(F, x, tensors, place, chosen), *(tensors[i] for i in chosen))[1]
    push = torch.func.vjp(pull, x)[1]
    return push(tuple(moved[i] for i in chosen))[0]


def _of_some(F: Condition, x: Tree, tensors: Sequence[Tensor], place: Placing, chosen: Sequence[int]) -> Callable[..., Tree]:
    """F at x as a function of the chosen tensors of theta."""

    def function(*some: Tensor) -> Tree:
        filled = list(tensors)
        for i, t in zip(chosen, some, strict=True):
            filled[i] = t
        return _like(F(x, *place(filled)), x)

    return function


def _residual(T: Condition) -> Condition:
    return lambda x, *theta: tree_map(torch.sub, _like(T(x, *theta), x), x)


def _like(found: Tree, x: Tree) -> Tree:
    """`found`, which must have the structure and shapes of x."""
    (leaves, spec), (wanted, wanted_spec) = flatten(found), flatten(x)
    if spec != wanted_spec or [leaf.shape for leaf in leaves] != [leaf.shape for leaf in wanted]:
        shapes = [[tuple(leaf.shape) for leaf in some] for some in (leaves, wanted)]
        raise ValueError(f"F: must give a tree like x, got shapes {shapes[0]} in {spec} for {shapes[1]} in {wanted_spec}")
    return found


def _tensors(tree: Tree) -> tuple[list[Tensor], Placing]:
    """The tensors of a tree, and the function that puts others in their places. It does not hold on to them."""
    leaves, spec = flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[i] for i in places]
    rest = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def place(tensors: Sequence[Any], *instead: Any) -> Tree:
        filled = list(instead) * len(rest) if instead else list(rest)
        for i, t in zip(places, tensors, strict=True):
            filled[i] = t
        return unflatten(filled, spec)

    return tensors, place


__all__ = ["custom_fixed_point", "custom_root", "root_jvp", "root_vjp"]
