"""What each of two processes does for `test_distributed.py`: adapted models over gloo, results left in a file per rank."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from adapt.cases import NAMES, SETTINGS, gpt, loss_of, losses, output
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from poise.adapt import attach, fold
from poise.optim import AdamW

WORLD = 2
STEPS = 3


def made(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same on all ranks, whatever their own random numbers: of one seed, and losses of one batch."""
    torch.manual_seed(100 + dist.get_rank())
    model = gpt().to(dtype)
    also = "*norm*" if dtype == torch.float32 else ()  # FSDP takes trained parameters of one dtype
    attach(model, name, seed=0, losses=losses(model), also=also, **SETTINGS.get(name, {}))
    return model.train()


def batch() -> Tensor:
    return torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(5))


def stepped(model: nn.Module, opt: torch.optim.Optimizer, x: Tensor) -> None:
    for _ in range(STEPS):
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()


def outcome(model: nn.Module, alone: nn.Module, **more: Any) -> dict[str, Any]:
    return {"found": whole(model), "alone": whole(alone), **more}


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in model.state_dict().items()
        if isinstance(t, Tensor)
    }


def ddp(name: str) -> dict[str, Any]:
    """Each rank has half of the batch; what is frozen has no gradient to average."""
    model, alone = made(name), made(name)
    replica = DistributedDataParallel(model)
    stepped(replica, AdamW(model, lr=0.01, backend="eager"), batch().chunk(WORLD)[dist.get_rank()])
    stepped(alone, AdamW(alone, lr=0.01, backend="eager"), batch())
    return outcome(model, alone)


def fsdp(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Blocks and the rest sharded apart, as one does, or all at once where blocks share parameters; then folded."""
    model, alone = made(name, dtype), made(name, dtype)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.model.layers if not shares(model) else ():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    stepped(model, AdamW(model, lr=0.01, backend="eager"), batch())
    stepped(alone, AdamW(alone, lr=0.01, backend="eager"), batch())
    logits = output(model), output(alone)
    found = outcome(model, alone, logits=logits)
    if foldable(alone):
        found["folded"] = whole(fold(model)), whole(fold(alone))
    return found


def shares(model: Any) -> bool:
    """Whether blocks share parameters, which FSDP2 takes within one group only."""
    held = [{id(p) for p in block.parameters()} for block in model.model.layers]
    return any(a & b for i, a in enumerate(held) for b in held[:i])


def foldable(model: nn.Module) -> bool:
    return all(getattr(module, "foldable", True) for module in model.modules())


SCENARIOS: dict[str, Callable[[str], dict[str, Any]]] = {
    "ddp": ddp,
    "fsdp": fsdp,
    "fsdp bfloat16": lambda name: fsdp(name, torch.bfloat16),
}


def run(rank: int, folder: str) -> None:
    """Every scenario for every adapter of the catalog; an error is a result too."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    results: dict[tuple[str, str], Any] = {}
    try:
        for name in NAMES:
            for scenario, act in SCENARIOS.items():
                try:
                    results[name, scenario] = act(name)
                except Exception:
                    results[name, scenario] = traceback.format_exc()
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
