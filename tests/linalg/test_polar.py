"""Polar factors: Newton-Schulz polynomials, their Gram form and its restarts, QDWH, SVD."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim.references import DYN5, EXPRESS, EXPRESS_END
from torch import Tensor

from poise.linalg import newton_schulz, polar
from poise.linalg.newton_schulz import almost_orthogonal_rows, restarts
from poise.linalg.orthogonality import orthogonalization_error
from poise.linalg.polar import METHODS, orthogonalize

pytestmark = pytest.mark.usefixtures("float32_products")

POLYNOMIALS = ["ns5", "dyn5", "turbo4", "polar_express"]
EXACT = ["qdwh", "svd"]

JORDAN = (3.4445, -4.7750, 2.0315)
EXPRESS_ALL = [*EXPRESS, EXPRESS_END]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def factors(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """U (rows x rows) and V (columns x rows) with orthonormal columns."""
    u, _ = torch.linalg.qr(gaussian(rows, rows, seed=seed))
    v, _ = torch.linalg.qr(gaussian(columns, rows, seed=seed + 1))
    return u, v


def spread(rows: int, columns: int, condition: float, seed: int = 0) -> Tensor:
    """Singular values spread evenly in the logarithm: where methods and precisions differ, as they do not on Gaussians."""
    u, v = factors(rows, columns, seed)
    return (u * torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)) @ v.mT


def gap(found: Tensor, wanted: Tensor) -> float:
    """Relative difference in the Frobenius norm; nan counts as infinite."""
    value = float(
        torch.linalg.matrix_norm(found.double() - wanted.double()).max() / torch.linalg.matrix_norm(wanted.double()).max()
    )
    return value if math.isfinite(value) else math.inf


def quintics(triples: list[tuple[float, float, float]], s: Tensor) -> Tensor:
    for a, b, c in triples:
        s = a * s + b * s**3 + c * s**5
    return s


# --- each method is what its source says ---


def schedule(method: str, steps: int) -> list[tuple[float, float, float]]:
    if method == "ns5":
        return [JORDAN] * steps
    if method == "dyn5":
        return (DYN5 + [DYN5[-1]] * steps)[max(0, 5 - steps) :][:steps]
    shrunk = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in EXPRESS_ALL[:-1]]
    return (shrunk + [EXPRESS_ALL[-1]] * steps)[:steps]


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize("method, margin", [("ns5", 1.0), ("dyn5", 1.0), ("polar_express", 1.01)])
def test_a_polynomial_method_moves_singular_values_by_its_quintics_and_keeps_the_vectors(
    method: str, margin: float, steps: int, form: Any
) -> None:
    u, v = factors(12, 20)
    s = torch.linspace(0.01, 3.0, 12, dtype=torch.float64)
    wanted = (u * quintics(schedule(method, steps), s / (margin * s.norm()))) @ v.mT
    assert gap(orthogonalize((u * s) @ v.mT, method, steps=steps, form=form), wanted) < 1e-11


@pytest.mark.parametrize("form", ["plain", "gram"])
@pytest.mark.parametrize("steps", [1, 3, 4, 6])
def test_turbo4_scales_rows_and_takes_the_last_triples_of_dyn5(steps: int, form: Any) -> None:
    m = gaussian(12, 20)
    x = m / (m @ m.mT).abs().sum(-1, keepdim=True).sqrt()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    wanted = (u * quintics((DYN5 + [DYN5[-1]] * 9)[max(0, 5 - steps) :][:steps], s)) @ vh
    assert gap(orthogonalize(m, "turbo4", steps=steps, form=form), wanted) < 1e-11


@pytest.mark.parametrize("method, steps", [("ns5", 5), ("dyn5", 5), ("turbo4", 4), ("polar_express", 5)])
def test_none_stands_for_the_method_s_own_number_of_steps(method: str, steps: int) -> None:
    m = gaussian(12, 20)
    assert torch.equal(orthogonalize(m, method), orthogonalize(m, method, steps=steps))


def test_ns5_brings_gaussian_singular_values_between_068_and_121() -> None:
    values = torch.linalg.svdvals(orthogonalize(gaussian(256, 1024, dtype=torch.float32), "ns5"))
    assert values.min() >= 0.68
    assert values.max() <= 1.21


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_qdwh_moves_singular_values_by_its_rational_functions_and_polishes_once(steps: int, dtype: torch.dtype) -> None:
    u, v = factors(12, 20)
    s = torch.linspace(0.01, 3.0, 12, dtype=torch.float64)
    m = (u * s) @ v.mT
    f = s / math.sqrt(float(torch.linalg.matrix_norm(m, 1) * torch.linalg.matrix_norm(m, math.inf)))
    eps = torch.finfo(dtype).eps
    low = eps
    for _ in range(steps):
        if low + 5 * eps >= 1:
            break
        d = (4 * (1 - low**2) / low**4) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(8 - 4 * d + 8 * (2 - low**2) / (low**2 * math.sqrt(1 + d))) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        f = f * (a + b * f**2) / (1 + c * f**2)
        low = low * (a + b * low**2) / (1 + c * low**2)
    wanted = (u * (1.5 * f - 0.5 * f**3)) @ v.mT
    assert gap(orthogonalize(m, "qdwh", steps=steps, dtype=dtype), wanted) < 1e3 * eps


@pytest.mark.parametrize("shape", [(32, 32), (24, 60), (60, 24)])
def test_svd_gives_the_polar_factor(shape: tuple[int, int]) -> None:
    u, v = factors(min(shape), max(shape))
    m, wanted = (u * torch.linspace(0.1, 5.0, len(u), dtype=torch.float64)) @ v.mT, u @ v.mT
    if shape[0] > shape[1]:
        m, wanted = m.mT, wanted.mT
    assert gap(orthogonalize(m, "svd"), wanted) < 1e-13


# --- how close they come ---


def test_qdwh_equals_svd_at_condition_one_million_and_ns5_does_not() -> None:
    """Singular values spaced evenly: with a cluster of small ones the polar factor itself is only known to 1e-11 in float64."""
    u, v = factors(96, 96)
    m = (u * torch.linspace(1e-6, 1.0, 96, dtype=torch.float64)) @ v.mT
    exact = orthogonalize(m, "svd")
    assert gap(orthogonalize(m, "qdwh"), exact) < 1e-12
    assert gap(orthogonalize(m, "ns5"), exact) > 0.1


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
def test_qdwh_is_orthogonal_and_close_to_svd_on_spread_singular_values(shape: tuple[int, int]) -> None:
    m = spread(min(shape), max(shape), 1e6)
    m = m if shape[0] <= shape[1] else m.mT
    o = orthogonalize(m, "qdwh")
    inner = o @ o.mT if shape[0] <= shape[1] else o.mT @ o
    assert torch.dist(inner, torch.eye(len(inner), dtype=torch.float64)) < 1e-13
    assert gap(o, orthogonalize(m, "svd")) < 1e-9


def test_two_qdwh_steps_are_not_enough_and_four_are() -> None:
    m = gaussian(40, 60)
    exact = orthogonalize(m, "svd")
    single = [gap(orthogonalize(m.float(), "qdwh", steps=n), exact) for n in (2, 3)]
    double = [gap(orthogonalize(m, "qdwh", steps=n), exact) for n in (2, 3, 4)]
    assert single[0] > 0.05 and single[1] < 1e-4
    assert double[0] > 0.5 and double[1] > 1e-3 and double[2] < 1e-6


@pytest.mark.parametrize("method", ["polar_express", "qdwh"])
def test_a_convergent_method_gets_closer_with_steps(method: str) -> None:
    m = gaussian(128, 128)
    errors = [float(orthogonalization_error(m, orthogonalize(m, method, steps=n)).spectral) for n in (3, 4, 5, 7, 10)]
    assert all(later < earlier or later < 1e-12 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-4


def test_the_limit_of_polar_express_converges_from_everywhere() -> None:
    m = gaussian(128, 128)
    errors = [float(orthogonalization_error(m, orthogonalize(m, "polar_express", steps=n)).spectral) for n in (8, 10, 16)]
    assert errors[2] < 1e-12


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ns5_stays_at_a_spectral_error_of_0318_however_many_steps(seed: int) -> None:
    m = gaussian(128, 128, seed=seed)
    errors = {n: float(orthogonalization_error(m, orthogonalize(m, "ns5", steps=n)).spectral) for n in (5, 10, 12, 20)}
    assert errors[5] > 0.4
    for steps in (10, 12, 20):
        assert abs(errors[steps] - 0.318) < 2e-3


def test_turbo4_is_as_close_as_dyn5_and_closer_than_four_steps_from_the_norm() -> None:
    m = gaussian(512, 512, dtype=torch.float32)
    exact = orthogonalize(m, "svd")
    turbo, five, four = (gap(orthogonalize(m, name, steps=n), exact) for name, n in (("turbo4", 4), ("dyn5", 5), ("dyn5", 4)))
    assert turbo < 1.1 * five
    assert turbo < 0.7 * four
    assert turbo == pytest.approx(0.099, abs=0.01)
    assert five == pytest.approx(0.109, abs=0.01)
    assert four == pytest.approx(0.213, abs=0.02)


# --- almost orthogonal rows ---


@pytest.mark.parametrize("seed", range(5))
def test_scaled_rows_have_spectral_norm_at_most_one_however_unequal_they_were(seed: int) -> None:
    m = gaussian(32, 80, seed=seed) * torch.logspace(-6, 3, 32, dtype=torch.float64)[:, None]
    m[1] = m[0] + 1e-9 * m[1]  # and nearly parallel
    s = almost_orthogonal_rows(m @ m.mT)
    norm = float(torch.linalg.matrix_norm(s * m, 2))
    assert 0.7 < norm <= 1 + 1e-12


def test_one_scaling_orthogonalizes_orthogonal_rows_of_any_length() -> None:
    _, v = factors(24, 60)
    m = torch.logspace(-1, 1, 24, dtype=torch.float64)[:, None] * v.mT
    assert gap(almost_orthogonal_rows(m @ m.mT) * m, v.mT) < 1e-13
    assert gap(orthogonalize(m, "turbo4"), orthogonalize(v.mT, "turbo4")) < 1e-12


def test_rows_without_a_common_column_may_differ_in_length_by_any_factor() -> None:
    """Added to squared lengths, the authors' 1e-7 would leave the last eight rows short."""
    m = torch.block_diag(*torch.logspace(4, -12, 16, dtype=torch.float64)[:, None, None] * gaussian(16, 1, 3))
    wanted = m / m.norm(dim=-1, keepdim=True)
    assert gap(almost_orthogonal_rows(m @ m.mT) * m, wanted) < 1e-13
    assert gap(orthogonalize(m, "turbo4"), orthogonalize(wanted, "turbo4")) < 1e-12


