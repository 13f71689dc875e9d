"""GaLore (GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection, arXiv 2403.03507)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play
from torch import Tensor

from poise.optim import SGD, GaLore
from poise.optim.transforms.momentum import momentum

galore = partial(GaLore, backend="eager")

TYPICAL: dict[str, Any] = {"rank": 32, "update_proj_gap": 2, "on_refresh": "rotate"}
CASES: list[dict[str, Any]] = [
    {"rank": 4, "update_proj_gap": 3, "weight_decay": 0.3},
    {"rank": 0.5, "update_proj_gap": 2, "on_refresh": "rotate", "side": "long", "proj_scale": 1.0},
    {"rank": 4, "update_proj_gap": 4, "on_refresh": "reset", "side": "both", "adamw_lr": 1e-3, "betas": (0.8, 0.9)},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    rank: int | float = 128,
    update_proj_gap: int = 200,
    proj_scale: float = 0.25,
    side: str = "short",
    on_refresh: str = "keep",
    adamw_lr: float | None = None,
) -> list[Tensor]:
    """The release's steps in its order, with factors A and B of both sides, the identity where nothing is projected.

    Of kept moments the signs of singular vectors follow their predecessors'.
    """
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    b1, b2 = betas
    ends = []
    for index, start in enumerate(params):
        w = start.double().clone()
        matrix = w.ndim > 1 and min(len(w), w[0].numel()) > 1
        w = w.reshape(len(w), -1) if matrix else w
        m, v, t, calls = torch.zeros(()).double(), torch.zeros(()).double(), 0, 0
        A = B = None
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            g = gradient.double().reshape(w.shape)
            size = rate
            if matrix:
                rows, columns = g.shape
                left = {"short": rows < columns, "long": rows >= columns, "both": True}[side]
                right = side == "both" or not left
                whole = min(rows, columns) if side == "both" else rows if left else columns
                r = min(rank if isinstance(rank, int) else round(rank * whole), rows, columns)
                if calls % update_proj_gap == 0:
                    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
                    new_A = U[:, :r].T if left else torch.eye(rows).double()
                    new_B = Vh[:r] if right else torch.eye(columns).double()
                    if A is not None and B is not None:
                        if on_refresh == "keep":
                            new_A = torch.diag(torch.diag(new_A @ A.T).sign()) @ new_A
                            new_B = torch.diag(torch.diag(new_B @ B.T).sign()) @ new_B
                        elif on_refresh == "rotate":
                            TA, TB = new_A @ A.T, new_B @ B.T
                            m, v = TA @ m @ TB.T, TA**2 @ v @ (TB**2).T
                        else:
                            m, v, t = torch.zeros_like(m), torch.zeros_like(v), 0
                    A, B = new_A, new_B
                assert A is not None and B is not None
                g = A @ g @ B.T
            elif adamw_lr is not None:
                size = adamw_lr * rate / rates[0]
            calls, t = calls + 1, t + 1
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g**2
            u = math.sqrt(1 - b2**t) / (1 - b1**t) * m / (v.sqrt() + eps)
            if matrix:
                assert A is not None and B is not None
                u = proj_scale * A.T @ u @ B
            w = (w - size * u) * (1 - size * weight_decay)
        ends.append(w.reshape(start.shape))
    return ends


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> Tensor:
    left, right = draw([(shape[0], rank), (rank, shape[1])], 0, seed=seed)[0]
    return left @ right


def state_of(opt: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """State by the last part of its name."""
    return {key.rpartition(".")[2]: value for key, value in opt.state[p].items()}


@pytest.mark.parametrize("side, shapes", [("short", [(9, 6), (6, 9)]), ("long", [(6, 6)]), ("both", [(6, 6)])])
def test_at_full_rank_momentum_that_is_carried_over_is_plain_momentum(side: Any, shapes: list[tuple[int, ...]]) -> None:
    start, grads = draw(shapes, 12)
    ours, plain = leaves(start), leaves(start)
    inner = momentum(0.9)
    opt = galore(ours, lr=0.1, rank=6, proj_scale=1.0, update_proj_gap=3, on_refresh="rotate", side=side, inner=inner)
    found, wanted = play(opt, ours, grads), play(SGD(plain, lr=0.1, momentum=0.9, backend="eager"), plain, grads)
    assert distance(found, wanted) < 1e-13


def test_at_full_rank_it_is_not_adam() -> None:
    start, grads = draw([(9, 6)], 12)
    ours, plain = leaves(start), leaves(start)
    found = play(galore(ours, lr=0.01, rank=6, proj_scale=1.0, eps=1e-8), ours, grads)
    wanted = play(torch.optim.AdamW(plain, lr=0.01, weight_decay=0.0), plain, grads)
    assert distance(found, wanted) > 0.02


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_at_a_refresh_the_best_approximation_of_its_rank_passes(shape: tuple[int, int]) -> None:
    start, grads = draw([shape], 4)
    params = leaves(start)
    opt = galore(params, lr=1.0, rank=2, proj_scale=1.0, update_proj_gap=3, inner=momentum(0.0))
    before = play(opt, params, grads[:3])[0]
    moved = before - play(opt, params, grads[3:])[0]
    gradient = grads[3][0]
    assert gradient is not None
    U, S, Vh = torch.linalg.svd(gradient)
    assert distance([moved], [U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]]) < 1e-12


def test_between_refreshes_the_weights_move_in_r_directions_only() -> None:
    start, grads = draw([(12, 8)], 6)
    params = leaves(start)
    opt = galore(params, rank=3, update_proj_gap=6)
    end = play(opt, params, grads)[0]
    assert torch.linalg.matrix_rank(end - start[0], rtol=1e-9) == 3


def test_the_trajectory_does_not_hang_on_the_vectors_that_span_the_subspace() -> None:
    """Momentum that is rotated along: any orthogonal r x r matrix may turn the basis at any time."""
    start, grads = draw([(9, 6)], 9)
    ours, turned = leaves(start), leaves(start)
    make = partial(galore, lr=0.1, rank=3, update_proj_gap=3, on_refresh="rotate", inner=momentum(0.9))
    wanted = play(make(ours), ours, grads)
    opt = make(turned)
    for step, row in enumerate(grads):
        play(opt, turned, [row])
        if step % 3 < 2:
            Q = torch.linalg.qr(draw([(3, 3)], 0, seed=step)[0][0])[0]
            (p,) = turned
            for key, value in opt.state[p].items():
                if key == "basis":
                    value.copy_(Q @ value)
                elif key.endswith("momentum_buffer"):
                    value.copy_(value @ Q.T)
    assert distance(turned, wanted) < 1e-13


def test_carried_over_moments_stay_with_a_signal_that_kept_ones_lose() -> None:
    """A constant signal of rank 4 in noise: cosines of the momentum with the signal just after each of five refreshes."""
    signal = low_rank((40, 30), 4, seed=3)
    hows: tuple[Literal["keep", "rotate"], ...] = ("keep", "rotate")
    cosines: dict[str, list[float]] = {how: [] for how in hows}
    for how in hows:
        (p,) = params = leaves([torch.zeros_like(signal)])
        opt = galore(params, rank=4, update_proj_gap=20, on_refresh=how, lr=0.0)
        noise = draw([(40, 30)], 101, seed=5)[1]
        for step, (n,) in enumerate(noise):
            assert n is not None
            play(opt, params, [[signal + 0.1 * signal.norm() * n / n.norm()]])
            if step and step % 20 == 0:
                held = state_of(opt, p)
                seen = held["exp_avg"] @ held["basis"]
                cosines[how].append(float((seen * signal).sum() / seen.norm() / signal.norm()))
    assert len(cosines["rotate"]) == 5
    assert min(cosines["rotate"]) > 0.98
    assert min(cosines["keep"]) > 0.9  # with signs put right; left to chance, they lose it


@pytest.mark.parametrize("shape", [(512, 256), (256, 512)])
@pytest.mark.parametrize(
    "side, numbers",
    [("short", 2 * 128 * 512 + 128 * 256), ("long", 2 * 128 * 256 + 128 * 512), ("both", 2 * 128 * 128 + 128 * 768)],
)
def test_state_is_two_moments_of_the_projection_and_the_basis(shape: tuple[int, int], side: Any, numbers: int) -> None:
    params = leaves([torch.zeros(shape)])
    assert galore(params, rank=128, side=side).state_bytes() == 4 * numbers
    assert galore(params, rank=128, side=side, state="bf16").state_bytes() == 2 * numbers
    assert galore(params, rank=128, side=side, state="int8").state_bytes() < 0.26 * 4 * numbers
    assert galore(params, rank=128, side=side, state="int4").state_bytes() < 0.14 * 4 * numbers


@pytest.mark.parametrize("side", ["short", "long", "left", "right", "both"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_a_rank_above_a_sides_length_is_cut_to_it(side: Any, shape: tuple[int, int]) -> None:
    start, grads = draw([shape], 2)
    params = leaves(start)
    opt = galore(params, rank=128, side=side)
    assert all(not torch.equal(a, b) for a, b in zip(play(opt, params, grads), start, strict=True))
    assert 4 in state_of(opt, params[0])["exp_avg"].shape


def test_the_randomized_basis_spans_what_the_svd_does() -> None:
    start, _ = draw([(40, 30)], 0)
    gradient = low_rank((40, 30), 4) + 0.01 * start[0]
    bases = []
    for projection in ("svd", "randomized"):
        params = leaves([torch.zeros(40, 30).double()])
        opt = galore(params, rank=4, projection=projection)
        play(opt, params, [[gradient]])
        bases.append(state_of(opt, params[0])["basis"])
    assert float(torch.linalg.svdvals(bases[0] @ bases[1].T).min()) > 1 - 1e-6


def test_each_expert_and_what_is_stored_inputs_first_is_projected_as_a_matrix_of_its_own() -> None:
    class Experts(torch.nn.Module):
        def __init__(self, stack: Tensor) -> None:
            super().__init__()
            self.experts = torch.nn.Module()
            self.experts.w1 = torch.nn.Parameter(stack.clone())

    start, grads = draw([(3, 8, 5)], 5)
    model = Experts(start[0])
    opt = galore(model, rank=2, update_proj_gap=2, on_refresh="rotate")
    assert opt._roster.described[0][0].role == "experts"
    (found,) = play(opt, list(model.parameters()), grads)
    for i in range(3):
        alone = leaves([start[0][i]])
        rows: Grads = [[g[i] for g in row if g is not None] for row in grads]
        wanted = play(galore(alone, rank=2, update_proj_gap=2, on_refresh="rotate"), alone, rows)
        assert distance([found[i]], wanted) < 1e-12


def test_a_transposed_convolution_is_projected_as_outputs_by_inputs_and_kernel() -> None:
    layers = torch.nn.Conv1d(3, 6, 1), torch.nn.ConvTranspose1d(6, 4, 3, bias=False), torch.nn.Linear(4, 2)
    (p,) = layers[1].parameters()
    start, grads = draw([(6, 4, 3)], 5, dtype=torch.float32)
    p.data.copy_(start[0])
    found = play(galore(torch.nn.Sequential(*layers), rank=2, update_proj_gap=2), [p], grads)[0]
    plain = leaves([outputs_first(start[0])])
    rows: Grads = [[outputs_first(g) for g in row if g is not None] for row in grads]
    assert distance([outputs_first(found)], play(galore(plain, rank=2, update_proj_gap=2), plain, rows)) < 1e-6


def outputs_first(t: Tensor) -> Tensor:
    return t.transpose(0, 1).reshape(4, 18)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"on_refresh": "drop"}, "on_refresh='drop'"),
        ({"side": "std"}, "side='std'"),
        ({"projection": "qr"}, "projection='qr'"),
        ({"proj_scale": -1.0}, "proj_scale=-1.0"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        galore(leaves([torch.zeros(4, 4)]), **options)
