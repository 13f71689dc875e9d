"""Shampoo (Preconditioned Stochastic Tensor Optimization, arXiv 1802.09568)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.optim import AdamW, Shampoo
from poise.optim.transforms.grafting import Graft

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
shampoo = partial(Shampoo, backend="eager")
plain = partial(shampoo, betas=(0.0, 1.0), damping="add", eps=1e-30)

# A direction that no gradient has shown yet has the root of eps. With eps = 1e-12 and roots that are not renewed in each step,
# a new gradient's part there is nearly all of the update, times what rounding has made of zero.
TYPICAL: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-3, "grafting": "adam", "precondition_frequency": 2}
CASES: list[dict[str, Any]] = [
    {},
    {
        "betas": (0.8, 0.95),
        "eps": 1e-5,
        "grafting": "adam",
        "precondition_frequency": 3,
        "max_preconditioner_dim": 24,
        "weight_decay": 0.1,
    },
    {
        "betas": (0.0, 0.9),
        "grafting": "rmsprop",
        "grafting_beta2": 0.8,
        "start_preconditioning_step": 3,
        "precondition_frequency": 2,
        "max_preconditioner_dim": 50,
        "exponent": 0.5,
        "damping": "add",
        "eps": 1e-3,
        "correct_bias": False,
    },
    {"merge_dims": True, "max_preconditioner_dim": 300, "grafting": "sgd", "betas": (0.9, 0.99), "eps": 1e-5},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 1.0),
    eps: float = 1e-12,
    weight_decay: float = 0.0,
    precondition_frequency: int = 1,
    start_preconditioning_step: int | None = None,
    max_preconditioner_dim: int = 1024,
    grafting: str = "none",
    grafting_beta2: float | None = None,
    grafting_eps: float = 1e-8,
    exponent: float | None = None,
    damping: str = "floor",
    correct_bias: bool = True,
    merge_dims: bool = False,
) -> list[Tensor]:
    """One block after another, each a problem of its own."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    (b1, b2), b, f = betas, max_preconditioner_dim, precondition_frequency
    begin = f if start_preconditioning_step is None else start_preconditioning_step
    gb2 = b2 if grafting_beta2 is None else grafting_beta2

    def root(A: Tensor, e: float) -> Tensor:
        values, Q = torch.linalg.eigh(A)
        if damping == "add":
            values = values.clamp(min=0) + eps
        elif values.min() < eps:
            values = values + (eps - values.min())
        return Q @ torch.diag(values**-e) @ Q.T

    def one_block(w: Tensor, gs: list[Tensor | None]) -> Tensor:
        L, R = torch.zeros(len(w), len(w)).double(), torch.zeros(w.shape[1], w.shape[1]).double()
        m, v, t = torch.zeros_like(w), torch.zeros_like(w), 0
        iL, iR = torch.eye(len(w)).double(), torch.eye(w.shape[1]).double()
        sides = [n > 1 for n in w.shape] if max(w.shape) > 1 else [True, False]
        e = 1 / 2 if sum(sides) == 1 else exponent or 1 / 4
        for rate, g in zip(rates, gs, strict=True):
            if g is None:
                continue
            t += 1
            L = b2 * L + (1 - b2 if b2 < 1 else 1) * g @ g.T
            R = b2 * R + (1 - b2 if b2 < 1 else 1) * g.T @ g
            v = gb2 * v + (1 - gb2 if gb2 < 1 else 1) * g**2
            m = b1 * m + (1 - b1) * g
            divisor = 1 - b2**t if b2 < 1 and correct_bias else 1.0
            if t == begin or (t > begin and t % f == 0):
                iL = root(L / divisor, e) if sides[0] else iL
                iR = root(R / divisor, e) if sides[1] else iR
            M = m / (1 - b1**t) if correct_bias else m
            other = M
            if grafting == "adam":
                other = M / ((v / (1 - gb2**t)).sqrt() + grafting_eps) if gb2 < 1 else M / (v.sqrt() + grafting_eps)
            elif grafting == "rmsprop":
                other = M / (v.sqrt() + grafting_eps)
            u = iL @ M @ iR
            if t < begin:
                u = other
            elif grafting != "none":
                u = u * other.norm() / (u.norm() + 1e-16)
            w = w - rate * (u + weight_decay * w)
        return w

    ends = []
    for index, start in enumerate(params):
        w = start.double().clone()
        shape = (w.numel(), 1) if w.ndim < 2 else (len(w), w[0].numel())
        if merge_dims and math.prod(shape) <= b:
            shape = (math.prod(shape), 1)
        w, gs = w.reshape(shape), [None if row[index] is None else row[index].double().reshape(shape) for row in grads]  # pyright: ignore[reportOptionalMemberAccess]
        for i in range(0, shape[0], b):
            for j in range(0, shape[1], b):
                at = (slice(i, i + b), slice(j, j + b))
                w[at] = one_block(w[at].clone(), [None if g is None else g[at] for g in gs])
        ends.append(w.reshape(start.shape))
    return ends


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw([(size, size)], 0, seed=seed)[0][0])[0]