def test_row_scaling_turns_the_target_a_little() -> None:
    m = gaussian(64, 64)
    target = orthogonalize(almost_orthogonal_rows(m @ m.mT) * m, "svd")
    assert 0.01 < gap(target, orthogonalize(m, "svd")) < 0.1


# --- the Gram form ---


@pytest.mark.parametrize("method", POLYNOMIALS)
@pytest.mark.parametrize("steps", range(1, 9))
def test_the_gram_form_equals_the_plain_one_in_float64(method: str, steps: int) -> None:
    m = gaussian(24, 60)
    assert gap(orthogonalize(m, method, steps=steps, form="gram"), orthogonalize(m, method, steps=steps, form="plain")) < 1e-12


@pytest.mark.parametrize("after", [s for n in range(5) for s in itertools.combinations(range(1, 5), n)])
def test_restarts_change_nothing_but_rounding(after: tuple[int, ...]) -> None:
    x = gaussian(24, 60)
    x /= x.norm()
    triples = schedule("polar_express", 5)
    wanted = newton_schulz.plain(x, x @ x.mT, triples)
    assert gap(newton_schulz.gram(x, x @ x.mT, triples, after), wanted) < 1e-12


@pytest.mark.parametrize(
    "steps, single, half, brain",
    [
        (1, (), (), ()),
        (2, (), (), (1,)),
        (3, (2,), (2,), (1, 2)),
        (4, (2,), (2,), (1, 2, 3)),
        (5, (3,), (2, 4), (1, 2, 3, 4)),
        (8, (3, 6), (2, 4, 6), (1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_restarts_are_closer_the_coarser_the_format(
    steps: int, single: tuple[int, ...], half: tuple[int, ...], brain: tuple[int, ...]
) -> None:
    assert {restarts(steps, dtype) for dtype in (torch.float32, torch.float64)} == {single}
    assert restarts(steps, torch.float16) == half
    assert restarts(steps, torch.bfloat16) == brain


def of_low_rank(rows: int, columns: int, seed: int) -> Tensor:
    """Of any rank, its singular values spread over up to six decades: a gradient of few examples."""
    draw = torch.Generator().manual_seed(seed)
    rank = int(torch.randint(1, rows + 1, (), generator=draw))
    decades = 6 * torch.rand((), generator=draw) * torch.rand(rank, generator=draw)
    u, v = torch.randn(rows, rows, generator=draw), torch.randn(columns, rank, generator=draw)
    return (torch.linalg.qr(u)[0][:, :rank] * 10.0**-decades) @ torch.linalg.qr(v)[0].mT


@pytest.mark.parametrize("method, steps", [("ns5", 5), ("dyn5", 5), ("turbo4", 4), ("polar_express", 5), ("polar_express", 8)])
@pytest.mark.parametrize("form", ["plain", "gram", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_rank_and_no_precision_throws_a_matrix_out(method: str, steps: int, form: Any, dtype: torch.dtype) -> None:
    """Rounding gives a Gram matrix negative eigenvalues, and the polynomials send these to infinity."""
    for rows, columns in ((4, 9), (10, 40), (10, 128)):
        m = torch.stack([of_low_rank(rows, columns, seed) for seed in range(100)])
        for either in (m, m.mT.contiguous()):
            o = orthogonalize(either, method, steps=steps, form=form, dtype=dtype)
            assert torch.linalg.matrix_norm(o, 2).max() < 1.25


@pytest.fixture
def rounding() -> Callable[..., float]:
    """Relative error of five or more steps on singular values spread over 1e4, against the plain form in float64."""
    m = spread(64, 256, 1e4)

    def error(method: str, dtype: torch.dtype, after: tuple[int, ...] | None, steps: int = 5) -> float:
        triples = schedule(method, steps)
        x = m / m.norm()
        wanted = newton_schulz.plain(x, x @ x.mT, triples)
        x = x.to(dtype)
        r = x @ x.mT
        return gap(newton_schulz.plain(x, r, triples) if after is None else newton_schulz.gram(x, r, triples, after), wanted)

    return error


@pytest.mark.parametrize("method", ["ns5", "dyn5", "polar_express"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_few_restarts_are_enough_in_other_precisions(rounding: Callable[..., float], method: str, dtype: torch.dtype) -> None:
    plain, none, some = (rounding(method, dtype, after) for after in (None, (), restarts(5, dtype)))
    assert some < 10 * plain
    assert none > 4 * some


@pytest.mark.parametrize("steps", [6, 8, 10])
@pytest.mark.parametrize("method", ["ns5", "dyn5", "polar_express"])
def test_more_steps_stay_as_exact_as_the_plain_form(rounding: Callable[..., float], method: str, steps: int) -> None:
    for dtype, worst in ((torch.float32, 10.0), (torch.bfloat16, 1.5)):
        assert rounding(method, dtype, restarts(steps, dtype), steps) < worst * rounding(method, dtype, None, steps)


@pytest.mark.parametrize("dtype, worst", [(torch.bfloat16, 1.5), (torch.float16, 4.0), (torch.float32, 10.0)])
@pytest.mark.parametrize("method", POLYNOMIALS)
def test_the_gram_form_is_restarted_for_its_precision(method: str, dtype: torch.dtype, worst: float) -> None:
    m = spread(64, 256, 1e4)
    wanted = orthogonalize(m, method)
    plain, gram = (gap(orthogonalize(m, method, form=form, dtype=dtype), wanted) for form in ("plain", "gram"))
    assert gram < worst * plain


@pytest.mark.parametrize("columns, taken, other", [(128, "gram", "plain"), (127, "plain", "gram")])
def test_auto_takes_the_gram_form_from_an_aspect_ratio_of_two(columns: int, taken: Any, other: Any) -> None:
    m = gaussian(64, columns, dtype=torch.float32)
    auto = orthogonalize(m)
    assert torch.equal(auto, orthogonalize(m, form=taken))
    assert not torch.equal(auto, orthogonalize(m, form=other))
    tall = m.mT.contiguous()
    assert torch.equal(orthogonalize(tall), orthogonalize(tall, form=taken))
    assert not torch.equal(orthogonalize(tall), orthogonalize(tall, form=other))


def test_auto_takes_the_plain_form_in_bfloat16() -> None:
    m = gaussian(64, 256, dtype=torch.float32)
    assert torch.equal(orthogonalize(m, dtype=torch.bfloat16), orthogonalize(m, form="plain", dtype=torch.bfloat16))


# --- scales, shapes, strides, dtypes ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exponent", [-100, -20, 5, 100])
def test_a_power_of_two_changes_no_bit(method: str, exponent: int) -> None:
    m = gaussian(12, 30, dtype=torch.float32)
    assert torch.equal(orthogonalize(m * 2.0**exponent, method), orthogonalize(m, method))


@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_matrix_has_the_transposed_result(method: str) -> None:
    m = gaussian(12, 30)
    for transposed in (m.mT, m.mT.contiguous()):
        for form in ("plain", "gram") if isinstance(polar.METHODS[method], newton_schulz.NewtonSchulz) else ("auto",):
            assert gap(orthogonalize(transposed, method, form=form), orthogonalize(m, method).mT) < 1e-12


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 6, 6)])
def test_zero_returns_zero(method: str, shape: tuple[int, ...]) -> None:
    assert torch.equal(orthogonalize(torch.zeros(shape), method), torch.zeros(shape))


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_or_row_in_a_batch_disturbs_no_other(method: str) -> None:
    m = gaussian(3, 6, 9, dtype=torch.float32)
    m[1] = 0
    o = orthogonalize(m, method)
    assert torch.equal(o[1], torch.zeros(6, 9))
    assert o[2].norm() > 1
    assert gap(o[2], orthogonalize(m[2], method)) < 1e-5
    m[2, 3] = 0
    assert orthogonalize(m, method)[2, 3].abs().max() < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 4, 6), (3, 0, 6), (3, 4, 0), (2, 0, 4, 6)])
def test_empty_matrices_come_back_empty(method: str, shape: tuple[int, ...]) -> None:
    assert orthogonalize(torch.zeros(shape, dtype=torch.bfloat16), method).shape == shape
    assert orthogonalize(torch.zeros(shape, dtype=torch.bfloat16), method).dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_a_vector_becomes_a_vector_of_one_length(method: str, shape: tuple[int, int]) -> None:
    m = gaussian(*shape)
    o = orthogonalize(m, method)
    assert gap(o / o.norm(), m / m.norm()) < 1e-12
    one = torch.ones(1, dtype=torch.float64)
    values = {"qdwh": one, "svd": one, "turbo4": quintics(DYN5[1:], one)}
    margin = 1.01 if method == "polar_express" else 1.0
    wanted = values[method] if method in values else quintics(schedule(method, 5), one / margin)
    assert float(o.norm()) == pytest.approx(float(wanted), abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 20), (2, 3, 20, 8), (5, 200, 300), (7, 16, 16)])
