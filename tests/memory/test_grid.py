"""Grids of low-precision weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from poise.memory.grid import GRIDS, Grid


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 2), (1, 300), (4, 1)])
def test_fp8_is_what_a_cast_to_e4m3_gives(shape: tuple[int, ...]) -> None:
    x = draw(*shape) * torch.logspace(-6, 2, shape[0]).view(-1, *[1] * (len(shape) - 1))
    scale = x.flatten(1).abs().amax(1).view(-1, *[1] * (len(shape) - 1)) / 448
    wanted = (x / scale).to(torch.float8_e4m3fn).float() * scale
    torch.testing.assert_close(GRIDS["fp8"].rounded(x), wanted, rtol=1e-6, atol=0)


def test_fp8_keeps_subnormal_numbers() -> None:
    x = torch.tensor([[448.0, 2**-6, 2**-7, 2**-9, 2**-10 * 1.01, 2**-10 * 0.99]])
    assert GRIDS["fp8"].rounded(x).tolist() == [[448.0, 2**-6, 2**-7, 2**-9, 2**-9, 0.0]]


@pytest.mark.parametrize("name, levels", [("int8", 127), ("int4", 7)])
def test_integers_of_a_row_or_group_lie_within_half_a_step(name: str, levels: int) -> None:
    x = draw(6, 300)
    found = GRIDS[name].rounded(x)
    groups = x.split(128, 1) if name == "int4" else (x,)
    for part, on in zip(groups, found.split(128, 1) if name == "int4" else (found,), strict=True):
        scale = part.abs().amax(1, keepdim=True) / levels
        codes = on / scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert float(((part - on) / scale).abs().amax()) <= 0.5 + 1e-4
        assert (
            torch.equal(on.abs().amax(1), part.abs().amax(1))
            or float((on.abs().amax(1) / part.abs().amax(1) - 1).abs().amax()) < 1e-6
        )


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_on_the_grid_stays_there(name: str) -> None:
    once = GRIDS[name].rounded(draw(6, 300))
    for noise in (None, torch.rand(6, 300) * 0.99):
        torch.testing.assert_close(
            GRIDS[name].rounded(once, noise), once, rtol=0, atol=float(once.abs().max()) * 1e-2 if noise is not None else 1e-6
        )


@pytest.mark.parametrize("name", GRIDS)
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(name: str) -> None:
    x = draw(2, 64)
    many = torch.stack(
        [GRIDS[name].rounded(x, torch.rand(2, 64, generator=torch.Generator().manual_seed(s))) for s in range(4000)]
    )
    spacing = many.amax(0) - many.amin(0)
    assert float(((many.mean(0) - x).abs() / (spacing + 1e-3)).amax()) < 0.05
    assert max(len(many[:, i, j].unique()) for i in range(2) for j in range(64)) == 2


def test_a_fixed_scale_is_a_lattice() -> None:
    grid = Grid(scale=0.05, stochastic=False)
    assert torch.allclose(grid.rounded(torch.tensor([[0.024, 0.026, -0.07, 100.0]])), torch.tensor([[0.0, 0.05, -0.05, 6.35]]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_zeros_and_nothing_are_left_alone(shape: tuple[int, ...]) -> None:
    for grid in GRIDS.values():
        assert torch.equal(grid.rounded(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("wrong", [{"bits": 5}, {"bits": 4, "floating": True}, {"group": 0}, {"scale": 0.0}], ids=str)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Grid"):
        Grid(**wrong)
