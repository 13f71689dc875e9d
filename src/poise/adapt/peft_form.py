"""Low-rank adapters as peft names and stores them; and what peft cannot hold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from poise.checkpoint.peft_directory import PREFIX

from .adapter import Adapted, Adapter, LowRank
from .attaching import Attached
from .targets import is_inputs_first

PEFT_WEIGHTS = "adapter_model.safetensors"


def unlike_peft(model: nn.Module, kept: Attached, found: dict[str, Adapter]) -> str:
    """Why peft cannot hold these adapters; "" if it can."""
    holders = {name: model.get_submodule(name.rpartition(".")[0]) for name in kept.also}
    if own := next((name for name, holder in holders.items() if next(holder.children(), None) is not None), None):
        return f"{own!r} trains too, and peft would save all that stands in its module with it"
    if twice := _standing_twice(model):
        return f"{twice!r} stands at several places in the model, of which peft adapts one"
    seen: dict[int, str] = {}
    for path, adapter in found.items():
        if not isinstance(adapter, LowRank):
            return f"what stands at {path!r} is no product of two matrices"
        layer: Any = model.get_submodule(path)
        other = seen.setdefault(id(adapter), path)
        if model.get_submodule(other).weight is not layer.weight:
            return f"{other!r} and {path!r} share one pair of matrices, and peft has a pair for each"
        if layer is model:
            return "the model is the adapted layer itself, and peft names layers by their path in a model"
        if adapter.layout.kind == "conv" and (layer.padding_mode != "zeros" or set(layer.dilation) != {1}):
            return f"{path!r} has a padding_mode or dilation, which peft's convolutions beside it would not have"
    return ""


def peft_form(
    model: nn.Module, kept: Attached, found: dict[str, Adapter], base: str | None, task_type: str | None
) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    stabilized = bool(getattr(kept.method, "rank_stabilized", False))
    turned, decomposed, dropout = set[bool](), False, 0.0
    for path, adapter in found.items():
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
            tensors[f"{PREFIX}{path}.{part}"] = tensor.detach().clone()  # tied layers have one, a file has none twice
        magnitude = getattr(adapter, "magnitude", None)
        if isinstance(magnitude, Tensor):
            decomposed = True
            across = magnitude.reshape(1, -1, *[1] * len(layout.kernel)) if layout.kind == "conv" else magnitude
            tensors[f"{PREFIX}{path}.lora_magnitude_vector"] = across.detach().clone()
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
        "target_modules": _targets(model, ranks),
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


def _targets(model: nn.Module, paths: Collection[str]) -> list[str] | str:
    """For peft, which takes each of a list for the end of a path too, and a string for an expression."""
    ends = tuple(f".{path}" for path in paths)
    if any(path.endswith(ends) and path not in paths for path, _ in model.named_modules()):
        return "|".join(re.escape(path) for path in sorted(paths))
    return sorted(paths)


def _whole_modules(model: nn.Module, kept: Attached) -> list[str]:
    """The layers whose own parameters train too, which peft saves whole."""
    return sorted({name.rpartition(".")[0] for name in kept.also})


def _exactly(path: str) -> str:
    """A pattern for peft that this path alone matches."""
    return "^" + path.replace(".", r"\.")


def _plain(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha


def _standing_twice(model: nn.Module) -> str | None:
    """The name of an adapted layer that stands at two places, be it in one module."""
    seen: set[int] = set()
    for parent in model.modules():
        for name, layer in parent._modules.items():
            if isinstance(layer, Adapted):
                if id(layer) in seen:
                    return name
                seen.add(id(layer))
    return None
