"""EcoTTA: side networks of a frozen network, which alone adapt to a stream without labels, and stay near what is frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poise.catalog import Paper, log_uniform, method, uniform

from ..entropy import MARGIN, confident_entropy
from ..partitions import Partition, ends_of, seen_by

KINDS: dict[int, tuple[Any, Any]] = {
    3: (nn.Conv1d, nn.BatchNorm1d),
    4: (nn.Conv2d, nn.BatchNorm2d),
    5: (nn.Conv3d, nn.BatchNorm3d),
}


class Adapted(NamedTuple):
    """One step: the mean entropy of the kept samples, how many were kept, and the distance of every partition's output."""

    entropy: Tensor
    kept: Tensor
    distances: Tensor


class Side(nn.Module):
    """The network beside one partition f, given an example of what f reads and what it gives.

    x~ = BN(f(x)) + relu(BN'(Conv3x3(x)))
    """

    def __init__(self, x: Tensor, y: Tensor, name: str) -> None:
        super().__init__()
        if x.ndim != y.ndim or x.ndim not in KINDS:
            raise ValueError(f"partitions: {name} maps {list(x.shape)} to {list(y.shape)}; both must have 1 to 3 axes of space")
        strides = [-(-a // b) for a, b in zip(x.shape[2:], y.shape[2:], strict=True)]
        if any(-(-a // s) != b for a, b, s in zip(x.shape[2:], y.shape[2:], strides, strict=True)):
            raise ValueError(f"partitions: {name} maps {list(x.shape)} to {list(y.shape)}, a size that no stride gives")
        conv, norm = KINDS[x.ndim]
        like: dict[str, Any] = {"device": y.device, "dtype": y.dtype}
        self.norm, self.conv_norm = norm(y.shape[1], **like), norm(y.shape[1], **like)
        self.conv = conv(x.shape[1], y.shape[1], 3, stride=strides, padding=1, bias=False, **like)
        self.cut = self.recording = False  # whether no gradient passes through f, and whether `last` is kept
        self.x: Tensor | None = None
        self.last: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.norm(y) + F.relu(self.conv_norm(self.conv(x)))

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before f: what it reads is what the side network reads."""
        self.x = args[0]
        return (args[0].detach(), *args[1:]) if self.cut else args

    def leave(self, module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        """After f: the output of both."""
        assert self.x is not None
        out = self(self.x, y)
        self.x, self.last = None, (out, y) if self.recording else None
        return out


@method(
    "ecotta",
    family="adapt",
    kind="solver",
    paper=Paper(
        "Memory-Efficient Continual Test-time Adaptation via Self-distilled Regularization",
        arxiv="2303.01904",
        year=2023,
    ),
    tune={"weight": uniform(0.1, 1.0), "lr": log_uniform(1e-4, 1e-2)},
    mutant=("F.relu(self.conv_norm(self.conv(x)))", "self.conv_norm(F.relu(self.conv(x)))"),
)
class EcoTTA(nn.Module):
    """Side networks beside the partitions of a frozen image classifier, which adapt to what it sees at test time.

        x~_k = BN_k(f_k(x_k)) + relu(BN'_k(Conv3x3(x_k))),    x_{k+1} = x~_k,    f_k frozen
        before deployment:  the side networks learn labelled source data, by cross-entropy
        at test time, every batch:  L = mean of H over samples with H < H0  +  lambda sum_k mean |x~_k - f_k(x_k)|

    H is the entropy of softmax, H0 = margin ln(classes). The distances hold the network near what it knows, so that a long
    stream does not ruin it; nothing is reset between domains. The gradient of one is taken for the parameters of its own side
    network alone, and x_k and f_k(x_k) are constants in it.

        eco = EcoTTA(model, ["layer1", "layer2", "layer3", "layer4"], example=images)
        eco.warm_up(loader)                                    # (images, labels) of the source, blurred and recoloured
        for images in stream:
            predictions = eco.adapt(images).argmax(1)

    The entropy reaches an earlier side network through the convolutions of later ones and not through frozen partitions, so
    that nothing of those is kept for the backward pass: that is the saving of memory. `through_frozen=True` gives the whole
    gradient. A call of the module, or of `model`, is the adapted network without a step; `remove` takes all of it away.

    Args:
        model: whose parameters are frozen, in place. Its forward pass calls the partitions one after another.
        partitions: of its encoder, in order, 4 or 5 with more layers in the last: paths or modules, or lists of those that
            follow each other.
        example: a batch that the model takes, which is run once to see sizes.
        weight: lambda, 0.5; 0.25 in a public implementation.
        margin: 0.4.
        lr, momentum: of SGD at test time, 5e-3 and 0.9.
        statistics: of the model's own batch norms while it adapts: "batch" (default), of the batch, their running averages
            moving along; or "running", the averages as they are. Side networks always use the batch.
        through_frozen: whether the entropy's gradient also passes through frozen partitions. Off.

    Attributes:
        sides: the side networks.
        optimizer: of test time, whose state is to be saved with the module's to go on exactly.
        last: of the last step, the entropy, how many samples were kept, and the distances.

    Raises:
        ValueError: settings out of range; partitions that are not run once each, in order; a size that a convolution with
            stride does not give.

    Source: "EcoTTA: Memory-Efficient Continual Test-time Adaptation via Self-distilled Regularization" (arXiv 2303.01904), of
    which there is no code by the authors. Both parts of the loss are one step here; a public implementation takes two, the
    distances first, each with a pass of its own, and lets the entropy through the frozen network.
    """

    def __init__(
        self,
        model: nn.Module,
        partitions: Sequence[Partition],
        example: Tensor,
        *,
        weight: float = 0.5,
        margin: float = MARGIN,
        lr: float = 5e-3,
        momentum: float = 0.9,
        statistics: Literal["batch", "running"] = "batch",
        through_frozen: bool = False,
    ) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"weight={weight}: must not be negative")
        if not 0 <= margin <= 1:
            raise ValueError(f"margin={margin}: must be from 0 to 1")
        if statistics not in ("batch", "running"):
            raise ValueError(f"statistics={statistics!r}: must be 'batch' or 'running'")
        self.weight, self.margin, self.statistics, self.through_frozen = weight, margin, statistics, through_frozen
        found = [ends_of(model, partition) for partition in partitions]
        sides = [Side(x, y, f"partition {k}") for k, (x, y) in enumerate(seen_by(model, found, example))]
        self.model, self.sides = model, nn.ModuleList(sides)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        for p in self._trained:
            p.requires_grad_(False)
        self._hooks: list[Any] = []
        for side, (first, last) in zip(sides, found, strict=True):
            self._hooks += [first.register_forward_pre_hook(side.enter), last.register_forward_hook(side.leave)]
        self.optimizer = torch.optim.SGD(self.sides.parameters(), lr=lr, momentum=momentum)
        self.last: Adapted | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def warm_up(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        epochs: int = 10,
        lr: float = 0.05,
        momentum: float = 0.9,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    ) -> list[float]:
        """Train the side networks on labelled source data; returns the mean loss of each epoch.

        Args:
            batches: (images, labels), gone through `epochs` times.
            lr, momentum: of SGD, 0.05 and 0.9.
        """
        if epochs > 1 and iter(batches) is batches:
            raise ValueError(f"batches can be gone through once only, and epochs={epochs}; give a loader or a list")
        self._ready()
        optimizer = torch.optim.SGD(self.sides.parameters(), lr=lr, momentum=momentum)
        means: list[float] = []
        for _ in range(epochs):
            losses: list[float] = []
            for x, labels in batches:
                optimizer.zero_grad()
                now = loss(self.model(x), labels)
                now.backward()
                optimizer.step()
                losses.append(float(now.detach()))
            means.append(sum(losses) / max(len(losses), 1))
        optimizer.zero_grad()
        return means

    @torch.enable_grad()
    def adapt(self, x: Tensor) -> Tensor:
        """One step on a batch without labels; returns its logits, of before the step."""
        self._ready()
        for side in self._sides():
            side.cut, side.recording = not self.through_frozen, True
        try:
            logits = self.model(x.detach())
        finally:
            for side in self._sides():
                side.cut = side.recording = False
        entropy, kept = confident_entropy(logits, self.margin)
        seen = [side.last for side in self._sides()]
        distances = torch.stack([(out - y.detach()).abs().mean() for out, y in seen])
        everything = list(self.sides.parameters())
        for p in everything:
            p.grad = torch.zeros_like(p)
        if self.weight:
            for side, distance in zip(self.sides, distances, strict=True):
                self._add(self.weight * distance, list(side.parameters()), keep=True)
        if bool(kept.any()):
            self._add(entropy, everything, keep=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for side in self._sides():
            side.last = None
        self.last = Adapted(entropy.detach(), kept.sum(), distances.detach())
        return logits.detach()

    def remove(self) -> nn.Module:
        """Take the side networks away and return the model, whose parameters train again if they did."""
        for hook in self._hooks:
            hook.remove()
        for p in self._trained:
            p.requires_grad_(True)
        self._hooks, self._trained = [], []
        return self.model

    def _add(self, term: Tensor, params: list[nn.Parameter], keep: bool) -> None:
        for p, g in zip(params, torch.autograd.grad(term, params, retain_graph=keep, allow_unused=True), strict=True):
            if g is not None:
                assert p.grad is not None
                p.grad += g

    def _sides(self) -> Iterable[Any]:
        return self.sides

    def _ready(self) -> None:
        """Set the modes of modules: batch norms as `statistics` says, all else of the model as when it predicts."""
        self.eval()
        self.sides.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.train(self.statistics == "batch")
