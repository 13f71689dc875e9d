"""A small convolutional network for small images."""

from __future__ import annotations

from torch import nn


class ConvNet(nn.Sequential):
    """Images (batch, 1, 8, 8) to logits (batch, classes): two convolutions of 3 x 3, the second of stride 2, and a linear head.

    Args:
        channels: of the two convolutions.
        classes: number of outputs.
    """

    def __init__(self, channels: tuple[int, int] = (16, 32), classes: int = 10) -> None:
        first, second = channels
        super().__init__(
            nn.Conv2d(1, first, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(first, second, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(second * 4 * 4, classes),
        )
