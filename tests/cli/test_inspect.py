"""`poise inspect`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poise.models import GPT, GPTConfig

NAMES = 21


@pytest.fixture(autouse=True)
def model(poise: Callable) -> None:
    """A small model in `m`."""
    torch.manual_seed(0)
    GPT(GPTConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2)).save_pretrained("m")


def edit(name: str, place: tuple[int, ...], value: float) -> None:
    tensors = load_file("m/model.safetensors")
    tensors[name][place] = value
    save_file(tensors, "m/model.safetensors", {"format": "pt"})


def test_the_table_tells_of_every_tensor_what_it_is(poise: Callable) -> None:
    ended = poise("inspect", "m")
    assert ended.code == 0 and ended.err == ""
    assert ended.out.startswith("nothing stands out") and "layers: 2 in model.layers" in ended.out
    rows = {
        line.split()[0]: line.split() for line in ended.out.splitlines() if line.startswith(" model.layers.1.") or "lm_" in line
    }
    assert rows["model.layers.1.self_attn.k_proj.weight"][1:5] == ["attention.k", "16", "x", "16"]
    assert "condition" not in ended.out


def test_what_stands_out_is_said_before_the_table(poise: Callable) -> None:
    edit("model.layers.1.mlp.up_proj.weight", (3, 5), math.nan)
    first = poise("inspect", "m").out.splitlines()[0]
    assert first.startswith("error: model.layers.1.mlp.up_proj.weight: 1 of 384 entries are NaN") and "[3, 5]" in first


def test_spectra_add_their_columns_and_sort_by_them(poise: Callable) -> None:
    ended = poise("inspect", "m", "--spectra", "--sort", "condition", "--match", "*.mlp.*")
    conditions = [float(line.split()[-1]) for line in ended.out.splitlines() if line.startswith(" model.layers")]
    assert len(conditions) == 6 and conditions == sorted(conditions, reverse=True) and conditions[-1] >= 1


@pytest.mark.parametrize("sort", ["name", "size", "norm", "rms", "outliers", "kurtosis"])
def test_every_order_lists_every_tensor(poise: Callable, sort: str) -> None:
    ended = poise("inspect", "m", "--sort", sort)
    assert ended.code == 0 and sum(".weight" in line and "head:" not in line for line in ended.out.splitlines()) == NAMES


def test_json_says_the_same_to_a_program(poise: Callable) -> None:
    found = json.loads(poise("inspect", "m", "--json").out)
    assert found["schema_version"] == 1 and found["path"] == "m" and len(found["tensors"]) == NAMES
    tensor = next(tensor for tensor in found["tensors"] if tensor["name"] == "lm_head.weight")
    weight = load_file("m/model.safetensors")["lm_head.weight"].double()
    assert tensor["statistics"]["norm"] == pytest.approx(float(weight.norm()), rel=1e-12) and tensor["role"] == "head"
    assert found["findings"] == []


def test_quiet_says_nothing(poise: Callable) -> None:
    assert poise("inspect", "m", "--quiet") == (0, "", "")


def test_a_file_is_inspected_as_a_folder_is(poise: Callable) -> None:
    found = json.loads(poise("inspect", "m/model.safetensors", "--json").out)
    assert found["layers"] == {"model.layers": 2} and found["vocabulary"] == 256


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "nowhere"),
        (["m", "--sort", "taste"], "--sort 'taste': known are file, name, size"),
        (["m", "--match", "*.nothing"], "match '*.nothing': none of the 21 names"),
        (["m/config.json"], "config.json"),
        (["m", "--html", "m"], "m"),
    ],
)
def test_bad_input_is_named_and_ends_with_two(poise: Callable, arguments: list[str], message: str) -> None:
    ended = poise("inspect", *arguments)
    assert ended.code == 2 and ended.out == "" and message in ended.err


def test_a_page_is_written(poise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from poise.compare.report import pages

    monkeypatch.setattr(pages, "get_plotlyjs", lambda: "/* plotly.js */")
    edit("model.layers.1.mlp.up_proj.weight", (3, 5), math.inf)
    ended = poise("inspect", "m", "--html", "out/page.html")
    text = Path("out/page.html").read_text(encoding="utf-8")
    assert ended.code == 0 and ended.out.rstrip().endswith("written: out/page.html")
    assert "1 error" in text and 'id="norms"' in text and 'id="spectra"' not in text and text.count("<tr") > NAMES
