"""SOAP (SOAP: Improving and Stabilizing Shampoo using Adam, arXiv 2409.11321)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.optim import SOAP, AdamW
from poise.optim.rules.lion import lion
from poise.optim.transforms.adaptive import adam
from poise.optim.transforms.rotation import Form, Sides

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
soap = partial(SOAP, backend="eager")
full = partial(SOAP, backend="eager", form="full")

# Whole factors of full rank or blocks shorter than the other side: the null space of a factor of lower rank has no basis of
# its own, and two programs that are equal up to rounding may take different ones there.
CASES: list[dict[str, Any]] = [
    {},
    {"precondition_frequency": 2, "shampoo_beta": 0.8, "block_size": 5},
    {"form": "full", "block_size": 8, "precondition_frequency": 1},
    {"form": "full", "block_size": 7, "precondition_frequency": 2, "normalize_grads": True, "betas": (0.9, 0.99), "eps": 1e-4},
    {"form": "full", "sides": "left", "block_size": 8, "precondition_frequency": 3, "correct_bias": False},
    {"sides": "right", "block_size": 4, "precondition_frequency": 1, "adamw_lr": 1e-3, "adamw_betas": (0.8, 0.9)},
    {"form": "full", "max_precond_dim": 1, "weight_decay": 0.3, "adamw_weight_decay": 0.1, "decay": "coupled"},
]


def published_blocks(rows: int, columns: int, form: str, limit: int, block_size: int | None, sides: str) -> tuple[int, int]:
    """Block sizes of L and R: bfloat16 factors and a factored v beside float32 m, the larger block halved down to 12 bytes."""
    left = min(rows, block_size or rows) if rows <= limit and sides != "right" else 0
    right = min(columns, block_size or columns) if columns <= limit and sides != "left" else 0
    while form == "compact" and 4 + 2 * 2 * (left * rows + right * columns) / (rows * columns) > 12:
        if left > right or (left == right and rows >= columns):
            left = -(-left // 2)
        else:
            right = -(-right // 2)
    return left, right


def cut(size: int, block: int) -> list[slice]:
    """The blocks of one side."""
    return [slice(i, min(i + block, size)) for i in range(0, size, block)] if block else []


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10000,
    form: str = "compact",
    block_size: int | None = None,
    sides: str = "both",
    normalize_grads: bool = False,
    correct_bias: bool = True,
    adamw_lr: float | None = None,
    adamw_betas: tuple[float, float] | None = None,
    adamw_weight_decay: float | None = None,
    decay: str = "after",
) -> list[Tensor]:
    """The release's steps in its order, matrix by matrix and block by block; vectors by AdamW.

    As there, m returns to the original space after every step and L, R are averages. "compact" rounds L, R and Q to bfloat16
    wherever they are kept; there m stays where it is until a refresh, and L and R are sums.
    """
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    compact = form == "compact"

    def kept(matrix: Tensor) -> Tensor:
        return matrix.bfloat16().double() if compact else matrix

    def shrunk(w: Tensor, step: Tensor, rate: float, wd: float) -> Tensor:
        if decay == "after":
            return (1 - rate * wd) * (w - step)
        return (1 - rate * wd) * w - step

    ends = []
    for index, start in enumerate(params):
        w = start.double().clone()
        if w.ndim < 2 or min(len(w), w[0].numel()) < 2:
            wd = weight_decay if adamw_weight_decay is None else adamw_weight_decay
            b1, b2 = adamw_betas or betas
            m, v, t = torch.zeros_like(w), torch.zeros_like(w), 0
            for rate, row in zip(rates, grads, strict=True):
                gradient = row[index]
                if gradient is None:
                    continue
                t += 1
                rate = rate if adamw_lr is None else adamw_lr * rate / rates[0]
                m = b1 * m + (1 - b1) * gradient.double()
                v = b2 * v + (1 - b2) * gradient.double() ** 2
                step = rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
                w = shrunk(w, step, rate, wd)
            ends.append(w)
            continue

        w = w.reshape(len(w), -1)
        rows, columns = w.shape
        b1, b2 = betas
        b = b2 if shampoo_beta is None else shampoo_beta
        left, right = published_blocks(rows, columns, form, max_precond_dim, block_size, sides)
        blocks = cut(rows, left), cut(columns, right)
        factors = [torch.zeros(rows, rows).double(), torch.zeros(columns, columns).double()]
        bases = [torch.eye(rows).double(), torch.eye(columns).double()]
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        row_mean, column_mean = torch.zeros(rows).double(), torch.zeros(columns).double()
        t = -1
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            g = gradient.double().reshape(w.shape)
            t += 1
            if t > 0:
                turned = bases[0].T @ g @ bases[1]
                m = b1 * m + (1 - b1) * turned
                v = b2 * v + (1 - b2) * turned**2
                row_mean = b2 * row_mean + (1 - b2) * (turned**2).mean(1)
                column_mean = b2 * column_mean + (1 - b2) * (turned**2).mean(0)
                second = v
                if compact:
                    most = sum(((1 - b1) * b1**s) ** 2 / ((1 - b2) * b2**s) for s in range(t))
                    second = torch.maximum(torch.outer(row_mean, column_mean) / row_mean.mean(), m**2 / most)
                u = bases[0] @ (m / (second.sqrt() + eps)) @ bases[1].T
                if normalize_grads:
                    u = u / (1e-30 + u.pow(2).mean().sqrt())
                if correct_bias:
                    u = u * math.sqrt(1 - b2**t) / (1 - b1**t)
                w = shrunk(w, rate * u, rate, weight_decay)
            if not compact:
                m = bases[0] @ m @ bases[1].T
            old = [basis.clone() for basis in bases]
            for side, (matrix, parts) in enumerate(zip((g, g.T), blocks, strict=True)):
                for part in parts:
                    block = factors[side][part, part] * (b if t > 0 else 0)
                    block = kept(block + (1 if compact else 1 - b) * matrix[part] @ matrix[part].T)
                    factors[side][part, part] = block
                    if t == 0:
                        bases[side][part, part] = kept(torch.linalg.eigh(block)[1].flip(1))
                    elif t % precondition_frequency == 0:
                        basis = bases[side][part, part].clone()
                        order = torch.diag(basis.T @ block @ basis).sort(descending=True, stable=True)[1]
                        bases[side][part, part] = kept(torch.linalg.qr(block @ basis[:, order])[0])
                        moved = part.start + order
                        if side == 0:
                            v[part], row_mean[part] = v[moved].clone(), row_mean[moved].clone()
                        else:
                            v[:, part], column_mean[part] = v[:, moved].clone(), column_mean[moved].clone()
            if not compact:
                m = bases[0].T @ m @ bases[1]
            elif t > 0 and t % precondition_frequency == 0:
                m = bases[0].T @ (old[0] @ m @ old[1].T) @ bases[1]
        ends.append(w.reshape(start.shape))
    return ends


def rotation(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw([(size, size)], 0, seed=seed)[0][0])[0]


def state_of(opt: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    """State by the last part of its name."""
    return {key.rpartition(".")[2]: value for key, value in opt.state[p].items()}


RELEASED = {
    "square": ((16, 16), {}),
    "outputs only": ((8, 12), {"max_precond_dim": 8}),
    "inputs only": ((12, 8), {"max_precond_dim": 8}),
    "normalized": ((16, 16), {"normalize_grads": True}),
    "another beta": ((16, 16), {"shampoo_beta": 0.9, "precondition_frequency": 3, "correct_bias": False}),
    "in blocks": ((12, 8), {"block_size": 6, "precondition_frequency": 5}),
}


@pytest.mark.parametrize("case", RELEASED)
def test_thirty_five_float32_steps_of_the_published_form_follow_the_release(case: str) -> None:
    """The release itself, run on these gradients, ends within 2e-6 of both."""
    shape, hyper = RELEASED[case]
    start, grads = draw([shape], 35, dtype=torch.float32)
    params = leaves(start)
    found = play(full(params, **hyper), params, grads)
    assert distance(found, reference(start, grads, lr=3e-3, form="full", **hyper)) < 3e-6


@pytest.mark.parametrize("hyper", [{}, {"precondition_frequency": 3, "betas": (0.7, 0.9)}], ids=["defaults", "often"])
@pytest.mark.parametrize("form", ["compact", "full"])
def test_thirty_steps_equal_the_formula(form: Form, hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 24), (8, 4, 3, 3), (24,), ()], 30, missing=[(0, 1), (4, 0), (11, 0), (12, 1)])
    if form == "full":  # of low rank whole; see CASES
        start, grads = [start[0], start[2]], [[row[0], row[2]] for row in grads]
    params = leaves(start)
    found = play(soap(params, lr=0.01, form=form, **hyper), params, grads)
    assert distance(found, reference(start, grads, lr=0.01, form=form, **hyper)) < 1e-10


def test_the_first_call_moves_and_decays_no_matrix() -> None:
    start, grads = draw([(12, 12), (12,)], 1)
    params = leaves(start)
    opt = soap(params, weight_decay=0.5)
    found = play(opt, params, grads)
    assert torch.equal(found[0], start[0])
    assert not torch.equal(found[1], start[1])
    held = state_of(opt, params[0])
    assert not held["exp_avg"].any() and not held["exp_avg_sq_row"].any()
    assert all(held[name].any() for name in ("L", "R", "Q_L", "Q_R"))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_without_factors_it_is_adam_from_the_second_gradient_on(eps: float) -> None:
    """With eps on the uncorrected root, which is torch's eps divided by sqrt(1 - b2^t): the same where it is 0."""
    start, grads = draw([(12, 8)], 30)
    ours, theirs = leaves(start), leaves(start)
    found = play(full(ours, max_precond_dim=1, eps=eps, weight_decay=0.1), ours, grads)
    opt = torch.optim.Adam(theirs, lr=3e-3, betas=(0.95, 0.95))
    for t, row in enumerate(grads[1:], 1):
        opt.param_groups[0]["eps"] = eps / math.sqrt(1 - 0.95**t)
        play(opt, theirs, [row])
        theirs[0].data.mul_(1 - 3e-3 * 0.1)
    assert distance(found, theirs) < 1e-12


