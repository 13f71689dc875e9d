"""A rule of poise is traced once a process, and whatever computes something else is not taken for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.problems import draw, leaves, play, same
from torch import Tensor

from poise.optim import AdamW, Context, Optimizer, Transform, chain
from poise.optim.engine import kernels, tiled
from poise.optim.engine.identity import identity
from poise.optim.transform import State
from poise.optim.transforms.adaptive import adam
from poise.optim.transforms.momentum import momentum


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is said of the kernels of a rule, which is then traced."""
    said: list[Any] = []

    def spied(*facts: Any) -> Any:
        said.append(identity(*facts))
        return said[-1]

    monkeypatch.setattr(tiled, "identity", spied)

    def tell(rule: Transform, dtype: torch.dtype = torch.float32, **options: Any) -> list[Any]:
        said.clear()
        start, grads = draw([(8, 5)], 1, dtype=dtype)
        params = leaves(start)
        play(Optimizer(params, chain(rule), lr=0.1, backend="tiles", **options), params, grads)
        return list(said)

    return tell


def test_a_rule_built_again_is_not_traced_and_trains_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(lr: float) -> list[Tensor]:
        start, grads = draw([(64, 128), (7,)], 3, dtype=torch.bfloat16)
        params = leaves(start)
        return play(AdamW(params, lr=lr, state="int8", backend="tiles"), params, grads)

    before, trace, traced = trained(0.1), kernels.trace, []
    monkeypatch.setattr(kernels, "trace", lambda *facts: traced.append(facts) or trace(*facts))
    assert same(trained(0.1), before)
    assert not same(trained(0.2), before)
    assert traced == []


@pytest.mark.parametrize(
    "other",
    [
        lambda told: told(momentum(0.9, nesterov=True)),
        lambda told: told(momentum(0.9, average=True)),
        lambda told: told(adam()),
        lambda told: told(momentum(0.9), torch.bfloat16),
        lambda told: told(momentum(0.9), torch.bfloat16, weights="nearest"),
        lambda told: told(momentum(0.9), torch.bfloat16, state="bf16"),
        lambda told: told(chain(momentum(0.9), momentum(0.9))),
    ],
    ids=["another setting", "one more setting", "rule", "dtype", "rounding", "state", "longer"],
)
def test_what_computes_something_else_is_something_else(told: Any, other: Any) -> None:
    first = told(momentum(0.9))
    assert first == told(momentum(0.9)) and None not in first
    different = other(told)
    assert different and None not in different and different != first


@pytest.mark.parametrize("pair", [(1, 1.0), (1, True), (0.0, -0.0), ((1,), [1])], ids=str)
def test_values_that_python_calls_equal_are_told_apart(told: Any, pair: Sequence[Any]) -> None:
    found = []
    for value in pair:
        rule = momentum(0.9)
        rule.more = value  # pyright: ignore[reportAttributeAccessIssue]
        found.append(told(rule))
    assert None not in found[0] and found[0] != found[1]


def scale(u: Tensor) -> Tensor:
    return 2 * u


class scaled(Transform):
    """Of no package, as in a notebook: what it calls may be defined anew."""

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return scale(u)


class held(momentum):
    """A rule of poise in a class of another's."""


def test_a_rule_whose_code_is_not_poises_is_traced_each_time(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(told(scaled())) == set(told(held(0.9))) == {None}

    def trained() -> Tensor:
        p = torch.nn.Parameter(torch.zeros(5))
        (end,) = play(Optimizer([p], scaled(), lr=1.0, backend="tiles"), [p], [[torch.ones(5)]])
        return end

    assert torch.equal(trained(), torch.full((5,), -2.0))
    monkeypatch.setitem(globals(), "scale", lambda u: 3 * u)
    assert torch.equal(trained(), torch.full((5,), -3.0))


def test_a_rule_that_was_patched_or_holds_a_tensor_is_traced_each_time(told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = momentum(0.9)
    rule.table = torch.ones(2)  # pyright: ignore[reportAttributeAccessIssue]
    assert set(told(rule)) == {None}
    right = momentum.update
    monkeypatch.setattr(momentum, "update", lambda self, u, state, x, k: 2 * right(self, u, state, x, k))
    assert set(told(momentum(0.9))) == {None}
