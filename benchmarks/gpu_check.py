"""What poise does on your GPU, in about ten minutes and one JSON file to send back: `make gpu-check`.

    python benchmarks/gpu_check.py [--out gpu-check.json] [--minutes 10] [--device cuda] [--quick]

docs/gpu.md says what is looked at, what the file holds, and how to come by a torch for your GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from gpu import report, run

# Sections in their order, and the share of the time that each may take; what one leaves over, the later ones have.
SHARES = {"machine": 2, "conformance": 24, "steps": 16, "memory": 6, "sharded": 12}
INTERRUPTED = 130

ABOUT = """\
make gpu-check finds out whether poise does on a GPU what its tests say it does on a CPU, and how fast: that every optimizer
agrees with its own run on the CPU, compiled and not, in every state format; that it resumes bit for bit; how long a step takes
beside torch's fused optimizers; what memory it needs; and that sharded training (FSDP2) equals a single process. It takes about
ten minutes and writes one JSON file without names of people, hosts or folders."""


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    device = args.device or found()
    if device is None:
        print(f"{ABOUT}\n\n{build()}\n\n{ADVICE}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(INTERRUPTED))  # by the way of `finally`, where workers end
    settings = {"device": device, "quick": args.quick, "minutes": args.minutes, "plugin": args.plugin is not None}
    whole = report.begin(version(), settings, args.sections)

    def save() -> None:
        report.write(whole, args.out)

    save()
    until, command = time.perf_counter() + args.minutes * 60, ["--device", device]
    command += ["--quick"] if args.quick else []
    command += ["--plugin", str(args.plugin.resolve())] if args.plugin is not None else []
    try:
        for i, name in enumerate(args.sections):
            share = SHARES[name] / sum(SHARES[later] for later in args.sections[i:])
            limits = run.Limits(max(0.0, until - time.perf_counter()) * share, args.stall)
            print(f"{name} (at most {limits.section:.0f} s) ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(prefix="poise-gpu-check-") as folder:
                if not args.quick:  # first steps are those of a new machine
                    os.environ.update(TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor", TRITON_CACHE_DIR=f"{folder}/triton")
                run.section(name, command, limits, whole, save)
        whole["finished"] = True
        save()
    except (KeyboardInterrupt, SystemExit):
        save()
        print(f"interrupted; {args.out} holds what was found until then", file=sys.stderr)
        return INTERRUPTED
    print(report.text(whole))
    print(f"\n{args.out} holds all of it. Attach it to an issue in the project's tracker: it is of use whatever it says.")
    return 1 if whole["verdict"]["failed"] else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Whether poise does on this GPU what it should, and how fast.")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-check.json"), metavar="FILE", help="the JSON file; gpu-check.json"
    )
    parser.add_argument("--device", metavar="TYPE", help="cuda (NVIDIA and AMD), xpu, mps or cpu; what torch finds")
    parser.add_argument("--minutes", type=float, metavar="M", help="for all of it; 10, or 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="small lists, few rounds, the compile caches that are there")
    parser.add_argument("--sections", metavar="NAMES", help=f"only these, with commas: {', '.join(SHARES)}")
    parser.add_argument(
        "--stall", type=float, default=150.0, metavar="S", help="seconds after which a silent task is given up; 150"
    )
    parser.add_argument(
        "--plugin", type=Path, metavar="FILE", help="Python that every process runs first: a fault to see found, say"
    )
    args = parser.parse_args(argv)
    args.minutes = args.minutes if args.minutes is not None else 1.0 if args.quick else 10.0
    for name in ("minutes", "stall"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be above 0")
    chosen = list(SHARES) if args.sections is None else [name.strip() for name in args.sections.split(",")]
    if strange := set(chosen) - set(SHARES):
        parser.error(f"--sections: unknown {', '.join(sorted(strange))}; known: {', '.join(SHARES)}")
    args.sections = [name for name in SHARES if name in chosen]
    if not args.out.absolute().parent.is_dir():
        parser.error(f"--out {args.out}: its folder does not exist")
    if args.plugin is not None and not args.plugin.is_file():
        parser.error(f"--plugin {args.plugin}: no such file")
    return args


def found() -> str | None:
    """The device type that torch sees, if it is there and sees one."""
    try:
        import torch
    except ImportError:
        return None
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return here.type if here is not None else None


def build() -> str:
    """What stands between this interpreter and a GPU."""
    nodes = {"NVIDIA": "/dev/nvidiactl", "AMD": "/dev/kfd"}
    card = next((name for name, node in nodes.items() if Path(node).exists()), None)
    seen = (
        "This machine has no driver for NVIDIA or AMD GPUs." if card is None else f"The machine has a driver for {card} GPUs."
    )
    try:
        import torch
    except ImportError as error:
        return f"This Python has no torch ({error}). {seen}"
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    made = next((f"{name} {version}" for name, version in builds.items() if version), "CPUs only")
    return f"torch {torch.__version__} is built for {made}, and sees no GPU. {seen}"


ADVICE = """\
With a GPU, point it to a Python whose torch is built for it:
    make gpu-check PYTHON=python3             that interpreter as it is; it needs torch, numpy and safetensors
    make gpu-check VENV=.venv-gpu             a new environment, with the torch that pip gives: CUDA on most Linux machines
    make gpu-check VENV=.venv-rocm TORCH_INDEX=ADDRESS    the same for AMD: ADDRESS is the index that pytorch.org names for ROCm
To see how it works without one: python benchmarks/gpu_check.py --device cpu --quick"""


def version() -> str:
    """poise's own, read rather than imported: this process must live whatever torch does."""
    source = (run.ROOT / "src" / "poise" / "__init__.py").read_text()
    told = re.search(r'__version__ = "(.*)"', source)
    return told[1] if told else "unknown"


if __name__ == "__main__":
    sys.exit(main())
