"""The four passes, and the function in front of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from merge.folders import SMALL, model, rewrite, tensors
from poise.checkpoint import CheckpointError, StateDict
from poise.merge import Merged, merge, merger, merging
from poise.merge.merger import Merger
from poise.merge.needs import needs
from poise.merge.protocol import Each, Observer, Place, merge_tensors, observed
from poise.merge.recipe import Recipe, Reference, Slice, Source, parse
from poise.merge.verifying import verify
from poise.models import GPT, GPTConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("models")
    model(where / "base", 0)
    for seed, name in enumerate("ab", 1):
        model(where / name, seed, near=where / "base")
    return where


@pytest.mark.hf
def test_transformers_loads_what_was_merged_with_our_logits(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = merge([folder / "a", folder / "b"], "ties", base=folder / "base", out=tmp_path / "out", density=0.5)
    assert isinstance(found, Merged) and found.broken == () and found.method == "ties"
    ours = GPT(GPTConfig(**SMALL))
    ours.load_state_dict(tensors(tmp_path / "out"))
    tokens = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
        assert theirs.std() > 0.1
        torch.testing.assert_close(theirs, ours(tokens), rtol=0, atol=1e-5)


@pytest.mark.hf
def test_transformers_loads_a_stack_of_two_models(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = f"""
merge_method: passthrough
dtype: bfloat16
slices:
  - sources: [{{model: {folder}/a, layer_range: [0, 3]}}]
  - sources: [{{model: {folder}/b, layer_range: [1, 4]}}]
"""
    merging.run(Merger(parse(text)), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 6 and loaded.dtype == torch.bfloat16
    wanted = tensors(folder / "b")["model.layers.1.mlp.up_proj.weight"].bfloat16()
    assert torch.equal(loaded.state_dict()["model.layers.3.mlp.up_proj.weight"], wanted)


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_ties", "warp"])
def test_tiles_do_not_matter(method: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [tensors(folder / name) for name in "ab"]
    base = tensors(folder / "base") if method not in ("linear", "slerp") else None
    settings: dict[str, Any] = {"density": 0.3} if "ties" in method else {}
    whole = merge(weights, method, base=base, **settings)
    monkeypatch.setattr(merger, "TILE", 4 * 16 * 3)  # three rows of the narrow tensors, two of the wide ones
    cut = Merger(recipe := recipe_of(method, base is not None, settings), opened(weights, base))
    assert recipe.own and cut.plan.errors == []
    cut.observe()
    assert isinstance(whole, dict)
    for planned in cut.planned:
        rows = [cut.rows(planned, *ends) for ends in merger.tiles(planned.shape)]
        assert len(rows) > 1 or planned.numel <= 48
        torch.testing.assert_close(torch.cat(rows), whole[planned.name], rtol=0, atol=1e-7)


def test_of_equal_entries_the_first_of_the_model_are_kept_wherever_tiles_end(monkeypatch: pytest.MonkeyPatch) -> None:
    base = {"a": torch.zeros(7, 4), "b": torch.zeros(9, 4)}
    model = {name: torch.ones_like(t) for name, t in base.items()}
    monkeypatch.setattr(merger, "TILE", 4 * 4 * 2)  # two rows
    cut = Merger(recipe_of("ties", True, {"density": 0.7}, 1), opened([model], base))
    cut.observe()
    kept = [torch.cat([cut.rows(p, *ends) for ends in merger.tiles(p.shape)]).reshape(-1) for p in cut.planned]
    assert torch.cat(kept).tolist() == [1.0] * 44 + [0.0] * 20  # floor(0.7 * 64)


def recipe_of(method: str, rooted: bool, settings: dict[str, Any], models: int = 2) -> Recipe:
    sources = tuple(Source(Reference(f"m{i}")) for i in range(models))
    return Recipe(method, (Slice(sources),), Reference("base") if rooted else None, settings, own=True)


def opened(weights: list[dict[str, Tensor]], base: dict[str, Tensor] | None) -> dict[Reference, StateDict]:
    models = {Reference(f"m{i}"): StateDict(w) for i, w in enumerate(weights)}
    return models if base is None else models | {Reference("base"): StateDict(base)}


def test_a_merge_on_disk_is_the_merge_in_memory(folder: Path, tmp_path: Path) -> None:
    from poise.merge.methods.ties import ties

    merge([folder / "a", folder / "b"], "ties", base=folder / "base", out=tmp_path / "out", density=0.3, weight=(1.0, 0.5))
    weights = [tensors(folder / name) for name in "ab"]
    wanted = merge_tensors(ties, weights, tensors(folder / "base"), density=0.3, weight=(1.0, 0.5))
    found = tensors(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


class Largest(Observer[float]):
    """The largest entry of all, in two rounds, so that both are seen."""

    rounds = 2

    def __init__(self, count: int, factor: float = 1.0) -> None:
        self.count, self.factor, self.found, self.places = count, factor, 0.0, []

    def see(self, round: int, place: Place, tensors: Any, base: Any, settings: Any) -> None:
        assert len(tensors) == self.count and settings["factor"] == 2.0
        self.places.append((round, place.name, place.start, place.offset, place.layer))
        self.found = max(self.found, *(float(t.max()) for t in tensors))

    def answer(self, place: Place) -> float:
        return self.found


SEEN: list[Largest] = []


@observed(Largest)
def divided(tensors: list[Tensor], base: Tensor | None, *, seen: float, weight: Each[float], factor: float = 1.0) -> Tensor:
    """Every model's rows with its weight, over the largest entry of all."""
    assert isinstance(weight, tuple)
    return factor * sum((w * t for w, t in zip(weight, tensors, strict=True)), torch.zeros(())) / seen


