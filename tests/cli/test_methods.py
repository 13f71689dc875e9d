"""`poise methods`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable

import pytest

from poise import catalog

KEYS = ["name", "family", "kind", "paper", "arxiv", "year", "summary", "import_path"]


def test_json_lists_every_method_with_where_it_comes_from_and_where_it_is(poise: Callable) -> None:
    ended = poise("methods", "--json", "--family", "optim")
    found = json.loads(ended.out)
    assert ended.code == 0 and ended.err == ""
    assert {entry["name"] for entry in found} >= {"adamw", "lion", "muon", "toy-sgd"}
    for entry in found:
        assert list(entry) == KEYS
        assert entry["family"] == "optim" and entry["paper"] and entry["summary"]
        module, _, name = entry["import_path"].rpartition(".")
        assert getattr(importlib.import_module(module), name) is catalog.get(entry["name"]).target


def test_the_table_names_every_method(poise: Callable) -> None:
    ended = poise("methods")
    assert ended.code == 0
    assert all(f"│ {method.name} " in ended.out for method in catalog.methods())


def test_an_unknown_family_is_bad_input(poise: Callable) -> None:
    ended = poise("methods", "--family", "optimm")
    assert ended.code == 2 and ended.out == ""
    assert "unknown family 'optimm'; known: optim" in ended.err


@pytest.mark.parametrize("arguments", [["nonsense"], ["methods", "--nonsense"], ["compare", "--trials", "0"]])
def test_wrong_usage_ends_with_two(poise: Callable, arguments: list[str]) -> None:
    assert poise(*arguments).code == 2


def test_the_version_is_the_packages(poise: Callable) -> None:
    import poise as package

    assert poise("--version").out.strip() == package.__version__
