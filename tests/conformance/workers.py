"""What each of two processes does for `test_distributed.py`: the whole catalog over gloo, results left in a file per rank."""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from poise.catalog import Method
from poise.optim import Transform

from .cases import batch, build, entries, grads_like, loss_of
from .problems import Grads, draw, leaves

# What `make gpu-check` sets otherwise before it runs the scenarios on its own devices.
WORLD = 2
DEVICE = "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Scenario = Callable[[Method], dict[str, Any]]


def uneven(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Rows that do not divide by two, two equal matrices, and a bias of one element, of which the second rank holds nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(128, 65), nn.ReLU(), nn.Linear(65, 128), nn.Linear(128, 65), nn.Linear(65, 1))
        return model.to(DEVICE, dtype)


def mesh() -> DeviceMesh:
    """All ranks in a row."""
    return init_device_mesh(DEVICE, (WORLD,))


def first() -> bool:
    """Whether this rank makes the run in one process, which is the same on all of them and needs none of the others."""
    return dist.get_rank() == 0


def outcome(opt: torch.optim.Optimizer, found: Any, alone: Any, start: list[Tensor]) -> dict[str, Any]:
    """Final weights, the first rank's for the run alone, and whether every element is computed from itself alone.

    Then no sum can be added in another order.
    """
    rules = opt._roster.rules.values()  # pyright: ignore[reportAttributeAccessIssue]
    exact = all(link.unit == "element" and type(link).measure is Transform.measure for rule in rules for link in rule)
    return {"found": whole(found), "alone": whole(alone), "start": start, "exact": exact}


def whole(tensors: Any) -> list[Tensor]:
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone().cpu() for t in tensors]


def give(params: list[Any], row: list[Tensor | None]) -> None:
    """Set gradients by hand, sharded as the parameter is."""
    for p, g in zip(params, row, strict=True):
        if g is None:
            p.grad = None
            continue
        g = g.to(DEVICE, p.dtype)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def steps(opt: torch.optim.Optimizer, params: list[Any], grads: Grads) -> None:
    for row in grads:
        give(params, row)
        opt.step()


def ddp(entry: Method) -> dict[str, Any]:
    """Real gradients, averaged by DDP, against one process that averages the same parts of the batch itself."""
    rank, data = dist.get_rank(), batch()
    size = 64 // WORLD
    mine = [slice(i * size, (i + 1) * size) for i in range(WORLD)]
    shares = [(data[0][part].to(DEVICE), data[1][part].to(DEVICE)) for part in mine]
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    model.to(DEVICE)
    twin, start = copy.deepcopy(model), whole(model.parameters())
    replica = DistributedDataParallel(model)
    opt, twin_opt = (build(entry, m, state="int8", backend="eager") for m in (replica, twin))
    for _ in range(3):
        opt.zero_grad()
        loss_of(replica, shares[rank]).backward()
        opt.step()
        if not first():
            continue
        parts = []
        for share in shares:
            twin.zero_grad()
            loss_of(twin, share).backward()
            parts.append([p.grad.clone() for p in twin.parameters() if p.grad is not None])
        for p, *found in zip(twin.parameters(), *parts, strict=True):
            p.grad = torch.stack(found).sum(0) / WORLD
        twin_opt.step()
    return outcome(opt, model.parameters(), twin.parameters(), start)


def sharded(state: str, dtype: str, backend: str = "eager") -> Scenario:
    """FSDP2 over uneven rows, a missing gradient and an empty shard, against the whole model in one process."""

    def run(entry: Method) -> dict[str, Any]:
        model, twin = uneven(DTYPES[dtype]), uneven(DTYPES[dtype])
        fully_shard(model, mesh=mesh())
        params, alone = list(model.parameters()), list(twin.parameters())
        grads = grads_like(alone, 4)
        grads[1][0] = grads[2][3] = None
        start = whole(alone)
        opt = build(entry, model, state=state, backend=backend)
        steps(opt, params, grads)
        if first():
            steps(build(entry, twin, state=state, backend=backend), alone, grads)
        return outcome(opt, params, alone, start)

    return run


def backward(entry: Method) -> dict[str, Any]:
    """FSDP2 with real gradients: losses of the sharded and of the plain model, step by step."""
    model, twin = uneven(), uneven()
    start = whole(twin.parameters())
    fully_shard(model, mesh=mesh())
    opt, twin_opt = build(entry, model, backend="eager"), build(entry, twin, backend="eager")
    x, y = batch()[0].to(DEVICE), torch.ones(64, 1, device=DEVICE)
    for _ in range(3):
        for m, o in ((model, opt), (twin, twin_opt)) if first() else ((model, opt),):
            o.zero_grad()
            nn.functional.mse_loss(m(x), y).backward()
            o.step()
    return outcome(opt, model.parameters(), twin.parameters(), start)


def columns(entry: Method) -> dict[str, Any]:
    """Matrices cut by columns, as tensor parallelism cuts every second one: pieces that are not contiguous in the whole."""
    alone = leaves([p.to(DEVICE) for p in draw([(64, 127), (64, 127)], 0, dtype=torch.bfloat16)[0]])
    params = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh(), [Shard(1)])) for p in alone]
    start, grads = whole(alone), grads_like(alone, 4)
    opt = build(entry, params, backend="auto")
    steps(opt, params, grads)
    if first():
        steps(build(entry, alone, backend="auto"), alone, grads)
    return outcome(opt, params, alone, start)


def resumed(entry: Method) -> dict[str, Any]:
    """FSDP2: state out, fresh objects, state in, on: against the run that was not interrupted."""
    model, fresh = uneven(torch.bfloat16), uneven(torch.bfloat16)
    fully_shard(model, mesh=mesh())
    fully_shard(fresh, mesh=mesh())
    params, again = list(model.parameters()), list(fresh.parameters())
    start = whole(params)
    grads = grads_like(leaves(whole(params)), 4)
    opt = build(entry, model, state="bf16", backend="eager")
    steps(opt, params, grads[:2])
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    steps(opt, params, grads[2:])
    fresh_opt = build(entry, fresh, state="bf16", backend="eager", lr=0.5)
    set_optimizer_state_dict(fresh, fresh_opt, saved)
    steps(fresh_opt, again, grads[2:])
    return outcome(opt, again, params, start)


# With "fsdp compiled" (int8) and "fsdp resumed" (bf16) every format of state and every dtype of weights is there; how a shard
# is encoded does not hang on the dtype it belongs to.
SHARDED = {"fp32": "float32", "int4": "bfloat16"}
SCENARIOS: dict[str, Scenario] = {
    "ddp": ddp,
    **{f"fsdp {state} {dtype}": sharded(state, dtype) for state, dtype in SHARDED.items()},
    "fsdp compiled": sharded("int8", "bfloat16", "auto"),
    "tensor parallel": columns,
    "fsdp backward": backward,
    "fsdp resumed": resumed,
}


def run(rank: int, folder: str) -> None:
    """Every scenario for every entry; an error is a result too, so that one entry does not take the others with it."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    results: dict[tuple[str, str], Any] = {}
    try:
        for entry in entries():
            for name, scenario in SCENARIOS.items():
                try:
                    results[entry.name, name] = scenario(entry)
                except Exception:
                    results[entry.name, name] = traceback.format_exc()
        torch.save(results, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


__all__ = ["SCENARIOS", "WORLD", "run"]