def test_a_method_of_ones_own_observes_all_rows_in_order_of_names() -> None:
    models = [
        {
            "layers.1.w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
            "layers.0.w": torch.tensor([[5.0, 6.0]]),
            "a": torch.tensor(8.0),
        },
        {"layers.1.w": torch.zeros(2, 2), "layers.0.w": torch.zeros(1, 2), "a": torch.tensor(0.0)},
    ]
    found = merge(models, divided, weight=([1, 3], 0), factor=2.0)
    assert isinstance(found, dict) and list(found) == list(models[0])
    assert found["a"].item() == 2.0 and found["layers.0.w"].tolist() == [[1.25, 1.5]]
    assert found["layers.1.w"].tolist() == [[0.75, 1.5], [2.25, 3.0]]
    with pytest.raises(ValueError, match=r"models\[0\].parameters.weight: missing at layers.1.w"):
        merge(models, divided, factor=2.0)
    work = Merger(
        Recipe("divided", (Slice(tuple(Source(Reference(f"m{i}")) for i in range(2))),), settings={"weight": 1, "factor": 2.0}),
        opened(models, None),
        function=divided,
    )
    work.observe()
    places = [("a", 0, 0, None), ("layers.0.w", 0, 1, 0), ("layers.1.w", 0, 3, 1)]
    assert work.seen.places == [(number, *place) for number in range(2) for place in places]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_nan_in_a_model_is_told_with_file_and_tensor(method: str, folder: Path, tmp_path: Path) -> None:
    broken = model(tmp_path / "broken", 5)
    weights = tensors(broken)
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    rewrite(broken, weights)
    with pytest.raises(CheckpointError) as raised:
        merge([folder / "a", broken], method, base=folder / "base", out=tmp_path / "out")
    error = raised.value
    assert error.file == broken / "model.safetensors" and error.tensor == "model.layers.2.mlp.down_proj.weight"
    assert "NaN" in str(error) and not (tmp_path / "out" / "config.json").exists()


