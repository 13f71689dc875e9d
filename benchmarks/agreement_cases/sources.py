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
from typing import Any

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


def load(source: str, official: Path | None) -> tuple[Any, str]:
    """A reference's module and its version, or `Missing`."""
    if source in PACKAGES:
        return _package(source)
    from .repositories import REPOSITORIES

    repository = REPOSITORIES[source]
    if official is None:
        raise Missing("give a folder of checkouts with --official")
    folder = official / source.replace("/", "+")
    if not (folder / repository.file).is_file():
        raise Missing(f"no checkout of {source} in the folder of --official")
    for package in repository.needs:
        if importlib.util.find_spec(package) is None:
            raise Missing(f"needs {package}, which is not installed")
    same = all(_blob(folder / path) == blob for path, blob in repository.blobs.items())
    return _file(folder / repository.file, repository.stubs), repository.commit[:7] if same else "of another commit"


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


def _file(path: Path, stubs: Sequence[str]) -> Any:
    """Import a file whose siblings it may import by name; nothing of it stays in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(f"official_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _beside(path.parent, stubs):
        spec.loader.exec_module(module)
        for name in ("qdwh", "newton_schulz", "zolopd"):  # imported later, inside functions
            if (path.parent / f"{name}.py").is_file():
                importlib.import_module(name)
        module.siblings = {  # pyright: ignore[reportAttributeAccessIssue]
            name: found
            for name, found in sys.modules.items()
            if str(getattr(found, "__file__", "")).startswith(str(path.parent))
        }
    return module


@contextmanager
def _beside(folder: Path, stubs: Sequence[str]) -> Iterator[None]:
    known = dict(sys.modules)
    sys.path.insert(0, str(folder))
    compiled = torch.compile
    torch.compile = _uncompiled  # they compile for a GPU
    try:
        for name in stubs:
            sys.modules[name] = _Stub(name)
        yield
    finally:
        torch.compile = compiled
        sys.path.remove(str(folder))
        for name in set(sys.modules) - set(known):
            origin = str(getattr(sys.modules[name], "__file__", ""))
            if name in stubs or origin.startswith(str(folder)):
                del sys.modules[name]
        sys.modules.update({name: known[name] for name in stubs if name in known})


def _uncompiled(model: Any = None, **_: Any) -> Any:
    return model if model is not None else lambda function: function


class _Stub(types.ModuleType):
    """A module that has every name; what is asked of it does nothing, and serves as a decorator and a base class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(
            name, (), {"register_module": staticmethod(lambda *_, **__: lambda cls: cls), "__class_getitem__": _anything}
        )


@classmethod
def _anything(cls: type, _: Any) -> type:
    return cls
