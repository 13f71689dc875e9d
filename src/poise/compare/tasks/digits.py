"""`digits`: scikit-learn's 1797 real handwritten digits of 8 x 8 pixels, and a small convolutional network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.compare.tasks import Split, array_digest
from poise.models import ConvNet

SHARES: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "tune": (0.6, 0.8), "report": (0.8, 1.0)}

Batch = tuple[Tensor, Tensor]


class Task:
    """Ten classes; loss in nats. Every class stands in the three splits in the same shares.

    Args:
        batch_size: a batch is (images (batch, 1, 8, 8) in [0, 1], classes (batch,)).
    """

    name = "digits"
    unit = "nats"
    optimum = None

    def __init__(self, batch_size: int = 64) -> None:
        self.batch_size = batch_size

    @cached_property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        return pixels()

    @cached_property
    def fingerprint(self) -> str:
        return array_digest(*self.data)

    @cached_property
    def members(self) -> dict[Split, np.ndarray]:
        """Which images each split holds."""
        found: dict[Split, list[np.ndarray]] = {split: [] for split in SHARES}
        classes = self.data[1]
        for label in range(10):
            ours = np.random.default_rng(label).permutation(np.flatnonzero(classes == label))
            for split, (low, high) in SHARES.items():
                found[split].append(ours[round(low * len(ours)) : round(high * len(ours))])
        return {split: np.sort(np.concatenate(parts)) for split, parts in found.items()}

    def model(self) -> nn.Module:
        return ConvNet()

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        if split == "train":
            yield from self.epochs(seed)
        else:
            yield self.batch(self.members[split])

    def epochs(self, seed: int) -> Iterator[Batch]:
        """Every image once in an epoch, in an order of its own; a rest too small for a batch is left out."""
        train = self.members["train"]
        for epoch in range(2**31):
            order = np.random.default_rng((seed, epoch)).permutation(train)
            for first in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield self.batch(order[first : first + self.batch_size])

    def batch(self, which: np.ndarray) -> Batch:
        images, classes = self.data
        return torch.from_numpy(images[which]).view(-1, 1, 8, 8), torch.from_numpy(classes[which])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


def pixels() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) in [0, 1] as float32, and their classes as int64."""
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return (np.asarray(images) / 16).astype(np.float32), np.asarray(classes).astype(np.int64)
