"""What every adapter of the catalog must do. A method that may not is exempt in the catalog, with the reason."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import NAMES, Mixed, gpt, loss_of, output, put, stirred, tokens
from adapt.workers import SCENARIOS
from torch import Tensor, nn

from poise import catalog
from poise.adapt import adapters, attached, detach, disabled, export, fold, load, unfold
from poise.optim import AdamW, Lion, Muon


def exempt(name: str, behaviour: str) -> bool:
    return behaviour in catalog.get(name).exempt


def given(behaviour: str) -> Any:
    return pytest.mark.parametrize("name", [name for name in NAMES if not exempt(name, behaviour)])


def base_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@given("starts as the base")
def test_the_model_starts_as_the_base_bit_for_bit(name: str) -> None:
    model = gpt()
    before = output(model)
    put(name, model)
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("name", NAMES)
def test_only_what_is_declared_trains_and_is_counted(name: str) -> None:
    model = gpt()
    before = base_of(model)
    kept = put(name, model, also="*norm*")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == kept.trainable < kept.total == sum(p.numel() for p in model.parameters())
    assert {n for n in trained if n in before} == set(kept.also) == {n for n in before if "norm" in n}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in trained}
    stepped(model, AdamW(model, lr=0.01))
    for n, p in model.named_parameters():
        if n in frozen:
            assert torch.equal(p, frozen[n]), n
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before and n not in kept.also)


@pytest.mark.parametrize("name", NAMES)
def test_all_that_trains_is_moved_by_training(name: str) -> None:
    model = gpt()
    put(name, model)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    stepped(model, AdamW(model, lr=0.01), steps=3)
    still = [n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert not still


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("also", [(), "*norm*"])
def test_without_adapters_the_model_is_the_base(name: str, also: Any) -> None:
    model = gpt()
    before = output(model)
    put(name, model, also=also)
    stirred(model)
    moved = output(model)
    assert not torch.allclose(moved, before)
    with disabled(model):
        assert torch.equal(output(model), before)
    assert torch.equal(output(model), moved)
    detach(model)
    assert torch.equal(output(model), before) and attached(model) is None
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.get_submodule("model.layers.0.mlp.up_proj")) is nn.Linear
    assert model.state_dict().keys() == gpt().state_dict().keys()


@given("folds")
@pytest.mark.parametrize("make", [gpt, Mixed])
def test_folded_weights_do_what_the_adapters_did(name: str, make: Any) -> None:
    model = make()
    put(name, model, None if make is gpt else places_of(name))
    stirred(model)
    wanted, before = output(model), base_of(model)
    fold(model)
    torch.testing.assert_close(output(model), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="folded already"):
        fold(model)
    unfold(model)
    assert torch.equal(output(model), wanted)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    plain = detach(fold(model))
    torch.testing.assert_close(output(plain), wanted, rtol=1e-5, atol=1e-5)
    fresh = make()
    fresh.load_state_dict(plain.state_dict())
    assert torch.equal(output(fresh), output(plain))


@given("any layer")
def test_layers_of_every_kind_are_adapted(name: str) -> None:
    model = Mixed()
    kept = put(name, model, places_of(name))
    assert len(kept.layers) >= 4
    stepped(stirred(model), AdamW(model, lr=0.01))


def test_what_depends_on_the_input_is_not_folded() -> None:
    for name in NAMES:
        if exempt(name, "folds"):
            model = gpt()
            put(name, model)
            before = base_of(model)
            with pytest.raises(ValueError, match="depends on the input"):
                fold(model)
            assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    model = gpt()
    put(name, model, also="*norm*")
    stirred(model)
    export(model, tmp_path / "a")
    again = gpt()
    kept = load(again, tmp_path / "a")
    assert torch.equal(output(again), output(model))
    first = attached(model)
    assert first is not None
    assert kept.trainable == first.trainable
    export(again, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_exactly(name: str) -> None:
    def begun() -> tuple[nn.Module, Any]:
        model = gpt()
        put(name, model)
        return model, AdamW(model, lr=0.01, state="int8")

    model, opt = begun()
    stepped(model, opt, steps=3)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    stepped(model, opt, steps=3)
    other, fresh = begun()
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    stepped(other, fresh, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rule", [AdamW, Lion, Muon])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4"])
def test_every_rule_and_state_format_trains_it(name: str, rule: Any, state: str) -> None:
    model = gpt()
    put(name, model)
    opt = rule(model, lr=0.003, state=state)
    first = float(loss_of(model, tokens(model)).detach())
    stepped(model, opt, steps=8)
    assert float(loss_of(model, tokens(model)).detach()) < first


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_are_adapted_in_float32(name: str) -> None:
    model = gpt().to(torch.bfloat16)
    put(name, model)
    assert {p.dtype for n, p in model.named_parameters() if ".adapter." in n} == {torch.float32}
    stepped(model, AdamW(model, lr=0.01), steps=2)
    assert output(model).dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_under_autocast(name: str) -> None:
    model = gpt()
    put(name, model)
    stirred(model)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, tokens(model))
    loss.backward()
    plain = loss_of(model, tokens(model)).detach()
    assert abs(float(loss.detach() - plain)) < 0.05 * float(plain)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_float64_weights_are_adapted_in_float64(name: str) -> None:
    model = gpt().double()
    put(name, model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert output(model).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_an_adapted_model_is_not_adapted_again(name: str) -> None:
    model = gpt()
    put(name, model)
    with pytest.raises(ValueError, match="adapted already"):
        put(name, model)
    with pytest.raises(ValueError, match="adapted already"):
        put(name, nn.Sequential(model))


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_adapted_models_of_their_own(name: str) -> None:
    model = gpt()
    put(name, model)
    stirred(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), output(model))
        wanted = output(model)
        stirred(twin)
        assert torch.equal(output(model), wanted) and not torch.equal(output(twin), wanted)
        detach(twin)
        assert attached(model) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_module_used_twice_has_one_adapter(name: str) -> None:
    model = gpt()
    model.model.layers[1] = model.model.layers[0]
    kept = put(name, model)
    assert not any(".layers.1." in path for path in kept.layers)
    assert len({id(a) for a in adapters(model).values()}) == len(kept.layers)
    stepped(model, AdamW(model, lr=0.01))


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_head_is_refused_by_name(name: str) -> None:
    model = gpt(tied=True)
    with pytest.raises(ValueError, match=r"lm_head.*tied|tied.*lm_head|no layer|leave it out"):
        put(name, model, "lm_head")
    assert attached(model) is None and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_two_attachments_of_one_seed_are_the_same(name: str) -> None:
    one, other = gpt(), gpt()
    put(name, one)
    torch.manual_seed(7)
    put(name, other)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def stepped(model: nn.Module, opt: torch.optim.Optimizer, steps: int = 1) -> None:
    model.train()
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, tokens(model)).backward()
        opt.step()


def test_every_exemption_names_a_behaviour_and_says_why() -> None:
    for name in NAMES:
        for behaviour, reason in catalog.get(name).exempt.items():
            assert behaviour in {"starts as the base", "folds", "any layer", *SCENARIOS}, f"{name}: {behaviour!r}"
            assert len(reason) > 20 and reason.endswith("."), f"{name}: {reason!r}"


def places_of(name: str) -> Any:
    """Layers of every kind, of those that the method takes."""
    return ["words", "re:blocks.0.[02]", "mix", "twice"] if not exempt(name, "any layer") else ["blocks.0.2", "twice"]
