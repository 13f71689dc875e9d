"""What each of two processes does for `test_two_processes.py`: train a model over gloo, and leave a file of results."""

from __future__ import annotations

import copy
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from poise.adapt import AltLoRA, AltLoRAPlus, PeriodicLoRA, attach, kappa_tune
from poise.optim import AdamW

WORLD = 2


def model(kind: str) -> Any:
    """Rows that do not divide by two, and biases that train beside; or the second weight alone, which kappa_tune chooses."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(12, 65), nn.Tanh(), nn.Linear(65, 7))
    if kind != "kappa-tune":
        attach(made, "lora", ["0", "2"], rank=3, seed=0, also="*bias")
    return made


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 12, generator=generator), torch.randn(16, 7, generator=generator)


def loss_of(made: Any, x: Tensor, y: Tensor) -> Tensor:
    return (made(x) - y).square().mean()


def step(made: Any, opt: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    opt.zero_grad()
    loss_of(made, x, y).backward()
    opt.step()


def whole(made: Any) -> list[Tensor]:
    """All that a model holds: also of what is frozen, the weights into which stages go."""
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in made.parameters()]


def build(kind: str, made: Any, **settings: Any) -> torch.optim.Optimizer:
    """Of a model that is sharded already, or is going to be a replica."""
    if kind == "altlora":
        return AltLoRA(made, lr=0.1, backend="eager", **settings)
    if kind == "altlora-plus":
        return AltLoRAPlus(made, lr=1e-3, backend="eager", **settings)
    if kind == "kappa-tune":
        assert kappa_tune(made, 1) == ["2.weight"]
    opt = AdamW(made, lr=1e-2, backend="eager")
    if kind == "periodic-lora":
        PeriodicLoRA(made, opt, every=2, **settings)
    return opt


def sharded(kind: str, **settings: Any) -> dict[str, list[Tensor]]:
    """FSDP2, with its state taken out and put into a new run half way, against one process."""
    made, fresh, alone, start = (model(kind) for _ in range(4))
    mesh = init_device_mesh("cpu", (WORLD,))
    for one in (made, fresh):
        fully_shard(one, mesh=mesh)
    opt, other, twin = (build(kind, one, **settings) for one in (made, fresh, alone))
    for number in range(5):
        if number == 3:
            fresh.load_state_dict(copy.deepcopy(made.state_dict()))
            if kind == "periodic-lora":  # what a driver or a trainer keeps is in the optimizer's own state_dict alone
                other.load_state_dict(copy.deepcopy(opt.state_dict()))
            else:
                set_optimizer_state_dict(fresh, other, copy.deepcopy(get_optimizer_state_dict(made, opt)))
            made, opt = fresh, other
        step(made, opt, *batch())
        step(alone, twin, *batch())
    return {"start": whole(start), "found": whole(made), "alone": whole(alone)}


def replicated(kind: str, **settings: Any) -> dict[str, list[Tensor]]:
    """DDP, each rank with half of the batch, against one process with all of it."""
    made, alone, start = (model(kind) for _ in range(3))
    opt, twin = build(kind, made, **settings), build(kind, alone, **settings)
    replica = DistributedDataParallel(made)
    x, y = batch()
    mine = slice(8 * dist.get_rank(), 8 * dist.get_rank() + 8)
    for _ in range(5):
        step(replica, opt, x[mine], y[mine])
        step(alone, twin, x, y)
    return {"start": whole(start), "found": whole(made), "alone": whole(alone)}


SCENARIOS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "fsdp": (sharded, "altlora", {}),
    "fsdp plus": (sharded, "altlora-plus", {"state": "bf16"}),
    "fsdp joint": (sharded, "altlora", {"joint": True}),
    "ddp": (replicated, "altlora", {}),
    "ddp plus": (replicated, "altlora-plus", {"joint": True}),
    "fsdp stages": (sharded, "periodic-lora", {}),
    "fsdp stages with momentum": (sharded, "periodic-lora", {"stage_momentum": 0.5}),
    "ddp stages": (replicated, "periodic-lora", {"stage_momentum": 0.5}),
    "fsdp kappa": (sharded, "kappa-tune", {}),
    "ddp kappa": (replicated, "kappa-tune", {}),
}


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        results = {name: scenario(kind, **settings) for name, (scenario, kind, settings) in SCENARIOS.items()}
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