def test_a_batch_is_its_matrices_one_by_one(method: str, shape: tuple[int, ...]) -> None:
    """(5, 200, 300) is worked on in several chunks."""
    m = gaussian(*shape)
    o = orthogonalize(m, method)
    assert o.shape == shape
    for index in itertools.product(*map(range, shape[:-2])):
        assert gap(o[index], orthogonalize(m[index], method)) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_strides_make_no_difference_and_the_result_is_contiguous(method: str) -> None:
    m = gaussian(4, 8, 20)
    views = [
        m.transpose(0, 1).contiguous().transpose(0, 1),
        m.mT.contiguous().mT,
        m.repeat(1, 2, 2)[:, :8, 20:],
        m.flip(0).flip(0),
    ]
    wanted = orthogonalize(m, method)
    for view in views:
        found = orthogonalize(view, method)
        assert found.is_contiguous()
        assert gap(found, wanted) < 1e-12
    shared = m[:1].expand(3, 8, 20)
    assert gap(orthogonalize(shared, method), wanted[:1].expand(3, 8, 20)) < 1e-10
    assert orthogonalize(m.mT, method).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_input_is_left_alone_and_its_dtype_returned(method: str, dtype: torch.dtype) -> None:
    m = torch.eye(6, 9).to(dtype) + gaussian(6, 9, dtype=dtype)
    before = m.clone()
    o = orthogonalize(m, method)
    assert torch.equal(m, before)
    assert o.dtype == dtype
    assert o.data_ptr() != m.data_ptr()
    assert gap(o, orthogonalize(m.double(), method)) < 4 * torch.finfo(dtype).eps * 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "scale, dtype", [(1e30, torch.float32), (1e-30, torch.float32), (1e250, torch.float64), (1e4, torch.float16)]
)
def test_sizes_whose_squares_leave_the_number_format_do_no_harm(method: str, scale: float, dtype: torch.dtype) -> None:
    m = gaussian(6, 9)
    assert gap(orthogonalize((m * scale).to(dtype), method), orthogonalize(m, method)) < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_of_a_decayed_momentum_makes_no_step(method: str) -> None:
    """float32 numbers that are multiplied by 0.95 end at the smallest subnormal, 1.4e-45, and never reach zero."""
    left = gaussian(6, 9, dtype=torch.float32).sign() * 1.4e-45
    assert torch.equal(left * 0.95, left)
    assert left.abs().min() > 0
    assert torch.equal(orthogonalize(left, method), torch.zeros(6, 9))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_that_is_not_finite_returns_nan_and_spares_its_neighbours(method: str, value: float) -> None:
    m = gaussian(3, 6, 9)
    wanted = orthogonalize(m, method)
    m[1, 2, 3] = value
    o = orthogonalize(m, method)
    assert o[1].isnan().all()
    assert gap(o[[0, 2]], wanted[[0, 2]]) < 1e-10


