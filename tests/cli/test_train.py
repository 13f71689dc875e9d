"""`poise train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

RUN = ["train", "toy.py", "--method", "adamw", "--steps", "12", "--checkpoint-every", "5", "--set", "lr=0.05"]


def test_a_run_writes_its_weights_and_says_how_good_they_are(poise: Callable) -> None:
    ended = poise(*RUN)
    assert ended.code == 0 and "adamw on toy: " in ended.out and "after 12 passes" in ended.out
    assert load_file("runs/train/toy/model/model.safetensors").keys() == {"weight", "bias"}


def test_json_says_the_same_to_a_program(poise: Callable) -> None:
    found = json.loads(poise(*RUN, "--json").out)
    assert found["passes"] == 12 and not found["diverged"] and found["resumed_from"] == 0
    assert found["loss"]["report"] > 0 and Path(found["model"]).is_dir()


def test_settings_and_state_reach_the_optimizer(poise: Callable) -> None:
    assert poise(*RUN, "--state", "int8", "--set", "betas=(0.8, 0.9)").code == 0
    state = torch.load("runs/train/toy/checkpoint.pt", weights_only=True)
    assert json.loads(state["identity"]["settings"]) == {"betas": [0.8, 0.9], "lr": 0.05, "state": "int8"}


def test_the_same_command_goes_on_after_an_interruption(poise: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from poise.compare.loop import Loop

    step = Loop.step

    def interrupted(loop: Loop) -> int:
        if loop.done == 8:
            raise KeyboardInterrupt
        return step(loop)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "step", interrupted)
        ended = poise(*RUN)
    assert ended.code == 3 and "5 of 12 passes are kept" in ended.err
    again = json.loads(poise(*RUN, "--json").out)
    assert again["resumed_from"] == 5
    whole = json.loads(poise(*RUN, "--json", "--out", "whole").out)
    assert again["loss"] == whole["loss"]


def test_adapters_are_trained_and_written_beside_the_weights_they_make(poise: Callable) -> None:
    arguments = ["train", "code-lm-small", "--adapt", "lora", "--set", "rank=2", "--set", "lr=0.01", "--steps", "4", "--json"]
    found = json.loads(poise(*arguments).out)
    held = load_file(f"{found['adapter']}/adapter_model.safetensors")
    folded = load_file(f"{found['model']}/model.safetensors")
    assert len(held) == 2 * 7 and not any(".adapter." in name for name in folded)
    base = "model.layers.0.mlp.up_proj"
    product = held[f"base_model.model.{base}.lora_B.weight"] @ held[f"base_model.model.{base}.lora_A.weight"]
    state = torch.load("runs/train/code-lm-small/checkpoint.pt", weights_only=True)["model"]
    torch.testing.assert_close(folded[f"{base}.weight"], state[f"{base}.weight"] + 4 * product)
    assert product.abs().max() > 0


def test_a_run_that_diverges_ends_with_one(poise: Callable) -> None:
    ended = poise("train", "toy.py", "--method", "toy-sgd", "--set", "lr=1e20", "--steps", "500")
    assert ended.code == 1 and "diverged after" in ended.err and ended.out == ""


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--method", "adamx"], "did you mean"),
        (["--set", "lr"], "NAME=VALUE"),
        (["--set", "colour=red"], "cannot be built with"),
        (["--state", "int7"], "int7"),
        (["--device", "gpu"], "--device gpu"),
        (["--task", "digits"], "give one"),
    ],
)
def test_bad_input_is_named_and_ends_with_two(poise: Callable, arguments: list[str], message: str) -> None:
    ended = poise("train", "toy.py", *arguments)
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1


def test_another_run_in_the_same_folder_is_refused_until_it_is_asked_for(poise: Callable) -> None:
    poise(*RUN)
    ended = poise(*RUN, "--seed", "1")
    assert ended.code == 2 and "of another run: seed 0, not 1" in ended.err
    assert poise(*RUN, "--seed", "1", "--fresh").code == 0
