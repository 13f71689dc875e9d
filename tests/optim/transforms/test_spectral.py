"""Orthogonalized updates and their scale by shape (Muon, 2024; Muon is Scalable for LLM Training, arXiv 2502.16982)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play
from torch import Tensor

from poise.linalg import polar
from poise.optim import Optimizer, chain
from poise.optim.transform import Context, Param, Transform
from poise.optim.transforms.spectral import orthogonalize, shape_scale

# m rows = outputs, n columns.
FACTORS = {
    "original": lambda m, n: math.sqrt(max(1.0, m / n)),
    "match_rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(m / n),
    "none": lambda m, n: 1.0,
}


def param(*shape: int, role: str = "matrix", splits: tuple[int, ...] = ()) -> Param:
    return Param("layer.weight", torch.Size(shape), torch.float64, role=role, splits=splits)


def run(links: list[Transform], p: Param, u: Tensor) -> Tensor:
    """The links one after another, on an update as the engine shows it to them."""
    for link in links:
        u = link.update(u, {}, torch.zeros_like(u), Context({}, param=p))
    return u


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rms(u: Tensor) -> float:
    return float(u.square().mean().sqrt())


# What a link sees of a parameter: a convolution as (out, in * kernel), experts as that many matrices, equal ones as a batch.
SEEN = [
    (param(24, 40), (24, 40)),
    (param(40, 24), (40, 24)),
    (param(24, 40), (3, 24, 40)),
    (param(36, 4, 3, 3, role="conv"), (36, 36)),
    (param(64, 3, 3, role="conv"), (64, 9)),
    (param(5, 24, 40, role="experts"), (5, 24, 40)),
    (param(48, 16, splits=(16, 16, 16)), (48, 16)),
    (param(48, 16, splits=(32, 8, 8)), (48, 16)),
    (param(48, 16, splits=(32, 8, 8)), (2, 48, 16)),
    (param(5, 48, 16, role="experts", splits=(24, 24)), (5, 48, 16)),
]


def parts(p: Param, u: Tensor) -> list[Tensor]:
    return list(u.split(list(p.splits), dim=-2)) if p.splits else [u]


@pytest.mark.parametrize("p, shape", SEEN)
def test_every_matrix_of_a_parameter_is_orthogonalized_by_itself(p: Param, shape: tuple[int, ...]) -> None:
    u = normal(*shape)
    found = run([orthogonalize("svd")], p, u)
    for part, before in zip(parts(p, found), parts(p, u), strict=True):
        for o, m in zip(part.reshape(-1, *part.shape[-2:]), before.reshape(-1, *part.shape[-2:]), strict=True):
            left, _, right = torch.linalg.svd(m, full_matrices=False)
            assert distance([o], [left @ right]) < 1e-12


@pytest.mark.parametrize("p, shape", SEEN)
@pytest.mark.parametrize("rule", FACTORS)
def test_the_scale_is_that_of_the_matrix_that_was_orthogonalized(rule: Any, p: Param, shape: tuple[int, ...]) -> None:
    u = normal(*shape)
    wanted = [FACTORS[rule](part.shape[-2], part.shape[-1]) * part for part in parts(p, u)]
    assert distance([run([shape_scale(rule)], p, u)], [torch.cat(wanted, dim=-2)]) < 1e-15 * 20


def test_a_convolution_is_scaled_by_its_filters_and_not_by_its_kernel() -> None:
    u = torch.ones(256, 36, dtype=torch.float64)
    assert float(run([shape_scale("original")], param(256, 4, 3, 3, role="conv"), u)[0, 0]) == pytest.approx(
        math.sqrt(256 / 36)
    )


@pytest.mark.parametrize("p, shape", SEEN)
def test_match_rms_moves_every_entry_by_02_on_average(p: Param, shape: tuple[int, ...]) -> None:
    found = run([orthogonalize("svd"), shape_scale("match_rms")], p, normal(*shape))
    assert rms(found) == pytest.approx(0.2, abs=1e-12)


@pytest.mark.parametrize("p, shape", SEEN)
@pytest.mark.parametrize("rule", FACTORS)
def test_the_announced_rms_is_that_of_exactly_orthogonal_updates(rule: Any, p: Param, shape: tuple[int, ...]) -> None:
    links = [orthogonalize("svd"), shape_scale(rule)]
    assert rms(run(links[:1], p, normal(*shape))) == pytest.approx(links[0].update_rms(p), rel=1e-12)
    assert rms(run(links, p, normal(*shape))) == pytest.approx(links[1].update_rms(p), rel=1e-12)


@pytest.mark.parametrize("shape, low, high", [((256, 256), 0.17, 0.19), ((256, 1024), 0.185, 0.2), ((1024, 256), 0.185, 0.2)])
def test_five_ns5_steps_move_entries_a_little_less_than_02(shape: tuple[int, int], low: float, high: float) -> None:
    found = run([orthogonalize("ns5", dtype=torch.float32), shape_scale("match_rms")], param(*shape), normal(*shape))
    assert low < rms(found) < high


@pytest.mark.parametrize("rule, transposes", [("none", True), ("match_rms", True), ("original", False), ("spectral", False)])
def test_a_transposed_update_has_the_transposed_result_unless_the_scale_knows_rows(rule: Any, transposes: bool) -> None:
    u = normal(40, 24)
    links = [orthogonalize(), shape_scale(rule)]
    gap = distance([run(links, param(40, 24), u)], [run(links, param(24, 40), u.mT.contiguous()).mT])
    assert gap < 1e-12 if transposes else gap > 0.01


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("options", [{"method": "ns5"}, {"steps": 3}, {"form": "gram"}, {"dtype": torch.bfloat16}])
def test_options_reach_the_orthogonalizer(options: dict[str, Any]) -> None:
    u = normal(24, 30).float()
    found = run([orthogonalize(**options)], param(24, 30), u)
    assert torch.equal(found, polar.orthogonalize(u, **options))
    assert not torch.equal(found, polar.orthogonalize(u))


@pytest.mark.parametrize("p, shape", SEEN)
def test_the_update_that_comes_in_is_not_written_to(p: Param, shape: tuple[int, ...]) -> None:
    u = normal(*shape)
    before = u.clone()
    run([orthogonalize(), shape_scale("match_rms")], p, u)
    run([shape_scale("match_rms")], p, u)
    assert torch.equal(u, before)


@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
@pytest.mark.parametrize("rule", FACTORS)
def test_empty_matrices_pass(rule: Any, shape: tuple[int, int]) -> None:
    links = [orthogonalize(), shape_scale(rule)]
    assert run(links, param(*shape), torch.zeros(shape)).shape == shape
    assert [link.update_rms(param(*shape)) for link in links] == [None, None]


def test_an_optimizer_shows_them_matrices_and_writes_the_parameters_own_shapes() -> None:
    """Gradient descent along the polar factor: convolutions by their filters, equal shapes together."""
    start, grads = draw([(24, 40), (24, 40), (12, 4, 3, 3), (6, 30)], 3)
    params = leaves(start)
    rule = chain(orthogonalize("svd"), shape_scale("spectral"))
    found = play(Optimizer(params, rule, lr=0.1, backend="eager"), params, grads)
    for i, weight in enumerate(start):
        for row in grads:
            g = row[i]
            assert g is not None
            left, _, right = torch.linalg.svd(g.reshape(len(g), -1), full_matrices=False)
            o = (left @ right).reshape(g.shape)
            weight = weight - 0.1 * math.sqrt(len(g) / g[0].numel()) * o
        assert distance([found[i]], [weight]) < 1e-12


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "newton"}, "newton"),
        ({"steps": 0}, "steps=0"),
        ({"method": "svd", "steps": 2}, "no steps"),
        ({"form": "wide"}, "wide"),
        ({"method": "svd", "form": "gram"}, "no Gram form"),
        ({"dtype": torch.int8}, "int8"),
    ],
)
def test_unknown_options_are_refused_when_the_rule_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(**options)


def test_an_unknown_scale_rule_is_refused_when_the_rule_is_built() -> None:
    with pytest.raises(ValueError, match=r"moonlight.*original, match_rms, spectral, none"):
        shape_scale("moonlight")  # type: ignore[arg-type]


@pytest.mark.parametrize("link", [orthogonalize(), shape_scale()])
def test_splits_that_do_not_add_up_and_vectors_are_refused(link: Transform) -> None:
    with pytest.raises(ValueError, match=r"layer\.weight.*30, 10.*48 rows"):
        run([link], param(48, 16, splits=(30, 10)), normal(48, 16))
    with pytest.raises(ValueError, match=r"layer\.weight.*two dimensions"):
        link.update_rms(param(48))


def test_links_say_what_they_are() -> None:
    assert repr(orthogonalize("ns5", 6)) == "orthogonalize('ns5', steps=6, form='auto', dtype=None)"
    assert repr(shape_scale("match_rms")) == "shape_scale('match_rms')"
