"""Pair Customization (Customizing Text-to-Image Models with a Single Image Pair, arXiv 2405.01536)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, loss_of, output, stirred, tokens
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import (
    LoRA,
    PairCustomization,
    acting,
    adapters,
    attach,
    attached,
    disabled,
    export,
    fold,
    load,
    style_guidance,
    unfold,
)
from poise.optim import AdamW

EVERY = ["words", "re:blocks.0.[02]", "mix", "twice"]


def put(model: nn.Module, targets: Any = None, method: Any = PairCustomization) -> nn.Module:
    attach(model, method(content_rank=5, style_rank=4), targets, seed=0)
    return model


def overlap(method: Any) -> float:
    """The largest deviation of the rows of both A, taken together, from orthonormal ones; over layers of every kind."""
    worst = 0.0
    for adapter in adapters(put(Mixed().double(), EVERY, method)).values():
        both: Any = adapter
        rows = torch.cat([both.content.lora_A, both.style.lora_A])
        worst = max(worst, float((rows @ rows.T - torch.eye(9, dtype=rows.dtype)).abs().max()))
    return worst


def test_content_and_style_read_orthogonal_directions() -> None:
    assert overlap(PairCustomization) < 1e-13


def test_a_shared_direction_is_seen() -> None:
    assert overlap(mutated(catalog.get("pair-customization"))) > 0.9


def test_changes_of_the_weight_are_orthogonal_whatever_is_trained() -> None:
    for adapter in adapters(stirred(put(Mixed().double(), EVERY))).values():
        content, style = (part.change().detach() for part in adapter.parts().values())
        assert float(content.norm()) > 0.1 and float(style.norm()) > 0.1
        assert abs(float((content * style).sum())) < 1e-13 * float(content.norm() * style.norm()) * 10


def test_layers_of_one_width_read_the_same_directions_and_hold_them_once() -> None:
    model = gpt()
    attach(model, PairCustomization(4, 4), "linear", seed=0)
    parts = [part for adapter in adapters(model).values() for part in adapter.parts().values()]
    held = {id(part.lora_A): part.lora_A for part in parts}
    assert sorted(A.shape[1] for A in held.values()) == [32, 32, 48, 48]
    other = gpt()
    attach(other, PairCustomization(4, 4), "down_proj", seed=0)  # what else is adapted does not matter
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(adapters(other)[path].parts()["style"].lora_A, adapters(model)[path].parts()["style"].lora_A)


def test_only_B_trains_and_A_stays_bit_for_bit() -> None:
    model = put(gpt())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith("lora_B") for name in trained)
    kept = attached(model)
    assert kept is not None and kept.trainable == 8 * 32 * (5 + 4)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if name not in trained}
    assert sum("lora_A" in name for name in frozen) == 2
    opt = AdamW(model, lr=0.01, weight_decay=0.1)
    for _ in range(4):
        opt.zero_grad()
        loss_of(model, tokens(model)).backward()
        opt.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, frozen[name]) if name in frozen else bool(p.any()), name


def test_parts_act_alone_or_together() -> None:
    model = gpt().double()
    before = output(model)
    stirred(put(model))
    x = torch.randn(3, 32, dtype=torch.float64)
    layer: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    content, style = (part.change() for part in layer.adapter.parts().values())
    expected = {(): 0 * content, ("content",): content, ("style",): style, ("style", "content"): content + style}
    for names, change in expected.items():
        with acting(model, *names):
            torch.testing.assert_close(layer(x), x @ (layer.weight + change).T, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x), x @ (layer.weight + content + style).T, rtol=1e-12, atol=1e-12)
    with acting(model):
        assert torch.equal(output(model), before)
    with disabled(model):
        assert torch.equal(output(model), before)


def test_only_the_named_part_trains_and_all_is_as_before_afterwards() -> None:
    model = stirred(put(gpt()))
    for names, train, wanted in ((["content"], None, {"content"}), (["content", "style"], "style", {"style"})):
        model.zero_grad()
        with acting(model, *names, train=train):
            loss_of(model, tokens(model)).backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == (name.endswith("lora_B") and any(f".{one}." in name for one in wanted)), name
    with pytest.raises(RuntimeError, match="stop"), acting(model, "style"):
        raise RuntimeError("stop")
    model.zero_grad()
    loss_of(model, tokens(model)).backward()
    assert all((p.grad is not None) == name.endswith("lora_B") for name, p in model.named_parameters())


def planted(joint: bool, same: bool) -> tuple[float, float]:
    """Errors on unseen inputs, of style alone against the planted difference, and of both against the styled map.

    The content map is the base and a change; the styled map that and a difference. With `same`, both read one subspace.
    """
    torch.manual_seed(0)
    layer: Any = nn.Linear(16, 6, bias=False).double()
    base = layer.weight.detach().clone()
    attach(layer, PairCustomization(8, 8), nn.Linear, seed=0)
    content, style = layer.adapter.content, layer.adapter.style
    if same:
        style.lora_A = content.lora_A
    shared, difference = (torch.randn(6, 8, dtype=torch.float64) @ part.lora_A for part in (content, style))
    x = torch.randn(64, 16, dtype=torch.float64)
    plain, styled = x @ (base + shared).T, x @ (base + shared + difference).T
    opt = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    for step in range(1000):
        if not joint:
            opt.zero_grad()
            with acting(layer, "content"):
                (layer(x) - plain).square().mean().backward()
            opt.step()
        if step >= 200:
            opt.zero_grad()
            with acting(layer, "content", "style", train=None if joint else "style"):
                (layer(x) - styled).square().mean().backward()
            opt.step()
    new = torch.randn(50, 16, dtype=torch.float64)
    with torch.no_grad(), acting(layer, "style"):
        alone = float((layer(new) - new @ (base + difference).T).norm() / (new @ difference.T).norm())
    with torch.no_grad():
        both = float((layer(new) - new @ (base + shared + difference).T).norm() / (new @ (shared + difference).T).norm())
    return alone, both


def test_style_alone_is_the_planted_difference_on_unseen_inputs() -> None:
    alone, both = planted(joint=False, same=False)
    assert alone < 1e-3 and both < 1e-3


def test_orthogonal_subspaces_tell_style_and_content_apart_even_from_styled_data_alone() -> None:
    assert planted(joint=True, same=False)[0] < 1e-3
    alone, both = planted(joint=True, same=True)
    assert both < 1e-3 and alone > 0.3


def test_the_style_is_written_as_a_lora_that_acts_as_it_does(tmp_path: Path) -> None:
    model = stirred(put(gpt()))
    with acting(model, "style"):
        wanted = output(model)
    export(model, tmp_path, part="style")
    again = gpt()
    kept = load(again, tmp_path)
    assert kept.method == LoRA(rank=4, alpha=4.0)
    torch.testing.assert_close(output(again), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"'colour': what stands at .* has the parts content, style"):
        export(model, tmp_path / "other", part="colour")
    with pytest.raises(ValueError, match="a part alone is written for peft"):
        export(model, tmp_path / "other", "poise", part="style")
    with pytest.raises(ValueError, match="peft has no PairCustomization"):
        export(model, tmp_path / "other", "peft")
    assert not (tmp_path / "other").exists()


def test_peft_reads_the_style(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = stirred(put(gpt()))
    with acting(model, "style"):
        wanted = output(model)
    export(model, tmp_path, part="style")
    again = peft.PeftModel.from_pretrained(gpt(), tmp_path).eval()
    torch.testing.assert_close(again(tokens(model)).detach(), wanted, rtol=1e-5, atol=1e-6)


def test_what_acts_is_folded() -> None:
    model = stirred(put(gpt()))
    both = output(model)
    with acting(model, "style"):
        wanted = output(model)
        fold(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-5, atol=1e-5)
    unfold(model)
    assert torch.equal(output(model), both)


def draws() -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)


def test_guidance() -> None:
    draw = draws()
    u, c, first, second = draw(), draw(), draw(), draw()
    plain = u + 5 * (c - u)
    assert torch.equal(style_guidance(u, c), plain)
    assert torch.equal(style_guidance(u, c, first, strength=0), plain)
    torch.testing.assert_close(style_guidance(u, c, first, 7.5, 7.5), u + 7.5 * (first - u), rtol=1e-12, atol=1e-12)
    wanted = plain + 3 * (first - c) + 0.5 * (second - c)
    torch.testing.assert_close(style_guidance(u, c, [first, second], strength=[3, 0.5]), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(style_guidance(u, c, first), plain + 3 * (first - c), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="style_rank=0: must be a whole number"):
        PairCustomization(style_rank=0)
    with pytest.raises(ValueError, match=r"content_rank=64, style_rank=64: 'model.*q_proj' has 32 inputs"):
        attach(gpt(), "pair-customization")
    with pytest.raises(ValueError, match="no attention in a repeated block"):
        attach(nn.Sequential(nn.Linear(200, 4)), "pair-customization")
    with pytest.raises(ValueError, match="'style' does not act"), acting(put(gpt()), "content", train="style"):
        pass
    lora = gpt()
    attach(lora, "lora")
    with pytest.raises(ValueError, match="has no parts"), acting(lora, "style"):
        pass
    u = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="2 are given for 1 styles"):
        style_guidance(u, u, u, strength=[1, 2])
    with pytest.raises(ValueError, match="styled: is"):
        style_guidance(u, u, torch.zeros(3))
