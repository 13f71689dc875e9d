"""Adapters read from disk and put beside a model's layers: peft's, and poise's own."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from poise import catalog
from poise.checkpoint import CheckpointError
from poise.checkpoint.lora import Delta, Full
from poise.checkpoint.peft_directory import CONFIG, PeftDirectory

from .adapter import LowRank
from .attaching import Attached, adapters, attach
from .exporting import OWN, OWN_WEIGHTS, own_tensors


def load(model: nn.Module, folder: str | Path) -> Attached:
    """Attach what `folder` holds to `model`, as it was when it was written: it goes on training, folds and is exported.

    Args:
        folder: of `export`, or any PEFT directory with LoRA or DoRA.

    Raises:
        CheckpointError: the folder holds no adapter, or one of another model; file and tensor are named.
        ValueError: the model is adapted already.
    """
    folder = Path(folder)
    if (folder / OWN).exists():
        return _own(model, folder)
    if (folder / CONFIG).exists():
        return _peft(model, folder)
    raise CheckpointError(f"holds neither {CONFIG} nor {OWN}", cure="give a folder that export or peft wrote", file=folder)


def _own(model: nn.Module, folder: Path) -> Attached:
    try:
        said = json.loads((folder / OWN).read_text())
        method = catalog.get(said["method"])
        known = {field.name for field in fields(method.target)}  # pyright: ignore[reportArgumentType]
        settings = {name: value for name, value in said["settings"].items() if name in known}
        layers, also = tuple(said["layers"]), tuple(said["also"])
        tensors = load_file(folder / OWN_WEIGHTS)
    except (KeyError, TypeError, AttributeError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error})", cure="export the adapters again", file=folder / OWN) from error
    missing = [path for path in layers if path not in dict(model.named_modules())]
    if missing:
        cure = "these are adapters of another model"
        raise CheckpointError(f"adapts {missing[0]!r}, and the model has no such layer", cure=cure, file=folder / OWN)
    kept = attach(model, method.target(**settings), _exactly(layers), also=also, losses=())
    wanted = own_tensors(model)
    for name in wanted:
        _put(name, wanted[name], tensors.get(name), folder / OWN_WEIGHTS)
    return kept


def _peft(model: nn.Module, folder: Path) -> Attached:
    directory = PeftDirectory(folder)
    updates = directory.deltas()
    config = directory.config
    named = dict(model.named_parameters(remove_duplicate=False))
    for name in updates:
        if name not in named:
            cure = "it was trained on another base: see base_model_name_or_path in its config"
            raise CheckpointError("the model has no such parameter", cure=cure, file=folder / CONFIG, tensor=name)
    pairs = {n.removesuffix(".weight"): u.fitting(named[n].shape) for n, u in updates.items() if isinstance(u, Delta)}
    whole = {name: update for name, update in updates.items() if isinstance(update, Full)}
    kind = "dora" if any(delta.magnitude is not None for delta in pairs.values()) else "lora"
    method = catalog.get(kind).target(
        rank=int(config["r"]),
        alpha=float(config.get("lora_alpha", 8)),
        dropout=float(config.get("lora_dropout", 0.0)),
        rank_stabilized=bool(config.get("use_rslora")),
    )
    kept = attach(model, method, _exactly(tuple(pairs)), also=tuple(whole))
    for path, adapter in adapters(model).items():
        assert isinstance(adapter, LowRank)
        delta = pairs[path]
        down, up = directory[delta.down].flatten(1), directory[delta.up].flatten(1)
        if len(down) != adapter.rank:  # its config names another rank for this layer
            adapter.lora_A = nn.Parameter(down.new_empty(down.shape).to(adapter.lora_A))
            adapter.lora_B = nn.Parameter(up.new_empty(up.shape).to(adapter.lora_B))
        adapter.scale = delta.scale
        _put(delta.down, adapter.lora_A, down, folder)
        _put(delta.up, adapter.lora_B, up, folder)
        if delta.magnitude is not None:
            magnitude: Any = adapter
            _put(delta.magnitude, magnitude.magnitude, directory[delta.magnitude].flatten(), folder)
    for name, update in whole.items():
        _put(name, named[name], directory[update.name], folder)
    kept.trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept.total = sum(p.numel() for p in model.parameters())
    return kept


def _exactly(paths: tuple[str, ...]) -> Any:
    """A target that means these paths and no others."""
    return lambda path, _: path in paths


@torch.no_grad()
def _put(name: str, wanted: Tensor, found: Tensor | None, file: Path) -> None:
    if found is None:
        raise CheckpointError("is missing", cure="export the adapters again", file=file, tensor=name)
    if found.shape != wanted.shape:
        problem = f"is {list(found.shape)}, and the model's is {list(wanted.shape)}"
        raise CheckpointError(problem, cure="it was trained on another base", file=file, tensor=name)
    wanted.copy_(found)