@pytest.mark.parametrize("method", ["svd", *POLYNOMIALS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_without_gradient_get_none(method: str, dtype: torch.dtype) -> None:
    """A gradient of few examples has low rank, and rounding must not fill it up."""
    m = (gaussian(64, 3) @ gaussian(3, 96, seed=1)).to(dtype)
    values = torch.linalg.svdvals(orthogonalize(m, method).double())
    assert values[2] > 0.6
    assert values[3] < 1e-2


def test_svd_of_low_rank_is_an_exact_partial_isometry() -> None:
    m = gaussian(64, 3) @ gaussian(3, 96, seed=1)
    o = orthogonalize(m, "svd")
    assert gap(o @ o.mT @ o, o) < 1e-13
    assert float(o.square().sum()) == pytest.approx(3.0, abs=1e-12)


# --- precision of the arithmetic ---


@pytest.fixture
def bfloat16_hardware(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool, bool], bool]]:
    """Sets what torch says of the processor and returns what is made of it."""

    def pretend(amx: bool, avx512: bool) -> bool:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
        polar.fast_bfloat16.cache_clear()
        return polar.fast_bfloat16("cpu")

    yield pretend
    polar.fast_bfloat16.cache_clear()


@pytest.mark.parametrize("amx, avx512", list(itertools.product([False, True], repeat=2)))
def test_bfloat16_counts_as_fast_on_a_cpu_only_with_instructions_for_it(
    bfloat16_hardware: Callable[[bool, bool], bool], amx: bool, avx512: bool
) -> None:
    assert bfloat16_hardware(amx, avx512) is (amx or avx512)


