"""PeriodicLoRA (arXiv 2402.16141): stages of LoRA whose products add up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, loss_of, output, stirred, tokens
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import LoRA, PeriodicLoRA, attach, detach, export, fold, pairs
from poise.optim import SGD, AdamW

KINDS: dict[str, Any] = {
    "poise": lambda model, **more: AdamW(model, lr=0.01, weight_decay=0.0, backend="eager", **more),
    "torch": lambda model: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0),
}
optimizers = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def adapted(dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    model = gpt().to(dtype)
    attach(model, LoRA(rank=2), seed=0, **more)
    return model.train()


def stepped(model: nn.Module, opt: Any, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, tokens(model)).backward()
        opt.step()


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("make", [gpt, Mixed])
def test_outputs_are_the_same_before_and_after_a_stage_ends(momentum: float, make: Any) -> None:
    model = make()
    attach(model, LoRA(rank=2), None if make is gpt else ["all", "embedding"])
    stages = PeriodicLoRA(model, SGD(model, lr=0.1), stage_momentum=momentum)
    stirred(model)
    before = output(model)
    weights = {pair.name: pair.layer.weight.detach().clone() for pair in pairs(model)}
    stages.unload()
    torch.testing.assert_close(output(model), before, rtol=1e-5, atol=1e-5)
    assert all(not torch.equal(pair.layer.weight, weights[pair.name]) for pair in pairs(model))
    double = make().double()
    attach(double, LoRA(rank=2), None if make is gpt else ["all", "embedding"])
    stages = PeriodicLoRA(double, SGD(double, lr=0.1), stage_momentum=momentum)
    stirred(double)
    before = output(double)
    stages.unload()
    torch.testing.assert_close(output(double), before, rtol=1e-11, atol=1e-11)


def test_outputs_tell_it_from_its_mutant() -> None:
    model = adapted()
    stages = mutated(catalog.get("periodic-lora"))(model, SGD(model, lr=0.1), stage_momentum=0.3)
    stirred(model)
    before = output(model)
    stages.unload()
    assert not torch.allclose(output(model), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.25])
def test_a_share_goes_into_the_weight_and_the_rest_stays(momentum: float) -> None:
    model = adapted(torch.float64)
    stages = PeriodicLoRA(model, SGD(model, lr=0.1), stage_momentum=momentum)
    stirred(model)
    before = [(pair.layer.weight.detach().clone(), pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs(model)]
    stages.unload()
    for pair, (weight, down, up) in zip(pairs(model), before, strict=True):
        wanted = weight + (1 - momentum) * pair.scale * up @ down
        torch.testing.assert_close(pair.layer.weight, wanted, rtol=1e-13, atol=1e-13)
        assert torch.equal(pair.B, momentum * up)
        assert torch.equal(pair.A, down) == (momentum > 0)
        assert float(pair.A.detach().abs().max()) <= max(float(down.abs().max()), pair.layer.in_features**-0.5)


def test_what_is_drawn_anew_differs_between_stages_and_layers_and_not_between_runs() -> None:
    def drawn() -> list[Tensor]:
        model = adapted()
        stages = PeriodicLoRA(model, SGD(model, lr=0.1))
        found = [pair.A.detach().clone() for pair in pairs(model)[:2]]
        for _ in range(2):
            stages.unload()
            found += [pair.A.detach().clone() for pair in pairs(model)[:2]]
        return found

    one, other = drawn(), drawn()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(not torch.equal(a, b) for i, a in enumerate(one) for b in one[:i])


@optimizers
def test_moments_are_zero_after_a_stage_and_its_first_step_is_the_first(kind: Any) -> None:
    model = adapted()
    opt = kind(model)
    PeriodicLoRA(model, opt, every=3)
    stepped(model, opt, 2)
    params = [p for pair in pairs(model) for p in (pair.A, pair.B)]
    assert all(int(opt.state[p]["step"]) == 2 and bool(opt.state[p]["exp_avg"].any()) for p in params)
    stepped(model, opt, 1)
    for p in params:
        kept = opt.state.get(p, {})
        assert not any(bool(torch.as_tensor(value).any()) for value in kept.values())
    before = [pair.B.detach().clone() for pair in pairs(model)]
    assert not any(bool(b.any()) for b in before)
    stepped(model, opt, 1)
    assert all(int(opt.state[p]["step"]) == 1 for p in params)
    for pair in pairs(model):  # with its bias corrected, Adam's first step is lr times the sign
        moved = pair.B.detach().abs()
        assert float((moved[moved > 0] - 0.01).abs().max()) < 1e-4


@optimizers
def test_what_trains_beside_the_adapters_keeps_its_moments(kind: Any) -> None:
    model = adapted(also="*norm*")
    opt = kind(model)
    PeriodicLoRA(model, opt, every=2)
    stepped(model, opt, 5)
    norm = model.get_parameter("model.norm.weight")
    assert int(opt.state[norm]["step"]) == 5
    assert bool(opt.state[norm]["exp_avg"].any())
    assert int(opt.state[pairs(model)[0].A]["step"]) == 1


@optimizers
@pytest.mark.parametrize("every", [6, 100])
def test_one_stage_is_lora_bit_for_bit(kind: Any, every: int) -> None:
    model, plain = adapted(), adapted()
    opt = kind(model)
    PeriodicLoRA(model, opt, every=every)
    stepped(model, opt, 5)
    stepped(plain, kind(plain), 5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def regression(rank: int, every: int | None, steps: int = 800) -> tuple[float, int, float]:
    """Loss at the end, rank of the change, and the loss of the best change of rank 8, of a linear map that needs rank 16."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(16, 16, bias=False, dtype=torch.float64))
    layer: Any = model[0]
    layer.weight.data.zero_()
    attach(model, LoRA(rank=rank, alpha=None), "0", seed=0)
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    if every is not None:
        PeriodicLoRA(model, opt, every=every, schedule=lambda t: min(1.0, (t + 1) / 10) * (1 - t / every))
    x = torch.eye(16, dtype=torch.float64)
    for step in range(steps):
        if every is None:
            for group in opt.param_groups:
                group["lr"] = 0.03 * (1 - step / steps)
        opt.zero_grad()
        loss = (model(x) - wanted.T).square().sum()
        loss.backward()
        opt.step()
    detach(fold(model))
    change = layer.weight.detach()
    best = float(torch.linalg.svdvals(wanted)[8:].square().sum())
    singular = torch.linalg.svdvals(change)
    return float((change - wanted).square().sum()), int((singular > 1e-9 * singular[0]).sum()), best


