"""Section 1: what the device is, and what it can do at best."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .settings import Check, Found, Settings, Tasks, free_memory, synchronize


def tasks(settings: Settings) -> Tasks:
    return {
        "machine: what it is": lambda: Found(facts=facts(settings.device)),
        "machine: bandwidth and products": lambda: rates(settings),
    }


def facts(device: str) -> dict[str, Any]:
    """Names and versions. Nothing that tells one owner's machine from another's of the same make."""
    known: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "triton": _version("triton", "pytorch-triton-rocm", "triton-rocm", "triton-xpu", "pytorch-triton-xpu"),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cpus": os.cpu_count(),
        "cxx": any(map(shutil.which, (os.environ.get("CXX", "g++").split() or ["g++"])[-1:])),
        "driver": _driver(),
        "gpus": [],
    }
    if device == "cuda":
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            known["gpus"].append(
                {
                    "name": p.name,
                    "memory_gb": round(p.total_memory / 2**30, 1),
                    "capability": f"{p.major}.{p.minor}",
                    "architecture": getattr(p, "gcnArchName", None),
                    "processors": p.multi_processor_count,
                    "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if i == 0 else None,
                }
            )
    elif device != "cpu":
        known["gpus"] = [{"name": device}] * torch.accelerator.device_count()
    return known


def _version(*names: str) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _driver() -> str | None:
    """NVIDIA's or AMD's kernel driver."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        return said[0] if said else None
    amd = Path("/sys/module/amdgpu/version")
    with contextlib.suppress(OSError):
        return amd.read_text().strip()
    return None


def rates(settings: Settings) -> Found:
    """GB/s of a copy (bytes read and written) and TFLOP/s of square products, medians."""
    device = settings.device
    size = 2**24 if device == "cpu" else min(2**30, free_memory(device) // 8)
    a = torch.ones(size // 4, device=device)
    b = torch.zeros_like(a)
    known: dict[str, Any] = {"copy_gb_s": 2 * a.nbytes / _seconds(lambda: b.copy_(a), device) / 1e9}
    n = 256 if device == "cpu" else 2048 if settings.quick else 8192
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(n, n, device=device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        known[f"matmul_{name}_tflops"] = 2 * n**3 / _seconds(lambda x=x: x @ x, device) / 1e12
    return Found([Check("machine: copies and multiplies", bool(torch.equal(a, b)))], facts=known)


def _seconds(work: Callable[[], object], device: str, repeats: int = 5) -> float:
    """Median seconds of a call, each waited for; the first does not count."""
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])
