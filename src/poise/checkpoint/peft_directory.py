"""A PEFT directory: an adapter, as it is stored, and as the updates of the base's weights that it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .checkpoint import Checkpoint, TensorInfo
from .directory import find_side_files
from .errors import CheckpointError
from .files import AGAIN, missing, read_json
from .lora import PARTS, Delta, Full, Update
from .pickled import PickledFile
from .safetensors_file import SafetensorsFile

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
MAX_NAME, MAX_REPEATS = 500, 2
_REPEAT, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)\s*[*+{?]")
UNSUPPORTED = ("layer_replication", "target_parameters", "trainable_token_indices", "lora_bias", "use_qalora", "arrow_config")
FILES = ("adapter_model.safetensors", "adapter_model.bin")


class PeftDirectory(Checkpoint):
    """An adapter that peft saved. Names are those of the file without `base_model.model.`; `config` is `adapter_config.json`.

    `model.layers.0.self_attn.q_proj.lora_A.weight` and its `lora_B` are one update of `model.layers.0.self_attn.q_proj.weight`;
    `deltas()` gives those.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self._path = Path(path)
        self.config: Mapping[str, Any] = read_json(self._path / CONFIG)
        found = next((self._path / name for name in FILES if (self._path / name).exists()), None)
        if found is None:
            raise missing(self._path / FILES[0])
        self._weights = SafetensorsFile(found) if found.suffix == ".safetensors" else PickledFile(found)
        self._stored = {name.removeprefix(PREFIX): name for name in self._weights}
        if len(self._stored) < len(self._weights):
            raise CheckpointError(f"has a tensor with {PREFIX!r} and without", cure=f"write it again, or {AGAIN}", file=found)
        self.metadata = self._weights.metadata
        self.side_files = find_side_files(self._path, CONFIG)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def info(self, name: str) -> TensorInfo:
        return self._weights.info(self._stored[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._weights.rows(self._stored[name], start, stop)

    def fingerprint(self) -> str:
        return self._weights.fingerprint()

    def deltas(self) -> dict[str, Update]:
        """By name of the base's weight, what becomes of it: a `Delta` for LoRA and DoRA, a `Full` for modules saved whole.

        Nothing is read until rows are asked for, but for shapes, which are checked against the ranks that the config names.

        Raises:
            CheckpointError: for a method other than LoRA, half a pair, or a rank that the config does not name.
        """
        self._check_config()
        pairs: dict[str, dict[str, str]] = {}
        updates: dict[str, Update] = {}
        for name in self:
            found = PARTS.fullmatch(name)
            if found:
                pairs.setdefault(found["module"], {})[found["part"]] = name
            elif "lora_" in name or "token_adapter" in name:
                raise self._bad("is of a kind of LoRA that cannot be folded", "fold it with peft's merge_and_unload", name)
            else:
                # modules_to_save, biases, and an embedding that was saved because its size changed.
                updates[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = Full(self, name)
        for module, parts in pairs.items():
            base = module.removesuffix(".base_layer")
            updates[f"{base}.weight"] = self._delta(base, parts)
        return updates

    def _check_config(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise self._bad(f"has peft_type {kind!r}, and only LORA is a sum of weights here", "fold it with peft")
        for key in UNSUPPORTED:
            if self.config.get(key):
                raise self._bad(f"uses {key!r}, which is not supported", "fold it with peft's merge_and_unload")

    def _delta(self, module: str, parts: Mapping[str, str]) -> Delta:
        embedding = any(part.startswith("lora_embedding") for part in parts)
        down, up = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
        for part in (down, up):
            if part not in parts:
                raise self._bad(f"has no {part}, only {', '.join(sorted(parts))}", AGAIN, module)
        rank = self._pattern("rank_pattern", module, "r")
        alpha = self._pattern("alpha_pattern", module, "lora_alpha")
        if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
            raise self._bad(f"has rank {rank!r} and alpha {alpha!r}, which are no numbers", "mend the config", module)
        shapes = self.info(parts[down]).shape, self.info(parts[up]).shape
        fits = all(len(shape) >= 2 for shape in shapes) and shapes[0][0] == rank == shapes[1][1]
        if not fits:
            problem = f"has {down} {list(shapes[0])} and {up} {list(shapes[1])}, and the config's rank is {rank}"
            raise self._bad(problem, "config and weights are not of one adapter: get both again", module)
        scale = alpha / (rank**0.5 if self.config.get("use_rslora") else rank)
        return Delta(
            checkpoint=self,
            down=parts[down],
            up=parts[up],
            magnitude=parts.get("lora_magnitude_vector"),
            scale=scale,
            transposed=embedding or bool(self.config.get("fan_in_fan_out")),
        )

    def _pattern(self, key: str, module: str, default: str) -> Any:
        """The value of the first pattern that the end of a module's name matches, as in peft."""
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise self._bad(f"has a {key!r} that is not a JSON object", "mend the config")
        for pattern, value in patterns.items():
            # The pattern is a stranger's, and one with repeats of repeats can be made to match for ever.
            if len(module) > MAX_NAME or _REPEATED_GROUP.search(pattern) or len(_REPEAT.findall(pattern)) > MAX_REPEATS:
                problem = f"has a {key!r} that may take for ever to match, {pattern!r:.200}"
                raise self._bad(problem, "write the modules out, one by one")
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise self._bad(f"has a {key!r} that is no pattern, {pattern!r} ({error})", "mend the config") from None
        return self.config.get(default)

    def _bad(self, problem: str, cure: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(problem, cure=cure, file=None if self._path is None else self._path / CONFIG, tensor=tensor)
