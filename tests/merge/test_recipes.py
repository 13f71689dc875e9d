"""Ten recipes in mergekit's syntax, against weights worked out by hand from its rules."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merge.folders import config, model, tensors
from poise.merge.merger import Merger
from poise.merge.merging import Merged, run
from poise.merge.recipe import parse

Weights = Mapping[str, Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models near one base."""
    where = tmp_path_factory.mktemp("models")
    model(where / "base", 0)
    for seed, name in enumerate("abc", 1):
        model(where / name, seed, near=where / "base")
    return where


def merged(recipe: str, folder: Path, out: Path) -> Merged:
    found = run(Merger(parse(recipe.replace("DIR", str(folder)))), out)
    assert found.broken == ()
    return found


def layer(name: str) -> int | None:
    found = re.search(r"layers\.(\d+)\.", name)
    return None if found is None else int(found[1])


def along(values: list[float], place: int | None, count: int = 4) -> float:
    """A gradient at a layer; before and after the layers its first value holds."""
    depth = 0.0 if place is None else place / (count - 1) * (len(values) - 1)
    low = min(int(depth), len(values) - 2)
    return values[low] + (depth - low) * (values[low + 1] - values[low])


def slerp(t: float, a: Tensor, b: Tensor) -> Tensor:
    if a.ndim < 2:
        return (1 - t) * a + t * b
    angle = math.acos(float((a * b).sum() / a.norm() / b.norm()))
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def elected(weights: list[float], taus: list[Tensor], mean: bool) -> Tensor:
    """Task vectors, summed or averaged over those with the sign of the sum."""
    stack = torch.stack([w * tau for w, tau in zip(weights, taus, strict=True)])
    agree = stack.sign() == stack.sum(0).sign()
    share = torch.tensor(weights).double().reshape(-1, *[1] * taus[0].ndim) * agree
    return (stack * agree).sum(0) / (share.sum(0).clamp(min=1e-12) if mean else 1)


def linear(name: str, w: Weights) -> Tensor:
    return (w["a"][name] + 0.3 * w["b"][name] + 0.5 * w["c"][name]) / 1.8


def gradients(name: str, w: Weights) -> Tensor:
    second = 0.5 if "mlp" in name else along([0.1, 0.9], layer(name)) if "layers.2" in name else 0.2
    return along([0, 0.3, 0.7, 1], layer(name)) * w["a"][name] + second * w["b"][name]


def angles(name: str, w: Weights) -> Tensor:
    t = 0.5
    if "self_attn" in name:
        t = along([0, 0.5, 0.3, 0.7, 1], layer(name))
    elif "mlp" in name:
        t = along([1, 0.5, 0.7, 0.3, 0], layer(name))
    return slerp(t, w["b"][name], w["a"][name])


def arithmetic(name: str, w: Weights) -> Tensor:
    base = w["base"][name]
    return base + 0.7 * (along([0, 1], layer(name)) * (w["a"][name] - base) + 0.4 * (w["b"][name] - base))


def ties(name: str, w: Weights) -> Tensor:
    base = w["base"][name]
    return base + elected([1.0, 0.5], [w[m][name] - base for m in "ab"], mean=True)


def ties_summed(name: str, w: Weights) -> Tensor:
    base = w["base"][name]
    return base + 1.3 * elected([0.5, 0.5], [w[m][name] - base for m in "ab"], mean=False)


def precedence(name: str, w: Weights) -> Tensor:
    """The source's weight, else the slice's, else the recipe's; depth is inside the slice; filters see the source's names."""
    place = layer(name)
    if place is None:  # the embedding belongs to the first slice, norm and head to the last; the depth there is 0
        first = "embed" in name
        one, two = ("a", "b") if first else ("c", "b")
        weights = (0.2, 0.25) if first else (1.0, 1.0)
    else:
        one, two = ("a", "b") if place < 2 else ("c", "b")
        depth = place % 2
        weights = ([0.2, 0.8][depth], 0.25) if place < 2 else ([1.0, 2.0][depth],) * 2
        if place == 3:
            weights = (2.0, 0.9)
        elif place == 2 and "q_proj" in name:
            weights = (1.0, 0.1)
    names = [name, name]
    if place is not None:
        names[1] = name.replace(f"layers.{place}.", f"layers.{place + 1 if place < 2 else place}.")
    return (weights[0] * w[one][names[0]] + weights[1] * w[two][names[1]]) / sum(weights)


