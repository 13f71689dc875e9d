"""The last links of every chain: the learning rate, and decoupled weight decay.

`Optimizer` appends them; a chain that `owns_step` brings its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from ..transform import Context, State, Transform

Decay = Literal["coupled", "independent", "after", "l2"]


class identity(Transform):
    """`u <- u`: the plain gradient."""

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u


class displacement(identity):
    """`u <- u`, which is the displacement already: neither learning rate nor decay is appended.

    The end of a chain whose own link for whole matrices knows both, since the last link of all must be of unit "element".
    """

    owns_step = True


class scale_by_lr(Transform):
    """Turn a descent direction into a displacement: `u <- -lr * u`."""

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return {"step_size": -float(hyper["lr"]) * float(hyper.get("update_scale", 1.0))}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.step_size * u


class decay(Transform):
    """Decoupled weight decay, added to the displacement.

    - "coupled": `u <- u - lr * weight_decay * x`, PyTorch's convention: decay follows the learning rate.
    - "independent": `u <- u - (lr / initial_lr) * weight_decay * x`, the convention of "Decoupled Weight Decay Regularization"
      (arXiv 1711.05101): decay follows the schedule but not the size of the learning rate. `initial_lr` is what torch's
      schedulers keep in the group; without a scheduler the ratio is 1.
    - "after": `u <- u - lr * weight_decay * (x + u)`: the weights decay after they have moved.
    """

    def __init__(self, mode: Literal["coupled", "independent", "after"] = "coupled") -> None:
        if mode not in ("coupled", "independent", "after"):
            raise ValueError(f"decay={mode!r}: must be 'coupled', 'independent' or 'after'")
        self.mode = mode

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        lr = float(hyper["lr"])
        rate = lr
        if self.mode == "independent":
            initial = float(hyper.get("initial_lr", lr))
            rate = lr / initial if initial else 0.0
        return {"shrink": rate * float(hyper["weight_decay"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u - k.shrink * (x + u if self.mode == "after" else x)

    def __repr__(self) -> str:
        return f"decay({self.mode!r})"


class add_l2(Transform):
    """Classical L2 regularization, `u <- u + weight_decay * x`: the gradient of `weight_decay/2 * ||x||^2`."""

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return {"weight_decay": float(hyper["weight_decay"])}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u + k.weight_decay * x


__all__ = ["Decay", "add_l2", "decay", "displacement", "identity", "scale_by_lr"]
