"""The type stubs of lazily looked-up names say what the lookup finds at run time."""

from __future__ import annotations

import ast
import importlib
import os
from collections.abc import Mapping
from pathlib import Path

import lazy_stubs
import pytest

SRC = Path(__file__).resolve().parent.parent / "src"
ROOMS = ("rules", "transforms")


def package(root: Path, files: Mapping[str, str]) -> Path:
    """A package `house` of these files below `root`."""
    for name, text in files.items():
        path = root / "house" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "house"


def exported(text: str) -> dict[str, str]:
    """Name -> module, read from a stub as a type checker reads it: only `import x as x` is a re-export."""
    return {
        alias.asname: f"{'.' * node.level}{node.module}"
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is not None
    }


def test_a_rule_in_a_new_file_is_re_exported(tmp_path: Path) -> None:
    house = package(
        tmp_path, {"__init__.py": "", "rules/lion.py": "class Lion: ...\n", "transforms/sign.py": "def sign(): ...\n"}
    )
    assert exported(lazy_stubs.stub(house, "house", ROOMS)) == {"Lion": ".rules.lion", "sign": ".transforms.sign"}


def test_private_names_and_private_files_stay_private(tmp_path: Path) -> None:
    rules = {
        "rules/lion.py": "class Lion: ...\ndef _helper(): ...\nclass _Base: ...\n",
        "rules/_shared.py": "def shared(): ...\n",
    }
    house = package(tmp_path, {"__init__.py": "", **rules})
    assert exported(lazy_stubs.stub(house, "house", ROOMS)) == {"Lion": ".rules.lion"}


def test_what_a_rule_file_only_imports_is_not_its_own(tmp_path: Path) -> None:
    house = package(tmp_path, {"__init__.py": "", "rules/muon.py": "from torch.optim import Optimizer\nclass Muon: ...\n"})
    assert exported(lazy_stubs.stub(house, "house", ROOMS)) == {"Muon": ".rules.muon"}


def test_the_file_that_says_the_name_comes_before_all_others(tmp_path: Path) -> None:
    both = "def sign(): ...\nclass AdaFactor: ...\n"
    house = package(tmp_path, {"__init__.py": "", "rules/a.py": both, "rules/ada_factor.py": both, "transforms/sign.py": both})
    assert exported(lazy_stubs.stub(house, "house", ROOMS)) == {"sign": ".transforms.sign", "AdaFactor": ".rules.ada_factor"}


def test_names_the_package_imports_itself_are_kept_if_it_lists_them(tmp_path: Path) -> None:
    init = (
        "from __future__ import annotations\nfrom typing import Any\nfrom .transform import Slot, chain as chain_\n"
        "from elsewhere import resolve\n__all__ = ['Slot', 'chain_']\ndef __getattr__(name: str) -> Any: ...\n"
    )
    text = lazy_stubs.stub(package(tmp_path, {"__init__.py": init, "rules/lion.py": "class Lion: ...\n"}), "house", ROOMS)
    assert exported(text) == {"Slot": ".transform", "chain_": ".transform", "Lion": ".rules.lion"}
    assert "from .transform import chain as chain_" in text
    assert "__getattr__" not in text, "with it, every misspelt name would pass as Any"


def test_without_a_list_only_the_packages_own_imports_are_kept(tmp_path: Path) -> None:
    init = (
        "from typing import Any\nfrom .transform import Slot\nfrom house.optimizer import Optimizer\nfrom houses import other\n"
    )
    found = exported(lazy_stubs.stub(package(tmp_path, {"__init__.py": init}), "house", ROOMS))
    assert found == {"Slot": ".transform", "Optimizer": "house.optimizer"}


def test_imports_for_type_checkers_count(tmp_path: Path) -> None:
    init = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .transform import Slot\n"
    assert exported(lazy_stubs.stub(package(tmp_path, {"__init__.py": init}), "house", ROOMS)) == {"Slot": ".transform"}


def test_a_listed_name_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    house = package(tmp_path, {"__init__.py": "__all__ = ['Lion', 'Tiger']\n", "rules/lion.py": "class Lion: ...\n"})
    with pytest.raises(ValueError, match=r"__all__ lists Tiger, which it neither imports nor finds in rules, transforms"):
        lazy_stubs.stub(house, "house", ROOMS)


def test_what_is_up_to_date_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = package(tmp_path, {"__init__.py": "", "rules/lion.py": "class Lion: ...\n"})
    monkeypatch.setattr(lazy_stubs, "LAZY", {"house": ROOMS})
    path = house / "__init__.pyi"
    assert lazy_stubs.write(tmp_path) == [path]
    os.utime(path, (0, 0))
    assert lazy_stubs.write(tmp_path) == [path]
    assert path.stat().st_mtime == 0
    (house / "rules" / "lion.py").write_text("class Lioness: ...\n")
    lazy_stubs.write(tmp_path)
    assert exported(path.read_text()) == {"Lioness": ".rules.lion"}


@pytest.mark.parametrize("name", sorted(lazy_stubs.LAZY))
def test_every_name_of_a_stub_is_what_the_package_returns_for_it(name: str) -> None:
    found = exported(lazy_stubs.stub(SRC.joinpath(*name.split(".")), name, lazy_stubs.LAZY[name]))
    package = importlib.import_module(name)
    assert found
    for exported_name, module in found.items():
        there = importlib.import_module(module, name)
        assert getattr(package, exported_name) is getattr(there, exported_name), exported_name
