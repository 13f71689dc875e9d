"""An adapted model's adapters on disk: as peft reads them where it can, else in a folder of poise's own.

adapter_config.json  adapter_model.safetensors      peft's, of LoRA and what is its like
poise_adapter.json   adapter.safetensors            every method's
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save
from torch import Tensor, nn

from poise.checkpoint.atomic import put
from poise.checkpoint.peft_directory import CONFIG, PREFIX

from .adapter import LowRank
from .attaching import Attached, adapters, attached
from .targets import is_inputs_first

Form = Literal["auto", "peft", "poise"]
PEFT_WEIGHTS = "adapter_model.safetensors"
OWN, OWN_WEIGHTS = "poise_adapter.json", "adapter.safetensors"
VERSION = 1


def export(
    model: nn.Module, folder: str | Path, form: Form = "auto", *, base: str | None = None, task_type: str | None = None
) -> Path:
    """Write the adapters of `model`, and whatever else of it trains, into a folder; the base's weights are not in it.

    Args:
        form: "auto" (default): a PEFT directory where peft has the method, else poise's own. "peft", "poise": that one. What
            peft lacks and does no more than a LoRA does is written for "peft" as a LoRA.
        base: `base_model_name_or_path`, for peft; None: what the model's own config says, if it does.
        task_type: for peft, "CAUSAL_LM" and so on; None: "CAUSAL_LM" if the model's class has that in its name.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not adapted, or peft has no such method.

    Files are whole or not there. Tensors are written as they are; `load` reads both forms.
    """
    kept = attached(model)
    if kept is None:
        raise ValueError("model is not adapted; attach(model, method) first")
    reason = _unlike_peft(model, kept)
    if form not in ("auto", "peft", "poise"):
        raise ValueError(f"form={form!r}: must be 'auto', 'peft' or 'poise'")
    if form == "peft" and reason:
        raise ValueError(f"form='peft': {reason}; form='poise' writes it, and fold(model) makes plain weights where it can")
    folder = Path(folder)
    if form == "poise" or reason or (form == "auto" and kept.method.peft == "as LoRA"):
        tensors = own_tensors(model)
        said = {
            "version": VERSION,
            "method": _catalog_name(kept),
            "settings": kept.method.settings(),
            "layers": list(kept.layers),
            "also": list(kept.also),
        }
        _write(folder, tensors, OWN_WEIGHTS, said, OWN)
    else:
        _write(folder, *_peft(model, kept, base, task_type), CONFIG)
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


def _write(folder: Path, tensors: dict[str, Tensor], file: str, said: dict[str, Any], config: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / file, save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"}))
    put(folder / config, (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode())  # last: with it the folder is one


def _unlike_peft(model: nn.Module, kept: Attached) -> str:
    """Why peft cannot hold these adapters; "" if it can."""
    if not kept.method.peft:
        return f"peft has no {type(kept.method).__name__}"
    if own := next((name for name in kept.also if name.rpartition(".")[0] in kept.layers), None):
        return f"{own!r} trains too, a parameter of an adapted layer itself"
    for path, adapter in adapters(model).items():
        if not isinstance(adapter, LowRank):
            return f"what stands at {path!r} is no product of two matrices"
        if model.get_submodule(path) is model:
            return "the model is the adapted layer itself, and peft names layers by their path in a model"
    return ""


def _peft(
    model: nn.Module, kept: Attached, base: str | None, task_type: str | None
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    stabilized = bool(getattr(kept.method, "rank_stabilized", False))
    turned, decomposed, dropout = set[bool](), False, 0.0
    for path, adapter in adapters(model).items():
        assert isinstance(adapter, LowRank)
        layout, (down, up, scale) = adapter.layout, adapter.factors()
        rank = len(down)
        ranks[path], alphas[path] = rank, scale * (math.sqrt(rank) if stabilized else rank)
        parts = ("lora_embedding_A", "lora_embedding_B") if layout.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        if layout.kind == "conv":
            down, up = down.reshape(rank, -1, *layout.kernel), up.reshape(-1, rank, *[1] * len(layout.kernel))
        if layout.kind == "linear":
            turned.add(is_inputs_first(layout.rows))
        for part, tensor in zip(parts, (down, up), strict=True):
            tensors[f"{PREFIX}{path}.{part}"] = tensor.detach()
        magnitude = getattr(adapter, "magnitude", None)
        if isinstance(magnitude, Tensor):
            decomposed = True
            across = magnitude.reshape(1, -1, *[1] * len(layout.kernel)) if layout.kind == "conv" else magnitude
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = across.detach()
        dropout = max(dropout, float(getattr(adapter.dropout, "p", 0.0)))
    whole = _whole_modules(model, kept)
    for path in whole:
        tensors |= {f"{PREFIX}{path}.{name}": t.detach() for name, t in model.get_submodule(path).state_dict().items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = getattr(model, "config", None)
    said = {
        "peft_type": "LORA",
        "task_type": task_type or ("CAUSAL_LM" if "CausalLM" in type(model).__name__ else None),
        "base_model_name_or_path": base or getattr(config, "name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": dropout,
        "target_modules": sorted(ranks),
        "bias": "none",
        "fan_in_fan_out": turned == {True},
        "use_rslora": stabilized,
        "use_dora": decomposed,
        "init_lora_weights": True,
        "rank_pattern": {_exactly(path): r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(path): _plain(a) for path, a in alphas.items() if a != alpha},
        "modules_to_save": whole or None,
    }
    return tensors, PEFT_WEIGHTS, said


def _whole_modules(model: nn.Module, kept: Attached) -> list[str]:
    """The layers whose own parameters train too, which peft saves whole."""
    return sorted({name.rpartition(".")[0] for name in kept.also})


def _exactly(path: str) -> str:
    """A pattern for peft that this path alone matches."""
    return "^" + path.replace(".", r"\.")


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _catalog_name(kept: Attached) -> str:
    from poise import catalog

    return next(m.name for m in catalog.methods("adapt") if m.target is type(kept.method))
