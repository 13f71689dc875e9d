"""What a user may write behind --methods."""

from __future__ import annotations

import pickle

import pytest
from torch import nn

from poise import catalog
from poise.compare import sampler
from poise.compare.entries import Entry, parse, setting


def test_an_entry_may_have_a_name_and_fixed_settings() -> None:
    found = parse("adamw, again=adamw, quick = lion(lr=1e-3, state=int8),muon(betas=(0.9, 0.99))")
    assert list(found) == ["adamw", "again", "quick", "muon"]
    assert found["again"] == Entry(catalog.get("adamw"), {})
    assert found["quick"] == Entry(catalog.get("lion"), {"lr": 1e-3, "state": "int8"})
    assert found["muon"].fixed == {"betas": (0.9, 0.99)}


def test_what_is_fixed_leaves_the_space() -> None:
    assert set(parse("adamw")["adamw"].space) - set(parse("adamw(lr=1)")["adamw"].space) == {"lr"}


def test_a_driver_stands_around_adamw_or_what_it_is_told_and_is_tuned_with_it() -> None:
    found = parse("ema,sharp=sam(around=muon,rho=0.1)")
    assert set(found["ema"].space) == {"p", *catalog.get("adamw").tune}
    assert set(found["sharp"].space) == set(catalog.get("muon").tune)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    sharp = found["sharp"].build(model, lr=0.5)
    assert type(sharp).__name__ == "SAM"
    assert type(sharp.inner).__name__ == "Muon"  # pyright: ignore[reportAttributeAccessIssue]
    assert (sharp.param_groups[0]["lr"], sharp.param_groups[0]["rho"]) == (0.5, 0.1)
    average = found["ema"].build(model, p=0.2)
    assert len(average.own["buffers"]) == 2  # pyright: ignore[reportAttributeAccessIssue]
    assert sampler.draw(found["ema"], 0, 0)["lr"] == 1e-3, "the first trial is the default of both"


def test_entries_of_drivers_can_be_sent_to_workers() -> None:
    entry = pickle.loads(pickle.dumps(parse("sam(around=lion)")["sam"]))
    assert type(entry.build(nn.Linear(2, 2), rho=0.3)).__name__ == "SAM"


@pytest.mark.parametrize(
    "text, message",
    [
        ("dnsam", "needs full"),
        ("sam(around=sam)", "is a driver"),
        ("altlora", r"lora\(around=altlora\)"),
        ("sam(around=altlora)", r"lora\(around=altlora\)"),
        ("sam(around=adamx)", "did you mean"),
        ("adamw(lr=1", "closing parenthesis"),
        ("adamw(lr=1)x", "closing parenthesis"),
        ("adamw(lr)", "NAME=VALUE"),
        ("adamw(=1)", "NAME=VALUE"),
        ("adamw,adamw", "stands twice"),
        ("a b=adamw", "is no name"),
        ("adamw,", "is no name"),
        ("adamx", "did you mean"),
    ],
)
def test_bad_entries_are_named(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("a=1", 1),
        ("a=1e-3", 1e-3),
        ("a=int8", "int8"),
        ("a=None", None),
        ("a=(1, 2)", (1, 2)),
        ("a=True", True),
        ("a=x=y", "x=y"),
    ],
)
def test_values_are_pythons_literals_or_strings(text: str, value: object) -> None:
    assert setting(text) == ("a", value)
