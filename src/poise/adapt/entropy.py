"""How unsure a classifier is, and the mean of that over the samples it is sure enough of: what test-time adaptation lowers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MARGIN = 0.4  # of the largest entropy there is


class Confident(NamedTuple):
    """The mean entropy of the samples that were kept, and which those are."""

    entropy: Tensor
    kept: Tensor


def entropy(logits: Tensor) -> Tensor:
    """Of softmax over the last dimension, in nats, for each sample. A class whose logit is -inf is none."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs.clamp(min=torch.finfo(logs.dtype).min)).sum(-1)


def confident_entropy(logits: Tensor, margin: float = MARGIN) -> Confident:
    """Mean entropy over the samples whose entropy is below a limit; exactly 0, with zero gradients, where there are none.

        mean of H over samples with H < H0,    H0 = margin ln(classes)

    Args:
        logits: (..., classes), finite or -inf.
        margin: H0 by the largest entropy there is, 0.4. Which samples are kept is a constant in the backward pass.
    """
    found = entropy(logits)
    kept = found.detach() < margin * math.log(logits.shape[-1])
    return Confident(torch.where(kept, found, 0.0).sum() / kept.sum().clamp(min=1), kept)
