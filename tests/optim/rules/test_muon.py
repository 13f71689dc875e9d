"""Muon (K. Jordan et al., 2024; Muon is Scalable for LLM Training, arXiv 2502.16982)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.references import adamw, polar, shape_factor
from torch import Tensor, nn

from poise.optim import Muon
from poise.optim.transforms.spectral import ScaleRule

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
muon = partial(Muon, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"method": "ns5", "steps": 5, "weight_decay": 0.1, "adamw_weight_decay": 0.3},
    {"method": "ns5", "nesterov": False, "scale_rule": "match_rms", "adamw_lr": 1e-2},
    {"method": "svd", "scale_rule": "spectral", "momentum": 0.5, "adamw_betas": (0.8, 0.9), "adamw_eps": 1e-3},
]


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    method: str = "polar_express",
    steps: int | None = None,
    scale_rule: str = "original",
    adamw_lr: float = 3e-4,
    adamw_betas: tuple[float, float] = (0.9, 0.95),
    adamw_eps: float = 1e-10,
    adamw_weight_decay: float = 0.0,
) -> list[Tensor]:
    """Matrices and convolutions by Muon, the rest by AdamW, whose learning rate follows the same schedule."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    ends = []
    for i, start in enumerate(params):
        gradients = [row[i] for row in grads]
        if start.ndim < 2:
            others = [adamw_lr * rate / rates[0] for rate in rates]
            ends.append(adamw(start, gradients, others, adamw_betas, adamw_eps, adamw_weight_decay))
            continue
        w = start.double().clone()
        buffer = torch.zeros_like(w)
        for rate, gradient in zip(rates, gradients, strict=True):
            if gradient is None:
                continue
            g = gradient.double()
            buffer = momentum * buffer + (1 - momentum) * g
            m = ((1 - momentum) * g + momentum * buffer if nesterov else buffer).reshape(len(w), -1)
            o = polar(m, method, steps) * shape_factor(*m.shape, scale_rule)
            w = (1 - rate * weight_decay) * w - rate * o.reshape(w.shape)
        ends.append(w)
    return ends


def orthogonal_update(matrix: Tensor, **hyper: Any) -> Tensor:
    """What Muon adds to a zero weight at lr 1, negated: the orthogonalised gradient."""
    params = leaves([torch.zeros_like(matrix)])
    hyper = {"method": "ns5", "scale_rule": "none", "momentum": 0.0, "nesterov": False, **hyper}
    return -play(muon(params, lr=1.0, **hyper), params, [[matrix]])[0]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(32, 48), (48, 32)])
def test_twenty_steps_equal_torch_muon(nesterov: bool, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own code, with its cast to bfloat16 undone."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    start, grads = draw([shape], 20)
    hyper: dict[str, Any] = dict(lr=0.02, momentum=0.95, nesterov=nesterov, weight_decay=0.1)
    ours, theirs = leaves(start), leaves(start)
    wanted = play(torch.optim.Muon(theirs, **hyper), theirs, grads)
    assert distance(reference(start, grads, method="ns5", **hyper), wanted) < 1e-12
    assert distance(play(muon(ours, method="ns5", steps=5, **hyper), ours, grads), wanted) < 1e-12


def test_ten_float32_steps_stay_within_bfloat16_rounding_of_torch_muon() -> None:
    start, grads = draw([(64, 128), (128, 64)], 10, dtype=torch.float32)
    ours, theirs = leaves(start), leaves(start)
    found = play(muon(ours, lr=0.02, method="ns5"), ours, grads)
    assert distance(found, play(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0), theirs, grads)) < 3e-3


@pytest.mark.parametrize("hyper", CASES, ids=["defaults", "ns5", "match_rms", "svd"])
def test_twelve_steps_equal_the_formula(hyper: dict[str, Any]) -> None:
    start, grads = draw([(24, 40), (40, 24), (24,), (8, 4, 3, 3), ()], 12)
    params = leaves(start)
    assert distance(play(muon(params, lr=0.02, **hyper), params, grads), reference(start, grads, lr=0.02, **hyper)) < 1e-9


