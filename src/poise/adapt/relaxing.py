"""Which layers deserve an adapter: shares of low-rank pairs in what layers do, learned in turn with the pairs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adaptation import Adaptation, Draw, Losses
from .adapter import Base, LowRank, added
from .attaching import adapters, attach, detach
from .targets import Place

Relaxation = Literal["sigmoid", "softmax"]
NUMBER = re.compile(r"(?:^|\.)\d+(?=\.|$)")


def row_and_kind(path: str) -> tuple[str, str]:
    """The block of a model that a layer belongs to, and what it is there: ("layers.0", "layers.*.mlp.up_proj")."""
    found = NUMBER.search(path)
    if found is None:
        return "", path
    return path[: found.end()], f"{path[: found.start()]}.*{path[found.end() :]}".removeprefix(".")


def rows_of(paths: Sequence[str]) -> list[int]:
    """For each layer, the number of its block; 0 for all where no block has two."""
    named = [row_and_kind(path)[0] for path in paths]
    if max(Counter(named).values()) == 1:
        return [0] * len(paths)
    return [list(dict.fromkeys(named)).index(name) for name in named]


def largest(shares: dict[str, float], keep: float, per_row: bool) -> tuple[str, ...]:
    """The layers with the largest shares, in their order: of each block's or of all the fraction `keep`, at least one."""
    paths = list(shares)
    rows = rows_of(paths) if per_row else [0] * len(paths)
    kept: set[str] = set()
    for row in set(rows):
        some = [path for path, own in zip(paths, rows, strict=True) if own == row]
        kept.update(sorted(some, key=lambda path: -shares[path])[: max(1, int(keep * len(some) + 0.5))])
    return tuple(path for path in paths if path in kept)


class Shares(nn.Module):
    """D, one number in (0, 1) for each layer, from Theta.

    Args:
        rows: the number of each layer's block.
        relaxation: "sigmoid": D = sigmoid(Theta). "softmax": of Theta over the layers of a block.
        like: of its device and dtype.
    """

    def __init__(self, rows: Sequence[int], relaxation: Relaxation, like: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(like.new_zeros(len(rows)))
        self.relaxation, self.rows = relaxation, torch.tensor(rows, device=like.device)

    def forward(self) -> Tensor:
        if self.relaxation == "sigmoid":
            return self.theta.sigmoid()
        together = self.rows[:, None] == self.rows
        return torch.where(together, self.theta, -torch.inf).softmax(-1).diagonal()


class Shared(LowRank):
    """A low-rank product times its share D.

    Args:
        shares: of all layers.
        number: of this one.
    """

    def __init__(self, *pair: Any, shares: Shares, number: int) -> None:
        super().__init__(*pair)
        self.shares, self.number = shares, number

    def forward(self, x: Tensor, layer: Any, base: Base) -> Tensor:
        return added(base(x), self.shares()[self.number] * self.beside(x, layer))

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.lora_A, self.shares()[self.number] * self.lora_B, self.scale


@dataclass(frozen=True)
class Relaxed(Adaptation):
    """What `pair` puts beside each layer, times a share: y = W x + D s B A x."""

    pair: Callable[[Place, Draw], tuple[Any, ...]]
    relaxation: Relaxation = "sigmoid"

    def begin(self, model: nn.Module, places: Sequence[Place], draw: Draw, losses: Losses) -> tuple[Shares, dict[str, int]]:
        paths = [place.path for place in places]
        return Shares(rows_of(paths), self.relaxation, draw.zeros(1)), {path: i for i, path in enumerate(paths)}

    def adapter(self, place: Place, draw: Draw, shared: Any) -> Shared:
        shares, numbers = shared
        return Shared(*self.pair(place, draw), shares=shares, number=numbers[place.path])


def search(
    model: nn.Module,
    places: Sequence[Place],
    pair: Callable[[Place, Draw], tuple[Any, ...]],
    losses: Iterable[Callable[[], Tensor]],
    *,
    steps: int,
    lr: float = 1e-3,
    share_lr: float = 0.03,
    relaxation: Relaxation = "sigmoid",
    seed: int = 0,
) -> dict[str, float]:
    """D of each layer by its path, learned by two problems of which each is the other's condition; the model is left as it is.

        B, A <- Adam on the loss of a batch,    Theta <- Adam on the loss of a held-out batch,    in turn

    Each at what the other has come to, without a derivative of B and A by Theta: DARTS of first order.

    Args:
        places: the layers.
        pair: what LowRank is made of beside a layer.
        losses: of batches, of which every second one is held out. Where there are fewer than two for each step, they are
            taken again, each for what it was for.
        steps: of each of the two.
        lr, share_lr: of the factors and of Theta.
        relaxation, seed: of D, and of what is drawn.

    Raises:
        ValueError: fewer than two losses.
    """
    given = list(islice(losses, 2 * steps))
    if len(given) < 2:
        raise ValueError(f"losses: {len(given)} given; a search needs at least two, one to train on and one held out")
    train, held_out = given[::2], given[1::2]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    paths = {path for place in places for path in (place.path, *place.tied)}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    attach(model, Relaxed(pair, relaxation), lambda path, _: path in paths, seed=seed)
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(seed)
            found: dict[str, Any] = adapters(model)
            shares: Shares = next(iter(found.values())).shares
            factors = [p for one in found.values() for p in (one.lora_A, one.lora_B)]
            fitting = torch.optim.Adam(factors, lr)
            weighing = torch.optim.Adam([shares.theta], share_lr, betas=(0.5, 0.999))  # as DARTS has it
            for t in range(steps):
                _step(fitting, factors, train[t % len(train)])
                _step(weighing, [shares.theta], held_out[t % len(held_out)])
        return {path: float(d) for path, d in zip(found, shares().detach(), strict=True)}
    finally:
        detach(model)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])


def _step(opt: torch.optim.Optimizer, params: Sequence[Tensor], loss: Callable[[], Tensor]) -> None:
    for p, g in zip(params, torch.autograd.grad(loss(), params, allow_unused=True), strict=True):
        p.grad = g
    opt.step()
