"""Folders that hold no adapter, a broken one, or one of another model: errors name file and tensor, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, output, stirred
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from poise.adapt import LoRA, adapters, attach, attached, export, load
from poise.checkpoint import CheckpointError

OWN, OWN_WEIGHTS = "poise_adapter.json", "adapter.safetensors"
PEFT, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {"poise": (OWN, OWN_WEIGHTS), "peft": (PEFT, PEFT_WEIGHTS)}


def written(folder: Path, form: Any, method: Any = "dora", **more: Any) -> Path:
    model = gpt()
    attach(model, method, ["q_proj", "up_proj"], also="*norm*", **more)
    stirred(model)
    return export(model, folder, form)


def refused(folder: Path, message: str, make: Callable[[], nn.Module] = gpt) -> None:
    model = make()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load(model, folder)
    assert attached(model) is None
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    if file.suffix == ".json":
        said = json.loads(file.read_text())
        change(said)
        file.write_text(json.dumps(said))
    else:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})


def without(part: str) -> Callable[[dict[str, Any]], Any]:
    return lambda said: [said.pop(name) for name in list(said) if part in name]


def replaced(part: str, tensor: Tensor) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({name: tensor.clone() for name in tensors if part in name})


def test_an_empty_folder_holds_nothing(tmp_path: Path) -> None:
    refused(tmp_path, "holds neither adapter_config.json nor poise_adapter.json")
    refused(tmp_path / "nowhere", "nowhere: holds neither")


@pytest.mark.parametrize("form", NAMES)
def test_broken_files_are_named(form: str, tmp_path: Path) -> None:
    config, weights = (written(tmp_path, form) / name for name in NAMES[form])
    whole = weights.read_bytes()
    for cut in (0, 7, 200, len(whole) - 5):
        weights.write_bytes(whole[:cut])
        refused(tmp_path, weights.name)
    weights.unlink()
    refused(tmp_path, weights.name)
    weights.write_bytes(whole)
    text = config.read_text()
    for broken in ("", "{", "[1]", text[:60]):
        config.write_text(broken)
        refused(tmp_path, config.name)
    config.write_text(text)
    load(gpt(), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("settings"), "poise_adapter.json: cannot be read .*settings"),
        (without("method"), "poise_adapter.json: cannot be read"),
        (lambda said: said.update(method="lorra"), "cannot be read .*unknown method 'lorra'"),
        (lambda said: said.update(method="adamw"), "poise_adapter.json: cannot be read"),
        (lambda said: said.update(layers=3), "poise_adapter.json: cannot be read"),
        (lambda said: said["settings"].update(rank=-1), "cannot be read .*rank=-1"),
        (lambda said: said.update(version=99), "is of version 99"),
        (lambda said: said["layers"].append("model.layers.9.up"), r"adapts 'model\.layers\.9\.up', and the model has no such"),
    ],
)
def test_a_config_that_says_what_is_not_so_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    changed(written(tmp_path, "poise") / OWN, change)
    refused(tmp_path, message)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("poise", without("layers.1.mlp.up_proj.adapter.lora_B"), r"adapter\.safetensors: tensor '.*lora_B': is missing"),
        ("poise", without("magnitude"), r"tensor '.*magnitude': is missing"),
        ("poise", without("model.norm"), r"tensor 'model\.norm\.weight': is missing"),
        (
            "poise",
            replaced("q_proj.adapter.lora_A", torch.zeros(8, 31)),
            r"lora_A': is \[8, 31\], and the model's is \[8, 32\]",
        ),
        ("poise", lambda tensors: tensors.update(more=torch.zeros(2)), r"tensor 'more': belongs to no adapter"),
        ("peft", without("layers.1.mlp.up_proj.lora_B"), "has no lora_B"),
        ("peft", replaced("up_proj.lora_A", torch.zeros(8, 31)), r"lora_A.*the base's is \[48, 32\]"),
        ("peft", replaced("up_proj.lora_A", torch.zeros(5, 32)), r"the config's rank is 8"),
        ("peft", replaced("lora_magnitude_vector", torch.zeros(31)), r"lora_magnitude_vector': is \[31\]"),
        ("peft", replaced("model.norm", torch.zeros(31)), r"tensor 'model\.norm\.weight': is \[31\]"),
        (
            "peft",
            lambda t: t.update({"base_model.model.other.weight": torch.zeros(2)}),
            "'other.weight': the model has no such",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(form: str, change: Any, message: str, tmp_path: Path) -> None:
    changed(written(tmp_path, form) / NAMES[form][1], change)
    refused(tmp_path, message)


@pytest.mark.parametrize("form", NAMES)
def test_another_model_is_told_from_the_one_it_was_trained_on(form: str, tmp_path: Path) -> None:
    written(tmp_path, form)
    refused(tmp_path, "the model has no such", Mixed)


def test_other_kinds_of_peft_are_refused(tmp_path: Path) -> None:
    changed(written(tmp_path, "peft") / PEFT, lambda said: said.update(peft_type="IA3"))
    refused(tmp_path, "peft_type 'IA3'")


def test_an_adapted_model_takes_no_other_adapters(tmp_path: Path) -> None:
    written(tmp_path, "poise")
    model = gpt()
    attach(model, "lora")
    stirred(model)
    wanted = output(model)
    with pytest.raises(ValueError, match="adapted already"):
        load(model, tmp_path)
    assert torch.equal(output(model), wanted)


@pytest.mark.parametrize("form", NAMES)
def test_loading_draws_nothing_and_keeps_settings(form: str, tmp_path: Path) -> None:
    method = LoRA(rank=3, alpha=4.5, dropout=0.1, rank_stabilized=True)
    written(tmp_path, form, method)
    before = torch.get_rng_state()
    model = gpt()
    torch.set_rng_state(before)
    kept = load(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert kept.method == method
    assert {adapter.scale for adapter in adapters(model).values()} == {method.scale}


def test_what_forms_there_are(tmp_path: Path) -> None:
    model = gpt()
    with pytest.raises(ValueError, match="model is not adapted"):
        export(model, tmp_path)
    attach(model, "lora")
    with pytest.raises(ValueError, match="form='onnx': must be 'auto', 'peft' or 'poise'"):
        export(model, tmp_path, "onnx")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())
