"""Signs: every entry of the update has the same size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..transform import Context, Param, State, Transform


class sign(Transform):
    """`u <- sign(u)`, with sign(0) = 0."""

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return torch.sign(u)

    def update_rms(self, p: Param) -> float:
        return 1.0
