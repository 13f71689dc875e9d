"""LANTON (Noise-Adaptive Layerwise Learning Rates: Accelerating Geometry-Aware Optimization, arXiv 2510.14009)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import polar, shape_factor
from torch import Tensor, nn

from poise.optim import LANTON, Muon, Optimizer, chain, momentum, noise_adaptive, sign

lanton = partial(LANTON, backend="eager")
muon = partial(Muon, nesterov=False, scale_rule="match_rms", weight_decay=0.1, backend="eager")  # the same without noise

CASES: list[dict[str, Any]] = [
    {},
    {"alpha": 3.0, "method": "svd", "scale_rule": "spectral", "momentum": 0.5, "noise_beta": 0.6},
    {"noise_every": 2, "vector_lr": 1e-2, "weight_decay": 0.3},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    sign_lr: float = 3e-4,
    vector_lr: float | None = None,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    noise_beta: float = 0.9,
    alpha: float | None = None,
    noise_every: int = 1,
    method: str = "polar_express",
    steps: int | None = None,
    scale_rule: str = "match_rms",
) -> list[Tensor]:
    """Matrices and convolutions as one group of layers, vectors as the other; steps within the first 100."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    vector_rates = [(sign_lr if vector_lr is None else vector_lr) * rate / rates[0] for rate in rates]

    def lmo(b: Tensor) -> Tensor:
        if b.ndim < 2:
            return b / b.square().mean().sqrt()
        flat = b.reshape(len(b), -1)
        return (polar(flat, method, steps) * shape_factor(flat.shape[0], flat.shape[1], scale_rule)).reshape(b.shape)

    weights = [p.double().clone() for p in params]
    buffers = [torch.zeros_like(w) for w in weights]
    previous: list[Tensor | None] = [None] * len(weights)
    noises, looked = [0.0] * len(weights), [0] * len(weights)
    for t, row in enumerate(grads):
        for matrices in (True, False):
            layers = [i for i, w in enumerate(weights) if (w.ndim > 1) == matrices and row[i] is not None]
            known = []
            for i in layers:
                gradient = row[i]
                assert gradient is not None
                last = previous[i]
                if last is not None:
                    if looked[i] % noise_every == 0:
                        apart = gradient.double() - last
                        dual = float((apart * lmo(apart)).sum())
                        noises[i] = noise_beta * noises[i] + (1 - noise_beta) * dual**2
                    looked[i] += 1
                    known.append(noises[i])
                previous[i] = gradient.double()
            typical = math.sqrt(sorted(known)[(len(known) - 1) // 2]) if known else 0.0
            a = typical if alpha is None else alpha
            shares = {i: a / math.sqrt(a**2 + noises[i]) for i in layers if looked[i]}
            for i in layers:
                gradient = row[i]
                assert gradient is not None
                buffers[i] = momentum * buffers[i] + (1 - momentum) * gradient.double()
                rate = rates[t] if matrices else vector_rates[t]
                slower = math.sqrt(shares[i] / max(shares.values())) if i in shares else 1.0
                weights[i] = (1 - rate * weight_decay) * weights[i] - rate * slower * lmo(buffers[i])
    return weights


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return draw([shape], 0, seed=seed)[0][0]


def noisy(sizes: Sequence[float], steps: int, *shape: int) -> Grads:
    """For each layer a gradient of its own that stays, and noise of a size of its own."""
    pulls, drawn = draw([shape] * len(sizes), steps, seed=2)
    return [[pull + size * n for pull, size, n in zip(pulls, sizes, row, strict=True) if n is not None] for row in drawn]


def rates_of(sizes: Sequence[float], *, steps: int = 30, **hyper: Any) -> list[float]:
    """What the last step of each layer is, against that of Muon."""
    grads = noisy(sizes, steps, 12, 16)
    moved = []
    makers: list[Any] = [lanton, muon]
    for make in makers:
        params = leaves([torch.zeros(12, 16)] * len(sizes), torch.float64)
        extra = hyper if make is lanton else {}
        opt = make(params, lr=0.01, **{**extra, "weight_decay": 0.0})
        before = play(opt, params, grads[:-1])
        moved.append([a - b for a, b in zip(play(opt, params, grads[-1:]), before, strict=True)])
    return [float(ours.norm() / theirs.norm()) for ours, theirs in zip(*moved, strict=True)]


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "alpha", "every"])
def test_ten_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 40), (40, 24), (24,), (8, 4, 3, 3), (40,)], 10, missing=[(0, 1), (4, 0), (5, 2)])
    grown: Grads = [[None if g is None else (i + 1) ** 2 * g for i, g in enumerate(row)] for row in grads]
    params = leaves(start)
    assert distance(play(lanton(params, lr=0.02, **hyper), params, grown), reference(start, grown, lr=0.02, **hyper)) < 1e-9