def test_a_torch_without_these_checks_counts_as_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.delattr(torch.cpu, name)
    polar.fast_bfloat16.cache_clear()
    assert polar.fast_bfloat16("cpu") is False
    polar.fast_bfloat16.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_by_default_the_hardware_decides_the_precision(
    bfloat16_hardware: Callable[[bool, bool], bool], dtype: torch.dtype
) -> None:
    m = gaussian(12, 20, dtype=dtype)
    bfloat16_hardware(True, False)
    assert torch.equal(orthogonalize(m), orthogonalize(m, dtype=torch.bfloat16))
    bfloat16_hardware(False, False)
    assert torch.equal(orthogonalize(m), orthogonalize(m, dtype=torch.float32))
    assert not torch.equal(orthogonalize(m.float()), orthogonalize(m.float(), dtype=torch.bfloat16))


def test_float64_stays_float64_whatever_the_hardware(bfloat16_hardware: Callable[[bool, bool], bool]) -> None:
    bfloat16_hardware(True, True)
    m = gaussian(12, 20)
    assert torch.equal(orthogonalize(m), orthogonalize(m, dtype=torch.float64))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_exact_methods_never_go_below_float32(method: str, dtype: torch.dtype) -> None:
    m = gaussian(12, 20, dtype=torch.float32)
    assert torch.equal(orthogonalize(m, method, dtype=dtype), orthogonalize(m, method, dtype=torch.float32))


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.05), (torch.float16, 0.005), (torch.float32, 1e-5)])
@pytest.mark.parametrize("method", POLYNOMIALS)
def test_a_chosen_precision_is_used(method: str, dtype: torch.dtype, error: float) -> None:
    m = gaussian(16, 40, dtype=torch.float32)
    wanted = orthogonalize(m.double(), method)
    assert error / 1000 < gap(orthogonalize(m, method, dtype=dtype), wanted) < error


