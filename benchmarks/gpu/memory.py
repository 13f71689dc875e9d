"""Section 4: what state weighs, and what a step needs beside weights, gradients and state."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import steps
from .settings import Check, Found, Settings, Tasks, forget

# Bytes for each number of state, blocks' scales and small tensors included.
FORMATS = {"fp32": 4.02, "bf16": 2.05, "int8": 1.08, "int4": 0.58}
RULES = {"AdamW": 2, "Lion": 1}  # numbers of state for each parameter


def tasks(settings: Settings) -> Tasks:
    chosen: Tasks = {"memory: torch AdamW": partial(peak, "torch", None, torch.float32, settings)}
    for dtype in (torch.float32, torch.bfloat16):
        for rule in RULES:
            for state in FORMATS:
                name = f"memory: {rule} {str(dtype).removeprefix('torch.')} {state}"
                chosen[name] = partial(peak, rule, state, dtype, settings)
    return chosen


def peak(rule: str, state: str | None, dtype: torch.dtype, settings: Settings) -> Found:
    """Bytes of state, and of the third step's peak above weights, gradients and state; by parameter."""
    device = settings.device
    params = steps.make("gpt" if device != "cpu" else "trajectory", dtype, settings)
    optimizer: Any = torch.optim.AdamW(params, fused=True) if state is None else steps.build(rule, params, {"state": state})
    for _ in range(2):
        optimizer.step()
    elements = sum(p.numel() for p in params)
    given = sum(p.nbytes + (0 if p.grad is None else p.grad.nbytes) for p in params)
    held = sum(t.nbytes for p in params for name, t in optimizer.state[p].items() if name != "step")
    row: dict[str, Any] = {
        "name": f"{rule} {state or ''}".strip(),
        "weights": str(dtype).removeprefix("torch."),
        "parameters": elements,
        "state_bytes_per_param": held / elements,
        "peak_above_weights_and_gradients_per_param": None,
        "kept_beside_state_per_param": None,
        "largest_tensor_share": max(p.numel() for p in params) / elements,
    }
    if device != "cpu":
        forget(device)
        kept = torch.accelerator.memory_allocated()
        optimizer.step()
        torch.accelerator.synchronize()
        row["peak_above_weights_and_gradients_per_param"] = (torch.accelerator.max_memory_allocated() - given) / elements
        row["kept_beside_state_per_param"] = (kept - given - held) / elements
    if state is None or device == "cpu":  # the CPU's list is too small for its vectors not to count
        return Found([], [row])
    limit = FORMATS[state] * RULES[rule]
    name = f"memory: {row['name']}, {row['weights']} weights: bytes of state by parameter"
    return Found([Check.at_most(name, held / elements, limit)], [row])
