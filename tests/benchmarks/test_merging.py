"""The page of weighed merges: it is what its JSON says, and no merge method is missing."""

from __future__ import annotations

import json
from pathlib import Path

import merge_losses
import numpy as np
import pytest
import text_domains
import torch

from poise import catalog

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def test_the_page_is_what_the_results_say() -> None:
    whole = json.loads((RESULTS / "merging.json").read_text(encoding="utf-8"))
    assert (RESULTS / "merging.md").read_text(encoding="utf-8") == merge_losses.page(whole)
    assert all(line["logits"] is None or line["logits"] < 1e-4 for line in whole["lines"])


def test_every_method_of_merging_is_weighed() -> None:
    whole = json.loads((RESULTS / "merging.json").read_text(encoding="utf-8"))
    lines = " ".join(line["name"] for line in whole["lines"])
    assert whole["fusion_study"]
    weighed = [m.name for m in catalog.methods("merge") if m.kind in ("merge", "solver")]
    for words in (name.split("_") for name in weighed if name != "dare_linear"):
        assert all(word in lines for word in words), words
    assert "dare, linear" in lines


@pytest.mark.parametrize("domain", ["python", "prose"])
def test_no_piece_of_a_text_is_in_two_splits(domain: str) -> None:
    whole = np.frombuffer(text_domains.text(domain), dtype=np.uint8)
    parts = {split: text_domains.stream(domain, split) for split in ("train", "tune", "report")}
    pieces = -(-len(whole) // text_domains.PIECE)
    assert sum(len(part) for part in parts.values()) == len(whole) + pieces - 3  # a zero between two pieces
    assert all(len(part) > text_domains.CONTEXT + 1 for part in parts.values())


def test_a_batch_is_of_all_domains_and_does_not_hang_on_earlier_ones() -> None:
    task = text_domains.Text(("python", "prose"))
    first, second = (next(task.batches("train", 0)) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (text_domains.BATCH, text_domains.CONTEXT + 1)
    stream = text_domains.stream("prose", "train")
    row = first[1].numpy().astype(np.uint8)
    assert row.tobytes() in stream.tobytes()
