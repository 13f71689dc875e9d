"""LoRA adapters: folded into their model, or merged as adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from merge.folders import model, tensors
from poise.checkpoint import CheckpointError
from poise.merge import Merged, merge
from poise.merge.merger import Merger
from poise.merge.recipe import parse

QUERY, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model(tmp_path / "base", 0, num_hidden_layers=2)


def adapter(folder: Path, seed: int, rank: int, modules: tuple[str, ...] = (QUERY,), **config: Any) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    stored: dict[str, Tensor] = {}
    for module in modules:
        for layer in range(2):
            path = f"base_model.model.{module.format(layer)}"
            inner = 24 if "down" in module else 16
            stored[f"{path}.lora_A.weight"] = torch.randn(rank, inner, generator=generator)
            stored[f"{path}.lora_B.weight"] = torch.randn(16, rank, generator=generator)
    save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [module.rsplit(".", 1)[1] for module in modules]
    known = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": targets,
        "bias": "none",
    }
    known |= {"base_model_name_or_path": "base", "fan_in_fan_out": False, "use_rslora": False, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return folder


def change(folder: Path, module: str) -> Tensor:
    """s B A of one weight."""
    stored = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    a, b = (stored.get(f"base_model.model.{module}.lora_{x}.weight") for x in "AB")
    if a is None or b is None:
        return torch.zeros(())
    alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
    return alpha / len(a) * b @ a


def test_a_folded_adapter_is_the_sum_that_it_stands_for(base: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", 1, 2)
    merge([f"{base}+{lora}"], out=tmp_path / "out")
    start, found = tensors(base), tensors(tmp_path / "out")
    name = f"{QUERY.format(1)}.weight"
    torch.testing.assert_close(found[name], start[name] + change(lora, QUERY.format(1)))
    assert all(torch.equal(found[n], start[n]) for n in start if "q_proj" not in n)


def test_every_method_of_differences_takes_folded_adapters(base: Path, tmp_path: Path) -> None:
    loras = [adapter(tmp_path / f"lora{i}", i, 2) for i in range(2)]
    listed = ", ".join(f"{{model: {base}+{lora}}}" for lora in loras)
    text = f"merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{listed}]\nparameters: {{weight: 0.5}}\n"
    work = Merger(parse(text))
    assert work.plan.errors == []
    (planned,) = [t for t in work.planned if t.name == f"{QUERY.format(0)}.weight"]
    wanted = tensors(base)[planned.name] + sum(0.5 * change(lora, QUERY.format(0)) for lora in loras)
    torch.testing.assert_close(work.rows(planned, 0, 16), wanted)
    torch.testing.assert_close(work.rows(planned, 3, 9), wanted[3:9])


def test_adapters_are_merged_as_an_adapter_of_the_summed_rank(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1, 2, (QUERY, DOWN))
    two = adapter(tmp_path / "two", 2, 3, use_rslora=False, lora_alpha=4)
    out = tmp_path / "out"
    found = merge([one, two], weight=([1, 3], 1), out=out)
    assert isinstance(found, Merged) and found.broken == () and found.tensors == 8
    for layer, (first, second) in enumerate(((0.5, 0.5), (0.75, 0.25))):
        for module in (QUERY.format(layer), DOWN.format(layer)):
            wanted = first * change(one, module) + second * change(two, module)
            torch.testing.assert_close(change(out, module), wanted, rtol=1e-5, atol=1e-5)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"] and {config["r"], *config["rank_pattern"].values()} == {5, 2}
    found = merge([one, two], "task_arithmetic", lambda_=0.5, out=tmp_path / "sum")
    torch.testing.assert_close(
        change(tmp_path / "sum", QUERY.format(0)),
        0.5 * sum(change(x, QUERY.format(0)) for x in (one, two)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.hf
def test_peft_loads_a_merged_adapter(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loras = [adapter(tmp_path / "one", 1, 2, (QUERY, DOWN)), adapter(tmp_path / "two", 2, 3)]
    merge(loras, "task_arithmetic", weight=(0.5, 1.0), out=tmp_path / "out")
    found = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out")).merge_and_unload()
    for module in (QUERY.format(1), DOWN.format(0)):
        wanted = tensors(base)[f"{module}.weight"] + 0.5 * change(loras[0], module) + change(loras[1], module)
        torch.testing.assert_close(found.state_dict()[f"{module}.weight"], wanted, rtol=1e-5, atol=1e-5)


def test_what_adapters_do_not_allow_is_named(base: Path, tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", 1, 2)
    with pytest.raises(CheckpointError, match=r"one: is an adapter, and others are whole models; fold it"):
        merge([one, base])
    with pytest.raises(ValueError, match="merge_method: adapters are merged as adapters by linear and task_arithmetic"):
        merge([one], "warp", out=tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no adapter; what follows a"):
        merge([f"{base}+{base}"])
    wide = adapter(tmp_path / "wide", 1, 2, ("model.layers.{}.mlp.up_proj",))
    with pytest.raises(CheckpointError, match=r"the adapter's change is \[16, 16\], the model's weight \[24, 16\]"):
        merge([f"{base}+{wide}"])
    strange = adapter(tmp_path / "strange", 1, 2, ("model.layers.{}.k",))
    with pytest.raises(CheckpointError, match="the model has no such tensor; the adapter is for another model"):
        merge([f"{base}+{strange}"])
