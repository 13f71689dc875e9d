"""What holds for every merge method: it is its formula, and the same however the models come.

A method's own test file, `tests/merge/methods/test_ties.py` for what stands in `methods/ties.py`, defines

    reference(models, base, **settings)    the published formula in plain float64, over the whole model at once
    CASES: list[dict]                      settings under which the two are compared
    WHOLE: dict                            settings under which one model is given back; default {}
    EQUAL: dict                            settings under which equal models are; default WHOLE
    COUNT: int                             how many models it takes; default 3
    NAN: "propagated" | "refused"          what becomes of a NaN in a model; default "propagated"

Where a file holds several entries, `reference_<name>` and so on come first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.cases import mutated, told

from merge.cutting import State, draw, family, largest_gap, merge_cut, moments, same
from poise.catalog import Method, methods
from poise.merge import merge_tensors
from poise.merge.protocol import besides

MERGES = [entry for entry in methods("merge") if entry.kind == "merge"]
every = pytest.mark.parametrize("entry", MERGES, ids=lambda entry: entry.name)


def beside(entry: Method, count: int) -> dict[str, Any]:
    return {name: moments(count) for name in besides(entry.target)}


def count_of(entry: Method) -> int:
    return told(entry, "COUNT", 3)


def merged(entry: Method, models: list[State], base: State, target: Callable[..., Any] | None = None, **settings: Any) -> State:
    return merge_tensors(target or entry.target, models, base, **settings, **beside(entry, len(models)))


def gap_to_reference(entry: Method, target: Callable[..., Any] | None = None) -> float:
    base, models = family(count_of(entry), torch.float64)
    gaps = []
    for settings in told(entry, "CASES"):
        wanted = told(entry, "reference")(models, base, **settings, **beside(entry, len(models)))
        gaps.append(largest_gap(merged(entry, models, base, target, **settings), wanted))
    return max(gaps)


@every
def test_it_is_its_formula(entry: Method) -> None:
    assert gap_to_reference(entry) < 1e-12


@every
def test_its_reference_tells_it_from_its_mutant(entry: Method) -> None:
    assert gap_to_reference(entry, mutated(entry)) > 1e-4


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_one_model_comes_back_bit_for_bit(entry: Method, dtype: torch.dtype) -> None:
    base, models = family(1, dtype)
    found = merged(entry, models, base, **told(entry, "WHOLE", {}))
    assert same({**found, "steps": models[0]["steps"]}, models[0])
    assert torch.equal(found["steps"], base["steps"])


@every
def test_equal_models_give_that_model(entry: Method) -> None:
    base, models = family(1)
    settings = told(entry, "EQUAL", told(entry, "WHOLE", {}))
    found = merge_tensors(
        entry.target,
        models * count_of(entry),
        base,
        **settings,
        **{k: v * count_of(entry) for k, v in beside(entry, 1).items()},
    )
    assert same({**found, "steps": models[0]["steps"]}, models[0])


@every
def test_inputs_are_not_changed(entry: Method) -> None:
    base, models = family(count_of(entry))
    extra = beside(entry, len(models))
    before = [
        {name: t.clone() for name, t in state.items()} for state in [base, *models, *(s for v in extra.values() for s in v)]
    ]
    for settings in told(entry, "CASES"):
        found = merge_tensors(entry.target, models, base, **settings, **extra)
        for t in found.values():
            if t.is_floating_point():
                t.fill_(7.0)
    after = [base, *models, *(s for v in extra.values() for s in v)]
    assert all(same(a, b) for a, b in zip(before, after, strict=True))


@every
@pytest.mark.parametrize("sizes", [(1,), (4, 1, 3)], ids=str)
def test_cut_in_rows_it_is_the_same_bit_for_bit(entry: Method, sizes: tuple[int, ...]) -> None:
    base, models = family(count_of(entry))
    for settings in told(entry, "CASES"):
        whole = merged(entry, models, base, **settings)
        cut = merge_cut(entry.target, models, base, sizes, True, **settings, **beside(entry, len(models)))
        assert same(cut, whole), settings


@every
def test_it_is_deterministic(entry: Method) -> None:
    base, models = family(count_of(entry))
    for settings in told(entry, "CASES"):
        assert same(merged(entry, models, base, **settings), merged(entry, models, base, **settings))


@every
def test_strides_do_not_matter(entry: Method) -> None:
    base, models = family(count_of(entry))
    turned = [{n: t.mT.contiguous().mT if t.ndim >= 2 else t for n, t in state.items()} for state in (base, *models)]
    settings = told(entry, "CASES")[0]
    assert not turned[0]["embed.weight"].is_contiguous()
    assert same(merged(entry, turned[1:], turned[0], **settings), merged(entry, models, base, **settings))


@every
def test_a_nan_in_a_model_is_refused_or_shows(entry: Method) -> None:
    base, models = family(count_of(entry))
    models[1]["layers.1.proj.weight"][2, 3] = torch.nan
    settings = told(entry, "EQUAL", told(entry, "WHOLE", {}))
    if told(entry, "NAN", "propagated") == "refused":
        with pytest.raises(ValueError, match=r"layers\.1\.proj\.weight"):
            merged(entry, models, base, **settings)
    else:
        assert torch.isnan(merged(entry, models, base, **settings)["layers.1.proj.weight"][2, 3])


@every
def test_models_that_do_not_fit_are_refused_with_the_tensors_name(entry: Method) -> None:
    base, models = family(count_of(entry))
    models[1]["layers.0.norm.weight"] = torch.zeros(8)
    with pytest.raises(ValueError, match=r"model 1: tensor 'layers.0.norm.weight' is \(8,\), not \(7,\)"):
        merged(entry, models, base)
    del models[1]["layers.0.norm.weight"]
    with pytest.raises(ValueError, match=r"model 1: tensor 'layers.0.norm.weight' is missing"):
        merged(entry, models, base)


def test_every_merge_is_listed_here() -> None:
    assert {"linear", "slerp", "ties", "ota", "warp"} <= {entry.name for entry in MERGES}
    assert draw(1)["none"].shape == (0, 4)
