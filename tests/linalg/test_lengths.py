"""Lengths of rows and columns."""

from __future__ import annotations

import torch

from poise.linalg.lengths import lengths, unit, wide


def test_lengths_are_euclidean_norms_that_keep_their_dimension_and_have_a_floor() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.equal(lengths(x, 1), torch.tensor([[5.0], [1e-12]]))
    assert torch.equal(lengths(x, 0, 3.5), torch.tensor([[3.5, 4.0]]))


def test_vectors_come_out_with_length_1_and_zeros_as_zeros() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.allclose(unit(x), torch.tensor([[0.6, 0.8], [0.0, 0.0]], dtype=torch.float64), rtol=1e-15)
    assert torch.equal(unit(x, dim=0, floor=6.0), x / 6)


def test_norms_of_low_precision_are_taken_in_float32() -> None:
    x = torch.full((1, 70000), 300.0, dtype=torch.float16)  # a square is beyond float16, and so is their sum
    found = unit(x)
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), torch.full_like(found, 70000**-0.5, dtype=torch.float32), rtol=1e-3)
    assert wide(x).dtype == torch.float32
    assert wide(x.double()).dtype == torch.float64