def test_four_stages_of_rank_two_make_a_change_of_rank_eight_near_the_best() -> None:
    alone, rank, best = regression(2, None)
    staged, rank_staged, _ = regression(2, 200)
    assert (rank, rank_staged) == (2, 8)
    assert staged < 0.5 * alone
    assert staged < 1.1 * best


def test_the_schedule_begins_anew_with_each_stage() -> None:
    model = adapted()
    opt = KINDS["poise"](model)
    seen: list[float] = []
    PeriodicLoRA(model, opt, every=3, schedule=lambda t: (t + 1) / 4)
    opt.register_step_post_hook(lambda *_: seen.append(opt.param_groups[0]["lr"]))
    stepped(model, opt, 7)
    assert seen == pytest.approx([0.0025, 0.005, 0.0075, 0.0025, 0.005, 0.0075, 0.0025])


@optimizers
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_run_that_was_saved_in_a_stage_goes_on_bit_for_bit(kind: Any, momentum: float) -> None:
    def begun() -> tuple[nn.Module, Any, PeriodicLoRA]:
        model = adapted()
        opt = kind(model)
        return model, opt, PeriodicLoRA(model, opt, every=3, stage_momentum=momentum)

    model, opt, stages = begun()
    stepped(model, opt, 5)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    stepped(model, opt, 5)
    other, again, more = begun()
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert (more.step, more.stage) == (2, 1)
    stepped(other, again, 5)
    assert (more.step, more.stage) == (stages.step, stages.stage) == (1, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="has nothing of periodic_lora"):
        again.load_state_dict(kind(adapted()).state_dict())


