"""4-bit Shampoo (4-bit Shampoo for Memory-Efficient Network Training, arXiv 2405.18144)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.optim import SGD, AdamW, Shampoo4Bit
from poise.optim.rules.lion import lion

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
shampoo = partial(Shampoo4Bit, backend="eager")

# Directions that few gradients have shown have no order of their own: in float32 rounding chooses among them, and the one step
# of orthogonal iteration that each refresh takes goes on from there.
TYPICAL: dict[str, Any] = {"statistics_every": 2, "roots_every": 2, "shampoo_eps": 1e-2}
CASES: list[dict[str, Any]] = [
    {"statistics_every": 2, "roots_every": 3, "weight_decay": 0.1},
    {"statistics_every": 1, "roots_every": 2, "bits": 32, "max_order": 24, "betas": (0.8, 0.9)},
    {
        "statistics_every": 3,
        "roots_every": 2,
        "max_order": 70,
        "base": "sgd",
        "momentum": 0.8,
        "weight_decay": 0.2,
        "shampoo_beta": 0.7,
    },
]

GRID = [-1 + 2 * i / 15 for i in range(16)]
CODES = torch.tensor([0.0 if i == 7 else math.copysign(g * g, g) for i, g in enumerate(GRID)], dtype=torch.float64)


def rounded(A: Tensor) -> Tensor:
    """Rows in blocks of 64, each entry the nearest of the 16 values."""
    found = A.clone()
    for row in found:
        for first in range(0, len(row), 64):
            piece = row[first : first + 64]
            scale = piece.abs().max()
            if scale > 0:
                piece.copy_(scale * CODES[(piece[:, None] / scale - CODES).abs().argmin(1)])
    return found


def bjorck(V: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        V = 1.5 * V - 0.5 * V @ V.T @ V
    return V


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    base: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    shampoo_beta: float = 0.95,
    shampoo_eps: float = 1e-6,
    statistics_every: int = 100,
    roots_every: int = 500,
    max_order: int = 1200,
    rectifications: tuple[int, int] = (1, 4),
    bits: int = 4,
) -> list[Tensor]:
    """Side by side and block by block, matrices written out; eigenvectors stand in columns and are rounded as rows."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)

    class Side:
        def __init__(self, order: int) -> None:
            self.V, self.s = torch.eye(order).double(), torch.full((order,), 1e-6).double()
            self.root = torch.eye(order).double()
            self.whole = bits == 32 or order**2 < 4096

        def kept(self, A: Tensor) -> Tensor:
            return A if self.whole else rounded(A)

        def see(self, gram: Tensor, t: int) -> None:
            if t % statistics_every == 0:
                V = bjorck(self.V, 0 if self.whole else rectifications[0])
                A = shampoo_beta * V @ torch.diag(self.s) @ V.T + (1 - shampoo_beta) * gram
                V = torch.linalg.qr(A @ V)[0]
                self.V, self.s = self.kept(V.T).T, torch.diag(V.T @ A @ V)
            if t % roots_every == 0:
                V = bjorck(self.V, 0 if self.whole else rectifications[1])
                root = V @ torch.diag((self.s + shampoo_eps * self.s.max()) ** -0.25) @ V.T
                diagonal = torch.diag(torch.diag(root))
                self.root = self.kept(root - diagonal) + diagonal

    ends = []
    for index, start in enumerate(params):
        w = start.double().clone()
        shape = w.shape
        w = w.reshape(len(w), -1) if w.ndim > 1 else w
        b = max_order
        places = [(i, j) for i in range(0, w.shape[0], b) for j in range(0, w.shape[1], b)] if w.ndim > 1 else []
        sides = {(i, j): [Side(n) for n in w[i : i + b, j : j + b].shape] for i, j in places}
        m, v, t = torch.zeros_like(w), torch.zeros_like(w), 0
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            t += 1
            g = gradient.double().reshape(w.shape)
            u = g.clone()
            for (i, j), (left, right) in sides.items():
                block = g[i : i + b, j : j + b]
                left.see(block @ block.T, t)
                right.see(block.T @ block, t)
                u[i : i + b, j : j + b] = left.root @ block @ right.root
            if sides:
                u = u * g.norm() / (u.norm() + 1e-12)
            if base == "sgd":
                m = momentum * m + u + weight_decay * w
                w = w - rate * m
            else:
                m = betas[0] * m + (1 - betas[0]) * u
                v = betas[1] * v + (1 - betas[1]) * u**2
                step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
                w = w - rate * (step + weight_decay * w)
        ends.append(w.reshape(shape))
    return ends