# --- bad input ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "ns6"}, "ns6.*known: ns5, dyn5, turbo4, polar_express, qdwh, svd"),
        ({"steps": 0}, "steps=0"),
        ({"steps": -1}, "steps=-1"),
        ({"steps": 2.0}, r"steps=2\.0"),
        ({"steps": True}, "steps=True"),
        ({"method": "svd", "steps": 3}, "svd.*no steps"),
        ({"form": "grams"}, "grams.*plain, gram, auto"),
        ({"method": "qdwh", "form": "gram"}, "qdwh.*no Gram form"),
        ({"dtype": torch.int32}, "int32"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(torch.eye(3), **options)


@pytest.mark.parametrize("m", [torch.eye(3, dtype=torch.int64), torch.eye(3, dtype=torch.complex64), torch.eye(3) > 0])
def test_only_real_floating_point_matrices_are_taken(m: Tensor) -> None:
    with pytest.raises(TypeError, match=str(m.dtype)):
        orthogonalize(m)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_vector_is_no_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        orthogonalize(torch.ones(shape))


def test_a_new_method_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "ns7", dataclasses.replace(METHODS["ns5"], steps=7))
    m = gaussian(6, 9)
    assert torch.equal(orthogonalize(m, "ns7"), orthogonalize(m, "ns5", steps=7))
