"""Teleportation (Improving Convergence and Generalization Using Parameter Symmetries, arXiv 2305.13404)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Task, classify, play, trained

from poise.compare.entries import parse
from poise.memory import rounding
from poise.optim import SGD, AdamW
from poise.training import EMA, Teleport

CASES: list[dict[str, Any]] = [
    {"at": (0, 5), "group": "diagonal", "lr_tele": 0.1, "steps": 2},
    {"at": (3,), "group": "data", "lr_tele": 0.01, "steps": 2},
    {"at": (3,), "group": "data", "lr_tele": 0.01, "steps": 2, "direction": "down"},
    {"at": (2, 4), "group": "inverse", "lr_tele": 0.003, "steps": 1},
]
TYPICAL: dict[str, Any] = {"at": (1, 4), "group": "data", "lr_tele": 0.01}
NEUTRAL: dict[str, Any] = {"at": range(100), "lr_tele": 0.0}


class OnBatch:
    """Cross-entropy on a random batch, in the model's dtype."""

    def __init__(self, n: int, features: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(2)
        self.x = torch.randn(n, features, generator=generator, dtype=torch.float64)
        self.y = torch.randint(classes, (n,), generator=generator)

    def __call__(self, model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        return nn.functional.cross_entropy(model(self.x.to(dtype)).to(torch.promote_types(dtype, torch.float32)), self.y)


def needs(opt: torch.optim.Optimizer, task: Task) -> dict[str, Any]:
    layers = [part for part in task.model.modules() if isinstance(part, nn.Linear)]
    return {"model": task.model, "loss": OnBatch(3, layers[0].in_features, layers[-1].out_features)}


def task() -> Task:
    """4 -> 5 -> 4 -> 3 in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        s = nn.LeakyReLU(0.1)
        model = nn.Sequential(nn.Linear(4, 5), s, nn.Linear(5, 4), s, nn.Linear(4, 3)).double()
    return Task(model, lambda m, i: nn.functional.cross_entropy(m(DATA[i][0]), DATA[i][1]), len(DATA))


DATA = [
    (torch.randn(6, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64), torch.arange(6) % 3) for i in range(16)
]


def reference(
    model: nn.Module, *, lr: float, steps: int, at: Any, group: str, lr_tele: float, steps_: int, direction: str = "up"
) -> tuple[list[Tensor], list[Tensor]]:
    """In the paper's layout, columns are samples; the derivative with respect to T is taken by differences."""
    x = [p.detach().clone() for p in model.parameters()]
    batch = OnBatch(3, 4, 3)

    def s(z: Tensor) -> Tensor:
        return torch.where(z > 0, z, 0.1 * z)

    def loss(w: list[Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        h = inputs.T
        for i in (0, 2, 4):
            z = w[i] @ h + w[i + 1][:, None]
            h = s(z)
        return -(z - torch.logsumexp(z, 0))[labels, torch.arange(len(labels))].mean()

    def gradient(w: list[Tensor], inputs: Tensor, labels: Tensor) -> list[Tensor]:
        w = [a.clone().requires_grad_() for a in w]
        return list(torch.autograd.grad(loss(w, inputs, labels), w))

    def moved(w: list[Tensor], T: list[Tensor]) -> list[Tensor]:
        w = list(w)
        for i, t in zip((0, 2), T, strict=True):
            h = batch.x.T
            for j in range(0, i, 2):
                h = s(w[j] @ h + w[j + 1][:, None])
            V, b, U = w[i], w[i + 1], w[i + 2]
            z = V @ h + b[:, None]
            if group == "diagonal":
                D = torch.diag(torch.exp(t))
                w[i : i + 3] = [D @ V, D @ b, U @ torch.linalg.inv(D)]
            elif group == "data":
                g = torch.eye(len(V)).double() + t
                off = torch.eye(len(V)).double() - s(g @ z) @ torch.linalg.pinv(s(g @ z))
                w[i : i + 3] = [g @ V, g @ b, U @ s(z) @ torch.linalg.pinv(s(g @ z)) + U @ off]
            else:
                g = torch.eye(len(V)).double() + t
                y = g @ s(z)
                wanted = torch.where(y > 0, y, 10 * y)
                off = torch.eye(len(h)).double() - h @ torch.linalg.pinv(h)
                w[i : i + 3] = [(wanted - b[:, None]) @ torch.linalg.pinv(h) + V @ off, b, U @ torch.linalg.inv(g)]
        return w

    def steepness(w: list[Tensor]) -> float:
        return sum(float(g.pow(2).sum()) for g in gradient(w, batch.x, batch.y))

    for t in range(steps):
        if t in at:
            for _ in range(steps_):
                zero = [torch.zeros(5).double(), torch.zeros(4).double()]
                if group != "diagonal":
                    zero = [torch.zeros(5, 5).double(), torch.zeros(4, 4).double()]
                T = [z.clone() for z in zero]
                for which in (0, 1):
                    for entry in range(zero[which].numel()):
                        ends = []
                        for step in (1, -1, 2, -2):
                            small = [z.clone() for z in zero]
                            small[which].view(-1)[entry] = step * 1e-4
                            ends.append(steepness(moved(x, small)))
                        slope = (8 * (ends[0] - ends[1]) - (ends[2] - ends[3])) / 12e-4
                        T[which].view(-1)[entry] = lr_tele * slope * (1 if direction == "up" else -1)
                x = moved(x, T)
        g = gradient(x, *DATA[t])
        x = [a - lr * b for a, b in zip(x, g, strict=True)]
    return x, x


def test_a_teleportation_leaves_the_optimizers_state_bit_for_bit_and_steps_of_both_kinds_are_counted() -> None:
    job = task()
    inner = AdamW(job.model, lr=0.01, backend="eager")
    opt = Teleport(inner, job.model, OnBatch(3, 4, 3), at=(), lr_tele=0.1)
    before = play(opt, job, 3)
    state = [{k: v.clone() for k, v in inner.state[p].items()} for p in job.model.parameters()]
    arrival = opt.jump()
    for p, kept in zip(job.model.parameters(), state, strict=True):
        assert same(list(inner.state[p].values()), list(kept.values()))
    assert not same(trained(job), before)
    assert arrival.objective[-1] > arrival.objective[0]
    assert opt.own == {"step": 3}


def test_the_step_after_a_teleportation_has_the_gradient_of_the_new_weights() -> None:
    job, twin = task(), task()
    opt = Teleport(SGD(job.model, lr=0.1), job.model, OnBatch(3, 4, 3), at=(0,), lr_tele=0.5)
    by_hand = Teleport(SGD(twin.model, lr=0.1), twin.model, OnBatch(3, 4, 3), at=(), lr_tele=0.5)
    by_hand.jump()
    assert same(play(opt, job, 1), play(by_hand, twin, 1))
    assert same(play(opt, job, 2, 1), play(by_hand, twin, 2, 1))


@pytest.mark.parametrize("group", ["diagonal", "data", "inverse"])
def test_a_t_of_zero_is_the_inner_optimizer_bit_for_bit(group: Any) -> None:
    job, twin = task(), task()
    opt = Teleport(AdamW(job.model, backend="eager"), job.model, OnBatch(3, 4, 3), range(4), group=group, lr_tele=0.0)
    assert same(play(opt, job, 4), play(AdamW(twin.model, backend="eager"), twin, 4))


def test_frozen_weights_and_their_partners_stay() -> None:
    job = task()
    frozen = job.model.get_parameter("2.weight").requires_grad_(False)
    before = trained(job)
    opt = Teleport(SGD(job.model, lr=0.0), job.model, OnBatch(3, 4, 3), lr_tele=0.5)
    assert same(play(opt, job, 1), before), "both pairs hold it"
    frozen.requires_grad_(True)
    job.model.get_parameter("4.weight").requires_grad_(False)
    opt.jump()
    after = trained(job)
    assert same(after[3:], before[3:])
    assert distance(after[:1], before[:1]) > 1e-4


def test_gradients_that_stand_in_the_weights_are_not_touched_and_autograd_stays_off() -> None:
    job = task()
    opt = Teleport(SGD(job.model, lr=0.1), job.model, OnBatch(3, 4, 3), at=())
    job.full()
    kept = [p.grad.clone() for p in job.model.parameters() if p.grad is not None]
    opt.jump()
    assert same([p.grad for p in job.model.parameters() if p.grad is not None], kept)
    assert all(p.requires_grad and p.is_leaf for p in job.model.parameters())


def test_split_weights_are_teleported_in_full_precision() -> None:
    job = classify(dtype=torch.bfloat16)
    inner = AdamW(job.model, lr=0.01, weights="split", backend="eager")
    opt = Teleport(inner, job.model, OnBatch(3, 16, 6), at=(), group="data", lr_tele=1e-3)
    play(opt, job, 2)
    lows = [inner.state[p]["weight.low"].clone() for p in job.model.parameters()]
    arrival = opt.jump()
    for (name, p), low in zip(job.model.named_parameters(), lows, strict=True):
        value = arrival.weights[name]
        assert value.dtype == torch.float32
        assert torch.equal(rounding.join(p.detach(), inner.state[p]["weight.low"]), value)
        if name in ("0.weight", "2.weight"):
            assert not torch.equal(inner.state[p]["weight.low"], low)


def test_a_refused_teleportation_changes_neither_weights_nor_count() -> None:
    job = task()
    opt = Teleport(SGD(job.model, lr=0.1), job.model, OnBatch(300, 4, 3), group="data", lr_tele=5.0)
    before = trained(job)
    with pytest.raises(ValueError, match="moved the loss"):
        play(opt, job, 1)
    assert same(trained(job), before)
    assert opt.own == {"step": 0}


def test_averages_around_it_see_the_weights_after_the_jump() -> None:
    job = task()
    opt = EMA(Teleport(SGD(job.model, lr=0.1), job.model, OnBatch(3, 4, 3), lr_tele=0.5), p=1.0)
    assert same(opt.own["weights"], trained(job))
    assert same(play(opt, job, 2), opt.own["weights"])


def test_a_model_without_the_symmetry_is_refused_when_it_is_built() -> None:
    job, loss = classify(), OnBatch(3, 16, 6)
    with pytest.raises(ValueError, match="Tanh"):
        Teleport(SGD(job.model), job.model, loss)
    conv = nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU())
    with pytest.raises(ValueError, match=r"no nn\.Sequential"):
        Teleport(SGD(conv), conv, loss)
    with pytest.raises(ValueError, match=r"at=\[-1\]"):
        Teleport(SGD(job.model), job.model, loss, [-1], group="data")
    wrong: Any = None
    with pytest.raises(TypeError, match="loss=None"):
        Teleport(SGD(job.model), job.model, wrong)


def test_a_comparison_says_that_it_cannot_give_a_batch_to_teleport_on() -> None:
    with pytest.raises(ValueError, match=r"teleport needs loss=\.\.\., which a task does not have"):
        parse("teleport")
    assert set(parse("implicit-map")["implicit-map"].space) >= {"steps", "lr"}
