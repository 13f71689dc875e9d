"""Adapters in a comparison: what trains, with which optimizer, and what it is charged."""

from __future__ import annotations

import pytest
from torch import nn

from compare.toys import Toy
from poise import catalog
from poise.adapt import LoRA, attached
from poise.compare.entries import entry_of, of_family, parse
from poise.compare.loop import Loop
from poise.compare.train import train
from poise.models import GPT, GPTConfig
from poise.optim import AdamW, Muon


class Deep(Toy):
    """With a hidden layer, which can be adapted."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


CONFIG = GPTConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)


def test_an_adapter_is_trained_by_adamw_or_what_is_named() -> None:
    entries = parse("lora,other=lora(rank=2,around=muon,targets=q_proj)")
    assert {"lr", "weight_decay", "alpha"} <= set(entries["lora"].space)
    model = GPT(CONFIG)
    assert isinstance(entries["lora"].build(model, lr=1e-3, alpha=4.0), AdamW)
    kept = attached(model)
    assert kept is not None and kept.method == LoRA(alpha=4.0) and len(kept.layers) == 7
    model = GPT(CONFIG)
    assert isinstance(entries["other"].build(model, lr=1e-3), Muon)
    kept = attached(model)
    assert kept is not None and kept.layers == ("model.layers.0.self_attn.q_proj",) and kept.trainable == 2 * 2 * 16


def test_only_an_optimizer_can_be_named() -> None:
    with pytest.raises(ValueError, match="sam is a driver"):
        parse("lora(around=sam)")


def test_a_run_says_how_many_parameters_it_trained() -> None:
    lora, adamw = entry_of(catalog.get("lora"), {"rank": 1, "targets": "0"}), entry_of(catalog.get("adamw"), {})
    run, whole = (train(Deep(), one, {"lr": 0.01}, number=0, seed=0, passes=3, split="tune") for one in (lora, adamw))
    assert (run.trained, run.parameters, run.passes) == (8, 25 + 8, 3)
    assert whole.trained == whole.parameters == 25


def test_passes_that_look_at_gradients_first_count() -> None:
    for method in catalog.methods("adapt"):
        if method.kind == "adapter" and method.target.reads_losses:  # pyright: ignore[reportFunctionMemberAccess]
            entry = entry_of(method, {"targets": "0"})
            loop = Loop(Deep(), lambda model, entry=entry: entry.build(model, Deep(), lr=0.01), seed=0, passes=400)
            assert 0 < loop.prepared == loop.done, method.name


def test_a_family_is_all_that_trains_a_model() -> None:
    assert of_family("adapt").split(",")[0] == "adamw" and "lora" in of_family("adapt").split(",")
    assert "muon" in of_family("optim") and "sam" in of_family("training").split(",")
    with pytest.raises(ValueError, match="none of its methods trains"):
        of_family("merge")