def test_the_first_plain_step_is_the_polar_factor_of_the_gradient() -> None:
    start, grads = draw([(20, 20)], 1)
    params = leaves(start)
    moved = start[0] - play(plain(params, lr=1.0), params, grads)[0]
    U, _, V = torch.linalg.svd(grads[0][0])
    assert distance([moved], [U @ V]) < 1e-10


def test_plain_steps_are_the_formula_of_the_first_paper() -> None:
    """Sums from eps I on, fourth roots, no momentum, whole matrices; a vector with its square root."""
    start, grads = draw([(6, 9), (5,)], 4)
    params = leaves(start)
    found = play(shampoo(params, lr=0.1, betas=(0.0, 1.0), damping="add", eps=0.3), params, grads)

    def power(A: Tensor, e: float) -> Tensor:
        values, Q = torch.linalg.eigh(A)
        return Q @ torch.diag(values**e) @ Q.T

    w, v = start
    L, R, H = (0.3 * torch.eye(n, dtype=torch.float64) for n in (6, 9, 5))
    for G, g in grads:
        assert G is not None and g is not None
        L, R, H = L + G @ G.T, R + G.T @ G, H + torch.outer(g, g)
        w = w - 0.1 * power(L, -0.25) @ G @ power(R, -0.25)
        v = v - 0.1 * power(H, -0.5) @ g
    assert distance(found, [w, v]) < 1e-12


@pytest.mark.parametrize("b2", [0.99, 1.0])
@pytest.mark.parametrize("grafting", ["none", "adam"])
def test_fourteen_float32_steps_follow_the_practical_rule(b2: float, grafting: Graft) -> None:
    """The release itself, run on these gradients without merging, ends within 3e-7 of this."""
    hyper: dict[str, Any] = {"betas": (0.9, b2), "grafting": grafting, "precondition_frequency": 3, "weight_decay": 0.1}
    start, grads = draw([(8, 6), (6, 6)], 14, dtype=torch.float32)
    params = leaves(start)
    found = play(shampoo(params, lr=0.01, **hyper), params, grads)
    assert distance(found, reference(start, grads, lr=0.01, **hyper)) < 1e-6


@pytest.mark.parametrize("grafting", ["sgd", "adam", "adagrad"])
def test_every_block_moves_as_far_as_the_rule_that_is_grafted(grafting: Graft) -> None:
    """The grafted rule without a preconditioner is Shampoo that has not started yet."""
    start, grads = draw([(10, 7)], 5)
    hyper: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.99), "grafting": grafting, "max_preconditioner_dim": 4}
    ours, theirs = leaves(start), leaves(start)
    opt, other = shampoo(ours, **hyper), shampoo(theirs, start_preconditioning_step=100, **hyper)
    for row in grads:
        before = ours[0].detach().clone(), theirs[0].detach().clone()
        moved = [after - b for after, b in zip((*play(opt, ours, [row]), *play(other, theirs, [row])), before, strict=True)]
        for i in range(0, 10, 4):
            for j in range(0, 7, 4):
                at = (slice(i, i + 4), slice(j, j + 4))
                assert float(moved[0][at].norm()) == pytest.approx(float(moved[1][at].norm()), rel=1e-9)
        assert distance(moved[:1], moved[1:]) > 1e-3


def test_before_its_start_it_is_adamw() -> None:
    start, grads = draw([(10, 7), (5,)], 6)
    ours, theirs = leaves(start), leaves(start)
    opt = shampoo(ours, 0.01, (0.9, 0.99), weight_decay=0.1, grafting="adam", start_preconditioning_step=6)
    twin = AdamW(theirs, 0.01, (0.9, 0.99), weight_decay=0.1, backend="eager")
    assert distance(play(opt, ours, grads[:5]), play(twin, theirs, grads[:5])) < 1e-14
    assert distance(play(opt, ours, grads[5:]), play(twin, theirs, grads[5:])) > 1e-3


def test_a_rotated_problem_is_solved_rotated() -> None:
    start, grads = draw([(12, 12)], 20)
    U, V = rotation(12, 1), rotation(12, 2)

    def solved(left: Tensor, right: Tensor) -> Tensor:
        params = leaves([left @ start[0] @ right.T])
        turned: Grads = [[left @ g @ right.T for g in row if g is not None] for row in grads]
        opt = shampoo(params, betas=(0.9, 0.99), grafting="sgd", precondition_frequency=3)
        return left.T @ play(opt, params, turned)[0] @ right

    one = torch.eye(12, dtype=torch.float64)
    wanted = solved(one, one)
    assert distance([solved(U, one), solved(one, V), solved(U, V)], [wanted] * 3) < 1e-11


