"""Small models on disk, for merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from poise.models import GPT, GPTConfig

SMALL: dict[str, Any] = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, max_position_embeddings=32
)


def model(folder: Path, seed: int, near: Path | None = None, **config: Any) -> Path:
    """A model whose weights are drawn from `seed`; with `near`, those of another model and a little more."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {**SMALL, "initializer_range": 0.2, **config}
    gpt = GPT(GPTConfig(**settings))
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    if near is not None:
        gpt.load_state_dict({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in tensors(near).items()})
    gpt.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def rewrite(folder: Path, changed: dict[str, Tensor]) -> None:
    """Put other tensors into a folder."""
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, folder / "model.safetensors")


def config(folder: Path, **keys: Any) -> dict[str, Any]:
    """The config of a folder, with `keys` set."""
    file = folder / "config.json"
    found = json.loads(file.read_text()) | keys
    file.write_text(json.dumps(found))
    return found


def tokenizer(folder: Path, tokens: list[str], added: dict[str, int], **more: Any) -> None:
    """A tokenizer whose tokens are numbered in order, and added ones as told."""
    entries = [
        {"id": n, "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        for t, n in added.items()
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    tree = {
        "version": "1.0",
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]},
        "added_tokens": entries,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **more}))


def vocabulary(folder: Path) -> dict[str, int]:
    tree = json.loads((folder / "tokenizer.json").read_text())
    return tree["model"]["vocab"] | {entry["content"]: entry["id"] for entry in tree["added_tokens"]}
