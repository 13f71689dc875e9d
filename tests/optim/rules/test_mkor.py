"""MKOR (MKOR: Momentum-Enabled Kronecker-Factor-Based Optimizer Using Rank-1 Updates, arXiv 2306.01685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor
from torch.distributed.tensor import DTensor

from poise.optim import MKOR, SGD, AdamW
from poise.optim.engine import shards
from poise.training import LayerMeans

TYPICAL: dict[str, Any] = {"inv_freq": 2}
CASES: list[dict[str, Any]] = [
    {"inv_freq": 1, "weight_decay": 0.1},
    {"inv_freq": 2, "form": "official", "stat_decay": 0.8, "stabilization_limit": 1.01, "base": "adamw", "betas": (0.8, 0.9)},
    {"inv_freq": 3, "form": "printed", "stat_decay": 0.7, "stabilization_limit": 1.1, "stabilization_factor": 0.3},
]


class Feeding:
    """Fed by itself: for a is taken the mean of a gradient's rows, for g that of its columns."""

    @property
    def _feeds(self) -> dict[str, dict[int, Tensor]]:
        fed: dict[str, dict[int, Tensor]] = {"input_mean": {}, "grad_mean": {}}
        for p in [p for group in self.param_groups for p in group["params"] if p.grad is not None and not p.grad.is_sparse]:  # pyright: ignore[reportAttributeAccessIssue]
            gradient = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            rows = gradient.flatten(1) if gradient.ndim > 1 else gradient.reshape(-1, 1)
            a, g = rows.mean(0), rows.mean(1) if gradient.ndim > 1 else rows[:, 0]
            for name, values in (("input_mean", a if gradient.ndim > 1 else torch.ones_like(a)), ("grad_mean", g[:, None])):
                whole = values.expand_as(rows).reshape(gradient.shape)
                piece = shards.scatter(p, whole).contiguous()
                fed[name][id(p)] = shards.like(p, piece, tuple(p.shape), tuple(range(p.ndim)))
        return fed

    @_feeds.setter
    def _feeds(self, given: Mapping[str, Any]) -> None:
        """Nobody need feed it."""


class FedMKOR(Feeding, MKOR):  # pyright: ignore[reportIncompatibleVariableOverride]
    pass


def build(params: Any, **options: Any) -> MKOR:
    kind: Any = FedMKOR if MKOR in FedMKOR.__mro__ else type("Fed", (Feeding, MKOR), {})
    return kind(params, **options)