@pytest.mark.parametrize("sides", ["both", "left"])
def test_a_rotated_problem_is_solved_rotated_on_the_sides_that_have_factors(sides: Sides) -> None:
    start, grads = draw([(12, 12)], 61)
    U, V = rotation(12, 1), rotation(12, 2)

    def solved(left: Tensor, right: Tensor) -> Tensor:
        params = leaves([left @ start[0] @ right.T])
        turned: Grads = [[left @ g @ right.T for g in row if g is not None] for row in grads]
        return left.T @ play(full(params, sides=sides, eps=1e-12), params, turned)[0] @ right

    one = torch.eye(12, dtype=torch.float64)
    plain = solved(one, one)
    assert distance([solved(U, one)], [plain]) < 1e-11
    gap = distance([solved(one, V)], [plain])
    assert gap < 1e-11 if sides == "both" else gap > 1e-2


@pytest.mark.parametrize("form, smallest, tolerance", [("full", 0.05, 5e-6), ("compact", 0.5, 0.05)])
def test_a_constant_gradient_is_replaced_by_its_polar_factor(form: Form, smallest: float, tolerance: float) -> None:
    """The means of rows and columns alone would make it ||G|| times the inverse: 5 where it should be 1."""
    U, V, values = rotation(12, 3), rotation(12, 4), torch.linspace(1, smallest, 12, dtype=torch.float64)
    gradient = U @ torch.diag(values) @ V.T
    params = leaves([torch.zeros(12, 12, dtype=torch.float64)])
    opt = soap(params, lr=1.0, form=form, weight_decay=0.0)
    for _ in range(3):
        before = params[0].detach().clone()
        play(opt, params, [[gradient]] * 8)
        moved = (before - params[0].detach()) / (8 if before.any() else 7)
        assert distance([moved], [U @ V.T]) < tolerance


