"""SAM (Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, same
from torch import Tensor, nn
from training.cases import Bowl, Task, bowl_task, classify, play, trained

from poise.optim import SGD, AdamW, BrakedSGD
from poise.training import EMA, SAM, DropMuon

CASES: list[dict[str, Any]] = [{}, {"rho": 0.7}]
NEUTRAL: dict[str, Any] = {"rho": 0.0}


def reference(bowl: Bowl, *, lr: float, steps: int, rho: float = 0.05) -> tuple[list[Tensor], list[Tensor]]:
    """Up the slope by rho, over all parameters together; there the gradient; back, and down by it."""
    x = bowl.start()
    for t in range(steps):
        g = bowl.gradient(x, t)
        length = sum(float(a.pow(2).sum()) for a in g) ** 0.5
        above = [a + rho * b / length for a, b in zip(x, g, strict=True)]
        x = [a - lr * b for a, b in zip(x, bowl.gradient(above, t), strict=True)]
    return x, x


def quadratic(curvatures: Tensor) -> Task:
    """`sum h x^2 / 2` from the point of ones."""
    model = nn.Module()
    model.x = nn.Parameter(torch.ones_like(curvatures))
    return Task(model, lambda m, _: (curvatures * m.get_parameter("x").square()).sum() / 2, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rho_zero_is_the_inner_optimizer_bit_for_bit_with_dropout_and_batch_statistics_too(dtype: torch.dtype) -> None:
    ends = []
    for rho in (None, 0.0):
        task = classify(dtype=dtype, more=[nn.BatchNorm1d(24), nn.Dropout(0.3)])
        inner = AdamW(task.model, lr=0.01, backend="eager")
        opt = inner if rho is None else SAM(inner, rho, model=task.model)
        torch.manual_seed(3)
        play(opt, task, 5)
        ends.append([v.clone() for v in task.model.state_dict().values()])
        ends[-1].append(torch.get_rng_state())
    assert same(*ends)


def test_on_a_quadratic_its_gradient_is_that_of_the_loss_plus_rho_times_the_gradients_length() -> None:
    h = torch.tensor([0.5, 2.0, 7.0, -1.0], dtype=torch.float64)
    task = quadratic(h)
    SAM(SGD(task.model, lr=0.0), rho=0.3).step(task.closure(SGD(task.model)))
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    ((h * x**2).sum() / 2 + 0.3 * torch.linalg.vector_norm(h * x)).backward()
    found = task.model.get_parameter("x").grad
    assert found is not None
    assert x.grad is not None
    assert distance([found], [x.grad]) < 1e-10


def test_the_ascent_is_rho_long_over_all_parameters_together() -> None:
    task = bowl_task()
    seen: list[list[Tensor]] = []
    opt = SAM(SGD(task.model, lr=0.0), rho=0.4)
    plain = task.closure(opt)

    def closure() -> Tensor:
        seen.append(trained(task))
        return plain()

    opt.step(closure)
    here, above = seen
    lengths = [float((a - b).norm()) for a, b in zip(above, here, strict=True)]
    assert sum(length**2 for length in lengths) ** 0.5 == pytest.approx(0.4, rel=1e-9)
    assert min(lengths) > 0.01
    assert same(trained(task), here)


def test_a_group_with_rho_zero_is_not_displaced_and_keeps_its_place_in_the_length() -> None:
    task = bowl_task()
    params = list(task.model.parameters())
    inner = SGD([{"params": params[:1]}, {"params": params[1:]}], lr=0.0)
    opt = SAM(inner, rho=0.4)
    opt.param_groups[1]["rho"] = 0.0
    seen: list[list[Tensor]] = []
    plain = task.closure(opt)

    def closure() -> Tensor:
        seen.append(trained(task))
        return plain()

    opt.step(closure)
    assert same(seen[0][1:], seen[1][1:])
    assert 0.01 < float((seen[0][0] - seen[1][0]).norm()) < 0.399


def test_both_passes_leave_out_the_same_units() -> None:
    drawn: list[Tensor] = []

    class Draw(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append(torch.rand(4))
            return x

    task = classify(more=[Draw()])
    play(SAM(SGD(task.model)), task, 2)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])


def test_only_the_first_pass_counts_in_batch_statistics() -> None:
    norm = nn.BatchNorm1d(24)
    task = classify(more=[norm])
    play(SAM(SGD(task.model), model=task.model), task, 3)
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 3


def test_an_error_above_leaves_weights_generators_and_statistics_as_the_first_pass_left_them() -> None:
    norm = nn.BatchNorm1d(24)
    task = classify(more=[norm, nn.Dropout(0.5)])
    opt = SAM(AdamW(task.model), rho=1.0, model=task.model)
    before = trained(task)
    plain = task.closure(opt)
    kept: list[Tensor] = []

    def closure() -> Tensor:
        if task.calls == 1:
            raise KeyError("above")
        loss = plain()
        kept.append(torch.get_rng_state())
        return loss

    with pytest.raises(KeyError, match="above"):
        opt.step(closure)
    assert same(trained(task), before)
    assert torch.equal(torch.get_rng_state(), kept[0])
    assert int(norm.num_batches_tracked or 0) == 1


def test_a_closure_that_does_not_clear_gradients_does_not_add_the_two_up() -> None:
    task, twin = bowl_task(), bowl_task()
    opt = SAM(SGD(task.model, lr=0.1), rho=0.3)

    def closure() -> Tensor:
        loss = task.loss(task.model, 0)
        loss.backward()
        return loss

    opt.step(closure)
    assert same(trained(task), play(SAM(SGD(twin.model, lr=0.1), rho=0.3), twin, 1))


def test_bfloat16_weights_are_displaced_on_average_by_what_was_asked() -> None:
    """4096 weights of 1.0, each to be moved by 0.05/64, a tenth of the spacing below 1 and a fifth of half that above."""
    moved: list[float] = []
    model = nn.Module()
    model.x = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    opt = SAM(SGD(model, lr=0.0), rho=0.05)

    def closure() -> Tensor:
        x: Any = model.x
        moved.append(float(x.detach().double().mean()) - 1.0)
        opt.zero_grad()
        loss = x.float().sum()
        loss.backward()
        return loss

    for _ in range(20):
        opt.step(closure)
    assert moved[::2] == [0.0] * 20
    assert sum(moved[1::2]) / 20 == pytest.approx(0.05 / 64, rel=0.1)
    assert len(set(moved[1::2])) > 10, "the same noise in every step would be a bias"


def test_the_loss_is_that_at_the_weights_and_the_inner_optimizer_is_told_it() -> None:
    told: list[Any] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            told.append(closure().detach())
            return super().step()

    task, twin = bowl_task(), bowl_task()
    wanted = twin.loss(twin.model, 0).detach()
    opt = SAM(Spy(task.model.parameters()), rho=0.5)
    assert same([opt.step(task.closure(opt)).detach(), *told], [wanted, wanted])
    assert task.calls == 2


def test_without_any_gradient_a_step_changes_nothing() -> None:
    task = classify()
    opt = SAM(AdamW(task.model, backend="eager"))
    before = trained(task)
    opt.step(opt.zero_grad)
    assert same(trained(task), before)


def test_an_inner_optimizer_that_takes_its_own_gradients_is_refused() -> None:
    task = classify()
    with pytest.raises(ValueError, match="LBFGS"):
        SAM(torch.optim.LBFGS(task.model.parameters()))
    with pytest.raises(ValueError, match=r"DropMuon\(SAM"):
        SAM(DropMuon(AdamW(task.model), task.model))
    with pytest.raises(ValueError, match=r"EMA\(SAM"):
        SAM(EMA(SAM(AdamW(task.model))))


def test_a_negative_rho_is_refused() -> None:
    with pytest.raises(ValueError, match="rho=-1"):
        SAM(SGD(classify().model), rho=-1)


def test_around_a_rule_with_a_rho_of_its_own_both_keep_theirs() -> None:
    start, grads = draw([(6, 4)], 1)
    (g,) = grads[0]
    assert g is not None
    params = leaves(start)
    opt = SAM(BrakedSGD(params, lr=0.1, rho=0.5, backend="eager"), rho=0.3)
    assert (opt.param_groups[0]["rho"], opt.param_groups[0]["sam_rho"]) == (0.5, 0.3)
    seen = []

    def closure() -> float:
        seen.append(params[0].detach().clone())
        params[0].grad = g.clone()
        return 0.0

    opt.step(closure)
    assert float((seen[1] - seen[0]).norm()) == pytest.approx(0.3)
    opt.param_groups[0]["sam_rho"] = 0.0
    opt.step(closure)
    assert torch.equal(seen[3], seen[2])
