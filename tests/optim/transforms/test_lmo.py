"""Steps that are best in a norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor

from poise.linalg import norms
from poise.optim import Optimizer, Param, chain
from poise.optim.transform import Context
from poise.optim.transforms.lmo import LMO_NORMS, MATRIX_NORMS, lmo, matrix_step, sharp

VECTOR_NORMS = ("l1", "l2", "linf")


def param(*shape: int, role: str = "matrix", splits: tuple[int, ...] = ()) -> Param:
    return Param("layer.weight", torch.Size(shape), torch.float64, role=role, splits=splits)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# What a matrix link sees of a parameter, and the matrices in it.
SEEN = [
    (param(12, 20), (12, 20)),
    (param(9, 2, 3, 3, role="conv"), (9, 18)),
    (param(5, 6, 10, role="experts"), (5, 6, 10)),
    (param(24, 8, splits=(8, 8, 8)), (24, 8)),
    (param(24, 8, splits=(16, 4, 4)), (2, 24, 8)),
]


def matrices_of(p: Param, u: Tensor) -> list[Tensor]:
    parts = u.split(list(p.splits), dim=-2) if p.splits else [u]
    return [one for part in parts for one in part.reshape(-1, *part.shape[-2:])]


@pytest.mark.parametrize("p, shape", SEEN)
@pytest.mark.parametrize("norm", MATRIX_NORMS)
@pytest.mark.parametrize("operator", [lmo, sharp])
def test_every_matrix_of_a_parameter_takes_its_own_step(operator: Any, norm: str, p: Param, shape: tuple[int, ...]) -> None:
    u = normal(*shape)
    link = operator(norm, "svd")
    found = link.update(u, {}, torch.zeros_like(u), Context({}, param=p))
    plain = {lmo: norms.lmo, sharp: norms.sharp}[operator]
    for step, before in zip(matrices_of(p, found), matrices_of(p, u), strict=True):
        assert distance([step], [plain(before, norm, "svd")]) < 1e-12


@pytest.mark.parametrize("p, shape", SEEN)
@pytest.mark.parametrize("norm", [norm for norm in LMO_NORMS if norm != "global_l2"])
def test_the_announced_rms_is_that_of_the_step(norm: str, p: Param, shape: tuple[int, ...]) -> None:
    link = lmo(norm, "svd")
    seen = shape if norm in MATRIX_NORMS else tuple(p.shape)
    u = normal(*seen)
    found = link.update(u, {}, torch.zeros_like(u), Context({}, param=p))
    assert float(found.square().mean().sqrt()) == pytest.approx(link.update_rms(p), rel=1e-12)


@pytest.mark.parametrize("norm", VECTOR_NORMS)
@pytest.mark.parametrize("operator", [lmo, sharp])
def test_a_norm_of_entries_sees_a_parameter_of_any_shape_as_one_vector(operator: Any, norm: str) -> None:
    start, grads = draw([(6, 4), (8, 4, 3, 3), (5,), (), (0, 3)], 1)
    params = leaves(start)
    found = play(Optimizer(params, chain(operator(norm)), lr=1.0, backend="eager"), params, grads)
    plain = {lmo: norms.lmo, sharp: norms.sharp}[operator]
    for after, before, g in zip(found, start, grads[0], strict=True):
        assert g is not None
        assert distance([before - after], [plain(g.reshape(1, -1), norm).reshape(g.shape)]) < 1e-13


@pytest.mark.parametrize("norm", MATRIX_NORMS)
def test_an_optimizer_shows_convolutions_by_their_filters(norm: str) -> None:
    start, grads = draw([(6, 4), (8, 4, 3, 3)], 1)
    params = leaves(start)
    found = play(Optimizer(params, lmo(norm, "svd"), lr=1.0, backend="eager"), params, grads)
    for after, before, g in zip(found, start, grads[0], strict=True):
        assert g is not None
        assert distance([before - after], [norms.lmo(g.reshape(len(g), -1), norm, "svd").reshape(g.shape)]) < 1e-13


@pytest.mark.parametrize("backend", ["eager", "tiles"])
@pytest.mark.parametrize("scale", [1.0, 1e-15, 1e15])
def test_the_global_length_of_a_step_is_lr_however_large_the_gradient(scale: float, backend: Any) -> None:
    start, grads = draw([(6, 4), (5,), (0,)], 1, dtype=torch.float32)
    params = leaves([torch.zeros_like(p) for p in start])
    rows: Grads = [[g * scale for g in row if g is not None] for row in grads]
    found = play(Optimizer(params, lmo("global_l2"), lr=0.3, backend=backend), params, rows)
    moved = torch.cat([p.flatten() for p in found]).double()
    together = torch.cat([g.flatten() for g in grads[0] if g is not None]).double()
    assert distance([moved], [-0.3 * together / together.norm()]) < 1e-7


def test_a_gradient_of_zeros_moves_nothing() -> None:
    start, _ = draw([(6, 4), (5, 3)], 0)
    zeros: Any = [[torch.zeros_like(p) for p in start]]
    for link in [*(lmo(norm) for norm in LMO_NORMS), *(sharp(norm) for norm in norms.NORMS)]:
        params = leaves(start)
        assert same(play(Optimizer(params, link, lr=1.0, backend="eager"), params, zeros), start), link


def test_a_sharp_step_has_the_gradient_s_own_size_and_says_so() -> None:
    assert [sharp(norm).update_rms(param(6, 4)) for norm in norms.NORMS] == [None] * len(norms.NORMS)
    link = sharp("spectral", "svd")
    u = normal(6, 4)
    small, large = (link.update(c * u, {}, u, Context({}, param=param(6, 4))) for c in (1.0, 8.0))
    assert math.isclose(float(large.norm() / small.norm()), 8.0, rel_tol=1e-12)


def test_options_reach_the_polar_factor_and_are_shown() -> None:
    u, p = normal(6, 10), param(6, 10)
    found = sharp("spectral", "ns5", 3).update(u, {}, u, Context({}, param=p))
    assert torch.equal(found, norms.sharp(u, "spectral", "ns5", steps=3))
    assert repr(sharp("spectral", "ns5", 3)) == "sharp('spectral', 'ns5', steps=3)"
    assert repr(lmo("l21", "svd")) == "lmo('l21', 'svd', steps=None)"
    assert isinstance(lmo("l21"), matrix_step)


@pytest.mark.parametrize("operator", [lmo, sharp])
def test_what_it_does_not_know_is_refused(operator: Any) -> None:
    for options, named in [(("l3",), "norm='l3'"), (("l2", "newton"), "method='newton'"), (("spectral", "ns5", 0), "steps=0")]:
        with pytest.raises(ValueError, match=named):
            operator(*options)
    with pytest.raises(ValueError, match="global_l2"):
        sharp("global_l2")
