"""LoRA adapters of one base, merged into one adapter without the base: no product is formed, and nothing is lost.

    sum_i c_i s_i B_i A_i = B A,    A = [A_1; A_2; ...],    B = [c_1 s_1 B_1, c_2 s_2 B_2, ...]

The rank is the sum of the ranks. This is `linear`, with c_i = w_i / sum w, and `task_arithmetic`, with c_i = lambda w_i. Other
methods look at entries of the products: they take `base+adapter` for each model, and give a whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from poise.checkpoint import CheckpointError
from poise.checkpoint.lora import Delta
from poise.checkpoint.peft_directory import CONFIG, PREFIX, PeftDirectory

from .parents import Parent
from .recipe.choosing import Chosen
from .recipe.settings import depth_of

WEIGHTS = "adapter_model.safetensors"
METHODS = ("linear", "task_arithmetic")


def are_adapters(parents: Sequence[Parent]) -> bool:
    """Whether all models are adapters.

    Raises:
        CheckpointError: some are, and some are not.
    """
    found = [parent for parent in parents if isinstance(parent.checkpoint, PeftDirectory)]
    if found and len(found) < len(parents):
        cure = "fold it into its model, as model+adapter, or merge adapters alone, without a base_model"
        raise CheckpointError("is an adapter, and others are whole models", cure=cure, file=str(found[0]))
    return bool(found)


class Joined:
    """Adapters as one.

    Args:
        chosen: the recipe's method and settings.
        dtype: of the factors; None: the first adapter's.
        notes: what is worth knowing.

    Raises:
        ValueError, CheckpointError: a method that adapters do not have, adapters of different shapes or with DoRA.
    """

    def __init__(self, parents: Sequence[Parent], chosen: Chosen, dtype: torch.dtype | None = None) -> None:
        self.parents, self.chosen, self.recipe, self.dtype = parents, chosen, chosen.recipe, dtype
        self.notes: list[str] = []
        if chosen.method.name not in METHODS:
            problem = (
                f"adapters are merged as adapters by {' and '.join(METHODS)}; for {chosen.method.name} name them model+adapter"
            )
            raise self.recipe.wrong("merge_method", problem)
        if any(source.layers is not None for part in self.recipe.slices for source in part.sources):
            raise self.recipe.wrong("slices", "adapters are merged whole; use models:")
        self.deltas = [self.of(parent) for parent in parents]
        bases = {str(parent.checkpoint.config.get("base_model_name_or_path")) for parent in parents}
        if len(bases) > 1:
            self.notes.append(f"adapters name different bases: {', '.join(sorted(bases))}; they must be one model")
        self.modules = sorted({name for deltas in self.deltas for name in deltas})
        for name in self.modules:
            held = [(parent, deltas[name]) for parent, deltas in zip(parents, self.deltas, strict=True) if name in deltas]
            if len({(delta.shape, delta.transposed) for _, delta in held}) > 1:
                shapes = ", ".join(f"{list(delta.shape)} in {parent}" for parent, delta in held)
                cure = "these are adapters of different models"
                raise CheckpointError(f"changes {shapes}", cure=cure, file=str(held[1][0]), tensor=name)

    @staticmethod
    def of(parent: Parent) -> Mapping[str, Delta]:
        assert isinstance(parent.checkpoint, PeftDirectory)
        found: dict[str, Delta] = {}
        for name, update in parent.checkpoint.deltas().items():
            if not isinstance(update, Delta) or update.magnitude is not None:
                kind = "is stored whole" if not isinstance(update, Delta) else "has a magnitude (DoRA)"
                raise CheckpointError(kind, cure="fold it, as model+adapter", file=str(parent), tensor=name)
            found[name] = update
        return found

    def coefficients(self, name: str) -> list[float]:
        """c_i of every adapter at one weight."""
        sources = self.recipe.slices[0].sources
        counted = [parent for parent in self.parents if parent.layer(name) is not None]
        found = counted[0].layer(name) if counted else None
        depth = depth_of(found[1], found[0].count) if found else 0.0
        settings = self.chosen.at(self.recipe.slices[0], sources, name, [name] * len(sources), depth)
        weights = [float(w) for w in settings.get("weight", (1.0,) * len(sources))]
        linear = self.chosen.method.name == "linear"
        scale = 1.0 if linear else float(settings.get("lambda_", 1.0))
        if settings.get("normalize", linear):
            if abs(sum(weights)) < 1e-12:
                raise ValueError(f"weight={weights}: sum to 0 at {name}, and are to be normalized")
            scale /= sum(weights)
        return [scale * weight for weight in weights]

    def tensors(self) -> dict[str, Tensor]:
        """The factors, under the names that peft reads, in the first adapter's dtype."""
        out: dict[str, Tensor] = {}
        for name in self.modules:
            held = [(c, d[name]) for c, d in zip(self.coefficients(name), self.deltas, strict=True) if name in d]
            first = held[0][1]
            dtype = self.dtype or first.checkpoint.info(first.down).dtype
            down = torch.cat([delta.checkpoint[delta.down].float() for _, delta in held])
            up = torch.cat([c * delta.scale * delta.checkpoint[delta.up].float() for c, delta in held], dim=1)
            out[PREFIX + first.down], out[PREFIX + first.up] = down.to(dtype).contiguous(), up.to(dtype).contiguous()
        return out

    def config(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """`adapter_config.json`: alpha is the rank, so that the scale is 1."""
        ranks = {}
        for name in self.modules:
            first = next(deltas[name] for deltas in self.deltas if name in deltas)
            ranks[name.removesuffix(".weight")] = len(tensors[PREFIX + first.down])
        most = max(set(ranks.values()), key=list(ranks.values()).count)
        pattern = {module: rank for module, rank in sorted(ranks.items()) if rank != most}
        kept = dict(self.parents[0].checkpoint.config)
        targets = [parent.checkpoint.config.get("target_modules") for parent in self.parents]
        if all(isinstance(target, list) for target in targets):
            kept["target_modules"] = sorted({module for target in targets for module in target or ()})
        elif any(target != targets[0] for target in targets):
            kept["target_modules"] = sorted(ranks)
        return {**kept, "r": most, "lora_alpha": most, "rank_pattern": pattern, "alpha_pattern": pattern, "use_rslora": False}

    def write(self, out: Path) -> tuple[int, int, int]:
        """Write a PEFT folder: tensors, entries and bytes of it."""
        import json

        from poise.checkpoint.atomic import put

        tensors = self.tensors()
        out.mkdir(parents=True, exist_ok=True)
        put(out / WEIGHTS, save(tensors, metadata={"format": "pt"}))
        put(out / CONFIG, (json.dumps(self.config(tensors), indent=2, ensure_ascii=False) + "\n").encode())
        return len(tensors), sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())

    def verify(self, out: Path) -> list[str]:
        """What is wrong with what was written: it is read again, and its changes are held to the sums that they stand for."""
        found = PeftDirectory(out).deltas()
        broken = [f"{name}: not written" for name in self.modules if name not in found]
        for name in self.modules[:8] if not broken else ():
            update = found[name]
            stop = min(64, update.shape[0])
            zero = torch.zeros(stop, *update.shape[1:])
            pairs = zip(self.coefficients(name), self.deltas, strict=True)
            summed = torch.stack([c * deltas[name].applied(zero) for c, deltas in pairs if name in deltas])
            got, dtype = update.applied(zero), self.dtype or torch.bfloat16
            if (
                not torch.isfinite(got).all()
                or (got - summed.sum(0)).abs().max() > 8 * torch.finfo(dtype).eps * summed.abs().max()
            ):
                broken.append(f"{name}: is not the sum of the adapters")
        return broken