def test_ns5_singular_values_lie_between_068_and_121() -> None:
    (matrix,), _ = draw([(256, 1024)], 0)
    values = torch.linalg.svdvals(orthogonal_update(matrix))
    assert values.min() >= 0.68
    assert values.max() <= 1.21


def test_the_default_iteration_comes_nearer_to_the_orthogonal_factor_than_ns5() -> None:
    (matrix,), _ = draw([(64, 128)], 0)
    exact = polar(matrix, "svd", None)
    default = distance([orthogonal_update(matrix, method="polar_express")], [exact])
    assert default < 0.6 * distance([orthogonal_update(matrix, method="ns5")], [exact])


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (48, 48), (12, 4, 3, 3)])
def test_match_rms_moves_every_full_rank_shape_by_02_lr(shape: tuple[int, ...]) -> None:
    (matrix,), _ = draw([shape], 0)
    update = orthogonal_update(matrix, method="svd", scale_rule="match_rms")
    assert abs(float(update.pow(2).mean().sqrt()) - 0.2) < 1e-12


@pytest.mark.parametrize("method", ["ns5", "polar_express"])
@pytest.mark.parametrize("exponent", [-30, 14])
def test_gradients_times_a_power_of_two_change_only_rounding(method: str, exponent: int) -> None:
    start, grads = draw([(24, 40)], 10)
    scaled: Grads = [[g * 2.0**exponent for g in row if g is not None] for row in grads]
    ends = []
    for rows in (grads, scaled):
        params = leaves(start)
        ends.append(play(muon(params, lr=0.02, method=method), params, rows))
    assert distance(*ends) < 1e-13


@pytest.mark.parametrize("rule, transposes", [("none", True), ("match_rms", True), ("original", False), ("spectral", False)])
def test_a_transposed_problem_is_solved_transposed_unless_the_scale_knows_rows(rule: ScaleRule, transposes: bool) -> None:
    start, grads = draw([(40, 24)], 10)
    turned: Grads = [[g.T.contiguous() for g in row if g is not None] for row in grads]
    tall, wide = leaves(start), leaves([start[0].T.contiguous()])
    a = play(muon(tall, lr=0.02, scale_rule=rule), tall, grads)
    b = play(muon(wide, lr=0.02, scale_rule=rule), wide, turned)
    gap = distance(a, [b[0].T])
    assert gap < 1e-11 if transposes else gap > 1e-3


def test_the_scale_of_a_convolution_is_that_of_its_matrix_of_filters() -> None:
    """256 x 4 x 3 x 3 is 256 x 36: sqrt(256 / 36) = 2.67. Taken from the kernel, 3 x 3, it would be 1."""
    (weight,), _ = draw([(256, 4, 3, 3)], 0)
    ratio = orthogonal_update(weight, scale_rule="original") / orthogonal_update(weight, scale_rule="none")
    assert distance([ratio], [torch.full_like(ratio, math.sqrt(256 / 36))]) < 1e-9