def test_bfloat16_weights_say_what_rounding_lost_and_masters_lose_nothing() -> None:
    exact, lossy, kept = adapted(), adapted(torch.bfloat16), adapted(torch.bfloat16)
    exact.load_state_dict(lossy.state_dict())
    runs = [
        PeriodicLoRA(model, SGD(model, lr=0.1), master=master)
        for model, master in ((exact, True), (lossy, False), (kept, True))
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for found in zip(*(pairs(model) for model in (exact, lossy, kept)), strict=True):
            moves = [0.003 * torch.randn(p.shape, generator=generator) for p in (found[0].A, found[0].B)]
            for pair in found:
                pair.A.data.add_(moves[0])
                pair.B.data.add_(moves[1])
        for stages in runs:
            stages.unload()
    name = pairs(exact)[0].name
    assert runs[0].rounding[name] < 1e-4
    assert 0.1 < runs[1].rounding[name] <= 1.5
    wanted, one, two = (pairs(model)[0].layer.weight.detach().float() for model in (exact, lossy, kept))
    torch.testing.assert_close(runs[2].masters[name], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(two, wanted.bfloat16().float())
    assert float((one - wanted).norm()) > 1.5 * float((two - wanted).norm())


def test_an_adapter_of_a_changed_base_is_not_exported(tmp_path: Path) -> None:
    model = adapted()
    stages = PeriodicLoRA(model, SGD(model, lr=0.1))
    export(model, tmp_path / "first")
    stages.unload()
    with pytest.raises(ValueError, match=r"the base's weights are not what they were: PeriodicLoRA .* of 1 stages"):
        export(model, tmp_path / "second")


def test_a_driver_around_the_optimizer_is_hooked_into_as_well() -> None:
    from poise.training import SAM

    model = adapted()
    opt = SAM(KINDS["poise"](model))
    stages = PeriodicLoRA(model, opt, every=2)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, tokens(model))
        loss.backward()
        return loss

    for _ in range(5):
        opt.step(closure)
    assert (stages.stage, stages.step) == (2, 1)
    assert int(opt.state[pairs(model)[0].A]["step"]) == 1
    stages.remove()
    for _ in range(5):
        opt.step(closure)
    assert stages.stage == 2


def test_a_tied_weight_is_unloaded_once() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    attach(model, LoRA(rank=2), ["0", "2"])
    stirred(model)
    x = torch.randn(3, 6)
    wanted = model(x)
    PeriodicLoRA(model, SGD(model, lr=0.1)).unload()
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "every=0: must be at least 1"),
        ({"stage_momentum": 1.0}, r"stage_momentum=1\.0"),
        ({"stage_momentum": -0.1}, r"stage_momentum=-0\.1"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], message: str) -> None:
    model = adapted()
    with pytest.raises(ValueError, match=message):
        PeriodicLoRA(model, SGD(model, lr=0.1), **change)


def test_what_cannot_be_unloaded_is_refused() -> None:
    model = gpt()
    with pytest.raises(ValueError, match="model is not adapted"):
        PeriodicLoRA(model, SGD(model, lr=0.1))
    attach(model, "dora")
    with pytest.raises(ValueError, match=r"WeightDecomposed at 'model\.layers\.0.* does more than add a product"):
        PeriodicLoRA(model, SGD(model, lr=0.1))
    model = adapted()
    with pytest.raises(ValueError, match=r"opt: does not train A and B at 'model\.layers\.0\.self_attn\.q_proj'"):
        PeriodicLoRA(model, torch.optim.SGD([pairs(model)[0].A], lr=0.1))
    stages = PeriodicLoRA(model, SGD(model, lr=0.1), schedule=lambda t: float("nan"))
    fold(model)
    with pytest.raises(ValueError, match="model is folded"):
        stages.unload()
    with pytest.raises(ValueError, match=r"schedule\(0\) = nan"):
        stages.opt.step()