def test_blocks_and_matrices_are_problems_of_their_own() -> None:
    """Four corners of one matrix, a convolution's 2-D view, and each of stacked experts."""
    start, grads = draw([(6, 8), (6, 2, 2, 2), (3, 6, 8)], 5)
    hyper: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.99), "precondition_frequency": 2, "max_preconditioner_dim": 4}
    params = leaves(start)
    named = [("corners", params[0]), ("conv.weight", params[1]), ("experts.up", params[2])]
    found = play(shampoo(named, **hyper), params, grads)

    def alone(pick: Any) -> Tensor:
        (w,), gs = leaves([pick(start)]), [[pick(row)] for row in grads]
        return play(shampoo([w], **hyper), [w], gs)[0]

    assert distance([found[0][4:, :4]], [alone(lambda ts: ts[0][4:, :4])]) < 1e-12
    assert distance([found[1].reshape(6, 8)], [alone(lambda ts: ts[1].reshape(6, 8))]) < 1e-12
    assert distance([found[2][1]], [alone(lambda ts: ts[2][1])]) < 1e-12


def test_merged_a_small_matrix_is_another_method() -> None:
    """As one vector of 36 it has a full matrix of moments and a square root: far away from two sides and fourth roots."""
    start, grads = draw([(6, 6)], 8)
    ends = []
    for merge in (False, True):
        params = leaves(start)
        ends.append(play(shampoo(params, merge_dims=merge, betas=(0.9, 0.99)), params, grads)[0] - start[0])
    vector = leaves([start[0].flatten()])
    flat: Grads = [[g.flatten() for g in row if g is not None] for row in grads]
    assert distance([ends[1]], [(play(shampoo(vector, betas=(0.9, 0.99)), vector, flat)[0]).reshape(6, 6) - start[0]]) < 1e-12
    assert float((ends[0] - ends[1]).norm() / ends[0].norm()) > 0.3


def test_newtons_roots_are_the_roots() -> None:
    start, grads = draw([(12, 12), (5,)], 10)
    ends = []
    for root in ("eigh", "newton"):
        params = leaves(start)
        ends.append(play(shampoo(params, root=root, betas=(0.9, 0.99), eps=1e-4, damping="add"), params, grads))
    assert distance(*ends) < 1e-6
    assert distance(ends[0], start) > 0.01


def test_without_grafting_sums_of_moments_shrink_the_steps_as_the_root_of_their_number() -> None:
    params = leaves([torch.zeros(6, 6)])
    gradient = draw([(6, 6)], 0, dtype=torch.float32)[0][0]
    opt = plain(params, lr=1.0)
    lengths = []
    for _ in range(16):
        before = params[0].detach().clone()
        lengths.append(float((play(opt, params, [[gradient]])[0] - before).norm()))
    assert [lengths[0] / lengths[n - 1] for n in (4, 9, 16)] == pytest.approx([2.0, 3.0, 4.0], rel=1e-3)


@pytest.mark.parametrize("shape, block", [((64, 64), 1024), ((64, 64), 16), ((128, 32), 32)])
def test_state_takes_24_bytes_an_element_of_square_blocks_whatever_their_size(shape: tuple[int, int], block: int) -> None:
    opt = shampoo(leaves([torch.zeros(shape)]), grafting="adam", max_preconditioner_dim=block)
    assert opt.state_bytes() == 24 * math.prod(shape)


def test_a_zero_gradient_moves_nothing_and_gives_no_nan() -> None:
    for grafting in ("none", "adam"):
        params = leaves([torch.ones(6, 4), torch.ones(3)])
        zeros: Grads = [[torch.zeros(6, 4), torch.zeros(3)]] * 5
        assert same(play(shampoo(params, grafting=grafting), params, zeros), [torch.ones(6, 4), torch.ones(3)])


def test_a_gradient_that_is_not_finite_spoils_its_own_matrix_only_and_keeps_its_roots() -> None:
    start, grads = draw([(6, 6), (6, 6)], 4)
    params = leaves(start)
    opt = shampoo(params)
    play(opt, params, grads[:2])
    roots = opt.state[params[0]]["L_root"].clone()
    found = play(opt, params, [[torch.full((6, 6), torch.nan, dtype=torch.float64), grads[2][1]]])
    assert found[0].isnan().all() and found[1].isfinite().all()
    assert torch.equal(opt.state[params[0]]["L_root"], roots)


def test_embeddings_and_heads_are_matrices_and_vectors_have_square_roots() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(30, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 30))
    rules = {line.name: line.rule for line in shampoo(model).plan()}
    assert rules == {
        "0.weight": "shampoo",
        "1.weight": "vectors",
        "1.bias": "vectors",
        "2.weight": "shampoo",
        "2.bias": "vectors",
    }


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("betas", (1.0, 0.9)),
        ("betas", (0.9, 0.0)),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("precondition_frequency", 0),
        ("start_preconditioning_step", 0),
        ("max_preconditioner_dim", 0),
        ("grafting", "lion"),
        ("grafting_beta2", 1.1),
        ("grafting_eps", -1.0),
        ("exponent", 0.0),
        ("damping", "much"),
        ("root", "svd"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        shampoo(leaves(draw([(4, 4)], 0)[0]), **hyper)


def test_newton_needs_the_inverse_of_an_integer() -> None:
    with pytest.raises(ValueError, match=r"exponent=0\.3"):
        shampoo(leaves(draw([(4, 4)], 0)[0]), root="newton", exponent=0.3)