SIZES = [(512, 512), (96, 384), (384, 96), (1536, 512), (65, 33), (31, 97), (8, 4, 3, 3), (300, 7), (5, 6)]


@pytest.mark.parametrize("shape", SIZES)
def test_state_takes_at_most_twelve_bytes_an_entry_and_four_a_row_and_column(shape: tuple[int, ...]) -> None:
    params = leaves([torch.zeros(shape)])
    rows, columns = shape[0], math.prod(shape[1:])
    held = soap(params).state_bytes()
    assert held <= 12 * rows * columns + 4 * (rows + columns)
    assert held > 7 * rows * columns  # and uses them


def test_of_a_square_matrix_both_factors_fit_whole() -> None:
    opt = soap(leaves([torch.zeros(64, 64)]))
    (p,) = opt.param_groups[0]["params"]
    assert {name: tuple(t.shape) for name, t in state_of(opt, p).items() if name in ("L", "R", "Q_L", "Q_R")} == dict.fromkeys(
        ("L", "R", "Q_L", "Q_R"), (64, 64)
    )


@pytest.mark.parametrize("shape, bytes_per_entry", [((64, 64), 24.0), ((32, 128), 42.0)])
def test_the_published_form_takes_what_the_paper_takes(shape: tuple[int, int], bytes_per_entry: float) -> None:
    params = leaves([torch.zeros(shape)])
    assert full(params).state_bytes() == bytes_per_entry * math.prod(shape)


