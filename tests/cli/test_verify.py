"""`poise verify`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from poise.models import GPT, GPTConfig

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(autouse=True)
def models(poise: Callable) -> None:
    """Models in `a`, in `same`, and in `b` with one entry changed."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2, max_position_embeddings=64))
    for folder in ("a", "same", "b"):
        model.save_pretrained(folder)
    change(lambda tensors: tensors[DOWN].index_put_((torch.tensor(7), torch.tensor(3)), torch.tensor(2.5)))


def change(edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file("b/model.safetensors")
    edit(tensors)
    save_file(tensors, "b/model.safetensors", {"format": "pt"})


def test_what_is_the_same_holds_any_bound(poise: Callable) -> None:
    ended = poise("verify", "a", "same", "--max-error", "0", "--no-outputs")
    assert ended.code == 0 and ended.err == "" and "21 of 21 tensors are equal in every bit, 0 differ" in ended.out


def test_a_broken_bound_ends_with_one_and_says_which_and_where(poise: Callable) -> None:
    ended = poise("verify", "a", "b", "--max-error", "1e-3", "--no-outputs")
    assert ended.code == 1
    assert ended.err.startswith(f"poise: {DOWN}: error 2.4") and "is above max_error 0.001 at [7, 3]" in ended.err
    assert "20 of 21 tensors are equal in every bit, 1 differ" in ended.out and "[7, 3]" in ended.out
    assert poise("verify", "a", "b", "--max-error", "3", "--no-outputs").code == 0
    assert poise("verify", "a", "b", "--no-outputs").code == 0


def test_names_shapes_and_nan_need_no_bound(poise: Callable) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors["extra"] = tensors.pop("model.norm.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:200].clone()
        tensors["model.layers.0.input_layernorm.weight"][4] = math.nan

    change(edit)
    ended = poise("verify", "a", "b", "--no-outputs", "--quiet")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.splitlines() == [
        "poise: only in A: model.norm.weight",
        "poise: only in B: extra",
        "poise: lm_head.weight: shape [256, 16] in A, [200, 16] in B",
        "poise: model.layers.0.input_layernorm.weight: an entry is finite in A and not in B, as at [4]",
    ]


def test_json_says_the_same_to_a_program(poise: Callable) -> None:
    ended = poise("verify", "a", "b", "--json", "--max-error", "1", "--no-outputs")
    found = json.loads(ended.out)
    assert ended.code == 1 and not found["equal"] and len(found["broken"]) == 1
    (changed,) = [tensor for tensor in found["tensors"] if not tensor["equal"]]
    assert changed["name"] == DOWN and changed["at"] == [7, 3] and changed["b"] == 2.5
    assert found["outputs"] is None and found["outputs_missing"] == "not asked for"


@pytest.mark.hf
def test_outputs_are_compared_where_models_can_be_built(poise: Callable) -> None:
    ended = poise("verify", "a", "b", "--max-kl", "1e-6")
    assert ended.code == 1 and "outputs: KL" in ended.err and "is above max_kl 1e-06" in ended.err
    assert "outputs on 4 sequences of 64 random tokens" in ended.out
    Path("some.txt").write_text("import os\n" * 20)
    ended = poise("verify", "a", "same", "--max-kl", "0", "--text", "some.txt")
    assert ended.code == 0 and "KL 0 nats, same first choice at 100.0% of positions" in ended.out


def test_files_without_a_config_are_compared_by_their_tensors_alone(poise: Callable) -> None:
    ended = poise("verify", "a/model.safetensors", "b/model.safetensors")
    assert ended.code == 0 and "outputs were not compared: " in ended.out and "no directory with a config.json" in ended.out
    ended = poise("verify", "a/model.safetensors", "same/model.safetensors", "--max-kl", "1")
    assert ended.code == 1 and "max_kl 1: the divergence could not be measured" in ended.err


def test_the_loss_of_a_task_is_bounded(poise: Callable) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 1)
    with torch.no_grad():
        linear.weight.fill_(1.0)
        linear.bias.fill_(0.0)
    save_file(linear.state_dict(), "good.safetensors")
    save_file({"weight": torch.zeros(1, 4), "bias": torch.zeros(1)}, "bad.safetensors")
    both = ("good.safetensors", "bad.safetensors", "--task", "toy.py", "--no-outputs")
    ended = poise("verify", *both, "--max-loss-increase", "0.1")
    assert ended.code == 1 and "loss on toy: 0 with A" in ended.out and "is above max_loss_increase 0.1" in ended.err
    assert poise("verify", *both, "--max-loss-increase", "100").code == 0
    assert poise("verify", both[1], both[0], *both[2:], "--max-loss-increase", "0").code == 0
    assert json.loads(poise("verify", *both, "--json").out)["losses"]["a"] == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["a", "nowhere"], "nowhere"),
        (["a", "b", "--task", "nosuch"], "task 'nosuch' is unknown"),
        (["a", "b", "--max-loss-increase", "1"], "--max-loss-increase needs a --task"),
        (["a", "b", "--max-kl", "1", "--no-outputs"], "--max-kl and --no-outputs"),
        (["a", "b", "--text", "nowhere"], "--text nowhere: no such file"),
        (
            ["a", "b", "--task", "toy.py", "--no-outputs"],
            "not in the checkpoint; is it of the model of task 'toy'",
        ),
        (["a", "b", "--device", "abacus"], "--device abacus"),
    ],
)
def test_bad_input_is_named_and_ends_with_two(poise: Callable, arguments: list[str], message: str) -> None:
    ended = poise("verify", *arguments)
    assert ended.code == 2 and ended.out == "" and message in ended.err and len(ended.err.splitlines()) == 1