def test_layers_of_equal_noise_move_as_without_any() -> None:
    """The second layer's gradients are the first's, turned and shifted: their differences have equal singular values."""
    turn, _ = torch.linalg.qr(matrix(12, 12))
    shift = matrix(12, 16, seed=9)
    grads: Grads = [[g, turn @ g + shift] for row in noisy([1.0], 12, 12, 16) for g in row if g is not None]
    start = [matrix(12, 16), matrix(12, 16, seed=1)]
    ours, theirs = leaves(start), leaves(start)
    found = play(lanton(ours, lr=0.02, method="svd"), ours, grads)
    assert distance(found, play(muon(theirs, lr=0.02, method="svd"), theirs, grads)) < 1e-13


def test_a_noise_far_below_alpha_changes_nothing() -> None:
    start, grads = [matrix(12, 16), matrix(12, 16, seed=1)], noisy([0.1, 10.0], 12, 12, 16)
    ours, theirs = leaves(start), leaves(start)
    found = play(lanton(ours, lr=0.02, alpha=1e12), ours, grads)
    assert same(found, play(muon(theirs, lr=0.02), theirs, grads))
    other = leaves(start)
    assert distance(play(lanton(other, lr=0.02, alpha=1.0), other, grads), found) > 1e-3


@pytest.mark.parametrize("alpha", [None, 1.0])
def test_the_least_noisy_layer_moves_at_lr_exactly_and_no_other_faster(alpha: float | None) -> None:
    grads = noisy([3.0, 0.5, 1.0, 0.7], 20, 12, 16)
    ours, theirs = (leaves([torch.zeros(12, 16)] * 4, torch.float64) for _ in range(2))
    found = play(lanton(ours, lr=0.02, alpha=alpha, weight_decay=0.0), ours, grads)
    wanted = play(muon(theirs, lr=0.02, weight_decay=0.0), theirs, grads)
    assert same(found[1:2], wanted[1:2])
    rates = rates_of([3.0, 0.5, 1.0, 0.7], alpha=alpha)
    assert rates[1] == 1.0
    assert all(rate < 0.999 for i, rate in enumerate(rates) if i != 1)
    assert rates[0] < rates[2] < rates[3]


def test_noise_of_a_layer_lowers_its_rate_by_its_root() -> None:
    """a / sqrt(a^2 + H) under a root: c times the noise, c^(-1/2) of the rate, once it is far above alpha."""
    loud, louder = (rates_of([1.0, c], alpha=1e-3)[1] for c in (100.0, 400.0))
    assert loud == pytest.approx(100**-0.5, rel=0.1)
    assert louder / loud == pytest.approx(0.5, rel=1e-6)


def test_two_batches_of_a_deterministic_gradient_differ_by_nothing_and_change_nothing() -> None:
    start, grads = [matrix(12, 16), matrix(12, 16, seed=1)], noisy([0.1, 10.0], 8, 12, 16)
    ours, theirs = leaves(start), leaves(start)
    opt = lanton(ours, lr=0.02, noise="independent")
    for row in grads:
        opt.feed(independent_grad=[g for g in row if g is not None])
        play(opt, ours, [row])
    assert same(ours, play(muon(theirs, lr=0.02), theirs, grads))
    assert [float(opt.state[p]["noise"]) for p in ours] == [0.0, 0.0]
    assert "previous_grad" not in opt.state[ours[0]]


