"""Formats that see a tensor whole: second moments by rows and columns ("Memory Efficient Optimizers with 4-bit States",
arXiv 2309.01507)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.memory import Dynamic4, Factored4, Rank1, get
from poise.memory.matrix import MatrixCodec, packed, unpacked
from poise.optim import AdamW, Lion

SHAPES = [(6, 5), (4, 3, 2, 3), (1, 7), (7, 1)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Positive, spread over decades along rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, generator=generator) + 0.1
    for axis in range(len(shape)):
        x = x * 10 ** (2 * torch.randn([-1 if d == axis else 1 for d in range(len(shape))] and
                                       [s if d == axis else 1 for d, s in enumerate(shape)], generator=generator))  # fmt: skip
    return x


def alone(t: Tensor, how: Literal["sum", "max"]) -> Tensor:
    return t


def through(codec: MatrixCodec, x: Tensor, kind: Any = "nonneg") -> Tensor:
    return codec.decode_whole(codec.encode_whole(x, kind, len(x), alone), kind)


def smallest_maximum(x: Tensor) -> Tensor:
    """Entry by entry: the least of the largest entries of every slice that it lies in."""
    scale = torch.empty_like(x)
    for where in torch.cartesian_prod(*map(torch.arange, x.shape)).reshape(-1, x.ndim).tolist():
        scale[tuple(where)] = min(float(x.select(axis, i).amax()) for axis, i in enumerate(where))
    return scale


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest relative difference; infinite where one of them is not a number."""
    return float(((found - wanted) / wanted).abs().nan_to_num(nan=torch.inf).max())


def off_scale(codec: MatrixCodec, x: Tensor) -> float:
    """How far it is from 16 values under the least of all axes' maxima."""
    scale = smallest_maximum(x)
    return apart(through(codec, x), torch.round(16 * x / scale).clamp(1, 16) / 16 * scale)


def off_means(codec: MatrixCodec, x: Tensor) -> float:
    """How far the means of rows and of columns are from those that were stored."""
    found = through(codec, x)
    return max(apart(found.flatten(1).mean(1), x.flatten(1).mean(1)), apart(found.mean(0), x.mean(0)))


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_one_scales_are_the_least_of_all_axes_maxima(shape: tuple[int, ...]) -> None:
    assert off_scale(Rank1(), draw(*shape)) < 1e-6


def test_the_scales_tell_rank_one_from_its_mutant() -> None:
    assert off_scale(mutated(catalog.get("int4-rank1"))(), draw(6, 5)) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_above_zero_stays_so_and_upper_never_falls(shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    scale = smallest_maximum(x)
    assert bool((through(Rank1(), x) >= scale / 16 * (1 - 1e-6)).all())
    above = through(Rank1(), x, "upper")
    assert bool((above >= x).all()) and bool((above <= x + scale / 16 * (1 + 1e-5)).all())


def test_an_outlier_spoils_neither_its_row_nor_its_column() -> None:
    """In blocks, all 128 entries beside it end in the lowest code."""
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) + 1.0
    x[5, 7] = 1e6
    error = ((through(Rank1(), x) - x).abs() / x).amax()
    blocks = Dynamic4(128)
    spoiled = ((blocks.decode(blocks.encode(x, "nonneg"), "nonneg") - x).abs() / x)[5].median()
    assert error < 0.07 and spoiled > 1e4


@pytest.mark.parametrize("codec", [Rank1(), Factored4()])
def test_zeros_stay_zeros(codec: MatrixCodec) -> None:
    x = draw(6, 5)
    x[2] = 0
    x[:, 1] = 0
    found = through(codec, x)
    assert not found[2].any() and not found[:, 1].any() and not through(codec, torch.zeros(3, 4)).any()
    assert bool((found[x > 0] > 0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_keep_the_means_of_rows_and_columns(shape: tuple[int, ...]) -> None:
    assert off_means(Factored4(), draw(*shape)) < 1e-5
    outer = torch.outer(torch.rand(4) + 1, torch.rand(5) + 1)
    torch.testing.assert_close(through(Factored4(), outer), outer)


def test_the_means_tell_factors_from_their_mutant() -> None:
    assert off_means(mutated(catalog.get("int4-factored"))(), draw(6, 5)) > 0.1


def test_an_average_kept_as_factors_is_the_average_of_the_factors() -> None:
    codec, kept = Factored4(), torch.zeros(6, 5)
    rows, columns = torch.zeros(6), torch.zeros(5)
    for seed in range(20):
        squared = draw(6, 5, seed=seed)
        kept = through(codec, 0.9 * kept + 0.1 * squared)
        rows, columns = 0.9 * rows + 0.1 * squared.mean(1), 0.9 * columns + 0.1 * squared.mean(0)
    torch.testing.assert_close(kept, torch.outer(rows, columns) / rows.mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 2), (0, 5), (2, 1)])