def updates(opt: torch.optim.Optimizer, params: Sequence[torch.nn.Parameter], grads: Grads) -> list[Tensor]:
    """What plain descent at lr 1 subtracts from the first parameter, step by step."""
    found = []
    for row in grads:
        before = params[0].detach().clone()
        found.append(before - play(opt, params, [row])[0])
    return found


@pytest.mark.parametrize("bits", [4, 32])
def test_the_update_is_as_long_as_the_gradient_and_turned(bits: Any) -> None:
    start, grads = draw([(70, 80)], 6)
    params = leaves(start)
    opt = shampoo(params, lr=1.0, base="sgd", momentum=0.0, bits=bits, statistics_every=1, roots_every=2)
    for t, (u, row) in enumerate(zip(updates(opt, params, grads), grads, strict=True), 1):
        assert row[0] is not None
        assert float(u.norm()) == pytest.approx(float(row[0].norm()), rel=1e-9)
        assert (distance([u], [row[0]]) < 1e-12) == (t < 2)


def test_repeated_gradients_are_whitened_in_float32_storage() -> None:
    """Statistics of one gradient over and over: their eigenvectors are found, and u is along the polar factor."""
    U, V = (torch.linalg.qr(draw([(12, 12)], 0, seed=s)[0][0])[0] for s in (1, 2))
    gradient = U @ torch.diag(torch.linspace(1, 0.3, 12, dtype=torch.float64)) @ V.T
    params = leaves([torch.zeros(12, 12).double()])
    opt = shampoo(params, lr=1.0, base="sgd", momentum=0.0, shampoo_beta=0.0, statistics_every=1, roots_every=100)
    u = updates(opt, params, [[gradient]] * 100)[-1]
    assert distance([u / u.norm()], [U @ V.T / 12**0.5]) < 1e-4


def test_four_bits_stay_near_thirty_two() -> None:
    start, noise = draw([(64, 96)], 40)
    pull = 0.5 * draw([(64, 96)], 0, seed=5)[0][0]
    grads: Grads = [[pull + g for g in row if g is not None] for row in noise]
    ends = []
    for bits in (4, 32):
        params = leaves(start)
        opt = shampoo(params, lr=0.01, base="sgd", bits=bits, statistics_every=5, roots_every=10)
        ends.append(play(opt, params, grads)[0] - start[0])
    assert float((ends[0] - ends[1]).norm() / ends[1].norm()) < 0.05


@pytest.mark.parametrize("base", ["adamw", "sgd"])
def test_before_the_first_root_it_is_its_base_rule(base: Any) -> None:
    start, grads = draw([(12, 8), (5,)], 4)
    ours, theirs = leaves(start), leaves(start)
    opt = shampoo(ours, 0.01, base, weight_decay=0.1, statistics_every=2, roots_every=5)
    adamw, sgd = (
        AdamW(theirs, 0.01, weight_decay=0.1, backend="eager"),
        SGD(theirs, 0.01, 0.9, weight_decay=0.1, backend="eager"),
    )
    assert distance(play(opt, ours, grads), play(adamw if base == "adamw" else sgd, theirs, grads)) < 1e-9


