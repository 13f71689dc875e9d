"""One rank of section 5: scenarios of the conformance tests on this rank's device, each result left in a file.

The scenarios are those that two processes over gloo go through in every run of the tests, and two that they have no need of:
a checkpoint on disk, and weights kept on the CPU.
"""

from __future__ import annotations

import os
import runpy
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from poise.catalog import Method, get

from .catalog import Grads, build, leaves

# after catalog.py, which lets files of tests be read without the test tools
from conformance import workers  # isort: skip

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl", "xpu": "cpu:gloo,xpu:xccl"}

_folder = Path()


def start(device: str, world: int) -> None:
    """Tell the scenarios where they run."""
    workers.DEVICE, workers.WORLD = device, world


def checkpointed(entry: Method) -> dict[str, Any]:
    """FSDP2: everything saved by torch.distributed.checkpoint, read into fresh objects, and on."""
    model, fresh = workers.uneven(), workers.uneven()
    for one in (model, fresh):
        fully_shard(one, mesh=workers.mesh())
    begin = workers.whole(model.parameters())
    grads = given(begin, 4)
    opt, again = build(entry, model, state="int8", backend="eager"), build(entry, fresh, state="int8", backend="eager", lr=0.5)
    params, others = list(model.parameters()), list(fresh.parameters())
    workers.steps(opt, params, grads[:2])
    where = _folder / f"checkpoint-{entry.name}"
    save({"model": model.state_dict(), "optim": get_optimizer_state_dict(model, opt)}, checkpoint_id=where)
    workers.steps(opt, params, grads[2:])
    shell = {"model": fresh.state_dict(), "optim": get_optimizer_state_dict(fresh, again)}
    load(shell, checkpoint_id=where)
    fresh.load_state_dict(shell["model"])
    set_optimizer_state_dict(fresh, again, shell["optim"])
    workers.steps(again, others, grads[2:])
    return {**workers.outcome(opt, others, params, begin), "exact": True}


def offloaded(entry: Method) -> dict[str, Any]:
    """FSDP2 with weights, gradients and state on the CPU, against the same on the device."""
    model, twin = workers.uneven(), workers.uneven()
    fully_shard(model, mesh=workers.mesh(), offload_policy=CPUOffloadPolicy())
    fully_shard(twin, mesh=workers.mesh())
    x, y = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), torch.ones(64, 1)
    x, y = x.to(workers.DEVICE), y.to(workers.DEVICE)
    opt, twin_opt = build(entry, model, backend="eager"), build(entry, twin, backend="eager")
    begin = workers.whole(twin.parameters())
    for _ in range(3):
        for m, o in ((model, opt), (twin, twin_opt)):
            o.zero_grad()
            torch.nn.functional.mse_loss(m(x), y).backward()
            o.step()
    sharded: list[Any] = list(model.parameters())
    mine = [p.to(workers.DEVICE).full_tensor() for p in sharded]
    return {**workers.outcome(opt, mine, twin.parameters(), begin), "exact": False}


def given(like: Sequence[torch.Tensor], steps: int) -> Grads:
    return workers.grads_like(leaves(like), steps)


def scenarios(device: str) -> dict[str, workers.Scenario]:
    """What is run, the commonest first. On one kind of device only there is nowhere to offload to."""
    known = {**workers.SCENARIOS, "fsdp checkpoint": checkpointed}
    first = ("fsdp fp32 float32", "fsdp compiled", "fsdp checkpoint", "ddp", "fsdp backward", "tensor parallel")
    ordered = {name: known[name] for name in (*first, *(name for name in known if name not in first))}
    return ordered if device == "cpu" else {**ordered, "fsdp offloaded": offloaded}


def run(rank: int, device: str, world: int, folder: str, todo: Sequence[tuple[str, str]], plugin: str | None) -> None:
    """Everything in `todo`, entries and scenarios; result i of this rank is `{folder}/{i}-{rank}.pt`."""
    global _folder
    _folder = Path(folder)
    torch.set_num_threads(1)
    if plugin is not None:
        runpy.run_path(plugin)
    start(device, world)
    if device == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        torch.accelerator.set_device_index(rank)
    dist.init_process_group(
        BACKENDS.get(device), init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    known = scenarios(device)
    for i, (name, scenario) in enumerate(todo):
        try:
            result: Any = known[scenario](get(name))
        except Exception:
            result = traceback.format_exc()
        part = _folder / f"{i}-{rank}.part"
        torch.save(result, part)
        part.rename(part.with_suffix(".pt"))
    dist.barrier()
    dist.destroy_process_group()
