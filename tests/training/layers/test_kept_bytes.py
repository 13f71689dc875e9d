"""What a forward pass keeps, counted."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from poise.training import kept_bytes


def test_a_linear_layer_keeps_its_input_and_no_parameter() -> None:
    layer, x = nn.Linear(8, 5), torch.randn(3, 7, 8)
    assert kept_bytes(lambda: layer(x), layer) == 3 * 7 * 8 * 4
    assert kept_bytes(lambda: layer(x)) == 3 * 7 * 8 * 4  # x takes no gradient, so the weight is not needed
    assert kept_bytes(lambda: layer(x.requires_grad_())) == 3 * 7 * 8 * 4 + 5 * 8 * 4


def test_what_several_layers_keep_is_counted_once() -> None:
    layers, x = nn.ModuleList(nn.Linear(8, 5) for _ in range(3)), torch.randn(7, 8)
    assert kept_bytes(lambda: [layer(x) for layer in layers], layers) == 7 * 8 * 4


def test_what_needs_no_gradient_is_not_kept_and_checkpointing_is_seen() -> None:
    model, x = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2)), torch.randn(7, 8)
    with torch.no_grad():
        assert kept_bytes(lambda: model(x), model) == 0
    assert kept_bytes(lambda: model(x), model) == 7 * (8 + 64) * 4
    assert kept_bytes(lambda: checkpoint(model, x, use_reentrant=False), model) == 7 * 8 * 4