mkor = partial(build, backend="eager")


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    stat_decay: float = 0.95,
    base: str = "sgd",
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    inv_freq: int = 10,
    form: str = "exact",
    stabilization_factor: float = 0.1,
    stabilization_limit: float | None = None,
) -> list[Tensor]:
    """Matrices by the factors themselves, inverted in every step, where the form has any."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    c, limit = stat_decay, stabilization_limit or (2.0 if form == "official" else 1e3)

    def damped(F: Tensor, share: float) -> Tensor:
        return (1 - share) * F + share * torch.eye(len(F)).double()

    ends = []
    for index, start in enumerate(params):
        w = start.double().clone()
        matrix = w.reshape(len(w), -1) if w.ndim > 1 else w
        inverses = [torch.eye(n).double() for n in reversed(matrix.shape)] if w.ndim > 1 else []
        flagged = [True, True]
        m, v, t = torch.zeros_like(matrix), torch.zeros_like(matrix), 0
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            t += 1
            g = gradient.double().reshape(matrix.shape)
            if inverses and (t - 1) % inv_freq == 0:
                for i, vector in enumerate((g.mean(0), g.mean(1))):
                    F, outer = inverses[i], torch.outer(vector, vector)
                    if form == "official":
                        if flagged[i]:
                            inverses[i], flagged[i] = torch.eye(len(F)).double(), False
                            continue
                        inverses[i] = torch.linalg.inv(torch.linalg.inv(damped(F, 1 - c)) + outer)
                        if inverses[i].abs().max() > limit:
                            flagged = [True, True]
                        continue
                    F = damped(F, stabilization_factor) if F.abs().max() > limit else F
                    if form == "exact":
                        inverses[i] = torch.linalg.inv(c * torch.linalg.inv(F) + (1 - c) * outer)
                    else:
                        share = (1 - c) / (c**2 * (1 + c * (1 - c) * vector @ F @ vector))
                        inverses[i] = c * F + share * F @ outer @ F
            u = g
            if inverses:
                u = inverses[1] @ g @ inverses[0]
                u = u * g.norm() / u.norm()
            if base == "sgd":
                m = momentum * m + u
                step = m
            else:
                m = betas[0] * m + (1 - betas[0]) * u
                v = betas[1] * v + (1 - betas[1]) * u**2
                step = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
            matrix = matrix - rate * (step + weight_decay * matrix)
        ends.append(matrix.reshape(w.shape))
    return ends


def layer(inputs: int = 6, outputs: int = 5, bias: bool = True, seed: int = 0) -> torch.nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias, dtype=torch.float64))


def trained(model: torch.nn.Module, opt: torch.optim.Optimizer, steps: int, inputs: int = 6) -> list[Tensor]:
    """Regression on fresh data; the inputs of each step."""
    generator = torch.Generator().manual_seed(1)
    seen = []
    for _ in range(steps):
        x = torch.randn(8, inputs, generator=generator, dtype=torch.float64) + 1
        opt.zero_grad()
        model(x).square().sum(1).mean().backward()
        opt.step()
        seen.append(x)
    return seen


def state_of(opt: torch.optim.Optimizer, p: Tensor) -> dict[str, Tensor]:
    return {key.rpartition(".")[2]: value for key, value in opt.state[p].items()}


def test_the_inverses_are_those_of_the_averaged_vectors_and_the_bias_is_an_input_of_one() -> None:
    model = layer()
    opt = MKOR(model, lr=0.0, inv_freq=1, backend="eager")
    LayerMeans(model, opt)
    linear: Any = model[0]
    L, R = torch.eye(5).double(), torch.eye(7).double()
    for x in trained(model, opt, 6):
        a = torch.cat([x.mean(0), torch.ones(1).double()])
        g = (2 * model(x)).detach().mean(0)  # of each row's own loss
        L, R = 0.95 * L + 0.05 * torch.outer(g, g), 0.95 * R + 0.05 * torch.outer(a, a)
    held = state_of(opt, linear.weight)
    assert distance([held["L_inv"], held["R_inv"]], [torch.linalg.inv(L), torch.linalg.inv(R)]) < 1e-6  # means are float32


def one_update(form: Any) -> tuple[Tensor, Tensor, Tensor]:
    """An inverse before and after one vector, and the vector."""
    start, grads = draw([(12, 9)], 4)
    params = leaves(start)
    opt = mkor(params, inv_freq=1, form=form)
    play(opt, params, grads[:3])
    before = state_of(opt, params[0])["L_inv"].clone()
    play(opt, params, grads[3:])
    assert grads[3][0] is not None
    return before, state_of(opt, params[0])["L_inv"].clone(), grads[3][0].mean(1)


def test_each_form_is_the_inverse_of_what_it_says() -> None:
    before, after, g = one_update("exact")
    assert distance([after], [torch.linalg.inv(0.95 * torch.linalg.inv(before) + 0.05 * torch.outer(g, g))]) < 1e-14
    before, after, g = one_update("official")
    P = 0.95 * before + 0.05 * torch.eye(12).double()
    assert distance([after], [torch.linalg.inv(torch.linalg.inv(P) + torch.outer(g, g))]) < 1e-14
    before, after, g = one_update("printed")
    assert distance([after], [torch.linalg.inv(0.95 * torch.linalg.inv(before) + 0.05 * torch.outer(g, g))]) > 0.05


def test_float32_factors_stay_positive_definite_over_ten_thousand_vectors() -> None:
    params = leaves([torch.zeros(6, 4)])
    opt = mkor(params, lr=0.0, inv_freq=1, stat_decay=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        play(opt, params, [[torch.randn(6, 4, generator=generator)] for _ in range(100)])
        for name in ("L_inv", "R_inv"):
            F = state_of(opt, params[0])[name].double()
            assert torch.equal(F, F.T)
            assert float(torch.linalg.eigvalsh(F)[0]) > 0


def test_a_direction_that_is_never_shown_does_not_grow_without_end() -> None:
    """Without the limit it would have grown by 0.8^-300, and a tenth is less than a refresh adds."""
    params = leaves([torch.zeros(6, 4)])
    opt = mkor(params, lr=0.0, inv_freq=1, stat_decay=0.8)
    play(opt, params, [[torch.eye(6)[:, :4]]] * 300)
    assert 500 < float(state_of(opt, params[0])["L_inv"].abs().max()) < 2000


@pytest.mark.parametrize("form", ["exact", "official", "printed"])
def test_an_update_has_the_norms_of_its_gradient_weight_and_bias_added(form: Any) -> None:
    model = layer()
    opt = MKOR(model, lr=1.0, momentum=0.0, inv_freq=1, form=form, backend="eager")
    LayerMeans(model, opt)
    turned = 0.0
    for _ in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        trained(model, opt, 1)
        moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert float(sum(m.norm() for m in moved)) == pytest.approx(float(sum(g.norm() for g in grads)), rel=1e-9)
        turned = max(turned, distance(moved, grads))
    assert turned > 1e-3


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_without_refreshes_it_is_its_base_rule_to_the_bit_and_needs_no_hooks(base: Any) -> None:
    start, grads = draw([(12, 8), (5,)], 5)
    ours, theirs = leaves(start), leaves(start)
    found = play(MKOR(ours, 0.01, base=base, inv_freq=None, backend="eager"), ours, grads)
    settings: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.0, "backend": "eager"}
    twin = AdamW(theirs, **settings) if base == "adamw" else SGD(theirs, momentum=0.9, **settings)
    assert same(found, play(twin, theirs, grads))


def test_the_first_official_refresh_only_makes_identities_and_a_tripped_input_factor_resets_the_other_at_once() -> None:
    """Inputs are refreshed first: the gradients' factor is reset in the same refresh, their own in the next."""
    start, grads = draw([(5, 4)], 4)
    params = leaves(start)
    opt = mkor(params, inv_freq=1, form="official", stabilization_limit=2.0)
    play(opt, params, grads[:1])
    held = state_of(opt, params[0])
    assert torch.equal(held["L_inv"], torch.eye(5).double()) and torch.equal(held["R_inv"], torch.eye(4).double())
    play(opt, params, grads[1:2])
    assert distance([held["L_inv"]], [torch.eye(5).double()]) > 1e-3
    held["R_inv"][0, 0] = 10.0
    play(opt, params, grads[2:3])
    assert torch.equal(held["L_inv"], torch.eye(5).double())
    assert float(held["R_inv"].abs().max()) > 2
    assert held["flagged"].tolist() == [1.0, 0.0]
    play(opt, params, grads[3:])
    assert torch.equal(held["R_inv"], torch.eye(4).double())


