"""Teleport: now and then, a jump along the level set of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from poise.catalog import Paper, log_uniform, method
from poise.optim.engine import shards

from .. import weights
from ..driver import Driver
from ..symmetry.symmetries import Group, Named, check_group, pairs_of
from ..symmetry.teleportation import Arrival, Objective, Teleportation


@method(
    "teleport",
    family="training",
    kind="driver",
    paper=Paper("Improving Convergence and Generalization Using Parameter Symmetries", arxiv="2305.13404", year=2023),
    tune={"lr_tele": log_uniform(1e-6, 1.0)},
    mutant=('self.own["step"] in self.at', 'self.own["step"] + 1 in self.at'),
)
class Teleport(Driver):
    """The inner optimizer, with jumps before some of its steps that leave the loss as it is and change its gradient.

    For layers `y = U s(V h + b)`, and `steps` times:

        W(T) = g(T).W                              for every pair of layers, from the input on; h is computed anew
        O(T) = sum ||dL/dW (W(T))||^2              over all weights; stop if O(0) > cap
        T    = lr_tele dO/dT at T = 0              minus it for direction="down"
        W    <- W(T)

        group="diagonal"  g = diag(exp(T)):  V' = g V,  b' = g b,  U' = U g^-1
        group="data"      g = 1 + T:         V' = g V,  b' = g b,  U' = U + U (s(z) - s(g z)) s(g z)^+,  z = V h + b
        group="inverse"   g = 1 + T:         U' = U g^-1,  V' = V + (s^-1(g s(z)) - z) h^+

    The optimizer's state stays as it is. The network is looked at in eval mode. Pairs with a weight that the optimizer does not
    train stay where they are.

    Args:
        opt: the optimizer that trains.
        model: the network; its layers are `nn.Linear`.
        loss: the loss on the batch to teleport on, as a function of the model: `lambda m: cross_entropy(m(x), y)`. It is called
            many times in one jump and has to be the same function then.
        at: before which steps to jump, counted from 0. `jump()` does so by hand.
        pairs: (lower layer, upper layer, function between them), by name: `[("fc1", "fc2", torch.relu)]`. None: those that the
            model's `nn.Sequential`s show.
        group: "diagonal" is exact for every input, and needs ReLU, LeakyReLU or PReLU. "data" is the paper's, for any s, and
            "inverse" its alternative, for LeakyReLU, Tanh and Sigmoid. These two keep the outputs on the given batch alone, and
            only while it has no more rows than the layers have units, or inputs.
        objective: "gradient" as above; "sharpness", the mean loss at distances 0.1, ..., 0.9 in `directions` random directions
            each (100: 900 passes a step); "curvature" of the orbit t -> exp(t M).W with M uniform in [0, 1), along which the
            jump then goes.
        direction: "up" or "down".
        lr_tele, steps, cap: 1e-4, 10 and 100, the published settings for SGD and Adagrad; momentum, RMSprop and Adam had 5e-2.
        project: for "data", the published U' = U s(z) s(g z)^+. It is the same on batches with at least as many rows as units;
            on smaller ones it also projects U on the span of the activations, where the default changes U as little as can be.
        tolerance: largest change of the loss, relative: 1e-6 in float64, 1e-3 in float32, 0.05 in fewer bits.
        check: what happens beyond it: "raise", and the weights are as they were, or "warn".
        seed: of the directions, and of M.

    Raises:
        ValueError: for layers without such a symmetry: other than `nn.Linear`, tied, sharded, reparameterised, or with
            something else between them; and if the loss moved.

    State: a count. Source: "Improving Convergence and Generalization Using Parameter Symmetries" (arXiv 2305.13404). The
    released code keeps the old activations for the second and later pairs, which moves the loss; here they are computed anew.
    Its runs have batches of 200 on 16 units, where "data" is an approximation that the check refuses. Its "inverse" has
    U (1 - T). The learned teleportation of the paper, by an LSTM, is not here.
    """

    needs_closure = True

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        model: nn.Module,
        loss: Callable[[nn.Module], Tensor],
        at: Iterable[int] = (0,),
        *,
        pairs: Sequence[Named] | None = None,
        group: Group = "diagonal",
        objective: Objective = "gradient",
        direction: Literal["up", "down"] = "up",
        lr_tele: float = 1e-4,
        steps: int = 10,
        cap: float = 100.0,
        directions: int = 100,
        project: bool = False,
        tolerance: float | None = None,
        check: Literal["raise", "warn"] = "raise",
        seed: int = 0,
    ) -> None:
        if not callable(loss):
            raise TypeError(f"loss={loss!r}: must be a function of the model that gives the loss on one batch")
        self.how = Teleportation(
            pairs, group, objective, direction, lr_tele, steps, cap, directions, project, tolerance, check, seed
        )
        self.at = frozenset(at)
        if any(step < 0 for step in self.at):
            raise ValueError(f"at={sorted(self.at)}: steps are counted from 0")
        found = pairs_of(model, pairs)
        check_group(found, group)
        for pair in found:
            if any(shards.is_sharded(p) for name in (pair.lower, pair.upper) for p in model.get_submodule(name).parameters()):
                raise ValueError(f"model: {pair.lower!r} or {pair.upper!r} is sharded; a teleportation needs whole weights")
        self.model, self.loss = model, loss
        super().__init__(opt, own={"step": 0})

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        if self.own["step"] in self.at:
            self.jump()
        self.own["step"] += 1
        return self.inner_step(closure)

    @torch.no_grad()
    def jump(self) -> Arrival:
        """Teleport now; returns where it led."""
        trained = {id(p) for p in self.parameters() if p.requires_grad}
        held = dict(self.model.named_parameters())
        skip = sorted({name.rpartition(".")[0] for name, p in held.items() if id(p) not in trained})
        begin = {
            name: weights.read(self, p) if id(p) in trained else p.detach().to(weights.computing(p.dtype))
            for name, p in held.items()
        }
        arrival = self.how.search(self.model, self.loss, begin, skip)
        for name, p in held.items():
            if arrival.weights[name] is not begin[name]:
                weights.write(self, p, arrival.weights[name])
        return arrival
