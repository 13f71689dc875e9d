"""What a setting is at one tensor."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

import pytest

from poise import catalog
from poise.merge.recipe import Case
from poise.merge.recipe.names import THEIRS, checked, resolve
from poise.merge.recipe.schema import Setting
from poise.merge.recipe.settings import depth_of, look_up, value_at


@pytest.mark.parametrize(("depth", "value"), [(0.0, 0.0), (1 / 3, 0.3), (0.5, 0.5), (2 / 3, 0.7), (0.9, 0.91), (1.0, 1.0)])
def test_a_gradient_is_interpolated_between_its_values(depth: float, value: float) -> None:
    assert value_at((0, 0.3, 0.7, 1), "x", depth) == pytest.approx(value)


def test_text_in_a_gradient_is_not_interpolated() -> None:
    assert [value_at(("a", "b", "c"), "x", depth) for depth in (0, 0.49, 0.5, 0.99, 1)] == ["a", "a", "b", "b", "c"]


def test_the_first_case_whose_filter_is_in_the_name_holds() -> None:
    cases: Setting = (Case(1, "self_attn"), Case((0, 10), "q_proj"), Case(3))
    assert value_at(cases, "layers.0.self_attn.q_proj", 0.5) == 1
    assert value_at(cases, "layers.0.q_proj", 0.5) == 5
    assert value_at(cases, "norm", 0.5) == value_at(cases, None, 0.5) == 3
    assert value_at((Case(1, "mlp"),), "norm", 0) is None
    assert value_at((Case(1, "*"), Case(2)), "norm", 0) == 1


def test_the_nearest_level_holds_if_one_of_its_cases_fits() -> None:
    levels = [{"w": (Case(1, "mlp"),)}, {"v": 5}, {"w": 2}]
    assert look_up("w", levels, "mlp.up", 0) == 1
    assert look_up("w", levels, "norm", 0) == 2
    assert look_up("u", levels, "norm", 0) is None


def test_depth_goes_from_the_first_layer_to_the_last() -> None:
    assert [depth_of(place, 5) for place in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert depth_of(0, 1) == 1


def words_of(kind: Any) -> list[str]:
    """The words that a setting's type names, wherever in it they stand."""
    own = [arg for arg in get_args(kind) if isinstance(arg, str)] if get_origin(kind) is Literal else []
    return [*own, *(word for arg in get_args(kind) if not isinstance(arg, str) for word in words_of(arg))]


def test_every_word_that_a_method_knows_may_stand_in_a_recipe() -> None:
    seen = 0
    for method in catalog.methods("merge"):
        if method.kind != "merge":
            continue
        for kind in resolve(method.name, own=True).types.values():
            for word in words_of(kind):
                assert checked(word, kind) == word
                seen += 1
            if words_of(kind):
                with pytest.raises(ValueError, match="must be one of"):
                    checked("no such word", kind)
    assert seen > 20
    assert checked(3, resolve("ota", own=True).types["compress"]) == 3


def test_every_method_of_mergekit_that_poise_has_is_found_with_its_settings() -> None:
    for name, line in THEIRS.items():
        found = resolve(name)
        assert {here if isinstance(here, str) else here[0] for here in line.settings.values()} <= set(found.types), name
