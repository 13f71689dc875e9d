"""Second moments saved from an optimizer and read by rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.cases import batch, loss_of, net
from torch import nn

from poise.merge import SecondMoments, merge_tensors, save_second_moments
from poise.merge.methods.ota import ota
from poise.optim import AdamW, Lion, Optimizer, chain
from poise.optim.transforms.adaptive import factored_adam
from poise.training import EMA


def trained(make: Any, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, data = net(), batch()
    opt = make(model)
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, data).backward()
        opt.step()
    return model, opt


@pytest.mark.parametrize(
    "make",
    [
        lambda model: AdamW(model, lr=1e-3),
        lambda model: EMA(AdamW(model, lr=1e-3), model),
        lambda model: torch.optim.AdamW(list(model.parameters())[::-1], lr=1e-3),
        lambda model: AdamW(model, lr=1e-3, state="bf16"),
    ],
    ids=["poise", "inside a driver", "torch", "bf16"],
)
def test_what_the_optimizer_keeps_is_read_back_under_the_models_names(make: Any, tmp_path: Path) -> None:
    model, opt = trained(make)
    names = [name for name, _ in model.named_parameters()]
    assert save_second_moments(opt, model, tmp_path / "v.safetensors") == names
    found = SecondMoments(tmp_path / "v.safetensors")
    assert set(found) == set(names)
    for name, p in model.named_parameters():
        kept = opt.state[p]["exp_avg_sq"].float()
        assert torch.equal(found[name], kept) and found.info(name).shape == p.shape
        assert float(kept.max()) > 0


@pytest.mark.parametrize(("state", "off"), [("int8", 0.01), ("int8-linear", 0.01), ("int4", 0.2), ("int4-factored", 1e-5)])
def test_moments_in_few_bits_are_written_as_numbers(state: str, off: float, tmp_path: Path) -> None:
    """After one step they are the same squares in every format, but for its rounding."""
    (model, exact), (other, opt) = (
        trained(lambda model, state=state: AdamW(model, lr=1e-3, state=state), 1) for state in ("fp32", state)
    )
    names = save_second_moments(EMA(opt, other), other, tmp_path / "v.safetensors")
    assert names == [name for name, _ in other.named_parameters()]
    found = SecondMoments(tmp_path / "v.safetensors")
    for name, p in model.named_parameters():
        v, wanted = found[name], exact.state[p]["exp_avg_sq"]
        if state == "int4-factored" and v.ndim == 2:  # which keeps the sums
            v, wanted = v.sum(0), wanted.sum(0)
        assert float((v - wanted).abs().max()) <= off * float(wanted.max()), name
    assert "exp_avg_sq" not in opt.state[other.get_parameter("0.weight")]


def test_two_vectors_keep_the_sums_of_rows_and_columns(tmp_path: Path) -> None:
    model, opt = trained(lambda model: AdamW(model, lr=1e-3))
    save_second_moments(opt, model, tmp_path / "full.safetensors")
    save_second_moments(opt, model, tmp_path / "small.safetensors", form="rank1")
    full, small = SecondMoments(tmp_path / "full.safetensors"), SecondMoments(tmp_path / "small.safetensors")
    assert set(full) == set(small)
    for name in full:
        v, w = full[name], small[name]
        assert w.shape == v.shape == small.info(name).shape
        if v.ndim == 2:
            assert torch.allclose(v.sum(0), w.sum(0), rtol=1e-5) and torch.allclose(v.sum(1), w.sum(1), rtol=1e-5)
            assert torch.equal(small.rows(name, 2, 5), w[2:5])
        else:
            assert torch.equal(v, w)
    ratio = (tmp_path / "small.safetensors").stat().st_size / (tmp_path / "full.safetensors").stat().st_size
    assert ratio < 0.07


def test_merging_takes_them_as_they_lie_on_disk(tmp_path: Path) -> None:
    base = net().state_dict()
    pairs = [trained(lambda model: AdamW(model, lr=1e-2), steps) for steps in (2, 5)]
    for number, (model, opt) in enumerate(pairs):
        save_second_moments(opt, model, tmp_path / f"{number}.safetensors", form="rank1")
    models = [model.state_dict() for model, _ in pairs]
    files = [SecondMoments(tmp_path / f"{number}.safetensors") for number in range(2)]
    inside = [{n: opt.state[p]["exp_avg_sq"] for n, p in model.named_parameters()} for model, opt in pairs]
    found = merge_tensors(ota, models, base, moments=files, density=0.4)
    wanted = merge_tensors(ota, models, base, moments=inside, density=0.4, compress="rank1")
    gaps = torch.cat([(found[n] - wanted[n]).abs().reshape(-1) for n in found])
    assert (
        float((gaps > 1e-6).double().mean()) < 1e-3
    )  # vectors of float32: an entry at the threshold may fall on the other side
    moved = torch.cat([(found[n] - base[n]).reshape(-1) for n in found])
    assert 0.4 <= float((moved != 0).float().mean()) <= 0.8


def test_adafactors_two_factors_are_multiplied_out(tmp_path: Path) -> None:
    model, opt = trained(lambda model: Optimizer(nn.ParameterList([model[0].weight]), chain(factored_adam()), lr=1e-3))
    save_second_moments(opt, model, tmp_path / "v.safetensors")
    p = next(iter(model.parameters()))
    rows, columns = opt.state[p]["exp_avg_sq_row"], opt.state[p]["exp_avg_sq_col"]
    found = SecondMoments(tmp_path / "v.safetensors")["0.weight"]
    assert torch.allclose(found.mean(1), rows[:, 0], rtol=1e-5) and torch.allclose(found.mean(0), columns[0], rtol=1e-5)


def test_what_has_none_is_refused(tmp_path: Path) -> None:
    model, opt = trained(lambda model: Lion(model, lr=1e-3))
    with pytest.raises(ValueError, match="keeps no exp_avg_sq"):
        save_second_moments(opt, model, tmp_path / "v.safetensors")
    with pytest.raises(ValueError, match="form='half'"):
        save_second_moments(opt, model, tmp_path / "v.safetensors", form="half")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "v.safetensors").exists()
    (tmp_path / "v.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"v.safetensors: cannot be read"):
        SecondMoments(tmp_path / "v.safetensors")