def test_codes_pack_and_unpack(shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    stored = packed(codes)
    assert stored.dtype == torch.uint8 and stored.shape == (shape[0], -(-torch.Size(shape[1:]).numel() // 2))
    assert torch.equal(unpacked(stored, shape), codes)


@pytest.mark.parametrize("name, bytes_each", [("int4-rank1", 1.08), ("int4-factored", 0.58)])
def test_adamw_keeps_what_the_format_says(name: str, bytes_each: float) -> None:
    p = nn.Parameter(torch.zeros(256, 128))
    opt = AdamW([p], state=name)
    p.grad = draw(256, 128, seed=3) - 1
    opt.step()
    assert opt.state_bytes() / p.numel() < bytes_each
    kept = {key for key in opt.state[p] if key.startswith("exp_avg_sq")}
    wanted = {"codes", "max0", "max1"} if name == "int4-rank1" else {"rows", "columns"}
    assert kept == {f"exp_avg_sq.{part}" for part in wanted}
    assert opt.state[p]["exp_avg.codes"].dtype == torch.uint8  # in blocks


@pytest.mark.parametrize("name", ["int4-rank1", "int4-factored"])
def test_signed_state_and_vectors_are_kept_in_blocks(name: str) -> None:
    matrix, vector = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(8192))
    for opt, p, keys in (
        (Lion([matrix], state=name), matrix, {"exp_avg"}),
        (AdamW([vector], state=name), vector, {"exp_avg", "exp_avg_sq"}),
    ):
        found = set(opt.state[p]) - {"step"}
        assert found == {f"{key}.{part}" for key in keys for part in ("codes", "scale")}


@pytest.mark.parametrize("name", ["int4-rank1", "int4-factored"])
@pytest.mark.parametrize("backend", ["auto", "eager", "chunks"])
def test_a_resumed_run_is_the_uninterrupted_one(name: str, backend: Any) -> None:
    def run(interrupt: bool) -> Tensor:
        p = nn.Parameter(draw(96, 64) / 100)
        opt = AdamW([p], lr=1e-2, state=name, backend=backend)
        for step in range(6):
            if interrupt and step == 3:
                saved = opt.state_dict()
                opt = AdamW([p], lr=1e-2, state=name, backend=backend)
                opt.load_state_dict(saved)
            p.grad = (draw(96, 64, seed=step) - 1) / 10
            opt.step()
        return p.detach()

    assert torch.equal(run(False), run(True))


@pytest.mark.parametrize("name, most", [("int4-rank1", 0.2), ("int4-factored", 0.35)])
def test_a_small_network_learns_nearly_as_with_float32_state(name: str, most: float) -> None:
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    y = (x @ torch.randn(64, 10, generator=torch.Generator().manual_seed(2))).argmax(1)

    def loss(state: str) -> float:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        opt = AdamW(net.parameters(), lr=3e-3, state=state)
        for step in range(150):
            opt.zero_grad()
            at = slice(64 * (step % 8), 64 * (step % 8) + 64)
            nn.functional.cross_entropy(net(x[at]), y[at]).backward()
            opt.step()
        return float(nn.functional.cross_entropy(net(x), y).detach())

    assert abs(loss(name) / loss("fp32") - 1) < most


def test_names_give_the_formats() -> None:
    assert get("int4-rank1") == Rank1() and get("int4-factored") == Factored4()
    assert Rank1().for_slot("signed", (8, 8)) == Dynamic4(128) and Rank1().for_slot("nonneg", (8,)) == Dynamic4(128)
