"""LoRA-SB (Initialization using Update Approximation is a Silver Bullet, arXiv 2411.19557)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, loss_of, losses, output, stirred, tokens
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import LoRA, LoRASB, adapters, attach, attached, export, load, pairs
from poise.adapt.estimates import summed_gradients
from poise.adapt.methods.lora_sb import Cored
from poise.adapt.targets import places
from poise.compare import tasks
from poise.compare.entries import parse
from poise.optim import SGD

RANK = 4


def batches(model: nn.Module, count: int = 3) -> list[Any]:
    """Losses of different batches."""
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.randint(1, 20, (3, 8), generator=generator) for _ in range(count)]
    return [lambda x=x: loss_of(model, x) for x in drawn]


def gradients(model: nn.Module, some: list[Any]) -> dict[str, Tensor]:
    """By autograd all at once, as stored."""
    found: dict[str, Tensor] = {}
    for loss in some:
        model.zero_grad()
        loss().backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                found[name] = found.get(name, torch.zeros_like(p)) + p.grad
    model.zero_grad()
    return found


def started(model: nn.Module, targets: Any = None, method: Any = LoRASB, count: int = 3, **settings: Any) -> dict[str, Cored]:
    settings = {"rank": RANK, "first_lr": 1e-3, **settings}
    attach(model, method(**settings), targets, losses=batches(model, count), seed=0)
    return adapters(model)  # pyright: ignore[reportReturnType]


def steps_of(model: nn.Module, found: dict[str, Tensor], paths: Any) -> dict[str, Tensor]:
    """The first full step of each layer, as (outputs, inputs)."""
    layouts = {place.path: place.layout for place in places(model, list(paths))}
    return {path: -1e-3 * torch.sign(layouts[path].rows.view(found[f"{path}.weight"])) for path in paths}


# -- what the paper promises ---------------------------------------------------------------------------------------------


def test_it_starts_as_the_best_copy_of_the_first_full_step() -> None:
    def apart(method: Any) -> float:
        model = gpt().double()
        truth = gradients(model, batches(model))
        found = started(model, method=method)
        steps = steps_of(gpt().double(), truth, found)
        assert steps
        worst = 0.0
        for path, step in steps.items():
            missed = (found[path].change() - step).square().sum()
            rest = torch.linalg.svdvals(step)[RANK:].square().sum()
            worst = max(worst, float(((missed - rest) / rest).detach().abs()))
        return worst

    assert apart(LoRASB) < 1e-10
    assert apart(mutated(catalog.get("lora-sb"))) > 0.1


def test_a_step_on_the_core_moves_the_weight_by_the_gradient_projected_on_both_sides() -> None:
    def apart(orthonormal: bool) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, 7)).double()
        x, y = torch.randn(20, 9).double(), torch.randn(20, 7).double()

        def loss() -> Tensor:
            return (torch.tanh(model(x)) - y).square().mean()

        attach(model, LoRASB(rank=3, alpha=6.0), "0", losses=[loss], seed=0)
        adapter: Any = adapters(model)["0"]
        if not orthonormal:
            adapter.lora_A.data[0] *= 1.1
        with torch.no_grad():
            z = torch.tanh(model(x))
            G = (2 * (z - y) * (1 - z * z) / z.numel()).T @ x
        A, B, before = adapter.lora_A.clone(), adapter.lora_B.clone(), adapter.change().detach()
        opt = SGD(model, lr=0.1)
        loss().backward()
        opt.step()
        A = torch.linalg.qr(A.T)[0].T  # of the same rows: the projector is theirs
        expected = -0.1 * 4.0 * B @ B.T @ G @ A.T @ A
        return float((adapter.change().detach() - before - expected).abs().max() / expected.abs().max())

    assert apart(True) < 1e-11
    assert apart(False) > 1e-3


def test_the_first_loss_is_below_the_bases_on_the_batches_it_looked_at() -> None:
    for first_lr in (1e-4, 1e-3):
        model = gpt()
        before = sum(float(loss().detach()) for loss in batches(model))
        started(model, first_lr=first_lr)
        after = sum(float(loss().detach()) for loss in batches(model))
        assert after < before - 5 * first_lr


def test_it_trains_the_square_of_the_rank_for_each_layer() -> None:
    model = gpt()
    found = started(model)
    kept = attached(model)
    assert kept is not None and kept.trainable == RANK**2 * len(found) == 16 * 14
    assert kept.passes == 3
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{path}.adapter.lora_R" for path in found}


# -- the estimate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, targets", [(gpt, None), (Mixed, ["words", "re:blocks.0.[02]", "mix", "twice"])])
def test_gradients_are_summed_over_the_batches_as_autograd_has_them(make: Any, targets: Any) -> None:
    model = make().double()
    found = places(model, targets)
    wanted = gradients(model, batches(model))
    sums = summed_gradients(model, found, batches(model))
    assert list(sums) == [place.path for place in found]
    for place in found:
        wide = place.layout.rows.view(wanted[f"{place.path}.weight"])
        assert sums[place.path].shape == (place.layout.outputs, place.layout.inputs)
        torch.testing.assert_close(sums[place.path], wide, rtol=1e-12, atol=1e-14)


def test_the_estimate_leaves_nothing_behind_and_holds_one_gradient_at_a_time() -> None:
    model = gpt().to(torch.bfloat16)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.norm.weight.grad = kept = torch.ones_like(model.model.norm.weight)
    some, seen = places(model, None), []
    weights = [place.layer.weight for place in some]

    def watched(weight: Tensor) -> None:
        seen.append(sum(w.grad is not None for w in weights))

    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    for weight in weights:
        weight.register_post_accumulate_grad_hook(watched)
    sums = summed_gradients(model, some, batches(model))
    assert {t.dtype for t in sums.values()} == {torch.float32}
    assert max(seen) == 1 and len(seen) == 3 * len(weights)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == trained
    assert model.model.norm.weight.grad is kept and all(w.grad is None for w in weights)


def test_batch_statistics_are_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    before = {name: b.clone() for name, b in model.named_buffers()}
    x = torch.randn(8, 4)
    attach(model, LoRASB(rank=2), "0", losses=[lambda: model(x).square().sum()], seed=0)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_only_so_many_batches_are_asked() -> None:
    model = gpt()
    kept = attach(model, LoRASB(rank=2, batches=5), losses=losses(model), seed=0)
    assert kept.passes == 5
    other = gpt()
    assert attach(other, LoRASB(rank=2), losses=batches(other, 2)).passes == 2


def test_a_gradient_that_is_no_number_is_named() -> None:
    model = gpt()
    some = [lambda: loss_of(model, tokens(model)) * float("nan")]
    with pytest.raises(ValueError, match=r"losses: the gradient of 'model\.layers\.0.*' is not finite"):
        attach(model, LoRASB(), losses=some)
    assert attached(model) is None and all(p.requires_grad and p.grad is None for p in model.parameters())


# -- the start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decomposition", ["exact", "randomized"])
def test_both_factors_are_orthonormal_in_float32(decomposition: str) -> None:
    model = Mixed()
    found = started(model, ["words", "re:blocks.0.[02]", "mix", "twice"], decomposition=decomposition)
    for adapter in found.values():
        eye = torch.eye(RANK)
        torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, eye, rtol=0, atol=1e-5)
        torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, eye, rtol=0, atol=1e-5)


def test_a_sketch_finds_nearly_all_that_the_exact_start_has() -> None:
    def captured(**settings: Any) -> Tensor:
        found = started(gpt(), **settings)
        return torch.stack([adapter.change().detach().square().sum() for adapter in found.values()])

    exact = captured()
    assert bool((captured(decomposition="randomized") > 0.999 * exact).all())
    assert bool((captured(decomposition="randomized", oversampling=0) <= exact * (1 + 1e-5)).all())


def test_the_scale_leaves_the_start_alone() -> None:
    one, other = started(gpt().double()), started(gpt().double(), alpha=12.0)
    for path in one:
        torch.testing.assert_close(one[path].change(), other[path].change(), rtol=1e-10, atol=1e-15)
        assert other[path].scale == 3.0


def test_a_layer_narrower_than_the_rank_gets_what_it_has() -> None:
    model = nn.Sequential(nn.Linear(5, 3)).double()
    x = torch.randn(8, 5).double()
    attach(model, LoRASB(rank=8, first_lr=0.5), "0", losses=[lambda: model(x).square().sum()], seed=0)
    adapter: Any = adapters(model)["0"]
    assert adapter.rank == 3 and adapter.lora_R.shape == (3, 3)
    torch.testing.assert_close(adapter.change().abs().detach(), torch.full((3, 5), 0.5).double())


def test_without_losses_it_is_a_random_projection_of_nothing() -> None:
    model = gpt()
    before = output(model)
    attach(model, LoRASB(rank=RANK), losses=(), seed=0)
    torch.testing.assert_close(output(model), before)
    for adapter in adapters(model).values():
        assert isinstance(adapter, Cored)
        assert not adapter.lora_R.any()
        torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.T, torch.eye(RANK), rtol=0, atol=1e-5)
        torch.testing.assert_close(adapter.lora_B.T @ adapter.lora_B, torch.eye(RANK), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="looks at gradients first"):
        attach(gpt(), LoRASB())


# -- out, and in ----------------------------------------------------------------------------------------------------------


def test_peft_gets_it_as_a_lora_where_that_is_asked_for(tmp_path: Path) -> None:
    model = gpt()
    started(model, alpha=12.0)
    stirred(model)
    export(model, tmp_path / "own")
    assert (tmp_path / "own" / "poise_adapter.json").exists()
    export(model, tmp_path / "peft", form="peft")
    again = gpt()
    kept = load(again, tmp_path / "peft")
    assert isinstance(kept.method, LoRA) and kept.trainable > 16 * 14
    torch.testing.assert_close(output(again), output(model), rtol=1e-5, atol=1e-5)


def test_its_pairs_say_that_something_stands_between() -> None:
    model = gpt()
    found = started(model)
    for pair in pairs(model):
        assert pair.core is found[pair.name].lora_R and not pair.A.requires_grad and not pair.B.requires_grad
    attach(other := gpt(), "lora")
    assert all(pair.core is None for pair in pairs(other))


def test_the_scale_gives_it_batches_of_the_task() -> None:
    entry, task = parse("lora-sb(rank=4,batches=3,around=muon)")["lora-sb"], tasks.load("digits")
    assert {"first_lr", "lr"} <= set(entry.space)
    model = task.model()
    assert type(entry.build(model, task, lr=0.01, first_lr=1e-3)).__name__ == "Muon"
    kept = attached(model)
    assert kept is not None and kept.passes == 3 and all(adapter.lora_R.any() for adapter in cores(model))


def cores(model: nn.Module) -> list[Any]:
    return list(adapters(model).values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"batches": 0}, "batches=0: must be a whole number of at least 1"),
        ({"first_lr": 0.0}, "first_lr=0.0: must be above 0"),
        ({"decomposition": "qr"}, "decomposition='qr': must be 'exact' or 'randomized'"),
        ({"oversampling": -1}, "oversampling=-1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRASB(**settings)
