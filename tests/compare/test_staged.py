"""A trainer of adapters in a comparison: it hooks into the optimizer of what is attached, and survives a kill."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from compare.test_adapted import CONFIG, Deep
from compare.toys import Toy
from poise import adapt, catalog
from poise.adapt import attached, pairs
from poise.compare.entries import entry_of, parse
from poise.compare.fit import Fit, fit, restore
from poise.compare.loop import Loop
from poise.compare.train import train
from poise.models import GPT
from poise.optim import Muon

PERIODIC = catalog.get("periodic-lora")


def test_it_stands_around_lora_or_what_is_named_and_settings_go_where_they_are_known() -> None:
    entry = parse("stages=periodic-lora(rank=2,every=3,targets=q_proj,seed=7)")["stages"]
    assert {"lr", "weight_decay", "alpha", "stage_momentum"} <= set(entry.space) and "every" not in entry.space
    model = GPT(CONFIG)
    opt = entry.build(model, lr=1e-3, alpha=4.0, stage_momentum=0.5)
    kept = attached(model)
    assert kept is not None and kept.method == adapt.LoRA(rank=2, alpha=4.0) and kept.trainable == 2 * 2 * 16
    (pair,) = pairs(model)
    with torch.no_grad():
        pair.B.fill_(1.0)
    weight, before = pair.layer.weight.detach().clone(), pair.B.detach().clone()
    for _ in range(3):
        pair.B.grad, pair.A.grad = torch.zeros_like(pair.B), torch.zeros_like(pair.A)
        opt.step()
    assert not torch.equal(pair.layer.weight, weight), "the stage of three steps has ended"
    assert torch.allclose(pair.B, 0.5 * before, rtol=0.01), "with the momentum that was asked for"
    other = parse("periodic-lora(adapter=lora,around=muon,every=3,rank=1,targets=q_proj,alpha=1.0,stage_momentum=0.0)")[
        "periodic-lora"
    ]
    assert type(other.build(GPT(CONFIG), lr=1e-3)) is Muon


def test_it_is_refused_around_what_is_no_adapter_or_of_an_optimizer_that_adapters_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"adapter=adamw.*adamw is no adapter"):
        parse("periodic-lora(adapter=adamw)")
    with pytest.raises(ValueError, match="sam is a driver"):
        parse("periodic-lora(around=sam)")


def test_it_ends_stages_in_a_run() -> None:
    fixed = {"rank": 1, "targets": "0", "alpha": 2.0, "every": 4, "stage_momentum": 0.0}
    plain = {name: fixed[name] for name in ("rank", "targets", "alpha")}
    run, lora = (
        train(Deep(), one, {"lr": 0.05}, number=0, seed=0, passes=12, split="tune")
        for one in (entry_of(PERIODIC, fixed), entry_of(catalog.get("lora"), plain))
    )
    assert run.trained == lora.trained == 8 and run.passes == 12
    assert run.curve[0] == lora.curve[0] and run.loss != lora.loss, "they part when the first stage ends"


def test_a_run_that_was_killed_ends_as_it_would_have_and_no_adapter_is_written(tmp_path: Path) -> None:
    entry = entry_of(PERIODIC, {"lr": 0.05, "rank": 1, "targets": "0", "alpha": 2.0, "every": 4, "stage_momentum": 0.5})
    whole, broken = (Fit(Deep(), entry, 0, 14, tmp_path / name, every=5) for name in ("whole", "broken"))
    (broken.folder / "adapter").mkdir(parents=True)  # of another run
    fit(whole)

    def die(passes: int, loss: float) -> None:
        seen.append(passes)
        if len(seen) == 12:
            raise KeyboardInterrupt

    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fit(broken, die)
    outcome = fit(broken)
    assert outcome.resumed_from == 10
    written = [(run.folder / "model" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert written[0] == written[1]
    assert not (whole.folder / "adapter").exists() and not (broken.folder / "adapter").exists()


def test_what_went_on_after_a_stage_still_knows_that_the_base_has_changed(tmp_path: Path) -> None:
    """The last stage of a run may end before the kill: the adapter alone would then be half of what was learned."""
    entry = entry_of(PERIODIC, {"lr": 0.05, "rank": 1, "targets": "0", "alpha": 2.0, "every": 4, "stage_momentum": 0.0})
    run = Fit(Deep(), entry, 0, 6, tmp_path, every=5)
    fit(run)
    task: Toy = Deep()
    loop = Loop(task, partial(entry.build, task=task), seed=0, passes=6)
    assert restore(run, loop) == 6
    with pytest.raises(ValueError, match="1 stages"):
        adapt.export(loop.model, tmp_path / "out")
