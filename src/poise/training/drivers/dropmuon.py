"""Drop-Muon: each step trains only the layers from a random one on."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.catalog import Paper, method

from ..driver import Driver

Starts = Literal["uniform", "epoch_shift"] | Sequence[float]


@method(
    "drop-muon",
    family="training",
    kind="driver",
    paper=Paper("Drop-Muon: Update Less, Converge Faster", arxiv="2510.02239", year=2025),
    mutant=("self.layers[: s - 1]", "self.layers[s:]"),
)
class DropMuon(Driver):
    """The inner optimizer on the layers s, ..., b of b, in forward order, with s drawn anew for each step.

        s ~ starts on {1, ..., b}
        layers i < s: no gradient is computed, weights and optimizer state stay bit for bit
        layers i >= s: one step of the inner optimizer

    The forward pass is whole; the backward pass ends at layer s, since nothing before it requires a gradient while the closure
    runs. The paper's optimizer is this around Muon (whose step is the polar factor; around a rule that multiplies it with the
    nuclear norm, it is the paper's other form). Nothing hangs on that: any optimizer that leaves parameters without gradient
    alone may stand inside. DistributedDataParallel must be told find_unused_parameters=True.

    Args:
        opt: the inner optimizer: `DropMuon(Muon(model), model)`.
        layers: the model, whose modules with parameters of their own are the layers in the order in which they were registered,
            or the layers in forward order, each a module or a list of parameters. A shared parameter belongs to the first of
            its layers. Parameters in no layer are trained in every step, so that the backward pass has to reach them.
        starts: the distribution of s: "uniform", with which layer i is trained in a share i/b of the steps; a probability for
            each layer; "epoch_shift", P(s = i) proportional to exp(alpha ((1 - u)(b - i) + u (i - 1))) with u the share of
            `total_steps` done, which begins near the first layer, with almost whole updates, and ends near the last.
        alpha, total_steps: of "epoch_shift": 0.5, and the length of the run.
        seed: of the draws.

    State: a count. Source: "Drop-Muon: Update Less, Converge Faster" (arXiv 2510.02239); no official code was found. That its
    experiments draw s uniformly is the reason for the default; "epoch_shift" follows a third party's reading of the appendix.
    """

    needs_closure = True

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        layers: nn.Module | Iterable[nn.Module | Iterable[Tensor]],
        starts: Starts = "uniform",
        *,
        alpha: float = 0.5,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        self.layers = _layers_of(layers, [p for group in opt.param_groups for p in group["params"]])
        self.starts, self.alpha, self.total_steps, self.seed = starts, alpha, total_steps, seed
        if isinstance(starts, str):
            if starts not in ("uniform", "epoch_shift"):
                raise ValueError(f"starts={starts!r}: must be 'uniform', 'epoch_shift' or a probability for each layer")
            if starts == "epoch_shift" and (total_steps is None or total_steps < 1):
                raise ValueError(f"total_steps={total_steps}: starts='epoch_shift' needs the length of the run, at least 1")
        elif len(starts) != len(self.layers):
            raise ValueError(f"starts: {len(starts)} probabilities for {len(self.layers)} layers")
        elif min(starts) < 0 or not math.isclose(sum(starts), 1.0, abs_tol=1e-6):
            raise ValueError(f"starts={list(starts)}: probabilities must not be negative and must add up to 1")
        super().__init__(opt, own={"step": 0})

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        assert closure is not None
        s = self.start(self.own["step"])
        self.own["step"] += 1
        with self.only_from(s):
            return self.inner_step(closure)

    def start(self, step: int) -> int:
        """The first layer, from 1 to b, that is trained `step` steps after the first."""
        weights = self.probabilities(step)
        return random.Random(f"{self.seed}:{step}").choices(range(1, len(weights) + 1), weights)[0]

    def probabilities(self, step: int) -> list[float]:
        """P(s = 1), ..., P(s = b)."""
        b = len(self.layers)
        if self.starts == "uniform":
            return [1 / b] * b
        if self.starts == "epoch_shift":
            assert self.total_steps is not None
            u = min(1.0, step / self.total_steps)
            weights = [math.exp(self.alpha * ((1 - u) * (b - i) + u * (i - 1))) for i in range(1, b + 1)]
            return [weight / sum(weights) for weight in weights]
        return [float(p) for p in self.starts]

    @contextmanager
    def only_from(self, s: int) -> Iterator[None]:
        """Within it, the layers before s require no gradient and have none."""
        frozen = [p for layer in self.layers[: s - 1] for p in layer if p.requires_grad]
        try:
            for layer in self.layers[: s - 1]:
                for p in layer:
                    p.grad = None
            for p in frozen:
                p.requires_grad_(False)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(True)


def _layers_of(layers: nn.Module | Iterable[nn.Module | Iterable[Tensor]], params: Sequence[Tensor]) -> list[list[Tensor]]:
    """Those of `params` that stand in each layer, each in the first of its layers; layers without any are left out."""
    if isinstance(layers, nn.Module):
        layers = [list(module.parameters(recurse=False)) for module in layers.modules()]
    wanted = {id(p) for p in params}
    found: list[list[Tensor]] = []
    for layer in layers:
        tensors = list(layer.parameters()) if isinstance(layer, nn.Module) else list(layer)
        mine = [p for p in tensors if id(p) in wanted]
        wanted -= {id(p) for p in mine}
        found.append(mine)
    found = [layer for layer in found if layer]
    if not found:
        raise ValueError("layers: none of them holds a parameter of the optimizer")
    return found
