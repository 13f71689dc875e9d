"""What is kept from step to step, as dicts and lists of tensors, numbers and strings: copied, checked, put back, counted."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from poise.optim import Optimizer
from poise.optim.engine import shards


def listed(kept: Any) -> Any:
    """`kept` in containers of its own; the tensors are the same ones, as in torch's state_dicts."""
    if isinstance(kept, Mapping):
        return {key: listed(value) for key, value in kept.items()}
    if isinstance(kept, list):
        return [listed(value) for value in kept]
    return kept


def copied(kept: Any) -> Any:
    """`kept` with copies of its tensors."""
    if isinstance(kept, Mapping):
        return {key: copied(value) for key, value in kept.items()}
    if isinstance(kept, list):
        return [copied(value) for value in kept]
    return kept.clone() if isinstance(kept, Tensor) else kept


def check(mine: Any, saved: Any, where: str) -> None:
    """Raise ValueError, with the place, where `saved` cannot be put into `mine`."""
    if isinstance(mine, Mapping):
        keys = list(saved) if isinstance(saved, Mapping) else []
        if sorted(keys) != sorted(mine):
            raise ValueError(
                f"{where}: the state_dict has {', '.join(map(repr, keys)) or 'nothing'}, this optimizer keeps "
                f"{', '.join(map(repr, mine))}"
            )
        for key, value in mine.items():
            check(value, saved[key], f"{where}: {key!r}")
    elif isinstance(mine, list):
        length = len(saved) if isinstance(saved, Sequence) and not isinstance(saved, str) else None
        if length != len(mine):
            raise ValueError(f"{where}: the state_dict has {length} entries, this optimizer {len(mine)}")
        for number, value in enumerate(mine):
            check(value, saved[number], f"{where}[{number}]")
    elif isinstance(mine, Tensor):
        if not isinstance(saved, Tensor):
            raise ValueError(f"{where} is {saved!r} in the state_dict, a tensor here")
        if saved.shape != mine.shape:
            raise ValueError(f"{where} has shape {tuple(saved.shape)} in the state_dict, {tuple(mine.shape)} here")
        if saved.dtype != mine.dtype:
            raise ValueError(f"{where} is {saved.dtype} in the state_dict, {mine.dtype} here")
    elif type(saved) is not type(mine):
        raise ValueError(f"{where} is {saved!r} in the state_dict, {mine!r} here")


def put(mine: Any, saved: Any) -> Any:
    """`saved`, which has been checked, in the tensors of `mine`."""
    if isinstance(mine, Mapping):
        return {key: put(value, saved[key]) for key, value in mine.items()}
    if isinstance(mine, list):
        return [put(value, saved[number]) for number, value in enumerate(mine)]
    return mine.copy_(saved) if isinstance(mine, Tensor) else saved


def size(kept: Any) -> int:
    """Bytes of the tensors in `kept`."""
    if isinstance(kept, Mapping):
        return sum(size(value) for value in kept.values())
    if isinstance(kept, list | tuple):
        return sum(size(value) for value in kept)
    return shards.local(kept).nbytes if isinstance(kept, Tensor) else 0


def snapshot(opt: Any, state: bool, params: bool) -> Any:
    """`opt.snapshot`, also for an optimizer of torch."""
    if callable(getattr(opt, "snapshot", None)):
        return opt.snapshot(state=state, params=params)
    weights = [shards.local(p).detach().clone() for group in opt.param_groups for p in group["params"]] if params else None
    return {"params": weights, "state": {p: copy.deepcopy(kept) for p, kept in opt.state.items()} if state else None}


def restore(opt: Any, taken: Mapping[str, Any]) -> None:
    """`opt.restore`, also for an optimizer of torch."""
    if callable(getattr(opt, "restore", None)):
        opt.restore(taken)
        return
    if taken["params"] is not None:
        tensors = [p for group in opt.param_groups for p in group["params"]]
        for p, value in zip(tensors, taken["params"], strict=True):
            shards.local(p).copy_(value)
    if taken["state"] is not None:
        opt.state.clear()
        opt.state.update({p: copy.deepcopy(kept) for p, kept in taken["state"].items()})


def begin_anew(opt: torch.optim.Optimizer) -> None:
    """Let an optimizer forget its state, as if it had taken no step; also one of torch."""
    if isinstance(opt, Optimizer):
        opt.begin_anew()
    elif isinstance(opt, torch.optim.Adagrad):  # the only one that makes its state when it is built, and never again
        for group in opt.param_groups:
            for p in group["params"]:
                opt.state[p]["step"].zero_()
                opt.state[p]["sum"].fill_(group["initial_accumulator_value"])
    else:
        opt.state.clear()


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of state, by the optimizer's own account where it gives one."""
    own = getattr(opt, "state_bytes", None)
    return int(own()) if callable(own) else size(list(opt.state.values()))  # pyright: ignore[reportArgumentType]
