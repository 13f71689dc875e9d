"""Inverse Kronecker factors of a layer that one vector a step keeps up to date, and the switch that leaves them off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..transform import Context, Param, Slot, State, Transform

Form = Literal["exact", "official", "printed"]
Reset = Literal["identity", "blend"]

LIMITS: dict[Form, float] = {"exact": 1e3, "official": 2.0, "printed": 1e3}


class rank_one_factors(Transform):
    """A layer's gradient between two inverse factors, with its own length. See `MKOR`, whose options it has.

        exact     F <- F / c - (1 - c) / (c^2 (1 + (1 - c) / c v.F v)) F v (F v)^T
        printed   F <- c F + (1 - c) / (c^2 (1 + c (1 - c) v.F v)) F v (F v)^T
        official  P = c F + (1 - c) I;   F <- P - P v (P v)^T / (1 + v.P v)

    in every `every`-th step, with v = a for the inputs' factor and v = g for the outputs'. It reads `k.input_mean` and
    `k.grad_mean`, fed in the shape of the joint matrix: a in each row, g in each column. State: an inverse for the rows and one
    for the columns of the joint matrix, and for "official" two flags.

    Raises:
        ValueError: for settings out of range, by the names that `MKOR` has for them.
    """

    unit = "layer"
    fed_by = "attach poise.training.LayerMeans(model, opt)"

    def __init__(
        self,
        stat_decay: float = 0.95,
        every: int | None = 10,
        form: Form = "exact",
        stabilization_factor: float = 0.1,
        limit: float | None = None,
        reset: Reset = "identity",
        half_precision: bool = False,
    ) -> None:
        if not 0.0 < stat_decay < 1.0:
            raise ValueError(f"stat_decay={stat_decay}: must be in (0, 1)")
        if every is not None and every < 1:
            raise ValueError(f"inv_freq={every}: must be at least 1, or None for never")
        if form not in get_args(Form):
            raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(Form))}")
        if not 0.0 <= stabilization_factor <= 1.0:
            raise ValueError(f"stabilization_factor={stabilization_factor}: must be in [0, 1]")
        if limit is not None and not limit > 1.0:
            raise ValueError(f"stabilization_limit={limit}: must be above 1, or None")
        if reset not in get_args(Reset):
            raise ValueError(f"reset={reset!r}: must be 'identity' or 'blend'")
        self.inv_freq, self.reset, self.half_precision = every, reset, half_precision
        self.form: Form = form
        self.limit = LIMITS[form] if limit is None else limit
        self.feeds = () if every is None else ("input_mean", "grad_mean")
        self.defaults = {"stat_decay": stat_decay, "stabilization_factor": stabilization_factor}

    def slots(self, p: Param) -> dict[str, Slot]:
        if p.role == "bias":  # whose weight is elsewhere
            return {}
        dtype = torch.float16 if self.half_precision else torch.float32
        sizes = zip(("L_inv", "R_inv"), p.shape, strict=True)
        made = {name: Slot((n, n), dtype, init="eye", kind="exact", dims=(None, None)) for name, n in sizes}
        return made | ({"flagged": Slot((2,), init=1.0, kind="exact")} if self.form == "official" else {})

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        decay, blend = float(hyper["stat_decay"]), float(hyper["stabilization_factor"])
        return {
            "decay": decay,
            "blend": blend,
            "pull": min(1.0, max(blend, 2 * (1 - decay))),  # a refresh makes it 1 / decay times as large again
            "due": float(self.inv_freq is not None and (step - 1) % self.inv_freq == 0),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if "L_inv" not in state:
            return u
        if k.due:
            given = (("R_inv", k.input_mean[0]), ("L_inv", k.grad_mean[:, 0]))
            (self._either if self.form == "official" else self._follow)(given, state, k)
        D = state["L_inv"].to(u.dtype) @ u @ state["R_inv"].to(u.dtype)
        scale = _length(u, k.param.bias) / _length(D, k.param.bias)
        return torch.where(scale.isnan(), u, scale * D)

    def _follow(self, given: Sequence[tuple[str, Tensor]], state: State, k: Context) -> None:
        """Each factor takes its vector in."""
        for name, v in given:
            F = state[name].to(v.dtype)
            F = torch.where(F.abs().amax() > self.limit, _towards_identity(F, k.pull), F)
            u, rest = F @ v, 1 - k.decay
            if self.form == "exact":
                c = rest / (k.decay**2 * (1 + rest / k.decay * (v @ u)))
                state[name] = F / k.decay - c * torch.outer(u, u)
            else:
                c = rest / (k.decay**2 * (1 + k.decay * rest * (v @ u)))
                state[name] = k.decay * F + c * torch.outer(u, u)

    def _either(self, given: Sequence[tuple[str, Tensor]], state: State, k: Context) -> None:
        """The release's refresh: a flagged factor is reset, another takes its vector in; one that grew too large flags both."""
        flagged = [bool(flag) for flag in state["flagged"]]
        for i, (name, v) in enumerate(given):
            F = state[name].to(v.dtype)
            if flagged[i]:
                state[name] = _towards_identity(F, 1.0 if self.reset == "identity" else k.blend)
                flagged[i] = False
                continue
            P = _towards_identity(F, 1 - k.decay)
            u = P @ v
            F = state[name] = P - torch.outer(u, u) / (1 + v @ u)
            if bool(F.abs().amax() > self.limit):
                flagged = [True, True]
        state["flagged"] = torch.tensor(flagged, dtype=state["flagged"].dtype, device=state["flagged"].device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.form!r}, inv_freq={self.inv_freq})"