def test_a_reset_may_blend_instead() -> None:
    start, grads = draw([(5, 4)], 3)
    params = leaves(start)
    opt = mkor(params, inv_freq=1, form="official", reset="blend", stabilization_factor=0.25)
    play(opt, params, grads[:2])
    held = state_of(opt, params[0])
    held["flagged"].fill_(1.0)
    before = held["L_inv"].clone()
    play(opt, params, grads[2:])
    assert distance([held["L_inv"]], [0.75 * before + 0.25 * torch.eye(5).double()]) < 1e-15


def test_the_hybrid_goes_over_to_its_base_rule_once_the_loss_falls_slowly() -> None:
    start, _ = draw([(5, 4)], 0)
    gradient = draw([(5, 4)], 0, seed=3)[0][0]
    params = leaves(start)
    opt = mkor(params, lr=1.0, momentum=0.0, inv_freq=1, hybrid=True, window=4, switch_threshold=0.5)
    losses = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, -9.0]
    plain = []
    for loss in losses:
        before = params[0].detach().clone()
        params[0].grad = gradient.clone()
        opt.step(lambda loss=loss: torch.tensor(loss))
        plain.append(distance([before - params[0].detach()], [gradient]) < 1e-12)
    assert plain == [False] * 11 + [True] * 5


def test_the_hybrid_needs_the_loss() -> None:
    params = leaves(draw([(5, 4)], 0)[0])
    opt = mkor(params, hybrid=True)
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match="loss"):
        opt.step()


def test_where_nothing_is_attached_the_error_names_what_to_attach() -> None:
    params = leaves(draw([(5, 4)], 0)[0])
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(RuntimeError, match=r"input_mean.*'param_0'.*opt\.feed\(input_mean=.*LayerMeans\(model, opt\)"):
        MKOR(params, backend="eager").step()


def test_layers_that_do_not_run_their_own_forward_pass_are_left_to_the_base_rule() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Conv2d(3, 4, 2)
            self.attn = torch.nn.MultiheadAttention(8, 2)
            self.norm = torch.nn.LayerNorm(8)
            self.wide, self.grouped, self.conv = (
                torch.nn.Linear(8, 9),
                torch.nn.Conv2d(4, 4, 3, groups=2),
                torch.nn.Conv2d(4, 4, 3),
            )
            self.proj = torch.nn.Linear(9, 8)

    def taken(**options: Any) -> set[str]:
        opt = MKOR(Net(), inv_freq=None, backend="eager", **options)
        return {line.name for line in opt.plan() if line.rule == "mkor"}

    wide, conv = {"wide.weight", "wide.bias"}, {"conv.weight", "conv.bias"}
    assert taken() == wide | conv | {"first.weight", "first.bias", "proj.weight", "proj.bias"}
    assert taken(skip=["proj", "first", "conv"]) == wide


def test_half_precision_keeps_the_inverses_in_float16() -> None:
    start, grads = draw([(16, 16)], 6)
    ends = []
    for half in (False, True):
        params = leaves(start)
        opt = mkor(params, inv_freq=1, half_precision=half)
        ends.append(play(opt, params, grads)[0])
        assert state_of(opt, params[0])["L_inv"].dtype == (torch.float16 if half else torch.float64)
    assert 0 < distance(ends[:1], ends[1:]) < 0.05


def test_a_zero_gradient_moves_nothing_and_gives_no_nan() -> None:
    params = leaves([torch.ones(6, 4), torch.ones(3)])
    zeros: Grads = [[torch.zeros(6, 4), torch.zeros(3)]] * 4
    assert same(play(mkor(params, inv_freq=1), params, zeros), [torch.ones(6, 4), torch.ones(3)])


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("stat_decay", 1.0),
        ("base", "lamb"),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("inv_freq", 0),
        ("form", "paper"),
        ("stabilization_factor", 1.5),
        ("stabilization_limit", 1.0),
        ("reset", "none"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        mkor(leaves(draw([(4, 4)], 0)[0]), **hyper)


def test_an_impossible_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        mkor(leaves(draw([(4, 4)], 0)[0]), hybrid=True, window=0)
