"""The M-FAC pruner: weights are dropped, and those that stay corrected, by the inverse of an empirical Fisher matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, log_uniform, method
from poise.linalg.fisher_window import FisherWindow


@dataclass(frozen=True)
class Round:
    """What one round of pruning did."""

    sparsity: float  # share of the weights that are zero after it
    saliency: float  # rise of the loss that was expected of it: the sum of the dropped weights' own
    gradients: int  # that F was made of


def prune_once(
    w: Tensor, G: Tensor, drop: int, damping: float = 1e-5, block: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Drop the weights that the loss needs least, and correct the others for each of them (optimal brain surgeon).

        saliency_i = w_i^2 / (2 [F^-1]_ii)
        w <- w + F^-1 z,  z_i = -w_i / [F^-1]_ii where dropped, else 0;   w_i <- 0 where dropped

    Args:
        w: (d,). G: (m, d), gradients of the loss at w, of which F = damping I + 1/m G^T G is made.
        drop: how many.
        damping, block: see `FisherWindow`.

    Returns:
        The new weights; the places of the dropped ones; the saliency that every weight had.

    The corrections are those of dropping each weight alone, added up. Solving for all dropped weights together is no better,
    since F is known from few gradients only; to drop few at a time and to make F anew is.
    """
    F = FisherWindow(G, damping, block)
    inverse = F.diagonal()
    saliency = w.square() / (2 * inverse)
    dropped = saliency.topk(drop, largest=False).indices
    z = torch.zeros_like(w)
    z[dropped] = -w[dropped] / inverse[dropped]
    w = w + F.solve(z)
    w[dropped] = 0.0
    return w, dropped, saliency


@method(
    "m-fac-pruner",
    family="training",
    kind="solver",
    paper=Paper(
        "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information",
        arxiv="2107.03356",
        year=2021,
    ),
    tune={"damping": log_uniform(1e-7, 1e-2), "block": choice(None, 128, 1024)},
    mutant=("w.square() / (2 * inverse)", "w.square() * (2 * inverse)"),
)
class MFACPruner:
    """Sets the weights of a trained network to zero, a few at a time, and moves the others to make up for it.

    A round takes gradients of the loss, makes `F = damping I + 1/m sum g g^T` over the weights that are left, drops those of
    the smallest saliency and corrects the rest (`prune_once`). Over R rounds the share of weights that is left shrinks by the
    same factor each time.

        pruner = MFACPruner(model)
        pruner.prune(lambda: (loss(model(x), y) for x, y in batches), sparsity=0.9)

    Args:
        model: put into the mode (train or eval) that the losses are meant in. Trained in place.
        damping: 1e-5. block: None for F over all weights; 128 and more with less memory and time for a block-diagonal F.
        names: of the parameters to prune; None for all with two dimensions or more, which leaves biases and norms alone.

    Raises:
        ValueError: a name that is not there, or nothing to prune.

    Kept from round to round: nothing but the zeros. A weight that is exactly 0 counts as dropped and stays so; between rounds
    of training call `apply` to put back those that an optimizer moved.

    Source: "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information" (arXiv 2107.03356) and its release.
    """

    def __init__(
        self, model: nn.Module, damping: float = 1e-5, block: int | None = None, names: Iterable[str] | None = None
    ) -> None:
        if not damping > 0:
            raise ValueError(f"damping={damping}: must be positive")
        if block is not None and block < 1:
            raise ValueError(f"block={block}: must be positive, or None")
        there = dict(model.named_parameters())
        chosen = [name for name, p in there.items() if p.ndim >= 2] if names is None else list(names)
        strange = [name for name in chosen if name not in there]
        if strange:
            raise ValueError(f"names: the model has no parameter {strange[0]!r}")
        if not chosen:
            raise ValueError("names: nothing to prune")
        self.damping, self.block = damping, block
        self.params = [there[name] for name in chosen]
        self.kept = [p.detach() != 0 for p in self.params]

    @property
    def sparsity(self) -> float:
        """Share of the weights that are dropped."""
        return 1 - sum(int(k.sum()) for k in self.kept) / self._size

    @property
    def _size(self) -> int:
        return sum(p.numel() for p in self.params)

    def prune(self, losses: Callable[[], Iterable[Tensor]], sparsity: float, rounds: int = 16) -> list[Round]:
        """Drop weights until `sparsity`, the share of zeros, is reached.

        Args:
            losses: gives, once a round, the losses whose gradients F is made of: of single samples or small batches, one after
                another, each with its graph. Their number is m.
            sparsity: in [0, 1). If it is reached already, nothing is done.
            rounds: 16, as released. One is hardly better than dropping the smallest weights.
        """
        if not 0.0 <= sparsity < 1.0:
            raise ValueError(f"sparsity={sparsity}: must be in [0, 1)")
        if rounds < 1:
            raise ValueError(f"rounds={rounds}: must be 1 or more")
        begin, history = self.sparsity, []
        for j in range(1, rounds + 1):
            left = (1 - begin) ** (1 - j / rounds) * (1 - sparsity) ** (j / rounds)
            drop = round((1 - left - self.sparsity) * self._size)
            if drop > 0:
                history.append(self._round(losses(), drop))
        return history

    def _round(self, losses: Iterable[Tensor], drop: int) -> Round:
        G = torch.stack([self._gradient(loss) for loss in losses])
        with torch.no_grad():
            w = torch.cat([p[k] for p, k in zip(self.params, self.kept, strict=True)])
            new, dropped, saliency = prune_once(w, G, drop, self.damping, self.block)
            kept = torch.ones_like(w, dtype=torch.bool)
            kept[dropped] = False
            counts = [int(k.sum()) for k in self.kept]
            for p, k, values, stays in zip(self.params, self.kept, new.split(counts), kept.split(counts), strict=True):
                p[k] = values
                k[k.clone()] = stays
        return Round(self.sparsity, float(saliency[dropped].sum()), len(G))

    def _gradient(self, loss: Tensor) -> Tensor:
        """Of the weights that are left, flat."""
        found = torch.autograd.grad(loss, self.params, allow_unused=True)
        pairs = zip(found, self.params, self.kept, strict=True)
        return torch.cat([torch.zeros_like(p[k]) if g is None else g[k] for g, p, k in pairs])

    @torch.no_grad()
    def apply(self) -> None:
        """Set dropped weights to zero again."""
        for p, k in zip(self.params, self.kept, strict=True):
            p.mul_(k)


__all__ = ["MFACPruner", "Round", "prune_once"]