class until_slow(rank_one_factors):
    """`rank_one_factors` until the loss falls too slowly for their price, then the plain gradient, for good.

    Every `window` steps, with r the fall per step of the smoothed loss in this window and r' that in the one before, the last
    refresh has been when `r < threshold r'`. The loss is smoothed with `2 / (window + 1)`.
    """

    needs_loss = True

    def __init__(self, window: int = 100, threshold: float = 0.1, *settings: Any) -> None:
        if window < 1:
            raise ValueError(f"window={window}: must be at least 1")
        super().__init__(*settings)
        self.window = window
        self.defaults = {**self.defaults, "switch_threshold": threshold}

    def slots(self, p: Param) -> dict[str, Slot]:
        made = super().slots(p)  # smoothed loss, its value at the beginning of the window, the last fall, whether it is over
        return made | ({"progress": Slot((4,), kind="exact")} if made else {})

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return super().scalars(step, hyper) | {
            "first": float(step == 1),
            "ends": float(step % self.window == 0),
            "compares": float(step >= 2 * self.window),
            "threshold": float(hyper["switch_threshold"]),
        }

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        if "progress" not in state:
            return u
        smoothed, begin, before, over = state["progress"].unbind()
        assert k.loss is not None
        loss = k.loss.to(device=u.device, dtype=u.dtype)
        smoothed = loss if k.first else smoothed + 2 / (self.window + 1) * (loss - smoothed)
        begin = loss if k.first else begin
        if k.ends:
            fall = (begin - smoothed) / self.window
            over = torch.where(fall < k.threshold * before, torch.ones_like(over), over) if k.compares else over
            begin, before = smoothed, fall
        state["progress"] = torch.stack([smoothed, begin, before, over])
        return u if bool(over) else super().update(u, state, x, k)


def _towards_identity(F: Tensor, share: float) -> Tensor:
    return (1 - share) * F + share * torch.eye(len(F), dtype=F.dtype, device=F.device)


def _length(joint: Tensor, bias: bool) -> Tensor:
    """`||W|| + ||b||`."""
    return joint[:, :-1].norm() + joint[:, -1].norm() if bias else joint.norm()
