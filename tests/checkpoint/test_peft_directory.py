"""Adapters: as stored, and as what they do to the base's weights; held to peft's own folding."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from checkpoint.forging import refused
from poise.checkpoint import CheckpointError, Delta, Full, PeftDirectory, open_checkpoint

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "fan_in_fan_out": False, "use_rslora": False}
Q = "model.layers.0.self_attn.q_proj"


def adapter(folder: Path, tensors: dict[str, Tensor], **config: Any) -> PeftDirectory:
    save_file({f"base_model.model.{name}": t.contiguous() for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    found = open_checkpoint(folder)
    assert isinstance(found, PeftDirectory)
    return found


def pair(module: str = Q, rank: int = 2, inputs: int = 5, outputs: int = 7) -> dict[str, Tensor]:
    return {f"{module}.lora_A.weight": torch.randn(rank, inputs), f"{module}.lora_B.weight": torch.randn(outputs, rank)}


def delta(found: PeftDirectory, name: str = f"{Q}.weight") -> Delta:
    update = found.deltas()[name]
    assert isinstance(update, Delta)
    return update


def test_the_raw_adapter_has_the_names_of_the_base_and_its_config(tmp_path: Path) -> None:
    tensors = pair()
    found = adapter(tmp_path, tensors, base_model_name_or_path="base")
    (tmp_path / "README.md").write_text("")
    assert set(found) == set(tensors) and f"{Q}.lora_A.weight" in found and len(found) == 2
    assert torch.equal(found.rows(f"{Q}.lora_B.weight", 2, 4), tensors[f"{Q}.lora_B.weight"][2:4])
    assert found.config["base_model_name_or_path"] == "base" and found.info(f"{Q}.lora_A.weight").shape == (2, 5)
    assert [file.name for file in PeftDirectory(tmp_path).side_files] == ["README.md"]


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8 / 2**0.5)])
def test_a_pair_is_a_delta_of_the_weights_shape_row_by_row(tmp_path: Path, rslora: bool, scale: float) -> None:
    tensors = pair()
    update = delta(adapter(tmp_path, tensors, use_rslora=rslora))
    whole = scale * (tensors[f"{Q}.lora_B.weight"].double() @ tensors[f"{Q}.lora_A.weight"].double())
    assert update.shape == (7, 5) and not update.whole
    torch.testing.assert_close(update.rows(0, 7).double(), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(update.rows(3, 5).double(), whole[3:5], rtol=1e-6, atol=1e-6)
    weight = torch.randn(7, 5)
    torch.testing.assert_close(update.applied(weight[2:6], 2).double(), weight[2:6].double() + whole[2:6], rtol=1e-6, atol=1e-6)


def test_of_weights_that_are_stored_turned_the_delta_is_turned(tmp_path: Path) -> None:
    tensors = pair()
    straight = delta(adapter(tmp_path, tensors)).rows(0, 7)
    turned = delta(adapter(tmp_path, tensors, fan_in_fan_out=True))
    assert turned.shape == (5, 7)
    torch.testing.assert_close(turned.rows(1, 4), straight.T[1:4])


def test_a_delta_turns_to_fit_a_weight_and_refuses_one_of_another_model(tmp_path: Path) -> None:
    update = delta(adapter(tmp_path, pair()))
    assert update.fitting(torch.Size((7, 5))) is update
    assert update.fitting(torch.Size((5, 7))).rows(0, 5).shape == (5, 7)
    with pytest.raises(CheckpointError) as error:
        update.fitting(torch.Size((7, 6)))
    refused(error, "of shape [7, 5], and the base's is [7, 6]", "another base", tensor=f"{Q}.lora_A.weight")


def test_half_precision_is_multiplied_in_float32(tmp_path: Path) -> None:
    tensors = {name: t.bfloat16() for name, t in pair().items()}
    rows = delta(adapter(tmp_path, tensors)).rows(0, 7)
    assert rows.dtype == torch.float32
    exact = 4 * (tensors[f"{Q}.lora_B.weight"].double() @ tensors[f"{Q}.lora_A.weight"].double())
    torch.testing.assert_close(rows.double(), exact, rtol=1e-6, atol=1e-6)


def test_patterns_of_ranks_and_alphas_are_taken_by_the_end_of_a_name_the_first_that_fits(tmp_path: Path) -> None:
    other = "model.layers.1.self_attn.q_proj"
    found = adapter(
        tmp_path,
        {**pair(rank=3), **pair(other)},
        rank_pattern={r"layers\.0\.self_attn\.q_proj": 3, "q_proj": 2},
        alpha_pattern={"0.self_attn.q_proj": 9, "_proj": 100},
    )
    assert delta(found).scale == 3.0
    assert delta(found, f"{other}.weight").scale == 4.0


def test_modules_that_were_saved_whole_replace_the_bases(tmp_path: Path) -> None:
    head = torch.randn(3, 5)
    found = adapter(tmp_path, {**pair(), "score.weight": head, "model.norm.bias": torch.ones(4)})
    update = found.deltas()["score.weight"]
    assert isinstance(update, Full) and update.shape == (3, 5) and not update.whole
    assert torch.equal(update.applied(torch.zeros(2, 5), 1), head[1:])
    assert set(found.deltas()) == {f"{Q}.weight", "score.weight", "model.norm.bias"}


@pytest.mark.parametrize(
    ("tensors", "config", "said", "tensor"),
    [
        (pair(), {"peft_type": "IA3"}, "peft_type 'IA3'", None),
        (pair(), {"layer_replication": [[0, 2]]}, "uses 'layer_replication'", None),
        (pair(), {"r": 4}, "lora_A [2, 5] and lora_B [7, 2], and the config's rank is 4", Q),
        (pair(), {"r": None}, "rank None", Q),
        (pair(), {"lora_alpha": "8"}, "alpha '8'", Q),
        (pair(), {"rank_pattern": [2]}, "'rank_pattern' that is not a JSON object", None),
        (pair(), {"rank_pattern": {"(": 2}}, "'rank_pattern' that is no pattern", None),
        ({f"{Q}.lora_A.weight": torch.ones(2, 5)}, {}, "has no lora_B, only lora_A", Q),
        ({f"{Q}.lora_B.weight": torch.ones(5, 2)}, {}, "has no lora_A, only lora_B", Q),
        ({**pair(), f"{Q}.lora_B.bias": torch.ones(7)}, {}, "a kind of LoRA that cannot be folded", f"{Q}.lora_B.bias"),
        ({f"{Q}.lora_A.weight": torch.ones(2), f"{Q}.lora_B.weight": torch.ones(2)}, {}, "lora_A [2] and lora_B [2]", Q),
    ],
)
def test_an_adapter_that_would_be_folded_wrongly_is_refused(
    tmp_path: Path, tensors: dict[str, Tensor], config: dict[str, Any], said: str, tensor: str | None
) -> None:
    found = adapter(tmp_path, tensors, **config)
    with pytest.raises(CheckpointError) as error:
        found.deltas()
    refused(error, said, tensor=tensor)


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*", "a*b*c*", "(a|b){9}"])
def test_a_pattern_that_could_match_for_ever_is_not_tried(tmp_path: Path, pattern: str) -> None:
    found = adapter(tmp_path, pair("a" * 40), rank_pattern={pattern + "$x": 2})
    with pytest.raises(CheckpointError) as error:
        found.deltas()
    refused(error, "may take for ever to match", "one by one")
    assert re.compile(pattern)


def test_an_adapter_without_its_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path)
    refused(error, "adapter_model.safetensors", "does not exist")


def test_a_pickled_adapter_is_read_as_well(tmp_path: Path) -> None:
    tensors = pair()
    torch.save({f"base_model.model.{name}": t for name, t in tensors.items()}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    found = PeftDirectory(tmp_path)
    assert set(found) == set(tensors) and delta(found).shape == (7, 5)


def test_a_name_with_and_without_the_prefix_is_refused(tmp_path: Path) -> None:
    adapter(tmp_path, pair())
    twice = {"base_model.model.a": torch.ones(1), "a": torch.ones(1)}
    save_file(twice, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError) as error:
        PeftDirectory(tmp_path)
    refused(error, "with 'base_model.model.' and without")


class Net(nn.Module):
    """Every kind of layer that LoRA takes, and a transformers Conv1D."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.emb = nn.Embedding(11, 6)
        self.square = nn.Embedding(6, 6)  # whose shape does not tell that it is stored (in, out)
        self.turned = Conv1D(8, 6)
        self.lin = nn.Linear(8, 5)
        self.conv = nn.Conv2d(3, 4, (3, 2))
        self.point = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lin(self.turned(self.emb(x))))