class Conv1D(nn.Module):
    """y = x W + b, as GPT-2 of transformers has it: weight (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.zeros(nx, nf, dtype=torch.float64))


@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_what_is_stored_inputs_first_moves_as_its_transpose_does(state: str) -> None:
    """The scale sqrt(max(1, outputs / inputs)) is 2 for 128 outputs of 32 inputs, whichever comes first in memory."""
    (start,), grads = draw([(128, 32)], 3)
    linear, turned = nn.Linear(32, 128, bias=False, dtype=torch.float64), Conv1D(128, 32)
    with torch.no_grad():
        linear.weight.copy_(start)
        turned.weight.copy_(start.T)
    models = [nn.Sequential(one, nn.Linear(128, 3, dtype=torch.float64)) for one in (linear, turned)]
    found = []
    for model, flip in zip(models, (False, True), strict=True):
        opt = Muon(model, momentum=0.0 if state != "fp32" else 0.95, backend="eager", state=state)
        weight = model[0].weight
        assert isinstance(weight, nn.Parameter)
        for row in grads:
            (grad,) = row
            assert grad is not None
            weight.grad = grad.T.contiguous() if flip else grad.clone()
            opt.step()
        found.append(weight.detach().T if flip else weight.detach())
    assert distance(found[:1], found[1:]) < 1e-12
    assert distance(found[:1], [start]) > 0.01


def test_a_transposed_convolution_is_scaled_by_its_outputs() -> None:
    """Stored (in, out, kernel): 4 x 64 x 3 x 3 is 64 x 36."""
    layer = nn.ConvTranspose2d(4, 64, 3, bias=False, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(4, 4, 1, dtype=torch.float64), layer)
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Muon(model, lr=1.0, method="svd", scale_rule="original").step()
    moved = (before - layer.weight.detach()).transpose(0, 1).reshape(64, 36)
    assert torch.linalg.svdvals(moved).sub(math.sqrt(64 / 36)).abs().max().item() < 1e-10


def test_without_momentum_it_orthogonalizes_the_gradient_as_torch_does_too() -> None:
    (start,), grads = draw([(12, 8)], 2)
    a, b = leaves([start]), leaves([start])
    assert distance(play(muon(a, momentum=0.0), a, grads), play(muon(b, momentum=0.0, nesterov=False), b, grads)) == 0.0


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_never_written_to(nesterov: bool, dtype: torch.dtype) -> None:
    start, grads = draw([(32, 48), (8, 4, 3, 3), (32,)], 3, dtype=dtype)
    params = leaves(start)
    opt = muon(params, lr=0.02, nesterov=nesterov)
    for row in grads:
        play(opt, params, [row])
        assert same([p.grad for p in params if p.grad is not None], [g for g in row if g is not None])


def test_a_missing_gradient_leaves_weight_and_momentum_alone() -> None:
    """Turning it into zeros would go on decaying the weight and moving it by its momentum."""
    start, grads = draw([(24, 40), (24,)], 5, missing=[(2, 0), (3, 0), (2, 1)])
    params = leaves(start)
    opt = muon(params, lr=0.02, weight_decay=0.5, adamw_weight_decay=0.5)
    before = play(opt, params, grads[:2])
    between = play(opt, params, grads[2:4])
    assert torch.equal(between[0], before[0])
    after = play(opt, params, grads[4:])
    assert distance(after, reference(start, grads, lr=0.02, weight_decay=0.5, adamw_weight_decay=0.5)) < 1e-9


def test_zero_gradients_only_decay_the_weights() -> None:
    start, _ = draw([(24, 40), (24,)], 0)
    params = leaves(start)
    zeros: Grads = [[torch.zeros_like(p) for p in start] for _ in range(5)]
    found = play(muon(params, lr=0.1, weight_decay=0.5, adamw_weight_decay=0.2), params, zeros)
    assert distance(found, [start[0] * 0.95**5, start[1] * (1 - 3e-4 * 0.2) ** 5]) < 1e-13


def test_vectors_and_scalars_follow_torch_adamw() -> None:
    start, grads = draw([(24,), (), (24, 40)], 20)
    ours, theirs = leaves(start), leaves(start)
    found = play(muon(ours, lr=0.02), ours, grads)
    theirs_opt = torch.optim.AdamW(theirs, lr=3e-4, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    assert distance(found[:2], play(theirs_opt, theirs, grads)[:2]) < 1e-12


def test_embeddings_and_the_output_head_of_a_model_follow_adamw() -> None:
    """They are matrices too, but a rule that takes every matrix would orthogonalise them."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(30, 16), torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 30))
    before = [p.detach().clone() for p in model.parameters()]
    opt = muon(model, lr=0.02, adamw_lr=1e-3)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    opt.step()
    embedding, hidden, _, head, _ = [(p.detach() - b).abs() for p, b in zip(model.parameters(), before, strict=True)]
    assert distance([embedding, head], [torch.full_like(embedding, 1e-3), torch.full_like(head, 1e-3)]) < 1e-5
    assert hidden.std() > 1e-3


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", -0.1),
        ("momentum", 1.5),
        ("weight_decay", -0.1),
        ("method", "newton"),
        ("scale_rule", "huge"),
        ("steps", 0),
        ("adamw_lr", -1.0),
    ],
)
def test_an_impossible_setting_is_refused_by_name(name: str, value: Any) -> None:
    hyper: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=name):
        muon(leaves(draw([(4, 4)], 0)[0]), **hyper)
