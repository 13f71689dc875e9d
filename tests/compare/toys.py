"""A problem and methods small enough to compare in a blink."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise.catalog import Method, Paper, Space, log_uniform
from poise.compare.results import Interval, MethodResult, Results, Run, Settings, Speedup, Timing, Verdict
from poise.compare.tasks import Split

SETTINGS = Settings.model_validate(dict(trials=3, tune_steps=6, steps=8, seeds=3, seed=0, budgets=()))


class Toy:
    """Linear regression on noisy data; `asked` lists the splits in the order they were read."""

    name = "toy"
    unit = "squared error"
    fingerprint = "toy"

    def __init__(self) -> None:
        self.asked: list[tuple[Split, int]] = []

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def batches(self, split: Split, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.asked.append((split, seed))
        generator = torch.Generator().manual_seed({"train": seed, "tune": -1, "report": -2}[split])
        for _ in range(2**31 if split == "train" else 2):
            x = torch.randn(16, 4, generator=generator)
            yield x, x.sum(1, keepdim=True) + 0.3 * torch.randn(16, 1, generator=generator)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()


def toy_sgd(model: nn.Module, lr: float = 0.1, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Plain gradient descent."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def toy_adam(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """Adam."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def toy_noise(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    """Gradient descent that draws from torch's global generator at every step."""

    class Noisy(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            torch.rand(3)
            return super().step(closure)

    return Noisy(model.parameters(), lr=lr)


def entry(target: Callable[..., Any], name: str | None = None, **tune: Space) -> Method:
    """A catalog line that does not stand in the catalog."""
    return Method(name or target.__name__, "optim", Paper("A toy"), target, tune=tune)


SGD = entry(toy_sgd, lr=log_uniform(1e-3, 0.5))
ADAM = entry(toy_adam, "adamw", lr=log_uniform(1e-3, 0.5))


def without_seconds(results: Results) -> dict[str, Any]:
    """What two equal studies must agree on to the bit: everything but the clock."""
    found = results.model_dump()
    for method in found["methods"]:
        del method["timing"]
    for one in [*found["methods"], *found["budgets"]]:
        for run in [*one.get("trials", []), *one.get("finals", []), *one.get("runs", [])]:
            del run["seconds"]
    return found


def run(number: int = 0, loss: float | None = 1.0, **other: Any) -> Run:
    """A finished run."""
    known: dict[str, Any] = dict(seed=0, hyper={"lr": 0.1}, passes=4, initial_loss=2.0, diverged=loss is None, curve=[(4, 1.0)])
    known |= dict(parameters=10, state_bytes=80, seconds=0.002)
    return Run(number=number, loss=loss, **(known | other))


def results(edges: dict[str, Any] | None = None) -> Results:
    """A comparison of one method with itself."""
    zero = Interval(mean=0.0, low=0.0, high=0.0)
    one = Interval(mean=1.0, low=0.9, high=1.1)
    methods = [
        MethodResult(
            name=name,
            method="adamw",
            arxiv=None,
            fixed={},
            space={},
            widened={},
            trials=[run()],
            best=0,
            edges=edges or {},
            tuning_gap=None,
            finals=[run(), run(1)],
            final=one,
            to_best=zero,
            to_reference=zero,
            speedup=Speedup(passes=8.0, ratio=1.0, low=0.9, high=1.1, bound="exact"),
            timing=Timing(seconds_per_step=0.002, optimizer_seconds_per_step=0.0005, ratio=1.0, low=0.9, high=1.1, rounds=3),
            divergences=0,
        )
        for name in ("adamw", "again")
    ]
    return Results(
        task="toy",
        unit="nats",
        fingerprint="0",
        optimum=None,
        settings=SETTINGS,
        reference="adamw",
        budgets=[],
        methods=methods,
        verdict=Verdict(
            ranking=["adamw", "again"], leaders=["adamw", "again"], halfway=["adamw", "again"], sentence="adamw and again tie"
        ),
        environment={},
    )
