"""The low-rank pairs of a model, as an optimizer asks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, stirred
from torch import nn

from poise.adapt import LoRA, adapters, attach, pairs
from poise.adapt.folding import folded_weight


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_pairs_are_the_parameters_themselves_in_the_models_order(method: str) -> None:
    model = gpt()
    attach(model, method, rank=3, alpha=6.0)
    found = pairs(model)
    assert [pair.name for pair in found] == list(adapters(model))
    held = {id(p) for p in model.parameters()}
    for pair in found:
        assert pair.layer is model.get_submodule(pair.name)
        assert {id(pair.A), id(pair.B)} <= held
        assert pair.A.shape == (3, pair.layer.in_features)
        assert pair.B.shape == (pair.layer.out_features, 3)
        assert pair.scale == 2.0


def test_their_product_is_what_folds() -> None:
    model = Mixed().double()
    attach(model, LoRA(rank=2, alpha=3.0), ["all", "embedding"])
    stirred(model)
    for pair in pairs(model):
        rows = pair.layer.adapter.layout.rows
        moved = rows.view(folded_weight(pair.layer)) - rows.view(pair.layer.weight)
        torch.testing.assert_close(moved, pair.scale * pair.B @ pair.A, rtol=1e-12, atol=1e-12)


def test_tied_and_shared_layers_have_one_pair() -> None:
    one = nn.Linear(4, 4)
    model: Any = nn.Sequential(one, nn.Linear(4, 4), one, nn.Linear(4, 4))
    model[3].weight = model[1].weight
    attach(model, "lora", rank=1)
    assert [pair.name for pair in pairs(model)] == ["0", "1"]


def test_a_frozen_factor_is_among_them() -> None:
    model = gpt()
    attach(model, "lora")
    pairs(model)[0].A.requires_grad_(False)
    assert len(pairs(model)) == 14


def test_without_pairs_it_says_how_to_get_some() -> None:
    with pytest.raises(ValueError, match="no low-rank pairs; attach"):
        pairs(gpt())
