"""What the tests of drivers run over: the catalog's drivers, how each is built, and small tasks with closures.

A driver's own test file (`tests/training/drivers/test_sam.py` of `drivers/sam.py`) defines

    reference(bowl, *, lr, steps, **hyper)    the published formula around plain gradient descent, in loops of float64: returns
                                              the weights after `steps` steps, and those to evaluate; a setting of the driver
                                              that is called `steps` too comes as `steps_`
    CASES: list[dict]                         settings under which the two are compared
    NEUTRAL: dict                             settings under which the driver is its inner optimizer
    TYPICAL: dict                             settings for all other behaviours; default `{}`
    needs(opt, task): dict                    what it must be given of the task beside its settings; default nothing
    task(): Task                              what the reference is compared on, which gets its model; default `bowl_task`
    INNER_STEPS: int                          steps of the inner optimizer in one of a driver in its typical setting; default 1
    KEPT: int                                 values that the driver keeps for each weight in its typical setting; default: a
                                              shadow for averages, `delay` of them for delays, else none
    has_state(model): list                    parameters that have state before the first step and after the second; default all

Where a file holds several drivers, `reference_<name>` and so on come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from conformance.cases import mutated, told
from torch import Tensor, nn

from poise.catalog import Method, methods
from poise.training import Driver

__all__ = ["Bowl", "Task", "bowl_task", "build", "classify", "entries", "mutated", "play", "told", "trained"]


class Bowl(nn.Module):
    """`sum h x^2 / 2 + x^4 / 4 + z x` over all entries: curved, no quadratic, and with another slope z for each batch."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(shape: Sequence[int]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        shapes = [(4, 5), (5,), (3, 2, 2)]
        self.weights = nn.ParameterList([normal(shape) for shape in shapes])
        self.curvatures = [normal(shape).abs() for shape in shapes]
        self.slopes = [[normal(shape) for shape in shapes] for _ in range(16)]

    def forward(self, batch: int) -> Tensor:
        terms = zip(self.weights, self.curvatures, self.slopes[batch], strict=True)
        return torch.stack([(h * x**2 / 2 + x**4 / 4 + z * x).sum() for x, h, z in terms]).sum()

    def start(self) -> list[Tensor]:
        return [w.detach().clone() for w in self.weights]

    def gradient(self, weights: Sequence[Tensor], batch: int | None) -> list[Tensor]:
        """By hand; of batch None: the mean over all batches."""
        if batch is None:
            every = [self.gradient(weights, number) for number in range(len(self.slopes))]
            return [torch.stack(some).mean(0) for some in zip(*every, strict=True)]
        return [h * x + x**3 + z for x, h, z in zip(weights, self.curvatures, self.slopes[batch], strict=True)]


class Task:
    """A model with a loss for each batch number, and the number of the batch that is next."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, int], Tensor], batches: int) -> None:
        self.model, self.loss, self.batches, self.at, self.calls = model, loss, batches, 0, 0

    def closure(self, opt: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self.calls += 1
            opt.zero_grad()
            loss = self.loss(self.model, self.at)
            loss.backward()
            return loss

        return closure

    def full(self) -> None:
        """The gradient over all batches."""
        for p in self.model.parameters():
            p.grad = None
        for number in range(self.batches):
            (self.loss(self.model, number) / self.batches).backward()

    def layers(self) -> list[list[nn.Parameter]]:
        return [[p] for p in self.model.parameters()]


def bowl_task(seed: int = 0, dtype: torch.dtype = torch.float64) -> Task:
    return Task(Bowl(seed, dtype), lambda model, batch: model(batch), 16)


def classify(seed: int = 0, dtype: torch.dtype = torch.float32, *, batches: int = 4, more: Sequence[nn.Module] = ()) -> Task:
    """16 -> 24 -> 24 -> 6 on random classes; `more` stands after the first activation."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), *more, nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)).to(dtype)
    generator = torch.Generator().manual_seed(5)
    data = [
        (torch.randn(12, 16, generator=generator).to(dtype), torch.randint(6, (12,), generator=generator))
        for _ in range(batches)
    ]
    return Task(model, lambda m, i: nn.functional.cross_entropy(m(data[i][0]).float(), data[i][1]), batches)


def entries() -> list[Method]:
    return [entry for entry in methods("training") if entry.kind == "driver"]


def build(
    entry: Method, opt: torch.optim.Optimizer, task: Task, *, target: Callable[..., Any] | None = None, **hyper: Any
) -> Driver:
    """The driver of `entry` around `opt`, in its typical setting unless told otherwise."""
    needs = told(entry, "needs", lambda opt, task: {})
    return (target or entry.target)(opt, **{**told(entry, "TYPICAL", {}), **needs(opt, task), **hyper})


def play(opt: torch.optim.Optimizer, task: Task, steps: int, begin: int = 0) -> list[Tensor]:
    """Step on batch after batch, from `begin` on; returns copies of the weights."""
    for step in range(begin, begin + steps):
        task.at = step % task.batches
        opt.step(task.closure(opt))  # pyright: ignore[reportArgumentType, reportCallIssue]
    return trained(task)


def trained(task: Task) -> list[Tensor]:
    return [p.detach().clone() for p in task.model.parameters()]
