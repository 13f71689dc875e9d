"""Where references come from: packages of this environment, and files of the authors' repositories in a folder of checkouts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import math
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
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
    "peft": "peft",
}

OPTIMIZER: Any = importlib.import_module("torch.optim.optimizer")
GONE = ((OPTIMIZER, "_dispatch_sqrt", math.sqrt),)  # what older releases of torch had


@dataclass(frozen=True)
class Repository:
    """A checkout `owner+name` of one commit.

    Attributes:
        file: the module that is imported.
        folder: where its imports begin, if it is part of a package and not in this folder itself; "." for the repository's.
        blobs: by path, the hash that git gives to each file which matters, so that a checkout of another commit is noticed.
        stubs: modules that are imported there and not needed for what is compared.
        needs: packages that it does need.
    """

    commit: str
    file: str
    blobs: dict[str, str]
    folder: str | None = None
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
    start = file.parent if repository.folder is None else (root / repository.folder).resolve()
    with _beside(start, repository.stubs):
        module = _file(file) if repository.folder is None else _inside(file.resolve(), start)
        yield module, repository.commit[:7] if same else "of another commit"


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


def _inside(path: Path, start: Path) -> Any:
    """A module of a package, by its name from `start` on."""
    return importlib.import_module(".".join(path.relative_to(start).with_suffix("").parts))


@contextmanager
def _beside(folder: Path, stubs: Sequence[str]) -> Iterator[None]:
    """Files of a folder import each other by name, and nothing of it stays; what they compile for a GPU runs as it is."""
    importlib.import_module("torch._dynamo")  # comes with the first optimizer of torch, and should not see the stubs
    known = {name: sys.modules.get(name) for name in stubs}
    sys.path.insert(0, str(folder))
    try:
        sys.modules.update(dict.fromkeys(stubs, cast("types.ModuleType", Nothing)))
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(torch, "compile", _uncompiled))
            patches.enter_context(redirect_stdout(io.StringIO()))  # some report on every step
            for owner, name, value in GONE:
                patches.enter_context(mock.patch.object(owner, name, value, create=True))
            yield
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if name in stubs or _comes_from(folder, name, module):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in known.items() if module is not None})


def _comes_from(folder: Path, name: str, module: Any) -> bool:
    file = getattr(module, "__file__", None)
    if file is None:  # a folder that is a package without saying so
        return (folder / name.replace(".", "/")).is_dir()
    return str(file).startswith(f"{folder}/")


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