def test_any_rule_may_be_the_base() -> None:
    start, grads = draw([(12, 8)], 4)
    params = leaves(start)
    opt = shampoo(params, lr=1.0, base=lion(), statistics_every=1, roots_every=2)
    for u in updates(opt, params, grads):
        assert torch.equal(u.abs().round(decimals=9), torch.ones(12, 8).double())


def test_vectors_and_single_rows_go_to_the_base_rule() -> None:
    start, grads = draw([(7,), (1, 6), ()], 5)
    ours, theirs = leaves(start), leaves(start)
    found = play(shampoo(ours, 0.01, statistics_every=1, roots_every=1), ours, grads)
    assert same(found, play(AdamW(theirs, 0.01, weight_decay=0.0, backend="eager"), theirs, grads))


def test_each_of_stacked_experts_is_a_matrix_of_its_own() -> None:
    start, grads = draw([(3, 6, 8)], 6)
    params, single = leaves(start), leaves([start[0][1]])
    hyper: dict[str, Any] = {"lr": 0.1, "statistics_every": 1, "roots_every": 2, "max_order": 5}
    found = play(shampoo([("experts.up", params[0])], **hyper), params, grads)
    alone = play(shampoo(single, **hyper), single, [[g[1] for g in row if g is not None] for row in grads])
    assert distance([found[0][1]], alone) < 1e-12


def test_preconditioners_of_a_square_matrix_take_two_and_a_quarter_bytes_an_element() -> None:
    """Two of eigenvectors and two of roots, each half a byte and a scale for 64; eigenvalues and diagonals are vectors."""
    opt = shampoo(leaves([torch.zeros(256, 256)]), base=lion())
    assert opt.state_bytes() == (4 + 4 * (0.5 + 4 / 64)) * 256 * 256 + 4 * 4 * 256
    opt = shampoo(leaves([torch.zeros(32, 32)]), base=lion())
    assert opt.state_bytes() == (4 + 4 * 4) * 32 * 32 + 4 * 4 * 32


def test_eigenvectors_and_roots_are_packed_and_the_rest_is_float32() -> None:
    opt = shampoo(leaves([torch.zeros(64, 130)]))
    (p,) = opt.param_groups[0]["params"]
    held = opt.state[p]
    assert {key: (tuple(held[key].shape), held[key].dtype) for key in held if key.startswith("R_")} == {
        "R_values": ((1, 130, 1), torch.float32),
        "R_root_diagonal": ((1, 130, 1), torch.float32),
        "R_vectors": ((1, 130, 96), torch.uint8),
        "R_vectors_scale": ((1, 130, 3), torch.float32),
        "R_root": ((1, 130, 96), torch.uint8),
        "R_root_scale": ((1, 130, 3), torch.float32),
    }


def test_a_gradient_that_is_not_finite_spoils_its_own_matrix_only() -> None:
    start, grads = draw([(70, 70), (70, 70)], 3)
    grads[0][0] = torch.full((70, 70), torch.nan, dtype=torch.float64)
    params = leaves(start)
    found = play(shampoo(params, statistics_every=1, roots_every=1), params, grads)
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_a_zero_gradient_moves_nothing_and_gives_no_nan() -> None:
    params = leaves([torch.ones(70, 70), torch.ones(4, 3)])
    zeros: Grads = [[torch.zeros(70, 70), torch.zeros(4, 3)]] * 4
    found = play(shampoo(params, statistics_every=1, roots_every=2), params, zeros)
    assert same(found, [torch.ones(70, 70), torch.ones(4, 3)])


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("base", "lamb"),
        ("betas", (1.0, 0.9)),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("shampoo_beta", 1.0),
        ("shampoo_eps", 0.0),
        ("statistics_every", 0),
        ("roots_every", 0),
        ("max_order", 0),
        ("rectifications", (1, -1)),
        ("bits", 8),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        shampoo(leaves(draw([(4, 4)], 0)[0]), **hyper)