@pytest.mark.parametrize("form", ["compact", "full"])
def test_a_state_format_encodes_the_moments_and_leaves_the_factors_alone(form: Form) -> None:
    params = leaves([torch.zeros(64, 128)])
    plain, small = (state_of(soap(params, form=form, state=state), params[0]) for state in ("fp32", "int8"))
    for name in ("L", "R", "Q_L", "Q_R"):
        assert small[name].dtype == plain[name].dtype == (torch.float32 if form == "full" else torch.bfloat16)
    assert "exp_avg" in plain and "exp_avg" not in small


@pytest.mark.parametrize("form", ["compact", "full"])
def test_an_average_of_a_thousand_steps_is_followed_in_bfloat16_too(form: Form) -> None:
    """To nearest, a bfloat16 number does not move by a thousandth of itself."""
    params = leaves([torch.zeros(16, 16)])
    opt = soap(params, form=form, shampoo_beta=0.999, lr=0.0)
    first, later = draw([(16, 16), (16, 16)], 0, dtype=torch.float32)[0]
    play(opt, params, [[first]])
    play(opt, params, [[later]] * 500)
    kept = 0.999**500
    wanted = kept * first @ first.T + (1 - kept) / 0.001 * later @ later.T
    found = opt.state[params[0]]["L"].float()
    assert float((found - wanted).norm() / wanted.norm()) < 0.08


def test_a_convolution_is_its_matrix_of_filters() -> None:
    start, grads = draw([(8, 4, 3, 3)], 25)
    flat: Grads = [[g.reshape(8, 36) for g in row if g is not None] for row in grads]
    kernel, matrix = leaves(start), leaves([start[0].reshape(8, 36)])
    found = play(soap(kernel), kernel, grads)
    assert distance([found[0].reshape(8, 36)], play(soap(matrix), matrix, flat)) < 1e-12


def test_each_of_stacked_experts_is_a_matrix_of_its_own() -> None:
    start, grads = draw([(3, 12, 10)], 25)
    stack, alone = leaves(start), leaves(list(start[0]))
    opt = soap([("experts.w1", stack[0])])
    found = play(opt, stack, grads)
    wanted = play(soap(alone), alone, [list(g) for row in grads for g in row if g is not None])
    assert tuple(opt.state[stack[0]]["L"].shape)[:2] == (3, 12)
    assert distance(list(found[0]), wanted) < 1e-12