def test_what_was_written_is_verified_against_the_plan(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = Merger(parse(f"merge_method: linear\nmodels: [{{model: {folder}/a}}, {{model: {folder}/b}}]\n"))
    assert merging.run(work, out).broken == ()
    good = load_file(out / "model.safetensors")

    def told(changed: dict[str, Tensor]) -> list[str]:
        save_file(changed, out / "model.safetensors", metadata={"format": "pt"})
        return verify(out, work.planned, work.rows, merger.TILE)

    first = work.planned[0].name
    assert told(good) == []
    assert told({**good, first: good[first] * 1.001}) == [f"{first}: rows 0 to 39 are not what merging gives"]
    assert "are not all finite" in told({**good, "model.norm.weight": good["model.norm.weight"] / 0})[0]
    assert "not planned" in told({**good, "more": torch.ones(1)})[0]
    assert "not written" in told({n: t for n, t in good.items() if n != "model.norm.weight"})[0]
    assert "was planned" in told({**good, first: good[first].half()})[0]
    (out / "model.safetensors").write_bytes(b"nothing")
    assert len(verify(out, work.planned, work.rows, merger.TILE)) == 1
    (out / "config.json").write_text("{")
    assert told(good) != []


def test_the_fingerprint_changes_with_whatever_decides_the_result(folder: Path) -> None:
    def digest(text: str = "", **more: Any) -> str:
        recipe = f"merge_method: linear\nmodels: [{{model: {folder}/a}}, {{model: {folder}/b}}]\n{text}"
        return Merger(parse(recipe), **more).fingerprint()

    found = [digest(), digest("parameters: {weight: 2}\n"), digest(settings={"weight": 2}), digest(dtype="float16")]
    found += [digest("chat_template: chatml\n"), digest(f"base_model: {folder}/base\n")]
    assert len(set(found)) == len(found) and digest() == found[0]


def test_settings_in_python_are_values_tuples_lists_and_cases() -> None:
    a, b = ({f"layers.{i}.{n}": torch.full((2,), v) for i in range(3) for n in ("up", "down")} for v in (1.0, 10.0))
    found = merge([a, b], normalize=False, weight=([0, 1], {"up": 2, "*": 3}))
    assert isinstance(found, dict)
    assert {n: t[0].item() for n, t in found.items()} == {
        "layers.0.up": 20.0, "layers.0.down": 30.0, "layers.1.up": 20.5,
        "layers.1.down": 30.5, "layers.2.up": 21.0, "layers.2.down": 31.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"weight=\(1, 2, 3\): a tuple has one value for each of the 2 models"):
        merge([a, b], weight=(1, 2, 3))
    with pytest.raises(ValueError, match=r"parameters.wieght: linear has no such setting; did you mean weight"):
        merge([a, b], wieght=1)
    with pytest.raises(TypeError, match="models: must be a sequence"):
        merge("a")
    with pytest.raises(ValueError, match="unknown method 'tie'; did you mean ties"):
        merge([a, b], "tie")


def test_in_python_the_defaults_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(100)}
    found = merge([{"w": torch.randn(100, generator=generator)}], "ties", base=base)
    assert isinstance(found, dict) and int((found["w"] != 0).sum()) == 20


def test_modules_and_adapters_of_bases_by_identity_are_models_too() -> None:
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    found = merge([one, two], "slerp", base=two, t=0.0)
    assert isinstance(found, dict) and torch.equal(found["weight"], two.weight)


def test_second_moments_stand_beside_the_models(tmp_path: Path) -> None:
    models = [{"w": torch.full((2, 2), float(v))} for v in (1, 3)]
    moments = [{"w": torch.tensor([[1.0, 0.0], [1.0, 4.0]])}, {"w": torch.tensor([[1.0, 1.0], [0.0, 1.0]])}]
    found = merge(models, "ota", moments=moments)
    assert isinstance(found, dict)
    torch.testing.assert_close(found["w"], torch.tensor([[2.0, 3.0], [1.0, (2 + 3) / 3]]))
    for i, held in enumerate(moments):
        save_file(held, tmp_path / f"v{i}.safetensors")
        save_file(models[i], tmp_path / f"m{i}.safetensors")
    listed = ", ".join(
        f"{{model: {tmp_path}/m{i}.safetensors, parameters: {{moments: {tmp_path}/v{i}.safetensors}}}}" for i in range(2)
    )
    merging.run(Merger(parse(f"merge_method: ota\nmodels: [{listed}]\n")), tmp_path / "out")
    torch.testing.assert_close(tensors(tmp_path / "out")["w"], found["w"])


def test_needs_count_every_pass(folder: Path) -> None:
    text = f"merge_method: METHOD\nbase_model: {folder}/base\nmodels: [{{model: {folder}/a}}, {{model: {folder}/b}}]\n"
    size = sum(t.nbytes for t in tensors(folder / "a").values())
    linear = needs(Merger(parse(text.replace("METHOD", "linear"))))
    ties = needs(Merger(parse(text.replace("METHOD", "ties"))), timed=True)
    assert (linear.read, linear.written, linear.seconds) == (2 * size, size, None)
    assert ties.read % (3 * size) == 0 and ties.read > 3 * size and ties.written == size
    assert ties.memory > linear.memory and ties.seconds is not None and ties.seconds > 0


def test_a_result_does_not_land_on_its_models(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would overwrite it"):
        merge([folder / "a", folder / "b"], out=folder / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, and is a file"):
        merge([folder / "a"], out=tmp_path / "file")


def test_the_recipe_lies_beside_the_result(folder: Path, tmp_path: Path) -> None:
    text = f"merge_method: linear\nmodels: [{{model: {folder}/a}}]\n"
    (folder / "a" / "README.md").write_text("of model a")
    (folder / "a" / "generation_config.json").write_text("{ }")
    merging.run(Merger(parse(text)), tmp_path / "out")
    assert (tmp_path / "out" / "merge_recipe.yaml").read_text() == text
    assert (tmp_path / "out" / "generation_config.json").read_text() == "{ }" and not (tmp_path / "out" / "README.md").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
