"""Recipes in mergekit's YAML: what is read, what is refused, by which name and at which line."""

from __future__ import annotations

from pathlib import Path

import pytest

from poise.merge.recipe import Case, Reference, Slice, Source, Token, Tokenizer, parse, read


def body(lines: str) -> str:
    return f"merge_method: linear\n{lines}"


def refusal(lines: str) -> str:
    with pytest.raises(ValueError, match=r"^r\.yaml") as raised:
        parse(body(lines), "r.yaml")
    return str(raised.value)


def test_settings_are_values_gradients_or_cases() -> None:
    recipe = parse(
        body("""
models:
  - model: a
    parameters: {weight: 0.5, density: [1, 0.7, 0.1]}
  - model: b
    parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.2}], t: {filter: x, value: 1}}
parameters: {normalize: true, int8_mask: null}
""")
    )
    first, second = recipe.slices[0].sources
    assert first.settings == {"weight": 0.5, "density": (1, 0.7, 0.1)} and first.layers is None
    assert second.settings == {"weight": (Case((0, 1), "mlp"), Case(0.2)), "t": (Case(1, "x"),)}
    assert recipe.settings == {"normalize": True}


def test_slices_name_layers() -> None:
    recipe = parse(
        body("""
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
      - {model: b, layer_range: [3, 5]}
    parameters: {weight: 2}
  - sources: [{model: c, layer_range: [4, 8]}]
    base_model: c
""")
    )
    one, two = recipe.slices
    assert one == Slice(
        (
            Source(Reference("a"), (0, 2), {"weight": 1}, "slices[0].sources[0]"),
            Source(Reference("b"), (3, 5), {}, "slices[0].sources[1]"),
        ),
        {"weight": 2},
        None,
        "slices[0]",
    )
    assert (one.length, two.length, two.base) == (2, 4, Reference("c"))


def test_a_model_may_have_an_adapter_and_several_spellings() -> None:
    recipe = parse(body("models: [{model: a+b}, {model: {model: {path: c}, lora: d}}, {model: {path: e}}]\nbase_model: a\n"))
    assert recipe.models == (Reference("a"), Reference("a", "b"), Reference("c", "d"), Reference("e"))


def test_a_tokenizer_is_a_name_or_a_mapping() -> None:
    models = "models: [{model: a}]\n"
    assert parse(body(models + "tokenizer_source: union\n")).tokenizer == Tokenizer("union")
    assert parse(body(models + "tokenizer_source: x/y\n")).tokenizer == Tokenizer(Reference("x/y"))
    found = parse(
        body(
            models
            + """
tokenizer:
  source: base
  pad_to_multiple_of: 64
  tokens:
    <a>: {source: m}
    <b>: {source: {kind: zero}, force: true}
    <c>: {source: {kind: model_token, model: m, token_id: 7}}
    <d>: {source: {kind: model_token, model: m, token: <e>}}
"""
        )
    ).tokenizer
    m = Reference("m")
    tokens = {"<a>": Token(m), "<b>": Token(None, None, True), "<c>": Token(m, 7), "<d>": Token(m, "<e>")}
    assert found == Tokenizer("base", tokens, 64)


def test_of_two_dtypes_the_one_that_is_written_counts() -> None:
    models = "models: [{model: a}]\n"
    assert parse(body(models + "dtype: float32\nout_dtype: bfloat16\n")).dtype == "bfloat16"
    assert parse(body(models + "dtype: torch.float16\n")).dtype == "float16"


def test_one_module_is_the_whole_model() -> None:
    found = parse(body("modules: {default: {models: [{model: a}], parameters: {weight: 1}}}\nparameters: {weight: 2, x: 3}\n"))
    assert found.slices[0].sources[0].where == "modules.default.models[0]" and found.settings == {"weight": 1, "x": 3}
    assert "modules: not supported" in refusal("modules: {text: {models: [{model: a}]}, vision: {models: [{model: a}]}}\n")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("modles: []\n", "r.yaml:2: modles: unknown key; did you mean modules or models?"),
        ("models:\n  - model: a\n    weight: 1\n", "r.yaml:4: models[0].weight: unknown key"),
        ("models:\n  - model: a\n    layer_range: [0, 1]\n", "r.yaml:4: models[0].layer_range: unknown key"),
        ("models: [{parameters: {weight: 1}}]\n", "models[0]: model is missing"),
        ("models: []\n", "models: must be a list of at least one entry"),
        ("models: [{model: a+b+c}]\n", "models[0].model: 'a+b+c' must be a path, or path+adapter"),
        ("models: [{model: a, parameters: {weight: [1, x]}}]\n", "models[0].parameters.weight: must be numbers"),
        ("models: [{model: a, parameters: {weight: [{filter: x}]}}]\n", "parameters.weight[0].value: must be a value"),
        ("models: [{model: a, parameters: [1]}]\n", "models[0].parameters: must be a mapping"),
        ("models: [{model: a}]\nslices: []\n", "exactly one of models, slices and modules is needed, not models, slices"),
        ("dtype: float32\n", "exactly one of models, slices and modules is needed, not none"),
        ("models: [{model: a}]\ndtype: int4\n", "r.yaml:3: dtype: 'int4' must be one of float32"),
        ("slices: [{sources: [{model: a}]}]\n", "slices[0].sources[0]: layer_range is missing"),
        ("slices: [{sources: [{model: a, layer_range: [2, 2]}]}]\n", "layer_range: must rise from 0 or more"),
        ("slices: [{sources: [{model: a, layer_range: [0, x]}]}]\n", "layer_range: must be two layer numbers"),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]\n",
            "slices[0].sources: layer_range must be equally long",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 2]}], residual_weight: 1}]\n",
            "slices[0].residual_weight: not supported",
        ),
        ("models: [{model: {model: a, revision: b}}]\n", "models[0].model.revision: not supported"),
        ("models: [{model: a}]\ntokenizer_source: union\ntokenizer: {source: base}\n", "only one of the two may stand"),
        ("models: [{model: a}]\ntokenizer: {tokens: {x: {force: true}}}\n", "tokenizer.tokens.x: source is missing"),
        ("models: [{model: a}]\ntokenizer: {pad_to_multiple_of: 0}\n", "pad_to_multiple_of: must be a positive whole number"),
        (
            "models: [{model: a}]\ntokenizer: {tokens: {x: {source: {kind: mean}}}}\n",
            "source.kind: must be zero or model_token",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_place(lines: str, said: str) -> None:
    assert said in refusal(lines)


def test_files_are_read_and_what_is_no_recipe_is_said(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("merge_method: linear\nmodels: [{model: a}]\n")
    assert read(file) == read(str(file)) == read(file.read_text())
    with pytest.raises(ValueError, match=r"absent.yaml: no such recipe"):
        read(tmp_path / "absent.yaml")
    file.write_text("a: [b\n")
    with pytest.raises(ValueError, match=r"r.yaml: not YAML"):
        read(file)
    file.write_text("models: [{model: a}]\n")
    with pytest.raises(ValueError, match="merge_method is missing"):
        read(file)
