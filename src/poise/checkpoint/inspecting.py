"""A whole checkpoint looked through: every tensor described and measured, what stands out said first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from .checkpoint import Checkpoint, TensorInfo
from .findings import Finding, findings
from .spectra import Spectrum, spectrum, stacked
from .statistics import Statistics, statistics
from .structure import Described, Structure, describe

SCHEMA = 1


@dataclass(frozen=True)
class Tensor:
    """One tensor, inspected."""

    name: str
    info: TensorInfo
    described: Described
    statistics: Statistics
    spectrum: Spectrum | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: numbers that are nan or infinite are null."""
        found, seen, spectral = self.described, self.statistics, self.spectrum
        return {
            "name": self.name,
            "shape": list(self.info.shape),
            "dtype": str(self.info.dtype).removeprefix("torch."),
            "parameters": self.info.numel,
            "bytes": self.info.nbytes,
            "file": None if self.info.file is None else self.info.file.name,
            "role": found.role,
            "of": found.of,
            "layer": found.layer,
            "stack": found.stack,
            "expert": found.expert,
            "experts": found.experts,
            "inputs_first": found.inputs_first,
            "vocabulary_dim": found.vocabulary,
            "parts": [
                {"role": part.role, "size": part.size, "ranges": [[r.start, r.stop, r.step] for r in part.ranges]}
                for part in found.parts
            ],
            "statistics": {key: finite(value) for key, value in asdict(seen).items()},
            "spectrum": None if spectral is None else {key: finite(value) for key, value in asdict(spectral).items()},
        }


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, inspected.

    Attributes:
        tensors: in the checkpoint's order; those that were asked for.
        structure: of the whole checkpoint.
        findings: what stands out, the worst first.
        parameters, nbytes: of the whole checkpoint.
    """

    path: str | None
    tensors: list[Tensor]
    structure: Structure
    findings: list[Finding]
    parameters: int
    nbytes: int

    def by(self, key: Callable[[Tensor], str]) -> dict[str, tuple[int, int, int]]:
        """Key -> (tensors, parameters, bytes), the largest first."""
        sums: dict[str, tuple[int, int, int]] = {}
        for tensor in self.tensors:
            count, parameters, nbytes = sums.get(key(tensor), (0, 0, 0))
            sums[key(tensor)] = (count + 1, parameters + tensor.info.numel, nbytes + tensor.info.nbytes)
        return dict(sorted(sums.items(), key=lambda item: -item[1][2]))

    @property
    def dtypes(self) -> dict[str, tuple[int, int, int]]:
        return self.by(lambda tensor: str(tensor.info.dtype).removeprefix("torch."))

    @property
    def roles(self) -> dict[str, tuple[int, int, int]]:
        return self.by(lambda tensor: tensor.described.role)

    def as_dict(self) -> dict[str, Any]:
        """What `poise inspect --json` prints, see `docs/inspect.md`."""
        fields = ("tensors", "parameters", "bytes")
        return {
            "schema_version": SCHEMA,
            "path": self.path,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "by_dtype": {key: dict(zip(fields, sums, strict=True)) for key, sums in self.dtypes.items()},
            "by_role": {key: dict(zip(fields, sums, strict=True)) for key, sums in self.roles.items()},
            "layers": dict(self.structure.stacks),
            "vocabulary": self.structure.vocabulary,
            "width": self.structure.width,
            "ties": dict(self.structure.ties),
            "head_is": self.structure.tied.embedding if self.structure.tied.shared else self.structure.tied.head,
            "findings": [asdict(finding) for finding in self.findings],
            "tensors": [tensor.as_dict() for tensor in self.tensors],
        }


def inspect(
    checkpoint: Checkpoint,
    *,
    match: str | None = None,
    spectra: bool = False,
    advance: Callable[[str], None] = lambda name: None,
) -> Inspection:
    """Look through a checkpoint, a tensor at a time; memory is bounded by the largest of them only where `spectra` are asked.

    Args:
        match: a glob; tensors of other names are neither read nor listed.
        spectra: singular values of every matrix, convolution and stack of experts. `spectra.method_for` says what that costs.
        advance: told each tensor's name before it is read.

    Raises:
        ValueError: if no name matches.
    """
    names = matching(checkpoint, match)
    structure = describe(checkpoint)
    found = []
    for name in names:
        advance(name)
        info, what = checkpoint.info(name), structure[name]
        spectral = values(checkpoint, name, what) if spectra and has_spectrum(info, what) else None
        found.append(Tensor(name, info, what, statistics(checkpoint, name), spectral))
    said = findings(checkpoint, structure, {tensor.name: tensor for tensor in found})
    where = None if checkpoint.path is None else str(checkpoint.path)
    return Inspection(where, found, structure, said, checkpoint.parameters, checkpoint.nbytes)


def matching(checkpoint: Checkpoint, match: str | None) -> list[str]:
    """The names that a glob matches; all without one.

    Raises:
        ValueError: if there is none.
    """
    names = [name for name in checkpoint if match is None or fnmatchcase(name, match)]
    if match is not None and not names:
        first = next(iter(checkpoint), None)
        raise ValueError(f"match {match!r}: none of the {len(checkpoint)} names is like that; the first is {first!r}")
    return names


def has_spectrum(info: TensorInfo, what: Described) -> bool:
    wide = sum(size > 1 for size in info.shape)
    return wide > 1 and info.dtype.is_floating_point and what.role not in ("norm", "bias", "vector", "buffer")


def values(checkpoint: Checkpoint, name: str, what: Described) -> Spectrum | None:
    whole: torch.Tensor = checkpoint[name]
    return stacked(whole) if what.experts is not None else spectrum(whole)


def finite(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
