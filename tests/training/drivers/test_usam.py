"""USAM and DNSAM (An SDE for Modeling SAM: Theory and Insights, arXiv 2301.08203)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Bowl, Task, bowl_task, classify, play

from poise.optim import SGD
from poise.training import DNSAM, SAM, USAM, Driver

CASES: list[dict[str, Any]] = [{}, {"rho": 0.02}]
CASES_dnsam: list[dict[str, Any]] = [{}, {"rho": 0.7}]
NEUTRAL: dict[str, Any] = {"rho": 0.0}


def needs_dnsam(opt: torch.optim.Optimizer, task: Task) -> dict[str, Any]:
    return {"full": task.full}


def reference_usam(bowl: Bowl, *, lr: float, steps: int, rho: float = 0.05) -> tuple[list[Tensor], list[Tensor]]:
    """Up by rho times the gradient, whatever its length."""
    x = bowl.start()
    for t in range(steps):
        above = [a + rho * b for a, b in zip(x, bowl.gradient(x, t), strict=True)]
        x = [a - lr * b for a, b in zip(x, bowl.gradient(above, t), strict=True)]
    return x, x


def reference_dnsam(bowl: Bowl, *, lr: float, steps: int, rho: float = 0.05) -> tuple[list[Tensor], list[Tensor]]:
    """Up along the batch's gradient, divided by the length of the mean over all batches."""
    x = bowl.start()
    for t in range(steps):
        whole = bowl.gradient(x, None)
        length = sum(float(a.pow(2).sum()) for a in whole) ** 0.5
        above = [a + rho * b / length for a, b in zip(x, bowl.gradient(x, t), strict=True)]
        x = [a - lr * b for a, b in zip(x, bowl.gradient(above, t), strict=True)]
    return x, x


def quadratic(curvatures: list[float], start: list[float]) -> tuple[nn.Parameter, Task]:
    h, model = torch.tensor(curvatures, dtype=torch.float64), nn.Module()
    x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    model.x = x
    return x, Task(model, lambda m, _: (h * m.get_parameter("x").square()).sum() / 2, 1)


def test_on_a_quadratic_usam_shrinks_each_coordinate_by_its_own_factor() -> None:
    h, lr, rho = [0.1, 1.0, 4.0, -0.5], 0.05, 0.3
    x, task = quadratic(h, [1.0] * 4)
    play(USAM(SGD([x], lr=lr), rho=rho), task, 20)
    wanted = torch.tensor([(1 - lr * (k + rho * k**2)) ** 20 for k in h], dtype=torch.float64)
    assert distance([x], [wanted]) < 1e-13


def test_on_a_quadratic_in_full_batch_dnsam_is_sam() -> None:
    h = [0.1, 1.0, 4.0, -0.5]
    x, task = quadratic(h, [1.0] * 4)
    y, twin = quadratic(h, [1.0] * 4)
    play(DNSAM(SGD([x], lr=0.1), full=task.full, rho=0.2), task, 10)
    play(SAM(SGD([y], lr=0.1), rho=0.2), twin, 10)
    assert distance([x], [y]) < 1e-13


@pytest.mark.parametrize("rho, escapes", [(1.0, True), (3.0, False)])
def test_a_saddle_attracts_usam_once_rho_exceeds_the_inverse_of_its_negative_curvature(rho: float, escapes: bool) -> None:
    """Curvatures 1 and -1/2: the second coordinate grows by 1 + lr (1/2 - rho/4), which is below 1 for rho > 2."""
    x, task = quadratic([1.0, -0.5], [1.0, 1e-11])
    play(USAM(SGD([x], lr=0.1 if escapes else 0.05), rho=rho), task, 2000)
    size = float(x.detach().norm())
    assert size > 1e6 if escapes else size < 1e-10


