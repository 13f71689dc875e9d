"""PeriodicLoRA: at the end of each stage the product goes into the weight, and the adapter begins anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from poise.catalog import Paper, choice, method, uniform
from poise.linalg.lengths import wide
from poise.optim import Optimizer

from ..adaptation import Draw
from ..adapter import LowRank
from ..attaching import Attached, adapters, attached
from ..registry import Pair, pairs
from ..targets import Place
from .lora import start

KEY = "periodic_lora"  # of what it keeps, in the optimizer's state_dict


@method(
    "periodic-lora",
    family="adapt",
    kind="trainer",
    paper=Paper("Breaking the Low-Rank Bottleneck in LoRA Optimization", arxiv="2402.16141", year=2024),
    tune={"every": choice(50, 100, 200, 400), "stage_momentum": uniform(0.0, 0.9)},
    mutant=("(1 - self.stage_momentum) * scale", "scale"),
)
class PeriodicLoRA:
    """Training of LoRA in stages, whose products add up to a change of higher rank in the memory of one.

    After every N steps of the optimizer, for each pair beside a weight W,

        W <- W + (1 - m) s B A            in float32, rounded once
        B <- m B;    for m = 0 also A <- drawn anew, as `attach` draws it
        moments and step counts of A and B begin anew, and so does the schedule

    What the model computes is the same before and after. m = 0 is the plain method; m above 0 keeps a share of the adapter, so
    that a stage goes on where the last one was going. The rank of W - W_0 is up to N's number of stages times that of the pair.

        attach(model, LoRA(rank=8))
        opt = AdamW(model, lr=1e-3)
        stages = PeriodicLoRA(model, opt, every=200, schedule=lambda t: min(1.0, (t + 1) / 20))
        ...                                                # train as always; then
        detach(fold(model))

    It hooks into the optimizer: loops, schedulers and trainers see the optimizer they had. Count and stage stand in the
    optimizer's state_dict, under "periodic_lora", which torch's `get_optimizer_state_dict` leaves out: save it beside that one.
    The weights of the base change, so that the result is the folded model: `export` refuses.

    Args:
        model: adapted by LoRA, or by a method that adds a product as it does.
        opt: that trains it, or a driver around it; of poise or of torch.
        every: N, steps of a stage; 200. The paper's are not known.
        stage_momentum: m, from 0 up to below 1.
        schedule: the factor of all learning rates at step t = 0, 1, ... of a stage, for warm-up and decay. None: they are left
            alone; an ordinary scheduler then needs the period of a stage.
        master: keep W in float32 beside weights of fewer bits, so that stages add up without rounding; off. Without it,
            `rounding` says what was lost.
        seed: of what is drawn; the same on all ranks.

    Attributes:
        stage: how many have ended.
        rounding: of the last stage, by path, what rounding changed of what went into W, relative to that: 0 is nothing, 1 all.

    Raises:
        ValueError: settings out of range; adapters that do more than add a product; a pair that `opt` does not train.

    Source: "Breaking the Low-Rank Bottleneck in LoRA Optimization" (arXiv 2402.16141). That weights, moments and schedule begin
    anew is the paper's; its rule for momentum was not to be seen, and this one, which leaves what the model computes as it
    is, is a reconstruction. A port that takes W <- W + m s B A and shrinks both A and B by 1 - m after every step changes the
    model each time, and is not followed.
    """

    def __init__(
        self,
        model: nn.Module,
        opt: torch.optim.Optimizer,
        *,
        every: int = 200,
        stage_momentum: float = 0.0,
        schedule: Callable[[int], float] | None = None,
        master: bool = False,
        seed: int = 0,
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        if not 0 <= stage_momentum < 1:
            raise ValueError(f"stage_momentum={stage_momentum}: must be at least 0 and below 1")
        for path, adapter in adapters(model).items():
            plain = type(adapter).forward is LowRank.forward and type(adapter).folded is LowRank.folded
            if not plain or type(adapter).between is not LowRank.between:  # pyright: ignore[reportAttributeAccessIssue]
                raise ValueError(f"model: {type(adapter).__name__} at {path!r} does more than add a product to the weight")
        self.model, self.opt, self.seed = model, opt, seed
        self.every, self.stage_momentum, self.schedule = every, stage_momentum, schedule
        trained = {p for group in opt.param_groups for p in group["params"] if p.requires_grad}
        if missing := next((pair.name for pair in pairs(model) if not {pair.A, pair.B} <= trained), None):
            raise ValueError(f"opt: does not train A and B at {missing!r}; make it of the adapted model")
        self.step, self.stage, self.rounding = 0, 0, dict[str, float]()
        narrow = [pair for pair in pairs(model) if pair.layer.weight.dtype in (torch.bfloat16, torch.float16)]
        self.masters: dict[str, Tensor] = {pair.name: wide(pair.layer.weight.detach()) for pair in narrow} if master else {}
        self._rates = [float(group.get("initial_lr", group["lr"])) for group in opt.param_groups]
        self._hooks = [
            opt.register_step_pre_hook(lambda *_: self._rate()),
            opt.register_step_post_hook(lambda *_: self._count()),
            opt.register_state_dict_post_hook(self._saved),
            opt.register_load_state_dict_pre_hook(self._loaded),
        ]

    def remove(self) -> None:
        """Leave the optimizer; what was unloaded stays in the weights."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def unload(self) -> None:
        """End the stage now."""
        kept = attached(self.model)
        if kept is None or kept.folded:
            raise ValueError("model is folded or without adapters; a stage ends while they train: unfold(model), or remove()")
        self.stage += 1
        self._say(kept)
        found = pairs(self.model)
        for pair in found:
            self._into_weight(pair)
            self._begin(pair)
        self._forget([p for pair in found for p in (pair.A, pair.B)])
        self.step = 0

    def _say(self, kept: Attached) -> None:
        """The base's weights are not what they were."""
        kept.rewritten = f"{type(self).__name__} has put products of {self.stage} stages into them"

    def _into_weight(self, pair: Pair) -> None:
        rows, weight = pair.layer.adapter.layout.rows, pair.layer.weight
        down, up, scale = pair.layer.adapter.factors()
        before = wide(weight.detach())
        change = (1 - self.stage_momentum) * scale * (wide(up) @ wide(down))
        held = self.masters.get(pair.name, before)
        moved = held + rows.stored(change.to(held.dtype), weight.shape)
        weight.data.copy_(moved)
        if pair.name in self.masters:
            self.masters[pair.name] = moved
        size = float(_whole(change.norm()))
        self.rounding[pair.name] = float(_whole((wide(weight.detach()) - moved).norm())) / size if size else 0.0

    def _begin(self, pair: Pair) -> None:
        if self.stage_momentum:
            pair.B.mul_(self.stage_momentum)
            return
        place = Place(pair.name, pair.layer, pair.layer.adapter.layout)
        draw = Draw(self.seed, f"{pair.name} {self.stage}", pair.A)
        down, up = start(place, draw, pair.A.shape[0])
        for p, value in ((pair.A, down), (pair.B, up)):
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value)

    def _forget(self, params: list[Tensor]) -> None:
        base = getattr(self.opt, "base", self.opt)  # a driver's innermost optimizer
        if isinstance(base, Optimizer):
            base.begin_anew(params)
            return
        for p in params:
            base.state.pop(p, None)

    def _rate(self) -> None:
        if self.schedule is None:
            return
        factor = float(self.schedule(self.step))
        if not math.isfinite(factor):
            raise ValueError(f"schedule({self.step}) = {factor}: must be a finite factor")
        for group, lr in zip(self.opt.param_groups, self._rates, strict=True):
            group["lr"] = lr * factor

    def _count(self) -> None:
        self.step += 1
        if self.step >= self.every:
            self.unload()

    def _saved(self, opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        return {**saved, KEY: {"step": self.step, "stage": self.stage, "masters": dict(self.masters)}}

    def _loaded(self, opt: Any, saved: dict[str, Any]) -> dict[str, Any]:
        mine = saved.get(KEY)
        if mine is None or mine["masters"].keys() != self.masters.keys():
            raise ValueError(f"state_dict: has {'other masters' if mine else 'nothing'} of {KEY}; build it as what was saved")
        self.step, self.stage = int(mine["step"]), int(mine["stage"])
        self.masters = {name: tensor.clone() for name, tensor in mine["masters"].items()}
        kept = attached(self.model)
        if kept is not None and self.stage:
            self._say(kept)
        return {key: value for key, value in saved.items() if key != KEY}


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t
