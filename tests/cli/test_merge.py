"""`poise merge` and `poise plan merge`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from merge.folders import model, rewrite, tensors

from poise.merge import merging

RECIPE = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {density: [1, 0.5], weight: 1.0}}
  - {model: b, parameters: {density: 0.5, weight: 0.3}}
parameters: {int8_mask: true}
"""


@pytest.fixture
def recipe(poise: Callable) -> Path:
    """A recipe over three models, in the folder that the program runs in."""
    model(Path("base"), 0)
    for seed, name in enumerate("ab", 1):
        model(Path(name), seed, near=Path("base"))
    Path("r.yaml").write_text(RECIPE)
    return Path("r.yaml")


def test_a_merge_ends_with_a_table_and_says_what_was_understood_differently(poise: Callable, recipe: Path) -> None:
    ended = poise("merge", "r.yaml", "out")
    assert ended.code == 0 and ended.err == ""
    assert "verified" in ended.out and "note: int8_mask: no effect here" in ended.out and "note: trim_scope:" in ended.out
    assert tensors(Path("out")).keys() == tensors(Path("a")).keys()


def test_json_says_the_same_to_a_program_and_what_is_finished_is_kept(poise: Callable, recipe: Path) -> None:
    arguments = ("merge", "r.yaml", "out", "--json", "--max-shard-size", "20KB")
    first, again = (json.loads(poise(*arguments).out) for _ in range(2))
    assert first["method"] == "ties" and first["models"] == ["base", "a", "b"] and first["broken"] == []
    assert first["shards"] > 1 and first["found"] == 0 and again["found"] == first["shards"]
    assert json.loads(poise(*arguments, "--fresh").out)["found"] == 0


def test_settings_and_dtype_of_the_command_line_beat_the_recipes(poise: Callable, recipe: Path) -> None:
    assert poise("merge", "r.yaml", "none", "--set", "weight=0", "--set", "density=1").code == 0
    base, found = tensors(Path("base")), tensors(Path("none"))
    assert all(torch.equal(found[name], base[name]) for name in base)
    ended = poise("merge", "r.yaml", "half", "--dtype", "float16", "--set", "lambda=[0, 1]")
    assert ended.code == 0 and {t.dtype for t in tensors(Path("half")).values()} == {torch.float16}
    first = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensors(Path("half"))[first], base[first].half())


def test_another_recipe_does_not_go_on_where_one_ended(poise: Callable, recipe: Path) -> None:
    assert poise("merge", "r.yaml", "out").code == 0
    ended = poise("merge", "r.yaml", "out", "--set", "density=1")
    assert ended.code == 2 and "--fresh" in ended.err
    assert poise("merge", "r.yaml", "out", "--set", "density=1", "--fresh").code == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("density: 0.5", "densty: 0.5"),
            "r.yaml:6: models[1].parameters.densty: ties has no such setting; did you mean density?",
        ),
        (("merge_method", "merge_methd"), "r.yaml:2: merge_methd: unknown key"),
        (("model: b,", "model: absent,"), "absent: does not exist"),
        (("ties", "della"), "poise does not have 'della'"),
    ],
)
@pytest.mark.parametrize("verb", [("merge",), ("plan", "merge")])
def test_bad_recipes_end_with_2_and_a_line(
    verb: tuple[str, ...], change: tuple[str, str], said: str, poise: Callable, recipe: Path
) -> None:
    recipe.write_text(RECIPE.replace(*change))
    ended = poise(*verb, "r.yaml", "out")
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err and not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("absent.yaml", "out"), "absent.yaml: no such recipe"),
        (("r.yaml", "out", "--set", "density"), "--set 'density' must be NAME=VALUE"),
        (("r.yaml", "out", "--set", "densty=1"), "--set densty: ties has no such setting"),
        (("r.yaml", "out", "--dtype", "int8"), "dtype='int8'"),
        (("r.yaml", "out", "--max-shard-size", "much"), "size 'much'"),
        (("r.yaml", "a"), "would overwrite it"),
    ],
)
def test_bad_arguments_end_with_2_and_a_line(arguments: tuple[str, ...], said: str, poise: Callable, recipe: Path) -> None:
    ended = poise("merge", *arguments)
    assert ended.code == 2 and said in ended.err


def test_nan_is_bad_input_found_on_the_way(poise: Callable, recipe: Path) -> None:
    weights = tensors(Path("b"))
    weights["model.norm.weight"][3] = float("nan")
    rewrite(Path("b"), weights)
    ended = poise("merge", "r.yaml", "out", "--quiet")
    assert ended.code == 2 and "b/model.safetensors: tensor 'model.norm.weight'" in ended.err and "NaN" in ended.err


def test_a_result_that_is_not_what_it_must_be_ends_with_1(
    poise: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "verify", lambda *_: ["w: rows 0 to 7 are not what merging gives"])
    ended = poise("merge", "r.yaml", "out")
    assert ended.code == 1 and "w: rows 0 to 7 are not what merging gives" in ended.err


def test_an_interruption_ends_with_3(poise: Callable, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "verify", interrupted)
    ended = poise("merge", "r.yaml", "out")
    assert ended.code == 3 and "the same command goes on" in ended.err


def test_a_plan_says_memory_disk_and_time_and_writes_nothing(poise: Callable, recipe: Path) -> None:
    ended = poise("plan", "merge", "r.yaml", "out", "--max-shard-size", "20KB")
    assert ended.code == 0 and not Path("out").exists()
    assert all(word in ended.out for word in ("result", "read", "memory", "time", "files", "note: int8_mask"))
    found = json.loads(poise("plan", "merge", "r.yaml", "out", "--json").out)
    size = sum(t.nbytes for t in tensors(Path("a")).values())
    assert found["written"] == size and found["read"] > 3 * size and found["errors"] == [] and found["seconds"] > 0


def test_a_plan_lists_every_error_that_headers_show(poise: Callable, recipe: Path) -> None:
    model(Path("b"), 7, num_hidden_layers=5)
    ended = poise("plan", "merge", "r.yaml", "out", "--json")
    found = json.loads(ended.out)
    assert ended.code == 2 and len(found["errors"]) == 9 and ended.err.count("poise: ") == 9


def test_what_is_no_command_is_a_training_task(poise: Callable) -> None:
    plain, named = (poise("plan", *more, "toy.py", "--no-steps") for more in ((), ("train",)))
    assert plain.code == named.code == 0 and plain.out == named.out and "adamw on toy" in plain.out
    ended = poise("plan", "--help")
    assert ended.code == 0 and "merge" in ended.out and "train" in ended.out
