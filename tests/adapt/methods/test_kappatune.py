"""KappaTune (arXiv 2506.16289): condition numbers decide what is fine-tuned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import Conv1D, gpt
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import KappaTune, attach
from poise.adapt.methods.kappatune import condition, conditions, kappa_tune
from poise.optim import AdamW


def planted(kappa: float, rows: int = 8, columns: int = 6, seed: int = 0, norm: float = 1.0) -> Tensor:
    """A matrix of this condition number and Frobenius norm."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64)).Q[:, :columns]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(kappa), columns, dtype=torch.float64)
    return left * (values * norm / values.norm()) @ right


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Linear(6, 8)
        self.a = nn.Conv2d(3, 8, (1, 2))
        self.zero = nn.Linear(6, 8)
        self.b = Conv1D(8, 6)
        self.norm = nn.LayerNorm(8)
        with torch.no_grad():
            self.c.weight.copy_(planted(50.0, seed=1))
            self.a.weight.copy_(planted(2.0, seed=2).reshape(8, 3, 1, 2))
            self.b.weight.copy_(planted(9.0, seed=3).T)
            self.zero.weight.copy_(planted(4.0, seed=4))
            self.zero.weight[:, 5] = self.zero.weight[:, 4]


def test_planted_spectra_are_ranked_and_scale_does_not_move_them() -> None:
    model = Planted()
    found = conditions(model)
    assert list(found) == ["a.weight", "b.weight", "c.weight", "zero.weight"]
    for name, kappa in (("a", 2.0), ("b", 9.0), ("c", 50.0)):
        assert found[f"{name}.weight"].kappa == pytest.approx(kappa, rel=1e-4)
    assert found["zero.weight"].kappa == math.inf
    with torch.no_grad():
        model.a.weight *= 1e3
        model.c.weight *= 1e-3
    again = conditions(model)
    assert list(again) == list(found)
    assert all(again[n].kappa == pytest.approx(found[n].kappa, rel=1e-4) for n in found)
    assert again["c.weight"].log_volume == pytest.approx(found["c.weight"].log_volume + 6 * math.log(1e-3), rel=1e-4)


def test_at_one_norm_volume_falls_as_kappa_grows() -> None:
    found = [condition(planted(kappa)) for kappa in (1.0, 2.0, 10.0, 100.0)]
    assert [c.kappa for c in found] == pytest.approx([1.0, 2.0, 10.0, 100.0])
    volumes = [c.log_volume for c in found]
    assert volumes == sorted(volumes, reverse=True)
    assert volumes[0] == pytest.approx(6 * math.log(6**-0.5))


def test_bfloat16_is_decomposed_in_float32() -> None:
    matrix = planted(20.0).to(torch.bfloat16)
    assert condition(matrix).kappa == pytest.approx(condition(matrix.double()).kappa, rel=1e-4)


def test_selected_weights_change_and_others_keep_their_bits() -> None:
    model = gpt()
    names = kappa_tune(model, 3)
    assert names == list(conditions(model))[:3]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = AdamW(model, lr=0.01, backend="eager")
    model(torch.arange(8)[None]).square().mean().backward()
    opt.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == set(names)


def test_adapters_stand_beside_the_least_conditioned_layers() -> None:
    model = gpt()
    wanted = [n.removesuffix(".weight") for n in conditions(model) if "proj" in n][:4]
    kept = attach(model, KappaTune(layers=4, dropout=0.0))
    assert set(kept.layers) == set(wanted)
    assert len(attach(gpt(), KappaTune()).layers) == 14
    assert all("up_proj" not in path for path in attach(gpt(), KappaTune(max_dim=32)).layers)
    method = KappaTune()
    assert (method.rank, method.scale, method.dropout, method.layers) == (16, 2.0, 0.05, 50)


def test_the_layers_tell_it_from_its_mutant() -> None:
    right, wrong = (attach(gpt(), kind(layers=4, dropout=0.0)) for kind in (KappaTune, mutated(catalog.get("kappatune"))))
    assert not set(right.layers) & set(wrong.layers)


class Two(nn.Module):
    """A layer that has learnt a first task, and beside it one that has learnt nothing, each with inputs of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.learnt, self.fresh = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.learnt.weight.data.copy_(planted(300.0, 8, 8, seed=1, norm=4.0))
        self.fresh.weight.data.copy_(planted(1.2, 8, 8, norm=4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.learnt(x[:, :8]) + self.fresh(x[:, 8:])


def forgetting(most: bool) -> float:
    """Loss on the first task, in which the fresh layer sees little, after training on a second, in which both see all."""
    generator = torch.Generator().manual_seed(0)
    x, target = torch.randn(64, 16, generator=generator), torch.randn(64, 8, generator=generator)
    old = torch.cat([x[:, :8], 0.2 * x[:, 8:]], 1)
    model = Two()
    first = model(old).detach()
    names = list(conditions(model))
    assert kappa_tune(model, 1) == names[:1]
    chosen = names[-1] if most else names[0]
    for name, p in model.named_parameters():
        p.requires_grad_(name == chosen)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    for _ in range(50):
        opt.zero_grad()
        nn.functional.mse_loss(model(x), target).backward()
        opt.step()
    return float(nn.functional.mse_loss(model(old), first))


def test_less_is_forgotten_than_with_the_worst_conditioned_weights() -> None:
    assert forgetting(most=False) < 0.8 * forgetting(most=True)


def test_condition_numbers_are_kept_in_a_file(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "conditions.json"
    model = Planted()
    wanted = conditions(model, cache=file)
    assert json.loads(file.read_text())["zero.weight"]["kappa"] is None
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    assert conditions(model, cache=file) == wanted
    model.c = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"'c\.weight' is \[8, 6\] there and \[8, 8\] here"):
        conditions(model, cache=file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is no file of condition numbers"):
        conditions(model, cache=file)


@pytest.mark.parametrize(
    ("settings", "message"), [({"layers": 0}, "layers=0"), ({"max_dim": 0}, "max_dim=0"), ({"rank": 0}, "rank=0")]
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KappaTune(**settings)
    with pytest.raises(ValueError, match="count=0"):
        kappa_tune(gpt(), 0)
    with pytest.raises(ValueError, match="no parameter of two dimensions"):
        kappa_tune(nn.LayerNorm(4))