@pytest.mark.hf
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_folding_is_pefts_own(tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = Net()
    before = {name: t.clone() for name, t in base.state_dict().items()}
    config = LoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["emb", "square", "turned", "lin", "conv", "point"],
        modules_to_save=["head"],
        rank_pattern={"lin": 2},
        alpha_pattern={"conv": 5},
        **options,
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(str(tmp_path))
    folded = model.merge_and_unload().state_dict()
    found = open_checkpoint(tmp_path)
    assert isinstance(found, PeftDirectory)
    updates = found.deltas()
    assert set(updates) == {
        "emb.weight",
        "square.weight",
        "turned.weight",
        "lin.weight",
        "conv.weight",
        "point.weight",
        "head.weight",
        "head.bias",
    }
    for name, update in updates.items():
        weight = before[name]
        if isinstance(update, Delta):
            update = update.fitting(weight.shape)
        torch.testing.assert_close(update.applied(weight), folded[name], rtol=1e-5, atol=1e-6)
        if not update.whole:
            half = torch.cat([update.applied(weight[:2], 0), update.applied(weight[2:], 2)])
            torch.testing.assert_close(half, folded[name], rtol=1e-5, atol=1e-6)
        else:
            with pytest.raises(ValueError, match="needs all of its"):
                update.applied(weight[:2], 0)
    assert {name.removeprefix("base_model.model.") for name in load_file(tmp_path / "adapter_model.safetensors")} == set(found)
