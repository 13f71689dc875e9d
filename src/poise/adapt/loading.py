"""Adapters read from disk and put beside a model's layers: peft's, and poise's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise import catalog
from poise.checkpoint import CheckpointError
from poise.checkpoint.files import read_json
from poise.checkpoint.lora import Delta, Full
from poise.checkpoint.peft_directory import CONFIG, PeftDirectory
from poise.checkpoint.safetensors_file import SafetensorsFile

from .attaching import Attached, attach, detach
from .exporting import OWN, OWN_WEIGHTS, VERSION, own_tensors


def load(model: nn.Module, folder: str | Path) -> Attached:
    """Attach what `folder` holds to `model`, as it was when it was written: it goes on training, folds and is exported.

    Args:
        folder: of `export`, or any PEFT directory with LoRA or DoRA.

    Raises:
        CheckpointError: the folder holds no adapter, or one of another model; file and tensor are named.
        ValueError: the model is adapted already, or ties a weight of an adapted layer to one that is not. It is as it was then.
    """
    folder = Path(folder)
    if (folder / OWN).exists():
        return _own(model, folder)
    if (folder / CONFIG).exists():
        return _peft(model, folder)
    raise CheckpointError(f"holds neither {CONFIG} nor {OWN}", cure="give a folder that export or peft wrote", file=folder)


def _own(model: nn.Module, folder: Path) -> Attached:
    file = folder / OWN
    said, tensors = read_json(file), SafetensorsFile(folder / OWN_WEIGHTS)
    if said.get("version") != VERSION:
        problem = f"is of version {said.get('version')!r}, and this poise reads {VERSION}"
        raise CheckpointError(problem, cure="read it with the poise that wrote it", file=file)
    try:
        method = catalog.get(said["method"])
        known = {field.name for field in fields(method.target)}  # pyright: ignore[reportArgumentType]
        made = method.target(**{name: value for name, value in said["settings"].items() if name in known})
        layers, also = tuple(said["layers"]), tuple(said["also"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"cannot be read ({error})", cure="export the adapters again", file=file) from error
    missing = [path for path in layers if path not in dict(model.named_modules())]
    if missing:
        cure = "these are adapters of another model"
        raise CheckpointError(f"adapts {missing[0]!r}, and the model has no such layer", cure=cure, file=file)
    kept = attach(model, made, _exactly(layers), also=also, losses=(), seed=0)
    with _or_detached(model):
        wanted = own_tensors(model)
        if strange := [name for name in tensors if name not in wanted]:
            raise CheckpointError(
                "belongs to no adapter", cure="get config and weights again", file=tensors.path, tensor=strange[0]
            )
        _fill((name, wanted[name], tensors.get(name), tensors.path) for name in wanted)
    return kept


def _peft(model: nn.Module, folder: Path) -> Attached:
    directory = PeftDirectory(folder)
    updates = directory.deltas()
    config = directory.config
    named = dict(model.named_parameters(remove_duplicate=False))
    held = named | dict(model.named_buffers())
    for name in updates:
        if name not in held:
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
    kept = attach(model, method, _exactly(tuple(pairs)), also=tuple(name for name in whole if name in named), seed=0)
    with _or_detached(model):
        wanted = [part for path, delta in pairs.items() for part in _parts(model, path, delta, directory)]
        wanted += [(name, held[name], directory[update.name], folder) for name, update in whole.items()]
        _fill(wanted)
    counted = {id(p): p for p in model.parameters()}.values()
    kept.trainable, kept.total = sum(p.numel() for p in counted if p.requires_grad), sum(p.numel() for p in counted)
    return kept


Part = tuple[str, Tensor, Tensor | None, Path | None]  # name in the file, where it goes, what the file has, the file


def _parts(model: nn.Module, path: str, delta: Delta, directory: PeftDirectory) -> list[Part]:
    """What the adapter of a layer is filled with; it gets the rank that the file has for this layer."""
    layer: Any = model.get_submodule(path)
    adapter: Any = layer.adapter
    down, up = directory[delta.down].flatten(1), directory[delta.up].flatten(1)
    if len(down) != adapter.rank:
        adapter.lora_A = nn.Parameter(torch.empty_like(down).to(adapter.lora_A))
        adapter.lora_B = nn.Parameter(torch.empty_like(up).to(adapter.lora_B))
    adapter.scale = delta.scale
    parts: list[Part] = [(delta.down, adapter.lora_A, down, directory.path), (delta.up, adapter.lora_B, up, directory.path)]
    if delta.magnitude is not None:
        parts.append((delta.magnitude, adapter.magnitude, directory[delta.magnitude].flatten(), directory.path))
    return parts


def _exactly(paths: tuple[str, ...]) -> Any:
    """A target that means these paths and no others."""
    return lambda path, _: path in paths


@contextmanager
def _or_detached(model: nn.Module) -> Iterator[None]:
    """An error within leaves the model without adapters."""
    try:
        yield
    except BaseException:
        detach(model)
        raise


@torch.no_grad()
def _fill(parts: Iterable[Part]) -> None:
    """Copy, once everything is there and fits; what layers share must be given alike by all of them."""
    given: dict[int, tuple[Tensor, Tensor]] = {}
    for name, wanted, found, file in parts:
        if found is None:
            raise CheckpointError("is missing", cure="export the adapters again", file=file, tensor=name)
        if found.shape != wanted.shape:
            problem = f"is {list(found.shape)}, and the model's is {list(wanted.shape)}"
            raise CheckpointError(problem, cure="it was trained on another base", file=file, tensor=name)
        before = given.setdefault(id(wanted), (wanted, found))
        if not torch.equal(before[1], found):
            problem = "differs from that of a layer with the same, tied weight"
            raise CheckpointError(problem, cure="untie the weights first (give one a copy)", file=file, tensor=name)
    for wanted, found in given.values():
        wanted.copy_(found)
