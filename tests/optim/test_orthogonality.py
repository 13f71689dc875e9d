"""How orthogonal the updates of an optimizer at work are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import same
from torch import Tensor, nn

from poise.linalg.orthogonality import OrthogonalizationError, orthogonalization_error
from poise.linalg.polar import orthogonalize as polar_factor
from poise.optim import AdamW, Muon, Optimizer, chain
from poise.optim.orthogonality import log_orthogonality, orthogonality
from poise.optim.transforms.momentum import momentum
from poise.optim.transforms.spectral import orthogonalize


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(56, 8), nn.Tanh(), nn.Linear(8, 3))


def loss(model: nn.Sequential, seed: int) -> Tensor:
    x = torch.randn(20, 1, 12, generator=torch.Generator().manual_seed(seed))
    return (model(x) - 1).square().mean()


def train(model: nn.Sequential, opt: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        opt.zero_grad()
        loss(model, seed).backward()
        opt.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("options", [{}, {"method": "ns5"}, {"steps": 2}], ids=str)
def test_what_is_judged_is_the_momentum_that_the_next_step_orthogonalizes(nesterov: bool, options: dict[str, Any]) -> None:
    model = net()
    opt = Muon(model, lr=0.01, momentum=0.8, nesterov=nesterov, backend="eager", **options)
    averages: dict[str, Tensor] = {}
    for seed in range(4):
        opt.zero_grad()
        loss(model, seed).backward()
        found = orthogonality(opt)
        assert found
        for name, p in model.named_parameters():
            if name not in found:
                continue
            assert p.grad is not None
            averages[name] = 0.8 * averages.get(name, torch.zeros_like(p)) + 0.2 * p.grad
            M = 0.2 * p.grad + 0.8 * averages[name] if nesterov else averages[name]
            M = M.flatten(1)
            wanted = orthogonalization_error(M, options.get("method", "polar_express"), steps=options.get("steps"))
            assert torch.allclose(found[name].spectral, wanted.spectral.reshape(1), rtol=1e-3)
            assert torch.allclose(found[name].sigma_min, wanted.sigma_min.reshape(1), rtol=1e-3)
        opt.step()
    assert {"0.weight", "3.weight"} <= set(averages)
    assert not {name for name in averages if name.endswith("bias")}


def test_it_judges_each_part_of_a_fused_projection_and_each_parameter_by_its_own_rule() -> None:
    W = nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    W.grad = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    bare = orthogonality(Optimizer([W], chain(orthogonalize("ns5"), momentum(0.5)), lr=0.1, backend="eager"))
    (error,) = bare.values()
    assert torch.allclose(error.spectral, orthogonalization_error(W.grad, polar_factor(W.grad, "ns5")).spectral)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.MultiheadAttention(6, 2)
            self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.inside(x, x, x)[0])

    model = Attention()
    model(torch.randn(4, 2, 5)).square().mean().backward()
    found = orthogonality(Muon(model, backend="eager"))
    assert found["inside.in_proj_weight"].spectral.shape == (3,)


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_looking_changes_nothing(state: Any) -> None:
    watched, alone = net(), net()
    mine, theirs = (Muon(model, state=state, backend="eager") for model in (watched, alone))
    log_orthogonality(mine, 1, lambda step, errors: None)
    train(watched, mine, range(3))
    train(alone, theirs, range(3))
    assert same([*watched.parameters()], [*alone.parameters()])
    for p, q in zip(watched.parameters(), alone.parameters(), strict=True):
        assert all(torch.equal(value, theirs.state[q][key]) for key, value in mine.state[p].items())
    assert [group["clock"] for group in mine.param_groups] == [group["clock"] for group in theirs.param_groups]


def test_it_is_logged_after_every_so_many_steps_until_it_is_removed() -> None:
    model = net()
    opt = Muon(model, backend="eager")
    seen: list[tuple[int, dict[str, OrthogonalizationError]]] = []
    handle = log_orthogonality(opt, 3, lambda step, errors: seen.append((step, errors)))
    train(model, opt, range(7))
    assert [step for step, _ in seen] == [3, 6]
    assert all(0 < float(error.spectral.max()) < 1.5 for _, errors in seen for error in errors.values())
    handle.remove()
    train(model, opt, range(4))
    assert len(seen) == 2


def test_an_optimizer_that_orthogonalizes_nothing_is_refused() -> None:
    opt = AdamW(net())
    with pytest.raises(ValueError, match="AdamW: none of its rules"):
        orthogonality(opt)
    with pytest.raises(ValueError, match="AdamW: none of its rules"):
        log_orthogonality(opt, 1, print)
    with pytest.raises(ValueError, match="every=0"):
        log_orthogonality(Muon(net()), 0, print)
