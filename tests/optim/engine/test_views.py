"""Parameters as matrices: outputs are rows, and what was turned round for a rule is turned back."""

from __future__ import annotations

import pytest
import torch

from poise.optim import Param
from poise.optim.engine.views import stored_as, view_of

CASES = [
    ((6, 4), "matrix", False, (6, 4)),
    ((4, 6), "matrix", True, (6, 4)),
    ((6, 4, 3, 2), "conv", False, (6, 24)),
    ((4, 6, 3, 2), "conv", True, (6, 24)),
    ((5, 6, 4), "experts", False, (5, 6, 4)),
    ((5, 4, 6), "experts", True, (5, 6, 4)),
    ((0, 6), "matrix", True, (6, 0)),
]


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("shape", "role", "inputs_first", "seen"), CASES)
def test_a_view_has_outputs_as_rows_and_is_undone(
    shape: tuple[int, ...], role: str, inputs_first: bool, seen: tuple[int, ...], batch: tuple[int, ...]
) -> None:
    p = Param("w", torch.Size(shape), torch.float32, role, inputs_first=inputs_first)
    t = torch.randn(*batch, *shape)
    view = view_of("matrix", p, t)
    assert tuple(view.shape) == (*batch, *seen) and p.matrix == seen[-2:]
    assert torch.equal(stored_as("matrix", p, view, t.shape), t)
    assert torch.equal(stored_as("matrix", p, view.clone(), t.shape), t)
    for unit in ("element", "tensor"):
        assert view_of(unit, p, t) is t


def test_rows_of_a_turned_convolution_are_its_outputs() -> None:
    p = Param("up", torch.Size((2, 3, 1, 2)), torch.float32, "conv", inputs_first=True)
    t = torch.arange(12.0).reshape(2, 3, 1, 2)
    assert torch.equal(view_of("matrix", p, t)[1], torch.cat([t[0, 1].flatten(), t[1, 1].flatten()]))
