"""Trees of tensors as vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.linalg.trees import ravel


def test_a_tree_comes_back_as_it_was() -> None:
    tree = {"a": torch.ones(2, 3), "b": [torch.tensor(2.0, dtype=torch.float64), (torch.zeros(0), torch.ones(4).bfloat16())]}
    vector, unravel = ravel(tree)
    assert vector.shape == (11,) and vector.dtype == torch.float64
    again = unravel(vector)
    assert torch.equal(again["a"], tree["a"]) and torch.equal(again["b"][0], tree["b"][0])
    assert [leaf.dtype for leaf in again["b"][1]] == [torch.float32, torch.bfloat16]
    assert again["b"][1][0].shape == (0,)


def test_small_dtypes_are_widened_to_float32() -> None:
    vector, unravel = ravel(torch.ones(3, dtype=torch.bfloat16))
    assert vector.dtype == torch.float32 and unravel(vector).dtype == torch.bfloat16


def test_leading_dimensions_are_kept() -> None:
    first, second = torch.arange(12.0).reshape(2, 3, 2), torch.arange(2.0)
    vector, unravel = ravel([first, second], batch_dims=1)
    assert vector.tolist() == [[0, 1, 2, 3, 4, 5, 0], [6, 7, 8, 9, 10, 11, 1]]
    assert torch.equal(unravel(vector)[0], first) and torch.equal(unravel(vector)[1], second)


@pytest.mark.parametrize(
    "tree, batch_dims, error, message",
    [
        ([1.0], 0, TypeError, "leaf of float"),
        ({"a": torch.ones(2, dtype=torch.int64)}, 0, TypeError, "leaf of torch.int64"),
        ([], 0, ValueError, "at least one tensor"),
        ([torch.ones(2, 3), torch.ones(3)], 1, ValueError, "batch_dims=1"),
        ([torch.ones(())], 1, ValueError, "batch_dims=1"),
    ],
)
def test_what_is_no_tree_of_numbers_is_refused(tree: Any, batch_dims: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ravel(tree, batch_dims)
