"""An adapted model's adapters on disk: as peft reads them where it can, else in a folder of poise's own.

adapter_config.json  adapter_model.safetensors      peft's, of LoRA and what is its like
poise_adapter.json   adapter.safetensors            every method's
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor, nn

from poise.checkpoint.atomic import put
from poise.checkpoint.peft_directory import CONFIG

from .adapter import Adapted, Adapter
from .attaching import Attached, adapters, attached
from .parts import part_of
from .peft_form import peft_form, unlike_peft

Form = Literal["auto", "peft", "poise"]
OWN, OWN_WEIGHTS = "poise_adapter.json", "adapter.safetensors"
VERSION = 1


def export(
    model: nn.Module,
    folder: str | Path,
    form: Form = "auto",
    *,
    part: str | None = None,
    base: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Write the adapters of `model`, and whatever else of it trains, into a folder; the base's weights are not in it.

    Args:
        form: "auto" (default): a PEFT directory where peft has the method, else poise's own. "peft", "poise": that one. What
            peft lacks and does no more than a LoRA does is written for "peft" as a LoRA.
        part: of a method that puts several LoRAs beside each layer, the one that is written, as a LoRA for peft; None: all.
        base: `base_model_name_or_path`, for peft; None: what the model's own config says, if it does.
        task_type: for peft, "CAUSAL_LM" and so on; None: "CAUSAL_LM" if the model's class has that in its name.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not adapted, its base's weights were changed, peft has no such method, there is no such part.

    Files are whole or not there. Tensors are written as they are; `load` reads both forms.
    """
    kept = attached(model)
    if kept is None:
        raise ValueError("model is not adapted; attach(model, method) first")
    if kept.rewritten:
        raise ValueError(f"the base's weights are not what they were: {kept.rewritten}; detach(fold(model)) and save the model")
    found: dict[str, Any] = dict(_everywhere(model) if part is None else part_of(model, part))
    if part is None and not kept.method.peft:
        reason = f"peft has no {type(kept.method).__name__}"
    else:
        reason = unlike_peft(model, kept, found)
    if form not in ("auto", "peft", "poise"):
        raise ValueError(f"form={form!r}: must be 'auto', 'peft' or 'poise'")
    if part is not None and (form == "poise" or reason):
        raise ValueError(f"part={part!r}: a part alone is written for peft{reason and ', and ' + reason}")
    if form == "peft" and reason:
        raise ValueError(f"form='peft': {reason}; form='poise' writes it, and fold(model) makes plain weights where it can")
    folder = Path(folder)
    if form == "poise" or reason or (form == "auto" and kept.method.peft == "as LoRA"):
        tensors = own_tensors(model)
        said = {
            "version": VERSION,
            "method": _catalog_name(kept),
            "settings": kept.method.settings(),
            "layers": list(_everywhere(model)),
            "also": list(kept.also),
        }
        _write(folder, tensors, OWN_WEIGHTS, said, OWN)
    else:
        _write(folder, *peft_form(model, kept, found, base, task_type), CONFIG)
    return folder


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a folder of poise's own holds: state of the adapters, and parameters of the model that train. Shared ones once."""
    kept = attached(model)
    assert kept is not None
    found = {name: p for name, p in model.named_parameters() if name in kept.also}
    beside = adapters(model)
    for path in kept.layers:
        at = f"{path}." if path else ""
        found |= {f"{at}adapter.{name}": t for name, t in beside[path].state_dict(keep_vars=True).items()}
    once: dict[int, str] = {}
    return {name: t.detach() for name, t in found.items() if once.setdefault(id(t), name) == name}


def _everywhere(model: nn.Module) -> dict[str, Adapter]:
    """By path, what stands beside every adapted layer, those tied to others too."""
    return {path: layer.adapter for path, layer in model.named_modules() if isinstance(layer, Adapted)}


def _write(folder: Path, tensors: dict[str, Tensor], file: str, said: dict[str, Any], config: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, t in tensors.items():
        here = t.cpu().contiguous()
        whole[name] = here.clone() if here.data_ptr() in held else here  # safetensors writes no memory under two names
        held.add(here.data_ptr())
    put(folder / file, save(whole, metadata={"format": "pt"}))
    put(folder / config, (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode())  # last: with it the folder is one


def _catalog_name(kept: Attached) -> str:
    from poise import catalog

    return next(m.name for m in catalog.methods("adapt") if m.target is type(kept.method))
