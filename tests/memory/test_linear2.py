"""The 4-bit squared grid of eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

from poise.linalg.eigenbasis import rectify
from poise.memory.linear2 import codebook, dequantize, packed_shape, quantize


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def there_and_back(x: Tensor) -> Tensor:
    return dequantize(*quantize(x), x.shape[-1])


def test_the_grid_is_the_published_one() -> None:
    published = [-1, -0.7511, -0.5378, -0.36, -0.2178, -0.1111, -0.04, 0, 0.0044, 0.04, 0.1111, 0.2178, 0.36, 0.5378, 0.7511, 1]
    assert torch.allclose(codebook(), torch.tensor(published), rtol=0, atol=5e-5)


def test_each_entry_becomes_the_nearest_value_of_its_own_block_of_64() -> None:
    x = draw(3, 5, 150)
    x[..., 64:128] *= 100
    codes, scale = quantize(x)
    assert codes.dtype == torch.uint8
    assert (codes.shape[-1], scale.shape[-1]) == packed_shape(150) == (96, 3)
    found = dequantize(codes, scale, 150)
    for first in (0, 64, 128):
        piece = slice(first, min(first + 64, 150))
        grid = codebook(torch.float64) * x[..., piece].abs().amax(-1, keepdim=True)[..., None]
        nearest = (x[..., piece][..., None] - grid).abs().amin(-1)
        assert torch.allclose((found[..., piece] - x[..., piece]).abs(), nearest, rtol=0, atol=1e-12)


def test_the_identity_and_zeros_come_back_as_they_were() -> None:
    for x in (torch.eye(70), torch.zeros(2, 64), -torch.eye(64).double()):
        assert torch.equal(there_and_back(x), x)


def test_what_is_not_finite_spoils_its_own_block() -> None:
    x = draw(2, 128)
    x[0, 3], x[1, 100] = torch.inf, torch.nan
    found = there_and_back(x)
    assert found[0, :64].isnan().all() and found[1, 64:].isnan().all()
    assert found[0, 64:].isfinite().all() and found[1, :64].isfinite().all()


def test_rectified_a_rounded_orthogonal_matrix_is_orthogonal_again() -> None:
    """The figures are those of 128 x 128: each iteration squares what is missing."""
    V = there_and_back(torch.linalg.qr(draw(128, 128)).Q.float())
    missing = [float((rectify(V, steps).mT @ rectify(V, steps) - torch.eye(128)).norm()) for steps in range(5)]
    for found, wanted in zip(missing[:3], (1.74, 0.28, 0.0099), strict=True):
        assert 0.8 * wanted < found < 1.2 * wanted
    assert missing[3] < 5e-5 and missing[4] < 1e-5


def test_rounded_eigenvectors_keep_the_root_that_a_rounded_matrix_loses() -> None:
    """Of a matrix with condition 1e6, the error of A^(-1/4): a few percent against more than all of it."""
    values, Q = torch.logspace(0, -6, 128, dtype=torch.float64), torch.linalg.qr(draw(128, 128)).Q
    wanted = (Q * values**-0.25) @ Q.mT

    def gap(A: Tensor) -> float:
        return float((A - wanted).norm() / wanted.norm())

    V = rectify(there_and_back(Q.mT), 4)
    assert gap(V.mT @ (values[:, None] ** -0.25 * V)) < 0.1
    A = there_and_back((Q * values) @ Q.mT)
    rounded, vectors = torch.linalg.eigh((A + A.mT) / 2)
    assert gap((vectors * (rounded.clamp(min=0) + 1e-6 * rounded.max()) ** -0.25) @ vectors.mT) > 0.8