def stacked(name: str, w: Weights) -> Tensor:
    place = layer(name)
    if place is None:
        return w["a" if "embed" in name else "b"][name] * 1.0
    if place < 3:
        return w["a"][name]
    return w["b"][name.replace(f"layers.{place}.", f"layers.{place - 2}.")] * (0.5 if "o_proj" in name else 1.0)


RECIPES: dict[str, tuple[str, Callable[[str, Weights], Tensor]]] = {
    "linear": (
        """
models:
  - {model: DIR/a, parameters: {weight: 1.0}}
  - {model: DIR/b, parameters: {weight: 0.3}}
  - {model: DIR/c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float32
""",
        linear,
    ),
    "gradients and filters": (
        """
merge_method: linear
models:
  - {model: DIR/a, parameters: {weight: [0, 0.3, 0.7, 1]}}
  - model: DIR/b
    parameters:
      weight:
        - {filter: mlp, value: 0.5}
        - {filter: layers.2, value: [0.1, 0.9]}
        - value: 0.2
parameters: {normalize: false}
""",
        gradients,
    ),
    "gradient slerp": (
        """
slices:
  - sources:
      - {model: DIR/a, layer_range: [0, 4]}
      - {model: DIR/b, layer_range: [0, 4]}
merge_method: slerp
base_model: DIR/b
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5 # the rest
""",
        angles,
    ),
    "task arithmetic": (
        """
merge_method: task_arithmetic
base_model: DIR/base
models:
  - {model: DIR/a, parameters: {weight: [0, 1]}}
  - model: DIR/base
  - {model: DIR/b, parameters: {weight: 0.4, density: 0.5}}
parameters: {lambda: 0.7, int8_mask: true}
""",
        arithmetic,
    ),
    "ties": (
        """
merge_method: ties
base_model: DIR/base
models:
  - {model: DIR/a, parameters: {weight: 1.0}}
  - {model: DIR/b, parameters: {weight: 0.5}}
parameters: {normalize: true, int8_mask: true}
""",
        ties,
    ),
    "ties, summed": (
        """
merge_method: ties
base_model: DIR/base
models:
  - {model: DIR/a, parameters: {weight: 0.5, density: 1}}
  - {model: DIR/b, parameters: {weight: 0.5, density: 1}}
parameters: {normalize: false, lambda: 1.3}
""",
        ties_summed,
    ),
    "dare_ties, nothing dropped": (
        """
merge_method: dare_ties
base_model: DIR/base
models: [{model: DIR/a}, {model: DIR/b}]
parameters: {weight: 0.5, lambda: 1.3, density: 1.0}
""",
        ties_summed,
    ),
    "source before slice before recipe": (
        """
merge_method: linear
slices:
  - sources:
      - {model: DIR/a, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
      - {model: DIR/b, layer_range: [1, 3]}
    parameters: {weight: 0.25}
  - sources:
      - {model: DIR/c, layer_range: [2, 4]}
      - model: DIR/b
        layer_range: [2, 4]
        parameters: {weight: [{filter: layers.3, value: 0.9}, {filter: q_proj, value: 0.1}]}
parameters: {weight: [1, 2]}
""",
        precedence,
    ),
    "layers stacked": (
        """
merge_method: passthrough
slices:
  - sources: [{model: DIR/a, layer_range: [0, 3]}]
  - sources: [{model: DIR/b, layer_range: [1, 4], parameters: {scale: [{filter: o_proj, value: 0.5}, {value: 1.0}]}}]
""",
        stacked,
    ),
    "one module": (
        """
merge_method: linear
modules:
  default:
    models:
      - {model: DIR/a, parameters: {weight: 1.0}}
      - {model: DIR/b, parameters: {weight: 0.3}}
      - {model: DIR/c, parameters: {weight: 0.5}}
""",
        linear,
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_gives_the_weights_that_its_rules_say(name: str, folder: Path, tmp_path: Path) -> None:
    recipe, rule = RECIPES[name]
    merged(recipe, folder, tmp_path / "out")
    weights = {m: {n: t.double() for n, t in tensors(folder / m).items()} for m in ("base", "a", "b", "c")}
    found = tensors(tmp_path / "out")
    layers = 6 if "stacked" in name else 4
    assert {layer(n) for n in found} == {None, *range(layers)} and len(found) == 3 + 9 * layers
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == layers
    for tensor, got in found.items():
        torch.testing.assert_close(got.double(), rule(tensor, weights), rtol=0, atol=5e-7, msg=f"{tensor} is another one")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("merge_method: model_stock\nmodels: [{model: DIR/a}]\n", "merge_method: poise does not have 'model_stock'; it has "),
        ("merge_method: lienar\nmodels: [{model: DIR/a}]\n", "unknown method 'lienar'; did you mean linear"),
        (
            "merge_method: linear\nmodels: [{model: DIR/a, parameters: {weigth: 1}}]\n",
            "recipe:2: models[0].parameters.weigth: linear has no such setting; did you mean weight?",
        ),
        (
            "merge_method: linear\nmodels: [{model: DIR/a}]\nparameters: {lambda: 1}\n",
            "parameters.lambda: linear has no such setting",
        ),
        (
            "merge_method: linear\nmodels: [{model: DIR/a}]\nparameters: {weight: much}\n",
            "parameters.weight: 'much' must be float",
        ),
        (
            "merge_method: linear\nmodels: [{model: DIR/a}]\nparameters: {normalize: 0.5}\n",
            "recipe:3: parameters.normalize: 0.5 must be bool",
        ),
        ("merge_method: ties\nmodels: [{model: DIR/a}]\n", "base_model: missing: ties merges differences from it"),
        (
            "merge_method: ties\nmodels: [{model: DIR/a}]\nbase_model: DIR/a\n",
            "models: only the base; ties needs at least one other model",
        ),
        (
            "merge_method: ties\nslices: [{sources: [{model: DIR/a, layer_range: [0, 1]}]}]\nbase_model: DIR/base\n",
            "slices[0].sources: base_model",
        ),
        (
            "merge_method: passthrough\nslices: [{sources: [{model: DIR/a, layer_range: [3, 5]}]}]\n",
            "slices[0].sources[0].layer_range: [3, 5] is beyond the 4 layers",
        ),
        ("merge_method: linear\nmodels: [{model: DIR/absent}]\n", "absent: does not exist; correct the path"),
        ("merge_method: linear\nmodels: [{model: meta/llama@main}]\n", "hf download meta/llama --revision main"),
        (
            "merge_method: linear\nmodels: [{model: DIR/a}]\nchat_template: alpaca\n",
            "chat_template: 'alpaca' is not carried by poise",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_name(recipe: str, said: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        Merger(parse(recipe.replace("DIR", str(folder)))).plan.check()


def test_what_has_no_effect_or_another_one_is_noted(folder: Path, tmp_path: Path) -> None:
    recipe = RECIPES["ties"][0]
    notes = merged(recipe, folder, tmp_path / "one").notes
    assert [note.split(":")[0] for note in notes] == ["int8_mask", "trim_scope"]
    asked = recipe.replace("int8_mask: true", "trim_scope: tensor")
    assert merged(asked, folder, tmp_path / "two").notes == ()


def test_layer_types_follow_their_layers(folder: Path, tmp_path: Path) -> None:
    for name, kinds in (("a", "stuv"), ("b", "wxyz")):
        config(folder / name, layer_types=list(kinds))
    merged(RECIPES["layers stacked"][0], folder, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == list("stuxyz")
    for name in "ab":
        found = config(folder / name)
        del found["layer_types"]
        (folder / name / "config.json").write_text(json.dumps(found))


def test_dare_is_drawn_from_the_seed(folder: Path) -> None:
    text = "merge_method: dare_linear\nbase_model: DIR/base\nmodels: [{model: DIR/a}]\nparameters: {density: 0.5}\n"
    recipe = parse(text.replace("DIR", str(folder)))

    def head(seed: int | None, settings: dict[str, int]) -> Tensor:
        merger = Merger(recipe, seed=seed, settings=settings)
        merger.plan.check()
        merger.observe()
        return merger.rows(merger.planned[-1], 0, 8)

    assert torch.equal(head(3, {}), head(3, {})) and torch.equal(head(3, {}), head(5, {"seed": 3}))
    assert not torch.equal(head(3, {}), head(4, {}))
