"""Four kinds of text that Python packages carry, and a small GPT that reads them: what is merged and adapted in the benchmarks.

python: the standard library; cpp: torch's headers; typescript: playwright's declarations; prose: Python's help topics and
scikit-learn's descriptions of its data.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pydoc_data.topics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from poise.compare.tasks import Split
from poise.compare.tasks.code_lm import Task as CodeLM
from poise.compare.tasks.code_lm import unit_hash
from poise.models import GPT, GPTConfig

DOMAINS = ("python", "cpp", "typescript", "prose")
DOMAIN_BYTES = 3_000_000  # at most, so that none outweighs the others by much; prose has half a million
PIECE = 4096  # bytes that go to one split together: far longer than a context, and enough of them in the smallest domain
CONTEXT, BATCH = 128, 16
WINDOWS = {"tune": 128, "report": 256}
CONFIG = GPTConfig(
    hidden_size=128,
    intermediate_size=344,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=CONTEXT,
    initializer_range=128**-0.5,
)


class Text:
    """Next-byte prediction on some of the domains, each batch from all of them alike. Loss in nats per byte.

    Args:
        domains: of `DOMAINS`.
        start: folder with the weights that training begins at; None draws them.
    """

    unit = "nats per byte"

    def __init__(self, domains: Sequence[str], start: Path | None = None) -> None:
        self.domains, self.start = tuple(domains), start
        self.name = "+".join(domains)
        weights = (start / "model.safetensors").read_bytes() if start is not None else b""
        self.fingerprint = hashlib.sha256(b"".join(text(name) for name in domains) + weights).hexdigest()

    def model(self) -> nn.Module:
        return GPT(CONFIG) if self.start is None else read(self.start)

    def batches(self, split: Split, seed: int) -> Iterator[Tensor]:
        views = [np.lib.stride_tricks.sliding_window_view(stream(name, split), CONTEXT + 1) for name in self.domains]
        if split == "train":
            for step in range(2**63):
                random = np.random.default_rng((seed, step))  # keyed by the step: a run that goes on reads what it would have
                chosen = [views[i % len(views)] for i in range(BATCH)]
                yield torch.from_numpy(np.stack([view[random.integers(len(view))] for view in chosen]).astype(np.int64))
        else:
            for view in views:
                starts = np.linspace(0, len(view) - 1, WINDOWS[split]).astype(np.int64)
                for some in np.split(starts, len(starts) // 32):
                    yield torch.from_numpy(view[some].astype(np.int64))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def losses(weights: Mapping[str, Tensor], split: Split) -> dict[str, float]:
    """Of a model with these weights: the loss on each domain."""
    model = loaded(weights).eval()
    found = {}
    for name in DOMAINS:
        task = Text((name,))
        found[name] = float(torch.stack([task.loss(model, batch) for batch in task.batches(split, 0)]).mean())
    return found


def read(folder: Path) -> GPT:
    """The model that `poise train` wrote."""
    config = json.loads((folder / "config.json").read_text())
    assert all(config[name] == getattr(CONFIG, name) for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    return loaded(load_file(folder / "model.safetensors"))


def loaded(weights: Mapping[str, Tensor]) -> GPT:
    model = GPT(CONFIG)
    tied = {"lm_head.weight": weights["model.embed_tokens.weight"]} if CONFIG.tie_word_embeddings else {}
    model.load_state_dict({**tied, **weights})
    return model


@cache
def stream(domain: str, split: Split) -> np.ndarray:
    """The pieces of a domain that belong to a split, one after another."""
    whole = text(domain)
    parts = []
    for number, begin in enumerate(range(0, len(whole), PIECE)):
        place = unit_hash(domain, str(number))
        if split == ("train" if place < 0.90 else "tune" if place < 0.95 else "report"):
            parts.append(whole[begin : begin + PIECE])
    return np.frombuffer(b"\0".join(parts), dtype=np.uint8)


@cache
def text(domain: str) -> bytes:
    """All of a domain, in an order that is the same everywhere.

    Raises:
        ImportError: the package that carries it is not installed.
    """
    if domain == "python":
        files = CodeLM().files
        parts = [files[name] for name in sorted(files, key=lambda name: unit_hash("choice", name))]
    elif domain == "cpp":
        parts = of_package("torch", "include", ".h")
    elif domain == "typescript":
        parts = of_package("playwright", "driver/package/types", ".d.ts")
    elif domain == "prose":
        topics = [topic.encode() for _, topic in sorted(pydoc_data.topics.topics.items())]
        parts = topics + of_package("sklearn", "datasets/descr", ".rst")
    else:
        raise ValueError(f"{domain!r} is no domain; known: {', '.join(DOMAINS)}")
    return b"\0".join(parts)[:DOMAIN_BYTES]


def of_package(package: str, folder: str, ending: str) -> list[bytes]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is missing, whose files are read as text: pip install {package}")
    root = Path(spec.submodule_search_locations[0])
    names = {path.relative_to(root).as_posix(): path for path in (root / folder).rglob(f"*{ending}")}
    return [names[name].read_bytes() for name in sorted(names, key=lambda name: unit_hash("choice", name))]
