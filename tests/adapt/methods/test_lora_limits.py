"""Computational limits of LoRA (arXiv 2406.03136): sizes of attention's logits by part."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapt.cases import stirred
from conformance.cases import mutated
from torch import nn

from poise import catalog
from poise.adapt import LoRA, attach, pairs
from poise.adapt.methods.lora_limits import lora_limits


def attention(bias: bool = True) -> Any:
    torch.manual_seed(0)
    layers = {"q": nn.Linear(8, 12, bias=bias), "k": nn.Linear(8, 6, bias=bias)}
    return nn.ModuleDict(layers).double()


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_a_computation_by_hand(bias: bool) -> None:
    model = attention(bias)
    attach(model, LoRA(rank=2), nn.Linear)
    stirred(model)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found = lora_limits(x, model["q"], model["k"], heads=4, key_heads=2)
    whole, frozen = 0.0, 0.0
    q, k = model["q"](x).detach(), model["k"](x).detach()
    q0, k0 = (nn.functional.linear(x, model[n].weight, model[n].bias).detach() for n in "qk")
    linear, quadratic = 0.0, 0.0
    for b in range(2):
        for h in range(4):
            for i in range(5):
                for j in range(5):
                    at, to = slice(3 * h, 3 * h + 3), slice(3 * (h // 2), 3 * (h // 2) + 3)
                    qi, kj, oi, oj = q[b, i, at], k[b, j, to], q0[b, i, at], k0[b, j, to]
                    whole = max(whole, abs(float(qi @ kj)) / 3**0.5)
                    frozen = max(frozen, abs(float(oi @ oj)) / 3**0.5)
                    linear = max(linear, abs(float((qi - oi) @ oj + oi @ (kj - oj))) / 3**0.5)
                    quadratic = max(quadratic, abs(float((qi - oi) @ (kj - oj))) / 3**0.5)
    assert (found.total, found.frozen, found.linear, found.quadratic) == pytest.approx((whole, frozen, linear, quadratic))
    assert found.bound == math.sqrt(math.log(5))


def test_the_linear_part_tells_it_from_its_mutant() -> None:
    model = attention()
    attach(model, LoRA(rank=2), nn.Linear)
    stirred(model)
    x = torch.randn(5, 8, dtype=torch.float64)
    right, wrong = (kind(x, model["q"], model["k"], 2, 1) for kind in (lora_limits, mutated(catalog.get("lora-limits"))))
    assert right.frozen == wrong.frozen
    assert right.linear != pytest.approx(wrong.linear, rel=1e-3)


def test_parts_grow_with_the_adapters_as_their_degree_says_and_dominance_is_warned_of() -> None:
    model = attention()
    x = torch.randn(5, 8, dtype=torch.float64)
    plain = lora_limits(x, model["q"], model["k"], 2, 1)
    assert plain.adapter == 0.0
    assert plain.total == plain.frozen
    attach(model, LoRA(rank=2), nn.Linear)
    stirred(model)
    one = lora_limits(x, model["q"], model["k"], 2, 1)
    for pair in pairs(model):
        pair.B.data *= 100
    with pytest.warns(UserWarning, match="adapters make logits of"):
        other = lora_limits(x, model["q"], model["k"], 2, 1)
    assert other.frozen == one.frozen
    assert (other.linear, other.quadratic) == pytest.approx((100 * one.linear, 1e4 * one.quadratic))


def test_what_does_not_fit_is_named() -> None:
    model = attention()
    with pytest.raises(ValueError, match=r"x: \[1, 8\]"):
        lora_limits(torch.randn(1, 8), model["q"], model["k"], 2)
    with pytest.raises(ValueError, match="heads=5: must divide the 12"):
        lora_limits(torch.randn(3, 8), model["q"], model["k"], 5)
    with pytest.raises(ValueError, match="heads=2, key_heads=2: heads of queries are 6 wide, of keys 3"):
        lora_limits(torch.randn(3, 8), model["q"], model["k"], 2)
