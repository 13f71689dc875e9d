"""Norms, their duals, linear minimization oracles and sharp operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from poise.linalg import norms, polar
from poise.linalg.norms import NORMS

lmo = partial(norms.lmo, method="svd")
sharp = partial(norms.sharp, method="svd")

DUALS = {
    "l1": "linf",
    "linf": "l1",
    "l2": "l2",
    "spectral": "nuclear",
    "nuclear": "spectral",
    "l21": "l2inf",
    "l2inf": "l21",
}
SHAPES = [(6, 4), (4, 6), (1, 5), (5, 1), (1, 1), (3, 4, 6)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def defined(M: Tensor, norm: str) -> float:
    """The norm of one matrix, entry by entry."""
    entries = M.tolist()
    lengths = [math.sqrt(sum(v * v for v in row)) for row in entries]
    sizes = [abs(v) for row in entries for v in row]
    if norm in ("l1", "linf", "l2"):
        return {"l1": sum(sizes), "linf": max(sizes), "l2": math.sqrt(sum(v * v for v in sizes))}[norm]
    if norm in ("l21", "l2inf"):
        return sum(lengths) if norm == "l21" else max(lengths)
    sigma = torch.linalg.eigvalsh(M @ M.T if M.shape[0] <= M.shape[1] else M.T @ M).clamp_min(0).sqrt()
    return float(sigma.max() if norm == "spectral" else sigma.sum())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_norm_is_what_its_name_says(norm: str, shape: tuple[int, ...]) -> None:
    M = gaussian(*shape)
    wanted = [defined(one, norm) for one in M.reshape(-1, *shape[-2:])]
    found = norms.value(M, norm)
    assert found.shape == shape[:-2]
    assert found.reshape(-1).tolist() == pytest.approx(wanted, rel=1e-12)


def test_duals_come_in_pairs() -> None:
    assert {name: norm.dual for name, norm in NORMS.items()} == DUALS


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_lies_on_the_unit_sphere_and_attains_the_dual_norm(norm: str, shape: tuple[int, ...]) -> None:
    M = gaussian(*shape)
    O = lmo(M, norm)
    assert torch.allclose(norms.value(O, norm), torch.ones(shape[:-2], dtype=torch.float64), rtol=1e-12)
    assert torch.allclose(norms.inner(M, O), norms.dual(M, norm), rtol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_no_point_of_the_unit_ball_goes_further(norm: str) -> None:
    M = gaussian(5, 7)
    others = gaussian(300, 5, 7, seed=1)
    others = torch.cat([others, lmo(others, norm)])  # corners of the ball too
    others = others / norms.value(others, norm)[:, None, None]
    assert float(norms.inner(M, others).max()) <= float(norms.dual(M, norm)) * (1 + 1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_the_sharp_operator_maximizes_the_inner_product_minus_half_the_square(norm: str) -> None:
    M = gaussian(5, 7)
    S = sharp(M, norm)

    def gain(X: Tensor) -> Tensor:
        return norms.inner(M, X) - norms.value(X, norm).square() / 2

    dual = float(norms.dual(M, norm))
    assert float(norms.value(S, norm)) == pytest.approx(dual, rel=1e-12)
    assert float(gain(S)) == pytest.approx(dual**2 / 2, rel=1e-12)
    assert float(gain(S + 0.3 * gaussian(300, 5, 7, seed=2)).max()) < float(gain(S))
    assert float(gain(0.99 * S)) < float(gain(S)) > float(gain(1.01 * S))


def test_the_sharp_operator_of_the_euclidean_norm_is_the_identity() -> None:
    M = gaussian(5, 7)
    assert torch.allclose(sharp(M, "l2"), M, rtol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_zero_gives_zero_also_beside_others(norm: str) -> None:
    M = gaussian(3, 4, 6)
    M[1] = 0.0
    for operator in (lmo, sharp):
        found = operator(M, norm)
        assert torch.equal(found[1], torch.zeros(4, 6, dtype=torch.float64))
        assert torch.allclose(found[0], operator(M[0], norm), rtol=1e-12)
        assert torch.equal(operator(torch.zeros(4, 6), norm), torch.zeros(4, 6))


@pytest.mark.parametrize("norm", NORMS)
def test_a_batch_is_its_matrices_one_by_one(norm: str) -> None:
    M = gaussian(2, 3, 4, 6)
    for operator in (lmo, sharp):
        one_by_one = [operator(M[i, j], norm) for i in range(2) for j in range(3)]
        assert torch.allclose(operator(M, norm), torch.stack(one_by_one).view(2, 3, 4, 6), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("exponent", [-100, -3, 100])
def test_the_scale_of_a_matrix_changes_no_bit_of_its_direction(norm: str, exponent: int) -> None:
    """Squares of these entries vanish or overflow in float32."""
    M = gaussian(5, 7, dtype=torch.float32)
    assert torch.equal(lmo(M * 2.0**exponent, norm), lmo(M, norm))


def test_a_short_row_is_normalized_beside_a_long_one() -> None:
    M = gaussian(3, 6, dtype=torch.float32) * torch.tensor([[1.0], [1e-30], [0.0]])
    lengths = torch.linalg.vector_norm(lmo(M, "l2inf"), dim=-1)
    assert lengths.tolist() == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l21"])
def test_equally_large_entries_and_rows_share_the_step(norm: str) -> None:
    M = torch.tensor([[3.0, -3.0], [-3.0, 3.0], [1.0, 0.0]])
    wanted = {"l1": M[:2].sign() / 4, "l21": M[:2].sign() / math.sqrt(2) / 2}[norm]
    assert torch.allclose(lmo(M, norm), torch.cat([wanted, torch.zeros(1, 2)]))


@pytest.mark.parametrize("method, steps, dtype", [("ns5", 3, torch.float32), ("qdwh", 2, None), ("polar_express", None, None)])
def test_the_spectral_oracle_is_the_polar_factor_of_the_registry(
    method: str, steps: int | None, dtype: torch.dtype | None
) -> None:
    M = gaussian(5, 7, dtype=torch.float32)
    found = norms.lmo(M, "spectral", method, steps=steps, dtype=dtype)
    assert torch.equal(found, polar.orthogonalize(M, method, steps=steps, dtype=dtype))
    torch.testing.assert_close(norms.sharp(M, "spectral", method, steps=steps, dtype=dtype), (M * found).sum() * found)


@pytest.mark.parametrize("norm", NORMS)
def test_a_matrix_with_nan_spoils_itself_alone(norm: str) -> None:
    M = gaussian(2, 4, 6)
    M[0, 1, 2] = torch.nan
    found = lmo(M, norm)
    assert torch.isnan(norms.value(M, norm)).tolist() == [True, False]
    assert torch.allclose(found[1], lmo(M[1], norm))
    if norm in ("linf", "l2inf"):  # directions of an entry, of a row
        M[0, 1] = 0.0
        assert torch.allclose(found[0, 0], lmo(M[0], norm)[0])
    else:
        assert bool(torch.isnan(found[0]).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_and_input_are_kept(norm: str, dtype: torch.dtype) -> None:
    M = gaussian(4, 6, dtype=dtype)
    before = M.clone()
    for operator in (lmo, sharp):
        found = operator(M.mT, norm)
        assert (found.dtype, found.shape) == (dtype, (6, 4))
        exact = operator(M.mT.double(), norm)
        assert torch.allclose(found.double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    assert torch.equal(M, before)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 3, 4)])
def test_empty_matrices_pass(norm: str, shape: tuple[int, ...]) -> None:
    M = torch.zeros(shape)
    assert lmo(M, norm).shape == sharp(M, norm).shape == shape
    for size in (norms.value(M, norm), norms.dual(M, norm)):
        assert torch.equal(size, torch.zeros(shape[:-2]))


@pytest.mark.parametrize("function", [norms.value, norms.dual, norms.lmo, norms.sharp])
def test_what_it_cannot_do_is_refused(function: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="norm='l3': unknown"):
        function(torch.ones(2, 2), "l3")
    with pytest.raises(ValueError, match="two dimensions"):
        function(torch.ones(2), "l2")
    with pytest.raises(TypeError, match="int64"):
        function(torch.ones(2, 2, dtype=torch.int64), "l2")
    if function in (norms.lmo, norms.sharp):
        with pytest.raises(ValueError, match="method='newton'"):
            function(torch.ones(2, 2), "l2", "newton")