def test_two_batches_tell_the_noise_at_the_first_step_also_of_convolutions() -> None:
    shapes = [(12, 16), (8, 4, 3, 3), (20,)]
    start, (first, second) = draw(shapes, 2)
    params = leaves(start)
    opt = lanton(params, noise="independent", method="svd", scale_rule="none")
    opt.feed(independent_grad=[g for g in second if g is not None])
    play(opt, params, [first])
    apart = [a - b for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    duals = [torch.linalg.matrix_norm(apart[i].reshape(len(apart[i]), -1), "nuc") for i in (0, 1)]
    duals.append(20 * apart[2].square().mean().sqrt())
    assert [float(opt.state[p]["noise"]) for p in params] == pytest.approx([0.1 * float(d) ** 2 for d in duals], rel=1e-12)


LIMIT = 150


def steps_to(target: float, make: Any, lr: float) -> int:
    """Steps until ||W1 - T||^2 + ||W2||^2 is below the target, with gradients whose noise differs a hundred times."""
    aims = [matrix(8, 8), torch.zeros(8, 8, dtype=torch.float64)]
    params = leaves([torch.zeros_like(aim) for aim in aims])
    opt = make(params, lr=lr, momentum=0.9, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, LIMIT):
        for p, aim, size in zip(params, aims, (0.05, 5.0), strict=True):
            p.grad = p.detach() - aim + size * torch.randn(8, 8, generator=generator, dtype=torch.float64)
        opt.step()
        if sum(float((p.detach() - aim).square().sum()) for p, aim in zip(params, aims, strict=True)) < target:
            return step
    return LIMIT


def test_with_a_hundred_times_the_noise_in_one_of_two_layers_it_arrives_before_the_best_single_rate() -> None:
    """The quiet layer has far to go; the noisy one is there, and a rate that the first wants throws it off."""
    single = min(steps_to(0.6, muon, 0.01 * 1.6**i) for i in range(8))
    assert steps_to(0.6, lanton, 0.08) < 0.8 * single


def test_layers_are_compared_with_those_of_their_own_norm_only() -> None:
    """Embedding and head, whose gradients are a thousand times as noisy, take nothing from the matrices, nor from a bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 30)).double()
    twin = [p.detach().clone() for p in model.parameters()]
    names = [name for name, _ in model.named_parameters()]
    opt = lanton(model, lr=0.01)
    assert {line.name: line.rule for line in opt.plan()} == {
        **dict.fromkeys(("0.weight", "3.weight"), "sign"),
        **dict.fromkeys(("1.weight", "2.weight"), "spectral"),
        **dict.fromkeys(("1.bias", "2.bias", "3.bias"), "rms"),
    }
    grads = draw([tuple(t.shape) for t in twin], 10, seed=5)[1]
    loud: Grads = [
        [1e3 * g if n in ("0.weight", "3.weight") else g for n, g in zip(names, row, strict=True) if g is not None]
        for row in grads
    ]
    found = dict(zip(names, play(opt, list(model.parameters()), loud), strict=True))
    hidden = [i for i, name in enumerate(names) if name in ("1.weight", "2.weight")]
    alone = leaves([twin[i] for i in hidden])
    wanted = play(lanton(alone, lr=0.01), alone, [[row[i] for i in hidden] for row in grads])
    assert distance([found[names[i]] for i in hidden], wanted) < 1e-13


def test_the_sum_of_absolute_values_is_the_noise_of_signs() -> None:
    model = nn.Sequential(nn.Embedding(30, 16), nn.Linear(16, 24)).double()
    params = list(model.parameters())
    opt = lanton(model)
    (first, second) = draw([tuple(p.shape) for p in params], 2, seed=5)[1]
    play(opt, params, [first, second])
    assert first[0] is not None and second[0] is not None
    assert float(opt.state[params[0]]["noise"]) == pytest.approx(0.1 * float((second[0] - first[0]).abs().sum()) ** 2)


def test_it_goes_on_top_of_any_direction() -> None:
    """Signs of a momentum, by hand: the layer with nine times the noise moves by a third."""
    direction = sign()
    rule = chain(momentum(0.9, average=True), direction, noise_adaptive([direction], alpha=1e-6))
    params = leaves([torch.zeros(5), torch.zeros(5)], torch.float64)
    opt = Optimizer(params, rule, lr=0.1, backend="eager")
    first: list[Tensor | None] = [torch.ones(5), torch.ones(5)]
    second: list[Tensor | None] = [torch.ones(5) + 0.1, torch.ones(5) + 0.9]
    before = play(opt, params, [first])
    assert same(before, [torch.full((5,), -0.1, dtype=torch.float64)] * 2)
    moved = [a - b for a, b in zip(play(opt, params, [second]), before, strict=True)]
    assert distance(moved, [torch.full((5,), -0.1), torch.full((5,), -0.1 / 3)]) < 1e-7


def test_alpha_is_the_median_noise_and_stands_still_from_step_100_on() -> None:
    params = leaves([torch.zeros(4, 4)] * 3, torch.float64)
    opt = lanton(params, lr=1e-3, method="svd")
    grads = noisy([0.1, 1.0, 10.0], 120, 4, 4)
    play(opt, params, grads[:100])
    held = opt.state[params[0]]["noise_alpha"].clone()
    middle = sorted(float(opt.state[p]["noise"]) for p in params)[1]
    assert float(held) == pytest.approx(math.sqrt(middle), rel=1e-6)
    play(opt, params, grads[100:])
    assert torch.equal(opt.state[params[0]]["noise_alpha"], held)
    assert sorted(float(opt.state[p]["noise"]) for p in params)[1] != pytest.approx(middle, rel=1e-3)


def test_a_layer_whose_noise_is_not_known_yet_does_not_count_as_the_quietest() -> None:
    grads = noisy([1.0, 3.0, 1.0], 9, 12, 16)
    late: Grads = [[a, b, c if t == 8 else None] for t, (a, b, c) in enumerate(grads)]
    ours, twins = leaves([torch.zeros(12, 16)] * 3, torch.float64), leaves([torch.zeros(12, 16)] * 2, torch.float64)
    found = play(lanton(ours, lr=0.02), ours, late)
    assert same(found[:2], play(lanton(twins, lr=0.02), twins, [row[:2] for row in grads]))
    first = leaves([torch.zeros(12, 16)], torch.float64)
    assert same(found[2:], play(muon(first, lr=0.02), first, [[grads[8][2]]]))


def test_a_layer_that_has_gone_to_infinity_does_not_stop_the_others() -> None:
    grads = noisy([1.0, 3.0, 1.0], 9, 12, 16)
    spoiled: Grads = [[a, b, torch.full((12, 16), math.inf) if t == 4 else c] for t, (a, b, c) in enumerate(grads)]
    ours, twins = leaves([torch.zeros(12, 16)] * 3, torch.float64), leaves([torch.zeros(12, 16)] * 3, torch.float64)
    found = play(lanton(ours, lr=0.02, alpha=1.0), ours, spoiled)
    assert not found[2].isfinite().all()
    assert found[0].isfinite().all() and found[1].isfinite().all()
    assert distance(found[:2], play(lanton(twins, lr=0.02, alpha=1.0), twins, grads)[:2]) < 0.02


def test_decay_follows_lr_and_not_a_layers_share_of_it() -> None:
    """The gradients do not depend on the weights, so that all that two runs differ by is what has decayed."""
    grads = noisy([1.0, 30.0], 6, 12, 16)
    start = [matrix(12, 16), matrix(12, 16, seed=1)]
    from_start, from_zero = leaves(start), leaves([torch.zeros_like(w) for w in start])
    found = play(lanton(from_start, lr=0.02, weight_decay=0.5), from_start, grads)
    moved = play(lanton(from_zero, lr=0.02, weight_decay=0.5), from_zero, grads)
    assert distance(found, [m + 0.99**6 * w for m, w in zip(moved, start, strict=True)]) < 1e-13


def test_looking_at_the_noise_less_often_leaves_it_as_it_was_in_between() -> None:
    grads = noisy([1.0], 7, 12, 16)
    params = leaves([torch.zeros(12, 16)], torch.float64)
    opt = lanton(params, noise_every=3)
    seen = []
    for row in grads:
        play(opt, params, [row])
        seen.append(float(opt.state[params[0]]["noise"]))
    assert seen[0] == 0.0
    assert seen[1] == seen[2] == seen[3] != 0.0
    assert seen[4] == seen[5] == seen[6] != seen[3]


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("sign_lr", -0.1),
        ("vector_lr", -0.1),
        ("momentum", 1.5),
        ("weight_decay", -0.1),
        ("noise_beta", 1.0),
        ("noise", "none"),
        ("alpha", 0.0),
        ("alpha", math.inf),
        ("noise_every", 0),
        ("method", "newton"),
        ("scale_rule", "huge"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        lanton(leaves(draw([(4, 4)], 0)[0]), **hyper)