def test_the_sde_of_usam_follows_it_as_closely_as_the_learning_rate_is_small() -> None:
    """Loss h x^2 / 2 with gradient noise s z. Its SDE, by the paper's drift and noise, where both have closed means:

        dX = -(h + rho h^2) X dt + sqrt(lr) s (1 + rho h) dW,    t = lr * steps

    Simulated at a tenth of the learning rate, its mean loss at time 1 is off that of USAM by O(lr): halving lr halves the gap.
    """
    h, s, rho = torch.tensor([1.0, 3.0], dtype=torch.float64), 1.0, 0.3
    paths, gaps, curves = 20000, {}, {}
    for lr in (0.1, 0.05, 0.025):
        generator = torch.Generator().manual_seed(0)
        x = nn.Parameter(torch.ones(paths, 2, dtype=torch.float64))
        opt = USAM(SGD([x], lr=lr), rho=rho)
        for _ in range(round(1 / lr)):
            z = s * torch.randn(paths, 2, generator=generator, dtype=torch.float64)

            def closure(noise: Tensor = z, x: nn.Parameter = x, opt: Driver = opt) -> Tensor:
                opt.zero_grad()
                loss = (h * x.square() / 2 + noise * x).sum()
                loss.backward()
                return loss

            opt.step(closure)
        found = (h * x.detach().square() / 2).sum(1).mean()

        y, dt = torch.ones(paths, 2, dtype=torch.float64), lr / 10
        generator = torch.Generator().manual_seed(1)
        for _ in range(round(1 / dt)):
            w = torch.randn(paths, 2, generator=generator, dtype=torch.float64) * dt**0.5
            y = y - (h + rho * h**2) * y * dt + lr**0.5 * s * (1 + rho * h) * w
        wanted = (h * y.square() / 2).sum(1).mean()
        gaps[lr], curves[lr] = abs(float(found - wanted)), float(found)
    assert all(gap < 2 * lr * curves[lr] for lr, gap in gaps.items()), (gaps, curves)
    assert gaps[0.025] < 0.5 * gaps[0.1]


def test_the_drift_of_usam_is_the_gradient_of_the_loss_plus_half_rho_times_the_squared_gradient() -> None:
    """One step on a batch of noise is, on average and to first order in rho, one of descent on f + rho/2 E ||g||^2."""
    task, bowl = bowl_task(), bowl_task().model
    rho = 1e-5
    opt = USAM(SGD(task.model, lr=0.0), rho=rho)
    assert isinstance(bowl, Bowl)
    moves = [torch.zeros_like(p) for p in task.model.parameters()]
    for number in range(task.batches):
        task.at = number
        opt.step(task.closure(opt))
        moves = [m + p.grad / task.batches for m, p in zip(moves, task.model.parameters(), strict=True) if p.grad is not None]
    weights = [w.requires_grad_() for w in bowl.start()]
    size = torch.zeros((), dtype=torch.float64)
    for number in range(task.batches):
        size = size + torch.stack([g.square().sum() for g in bowl.gradient(weights, number)]).sum() / task.batches
    wanted = torch.autograd.grad(size / 2, weights)
    found = [(m - g.detach()) / rho for m, g in zip(moves, bowl.gradient(weights, None), strict=True)]
    assert distance(found, wanted) < 2e-3 * max(float(g.abs().max()) for g in wanted)


def test_dnsam_divides_by_the_length_of_the_whole_gradient_not_the_batchs() -> None:
    task, twin = bowl_task(), bowl_task()
    a = play(DNSAM(SGD(task.model, lr=0.1), full=task.full, rho=0.3), task, 3)
    assert distance(a, play(SAM(SGD(twin.model, lr=0.1), rho=0.3), twin, 3)) > 1e-3


def test_the_pass_over_all_data_leaves_no_trace_in_batch_statistics() -> None:
    norm = nn.BatchNorm1d(24)
    task = classify(more=[norm])
    play(DNSAM(SGD(task.model), full=task.full, model=task.model), task, 3)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 3


def test_dnsam_without_the_whole_gradient_is_refused() -> None:
    with pytest.raises(TypeError, match="full=None"):
        DNSAM(SGD(classify().model), None)  # pyright: ignore[reportArgumentType]


def test_two_saddle_runs_of_one_seed_are_the_same_run() -> None:
    ends = []
    for _ in range(2):
        task = classify(dtype=torch.bfloat16)
        ends.append(play(USAM(SGD(task.model, lr=0.1, backend="eager"), rho=0.1), task, 4))
    assert same(*ends)
