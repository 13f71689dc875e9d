"""Where references come from: packages of this environment, and files of the authors' repositories in a folder of checkouts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch

PACKAGES = {
    "torch": "torch",
    "timm": "timm",
    "pytorch_optimizer": "pytorch-optimizer",
    "heavyball": "heavyball",
    "optax": "optax",
}


@dataclass(frozen=True)
class Repository:
    """A checkout `owner+name` of one commit.

    Attributes:
        file: the module that is imported.
        blobs: by path, the hash that git gives to each file which matters, so that a checkout of another commit is noticed.
        stubs: modules that are imported there and not needed for what is compared.
        needs: packages that it does need.
    """

    commit: str
    file: str
    blobs: dict[str, str]
    stubs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


class Missing(Exception):
    """A reference that is not there."""


@contextmanager
def reference(source: str, official: Path | None) -> Iterator[tuple[Any, str]]:
    """A reference's module and its version, or `Missing`; while it lasts, a repository's files find each other."""
    if source in PACKAGES:
        yield _package(source)
        return
    from .repositories import REPOSITORIES

    repository = REPOSITORIES[source]
    if official is None:
        raise Missing("give a folder of checkouts with --official")
    file = official / source.replace("/", "+") / repository.file
    if not file.is_file():
        raise Missing(f"no checkout of {source} in the folder of --official")
    for package in repository.needs:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"needs {package}, which is not installed")
    root = official / source.replace("/", "+")
    same = all(_blob(root / path) == blob for path, blob in repository.blobs.items())
    with _beside(file.parent, repository.stubs):
        yield _file(file), repository.commit[:7] if same else "of another commit"


def _package(source: str) -> tuple[Any, str]:
    try:
        if source == "timm":
            from rows import bare

            for package in ("timm", "timm.optim"):
                bare(package)
            module: Any = types.SimpleNamespace(
                **{name: importlib.import_module(f"timm.optim.{name}") for name in ("adamw", "lion", "muon", "sgdw")}
            )
        else:
            module = importlib.import_module(source)
    except ImportError as error:
        raise Missing(f"{PACKAGES[source]} is not installed ({error})") from error
    return module, importlib.metadata.version(PACKAGES[source])


def _blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _beside(folder: Path, stubs: Sequence[str]) -> Iterator[None]:
    """Files of a folder import each other by name, and nothing of it stays; what they compile for a GPU runs as it is."""
    known = {name: sys.modules.get(name) for name in stubs}
    sys.path.insert(0, str(folder))
    try:
        sys.modules.update(dict.fromkeys(stubs, cast("types.ModuleType", Nothing)))
        with mock.patch.object(torch, "compile", _uncompiled):
            yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if name in stubs or str(getattr(module, "__file__", "")).startswith(str(folder)):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in known.items() if module is not None})


def _uncompiled(model: Any = None, **_: Any) -> Any:
    return model if model is not None else lambda function: function


class _Any(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing

    def __getitem__(cls, key: Any) -> Any:
        return cls


class Nothing(metaclass=_Any):
    """Stands for a module that is imported and not needed, and for all in it: base classes, decorators, type hints."""

    def __new__(cls, *args: Any, **_: Any) -> Any:
        if cls is Nothing:
            return args[0] if args and callable(args[0]) else Nothing
        return super().__new__(cls)