def test_what_is_stored_inputs_first_moves_as_its_transpose_does() -> None:
    class Conv1D(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nf = 12
            self.weight = torch.nn.Parameter(torch.zeros(10, 12, dtype=torch.float64))

    (start,), grads = draw([(12, 10)], 25)
    linear, turned = torch.nn.Linear(10, 12, bias=False, dtype=torch.float64), Conv1D()
    ends = []
    for layer, flip in ((linear, False), (turned, True)):
        weight = layer.weight
        assert isinstance(weight, torch.nn.Parameter)
        weight.data.copy_(start.T if flip else start)
        opt = soap(torch.nn.Sequential(layer, torch.nn.Linear(12, 3, dtype=torch.float64)))
        for (g,) in grads:
            assert g is not None
            weight.grad = g.T.contiguous() if flip else g.clone()
            opt.step()
        ends.append(weight.detach().T if flip else weight.detach())
    assert distance(ends[:1], ends[1:]) < 1e-12
    assert distance(ends[:1], [start]) > 0.01


def test_another_rule_takes_adams_place_in_the_rotated_space() -> None:
    """Lion's signs, rotated back: on a square matrix with full factors its update has the norm of a matrix of signs."""
    (start,), grads = draw([(10, 10)], 2)
    params = leaves([start])
    opt = full(params, lr=1.0, inner=lion(), weight_decay=0.0)
    play(opt, params, grads[:1])
    QL, QR = opt.state[params[0]]["Q_L"].clone(), opt.state[params[0]]["Q_R"].clone()
    found = play(opt, params, grads[1:])
    g = grads[1][0]
    assert g is not None
    assert distance(found, [start - QL @ torch.sign(QL.T @ g @ QR) @ QR.T]) < 1e-12


def test_an_inner_rule_counts_its_steps_without_the_call_that_gathers() -> None:
    """torch's Adam, whose bias correction knows the step, is the default where eps is 0."""
    start, grads = draw([(12, 12)], 12)
    ours, given = leaves(start), leaves(start)
    wanted = play(full(ours, eps=0.0), ours, grads)
    assert distance(play(full(given, inner=adam((0.95, 0.95), 0.0)), given, grads), wanted) < 1e-12


def test_vectors_follow_adamw_with_the_same_settings() -> None:
    start, grads = draw([(24,), (12, 12)], 10)
    ours, theirs = leaves(start), leaves(start)
    found = play(soap(ours), ours, grads)
    wanted = play(AdamW(theirs, 3e-3, (0.95, 0.95), weight_decay=0.01, decay="after", backend="eager"), theirs, grads)
    assert distance(found[:1], wanted[:1]) < 1e-14


def test_embeddings_and_heads_go_to_adamw_unless_a_group_asks_for_soap() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, 16), torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 30))
    rules = {line.name: line.rule for line in soap(model).plan()}
    assert rules == {"0.weight": "adamw", "1.weight": "soap", "1.bias": "adamw", "3.weight": "adamw", "3.bias": "adamw"}
    asked = [{"params": [("0.weight", model[0].weight)], "rule": "soap"}, {"params": [("1.weight", model[1].weight)]}]
    assert {line.name: line.rule for line in soap(asked).plan()} == {"0.weight": "soap", "1.weight": "soap"}


def test_a_gradient_that_is_not_finite_spoils_its_own_matrix_only() -> None:
    start, grads = draw([(6, 6), (6, 6)], 12)
    params, twins = leaves(start), leaves(start)
    spoiled = [list(row) for row in grads]
    spoiled[0][0] = torch.full((6, 6), float("nan"), dtype=torch.float64)
    found = play(full(params, precondition_frequency=2), params, spoiled)
    assert found[0].isnan().all()
    assert same(found[1:], play(full(twins, precondition_frequency=2), twins, grads)[1:])


def test_a_zero_gradient_moves_nothing_and_gives_no_nan() -> None:
    forms: tuple[Form, ...] = ("compact", "full")
    for form in forms:
        params = leaves([torch.ones(6, 4)])
        zeros: Grads = [[torch.zeros(6, 4)]] * 5
        assert same(
            play(soap(params, form=form, precondition_frequency=2, weight_decay=0.0), params, zeros), [torch.ones(6, 4)]
        )


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("betas", (1.0, 0.9)),
        ("shampoo_beta", 1.0),
        ("eps", -1.0),
        ("weight_decay", -0.1),
        ("precondition_frequency", 0),
        ("max_precond_dim", -1),
        ("form", "tiny"),
        ("block_size", 0),
        ("sides", "top"),
        ("adamw_lr", -1.0),
        ("adamw_weight_decay", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        soap(leaves(draw([(4, 4)], 0)[0]), **hyper)
