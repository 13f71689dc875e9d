"""attach, disabled, fold, unfold, detach: what they refuse, and what they leave as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, losses, output, stirred
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise.adapt import Adaptation, LoRA, adapters, attach, attached, detach, disabled, fold, unfold
from poise.adapt.adapter import LowRank
from poise.optim import AdamW


def untouched(model: nn.Module, make: Any = gpt) -> None:
    assert attached(model) is None
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in make().named_modules()]
    assert all(p.requires_grad for p in model.parameters())


class Broken(LoRA):
    def adapter(self, place: Any, draw: Any, shared: Any) -> LowRank:
        if "mlp" in place.path:
            raise ValueError("there is none for it")
        return super().adapter(place, draw, shared)


class BrokenAtTheEnd(LoRA):
    def finish(self, model: nn.Module, adapters: Any, losses: Any) -> None:
        raise ValueError("it cannot be finished")


class Looking(LoRA):
    needs_losses = True

    def begin(self, model: nn.Module, places: Any, draw: Any, losses: Any) -> Any:
        for _, loss in zip(range(3), losses, strict=False):
            loss()


class Nothing(LoRA):
    def choose(self, model: nn.Module, places: Any) -> Any:
        return []


@pytest.mark.parametrize(
    ("error", "message", "given"),
    [
        (ValueError, "unknown method 'lora2'.*did you mean", {"method": "lora2"}),
        (TypeError, "is no adaptation", {"method": "adamw"}),
        (TypeError, "is no adaptation", {"method": nn.Linear}),
        (TypeError, "is no adaptation", {"method": 3}),
        (TypeError, "settings rank: the method is given with its settings already", {"method": LoRA(), "rank": 4}),
        (TypeError, "unexpected keyword argument 'ranks'", {"method": "lora", "ranks": 4}),
        (ValueError, "rank=0", {"method": "lora", "rank": 0}),
        (ValueError, "'q_prjo' means no layer of the model; it has model.embed_tokens", {"targets": "q_prjo"}),
        (ValueError, r"also: '\*nrom\*' is the name of no parameter", {"also": "*nrom*"}),
        (ValueError, r"Looking looks at gradients first: give losses=", {"method": Looking()}),
        (ValueError, r"adapts none of those layers", {"method": Nothing()}),
        (ValueError, "there is none for it", {"method": Broken()}),
        (ValueError, "it cannot be finished", {"method": BrokenAtTheEnd()}),
    ],
)
def test_errors_name_what_is_wrong_and_change_nothing(error: Any, message: str, given: dict[str, Any]) -> None:
    model = gpt()
    with pytest.raises(error, match=message):
        attach(model, **{"method": "lora", **given})
    untouched(model)


def test_a_model_that_is_not_adapted_is_said_to_be_so() -> None:
    for act in (fold, unfold, detach, adapters, lambda model: disabled(model).__enter__()):
        with pytest.raises(ValueError, match="model is not adapted; attach"):
            act(gpt())


def test_parts_of_an_adapted_model_belong_to_it() -> None:
    model = gpt()
    attach(model, "lora")
    with pytest.raises(ValueError, match=r"'0\.model\.layers\.0\.self_attn\.q_proj' is adapted already, as a part of another"):
        attach(nn.Sequential(model), "lora", "lm_head")
    part = gpt()
    attach(part.model.layers[1], "lora")
    with pytest.raises(ValueError, match=r"adapted already, as a part"):
        attach(part, "lora")
    detach(part.model.layers[1])
    attach(part, "lora")


def test_a_layer_alone_is_a_model() -> None:
    model = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    before = model(x)
    kept = attach(model, "lora", "linear", rank=2)
    assert kept.layers == ("",)
    assert torch.equal(model(x), before)
    stirred(model)
    wanted = model(x)
    torch.testing.assert_close(fold(model)(x), wanted)
    assert type(detach(model)) is nn.Linear
    assert set(model.state_dict()) == {"weight", "bias"}


def test_counts_and_passes_are_said() -> None:
    model = gpt()
    kept = attach(model, Looking(rank=4), ["q_proj", "v_proj"], losses=losses(model))
    assert (kept.trainable, kept.passes) == (4 * 4 * (32 + 32), 3)
    assert kept.total == sum(p.numel() for p in gpt().parameters()) + kept.trainable
    assert str(kept) == f"{kept.method}: 4 layers, 1,024 of {kept.total:,} parameters train ({kept.trainable / kept.total:.2%})"


def test_what_was_frozen_before_stays_frozen_after() -> None:
    model = gpt()
    model.model.embed_tokens.weight.requires_grad_(False)
    attach(model, "lora", also="*norm*")
    detach(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_disabled_is_over_after_an_error_and_refused_on_a_folded_model() -> None:
    model = gpt()
    attach(model, "lora")
    stirred(model)
    wanted = output(model)
    with pytest.raises(KeyError), disabled(model):
        raise KeyError
    assert torch.equal(output(model), wanted)
    fold(model)
    with pytest.raises(ValueError, match="is folded, so that its weights are not the base's"), disabled(model):
        pass
    with pytest.raises(ValueError, match="folded already"):
        fold(model)
    unfold(model)
    with pytest.raises(ValueError, match="is not folded"):
        unfold(model)


def test_a_hundred_folds_leave_the_weights_as_they_were() -> None:
    model = gpt().to(torch.bfloat16)
    attach(model, "lora", rank=2)
    stirred(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(100):
        unfold(fold(model))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_hooks_parametrizations_of_others_and_references_stay() -> None:
    model = Mixed()
    held, seen = model.out, []
    model.out.register_forward_hook(lambda module, args, y: seen.append(module))
    attach(model, "lora", "out")
    assert model.out is held
    assert isinstance(held, nn.Linear)
    output(model)
    detach(model)
    output(model)
    assert seen == [held, held]
    assert model.out is held
    assert type(held) is nn.Linear


def test_tied_layers_have_one_adapter_and_one_fold() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    kept = attach(model, LoRA(rank=2), ["0", "2"])
    one, other = (layer.adapter for layer in (model[0], model[2]))
    assert one is other
    assert kept.trainable == 2 * (6 + 6)
    stirred(model)
    x = torch.randn(3, 6)
    wanted = model(x)
    torch.testing.assert_close(fold(model)(x), wanted)
    unfold(model)
    assert torch.equal(model(x), wanted)
    detach(fold(model))
    torch.testing.assert_close(model(x), wanted)
    assert model[2].weight is model[0].weight
    assert type(model[2]) is nn.Linear


def test_seeds_and_names_decide_what_is_drawn_and_order_does_not() -> None:
    def drawn(model: nn.Module, **more: Any) -> dict[str, Tensor]:
        attach(model, "lora", **more)
        return {path: next(adapter.parameters()).detach() for path, adapter in adapters(model).items()}

    whole, some = drawn(gpt(), seed=3), drawn(gpt(), seed=3, targets=["down_proj", "k_proj"])
    assert 0 < len(some) < len(whole)
    assert all(torch.equal(whole[path], tensor) for path, tensor in some.items())
    assert not torch.equal(whole["model.layers.0.mlp.up_proj"], whole["model.layers.1.mlp.up_proj"])
    assert not torch.equal(drawn(gpt(), seed=4)["model.layers.0.mlp.up_proj"], whole["model.layers.0.mlp.up_proj"])
    torch.manual_seed(5)
    one = drawn(gpt())
    torch.manual_seed(5)
    gpt()
    assert one.keys() == whole.keys()


def test_training_under_autocast_checkpointing_and_compile_is_training() -> None:
    x = torch.randn(4, 8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    attach(model, LoRA(rank=2))
    stirred(model)
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False), compiled(model)):
        model.zero_grad()
        run(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        model(x).float().square().mean().backward()
    AdamW(model, lr=0.01).step()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def test_an_adaptation_needs_an_adapter() -> None:
    with pytest.raises(NotImplementedError, match=r"Adaptation\.adapter"):
        attach(gpt(), Adaptation())
