"""Memory, speed and safety of merges: four sharded Llamas of 1, 2 and 4 GB, their largest tensor 256 MB.

    python benchmarks/merge_memory.py memory [--sizes 1,2,4]        anonymous memory above the imported program, and seconds
    python benchmarks/merge_memory.py peer --mergekit PYTHON        seconds of mergekit on the same recipe, in turns
    python benchmarks/merge_memory.py kill [--kills 10]             kill -9 at random moments; the bytes must be the same

Parents are written once, into --folder; 4 GB take 20 GB of disk. Everything measured is a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

WIDTH, WORDS, INNER = 4096, 32768, 11008
LAYERS = {1: 1, 2: 4, 4: 9}  # beside embedding and head of 256 MB each
TENSOR = WIDTH * WORDS * 2  # bytes of the largest
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear")
SHARD = 512 * 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["memory", "peer", "kill", "one"])
    parser.add_argument("recipe", nargs="?", type=Path, help=argparse.SUPPRESS)  # of "one", which the others start
    parser.add_argument("--sizes", default="1,2,4", help="gigabytes of each parent, with commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas; %(default)s")
    parser.add_argument("--folder", type=Path, default=Path("runs/merge-memory"), metavar="DIR")
    parser.add_argument("--mergekit", type=Path, metavar="PYTHON", help="an interpreter that has mergekit")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of poise and mergekit")
    parser.add_argument("--kills", type=int, default=10, metavar="N")
    args = parser.parse_args(argv)
    if args.what == "one":
        print(json.dumps(one(args.recipe, args.folder, args.mergekit)))
        return 0
    methods = args.methods.split(",")
    for size in map(int, args.sizes.split(",")):
        parents = [written(args.folder / f"{size}GB-{i}", size, i) for i in range(4)]
        if args.what == "memory":
            measure(parents, methods, args.folder)
        elif args.what == "peer":
            race(parents, methods, args.folder, args.mergekit, args.rounds)
        else:
            kill(parents, methods, args.folder, args.kills)
    return 0


def written(folder: Path, size: int, seed: int) -> Path:
    """A Llama in shards; folders that are whole are left as they are. All seeds differ from a common start, by little."""
    import torch
    from safetensors.torch import save_file

    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"model.embed_tokens.weight": (WORDS, WIDTH), "lm_head.weight": (WORDS, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS[size]):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{part}_proj.weight": (WIDTH, WIDTH) for part in "qkvo"}
        shapes |= {f"{at}mlp.{part}_proj.weight": (INNER, WIDTH) for part in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (WIDTH, INNER)}
        shapes |= {f"{at}{part}_layernorm.weight": (WIDTH,) for part in ("input", "post_attention")}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes.items():
        if shards[-1] and sum(2 * torch.Size(s).numel() for s in [*shards[-1].values(), shape]) > SHARD:
            shards.append({})
        shards[-1][name] = shape
    places = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, shape in shard.items():
            start = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
            own = torch.Generator().manual_seed(seed * 1000 + len(places))
            # The numbers of some rows, over and over: drawing all of them would take longer than all that is measured.
            tile = torch.randn(min(shape[0], 512), *shape[1:], generator=start)
            tile += 0.1 * torch.randn(tile.shape, generator=own)
            times = -(-shape[0] // tile.shape[0])
            tensors[name] = (0.02 * tile).bfloat16().repeat(times, *[1] * (len(shape) - 1))[: shape[0]].contiguous()
            places[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "vocab_size": WORDS}
    config |= {"intermediate_size": INNER, "num_hidden_layers": LAYERS[size], "num_attention_heads": 32}
    config |= {"tie_word_embeddings": False, "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def recipe(parents: Sequence[Path], method: str, folder: Path) -> Path:
    """The same YAML for both programs; paths from the folder above, where both are started."""
    models, base, more = list(parents), "", ""
    if method == "slerp":
        models, base, more = models[:2], f"base_model: {parents[0]}\n", "parameters: {t: 0.4}\n"
    elif method != "linear":
        models, base, more = models[1:], f"base_model: {parents[0]}\n", "parameters: {weight: 0.4"
        more += ", density: 0.5}\n" if method != "task_arithmetic" else "}\n"
    else:
        more = "parameters: {weight: 0.25}\n"
    text = f"merge_method: {method}\n{base}{more}dtype: bfloat16\nmodels:\n" + "".join(f"  - model: {m}\n" for m in models)
    path = folder / f"{method}.yaml"
    path.write_text(text)
    return path


def measure(parents: Sequence[Path], methods: Sequence[str], folder: Path) -> None:
    for method in methods:
        found = started(recipe(parents, method, folder), folder)
        peak, said = found["peak"] / 2**20, found["said"] / 2**20
        print(
            f"{method:16} {parents[0].name.partition('-')[0]}: {peak:6.0f} MB above the imported program,"
            f" {found['peak'] / TENSOR:.2f} of the largest tensor; said {said:.0f} MB; {found['seconds']:.1f} s",
            flush=True,
        )


def race(parents: Sequence[Path], methods: Sequence[str], folder: Path, mergekit: Path | None, rounds: int) -> None:
    for method in methods:
        path, ours, theirs = recipe(parents, method, folder), [], []
        for _ in range(rounds):
            ours.append(started(path, folder))
            theirs.append(started(path, folder, mergekit))
        ratios = [t["seconds"] / o["seconds"] for o, t in zip(ours, theirs, strict=True)]
        peaks = [max(found["peak"] for found in all) / 2**20 for all in (ours, theirs)]
        seconds = [median(found["seconds"] for found in all) for all in (ours, theirs)]
        print(
            f"{method:16} {parents[0].name.partition('-')[0]}: poise {seconds[0]:.1f} s, mergekit {seconds[1]:.1f} s,"
            f" mergekit / poise {median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}];"
            f" memory {peaks[0]:.0f} and {peaks[1]:.0f} MB",
            flush=True,
        )


def started(path: Path, folder: Path, mergekit: Path | None = None) -> dict[str, Any]:
    """One merge in a process of its own."""
    command = [str(mergekit or sys.executable), __file__, "one", str(path), "--folder", str(folder)]
    command += ["--mergekit", str(mergekit)] if mergekit is not None else []
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


def one(path: Path, folder: Path, mergekit: Path | None) -> dict[str, Any]:
    out, said = folder / "out", 0
    shutil.rmtree(out, ignore_errors=True)
    run: Callable[[], Any]
    if mergekit is not None:
        import yaml
        from mergekit.config import MergeConfiguration  # pyright: ignore[reportMissingImports]
        from mergekit.merge import run_merge  # pyright: ignore[reportMissingImports]
        from mergekit.options import MergeOptions  # pyright: ignore[reportMissingImports]

        config = MergeConfiguration.model_validate(yaml.safe_load(path.read_text()))
        options = MergeOptions(lazy_unpickle=True, quiet=True, write_model_card=False)
        run = partial(run_merge, config, str(out), options)
    else:
        from poise.merge.merger import Merger
        from poise.merge.merging import run as merge
        from poise.merge.needs import needs
        from poise.merge.recipe import read

        merger = Merger(read(path))
        said = needs(merger).memory
        run = partial(merge, merger, out)
    watch = Watch()
    watch.start()
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    watch.stop.set()
    watch.join()
    return {"seconds": seconds, "peak": watch.peak - watch.baseline, "said": said}


class Watch(threading.Thread):
    """The most anonymous memory that the process had: mapped files are the system's to take back."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop = threading.Event()
        self.baseline = self.peak = anonymous()

    def run(self) -> None:
        while not self.stop.wait(0.004):
            self.peak = max(self.peak, anonymous())


def anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def kill(parents: Sequence[Path], methods: Sequence[str], folder: Path, kills: int) -> None:
    """Kill the command again and again, look at what lies there, and compare what it ends with."""
    command = [sys.executable, "-m", "poise.cli", "merge", "--max-shard-size", "200MB", "--quiet"]
    for method in methods:
        path = recipe(parents, method, folder)
        whole, broken = folder / "whole", folder / "broken"
        for out in (whole, broken):
            shutil.rmtree(out, ignore_errors=True)
        began = time.monotonic()
        subprocess.run([*command, str(path), str(whole)], check=True, stdout=subprocess.DEVNULL)
        length, wanted = time.monotonic() - began, digests(whole)
        moments, killed, seen = random.Random(0), 0, 0
        while killed < kills:
            process = subprocess.Popen([*command, str(path), str(broken)], stdout=subprocess.DEVNULL, start_new_session=True)
            try:
                process.wait(moments.uniform(0.05, 0.6) * length)
                shutil.rmtree(broken)  # it had finished: from the start
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
                files = {name: digest for name, digest in digests(broken).items() if name in wanted}
                half = [name for name, digest in files.items() if digest != wanted[name]]
                assert not half, f"{method}: {half} under a final name is not what it must be"
                seen += len([name for name in files if name.endswith(".safetensors")])
        subprocess.run([*command, str(path), str(broken)], check=True, stdout=subprocess.DEVNULL)
        same = digests(broken) == wanted
        print(
            f"{method:16} {killed} kills in {length:.1f} s long merges, {seen} finished files seen; same bytes: {same}",
            flush=True,
        )
        assert same


def digests(folder: Path) -> dict[str, str]:
    """Of what a user sees: all files but those that are not finished, and the journal."""
    if not folder.exists():
        return {}
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    raise SystemExit(main())
