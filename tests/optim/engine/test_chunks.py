"""Rules without a compiler: pieces of tensors, in buffers; the same mathematics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play, same
from optim.toys import apply, heavy
from torch import Tensor

from poise.optim import Optimizer, chain
from poise.optim.engine import chunks
from poise.optim.engine.flat import Flat
from poise.optim.rules.lion import lion
from poise.optim.transforms.adaptive import adam
from poise.optim.transforms.clipping import clip
from poise.optim.transforms.momentum import momentum
from poise.optim.transforms.sign import sign

Math = Callable[[Tensor, Any, Tensor, Any], Tensor]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PIECE", 64)
    monkeypatch.setattr(chunks, "_local", threading.local())


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[chunks.Pieces]:
    """What is made of each program."""
    made: list[chunks.Pieces] = []
    original = chunks.Pieces.__init__

    def noted(self: chunks.Pieces, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(chunks.Pieces, "__init__", noted)
    return made


def run(rule: Any, backend: Any, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    start, grads = draw([(9, 70), (33,), (), (0,), (64,)], 4, dtype=dtype, missing=[(1, 0)])
    params = leaves(start)
    opt = Optimizer(params, rule, lr=0.05, weight_decay=0.1, backend=backend, **options)
    weights = play(opt, params, grads)
    return weights + [value for p in params for value in opt.state[p].values()]


def _two_halves(u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
    old = state["a"]
    state["a"] = 0.5 * old + u
    state["b"] = old + state["b"] * x
    return state["a"] - state["b"]


def _late_reader(u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
    """The new value is known long before the old one is read for the last time."""
    old = state["a"]
    state["a"] = u * 2
    t = (x + u).abs().sqrt()
    return t * old + state["a"] / (t + 1)


def _one_value_twice(u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
    state["a"] = state["b"] = u + x
    return state["a"]


def _scalars_first(u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
    state["a"] = k.gain - u
    return 2 / (1 + u * u) + k.gain * (3 + x) - k.gain / (2 + u * u) + (k.gain * k.gain + k.gain.sqrt() - 0.5) * u


def _extremes(u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
    state["a"] = torch.maximum(state["a"], u.abs())
    u = torch.minimum(torch.maximum(u, k.gain * -0.5), k.gain * 0.5)
    return torch.minimum(torch.maximum(u, x), state["a"]) + torch.exp(-u * u) - torch.sign(u).neg()


def _many_temporaries(u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
    parts = [u * float(i) + x for i in range(8)]
    total = parts[0]
    for part in reversed(parts):
        total = total * 0.5 + part / (1 + part * part)
    state["b"] = total - parts[3]
    return total + parts[7] * state["b"]


def _sums_of_products(u: Tensor, state: Any, x: Tensor, k: Any) -> Tensor:
    """Every form that a sum can take in, and products that it must not: used twice, or kept."""
    a, b = state["a"], state["b"]
    kept = a * 0.5
    state["a"] = kept
    state["b"] = b * k.gain + u * u * 0.25
    twice = u * x
    total = (a * 0.3 - twice) + twice * 0.1
    total = total - u * x * k.gain + (u * 0.5) / (1 + a * a) * 3.0 - x * 0.1
    total = k.gain * (0.1 * (kept + total)) - u / (2 + b * b)
    return (u * 0.5) / (1 + a * a) * k.gain - x * 0.1 + total - kept


KNOWN: dict[str, Math] = {
    "sums of products": _sums_of_products,
    "two slots from one old value": _two_halves,
    "an old value read late": _late_reader,
    "one value in two slots": _one_value_twice,
    "scalars before tensors": _scalars_first,
    "extremes": _extremes,
    "many temporaries": _many_temporaries,
    "the weights alone": lambda u, state, x, k: x * x,
    "nothing but the gradient": lambda u, state, x, k: u,
}
UNKNOWN: dict[str, Math] = {
    "a choice": lambda u, state, x, k: torch.where(u > 0, u, 0.5 * u),
    "a power": lambda u, state, x, k: u**3,
    "noise": lambda u, state, x, k: u + k.uniform(),
    "a constant": lambda u, state, x, k: u + torch.ones_like(u),
    "the weights remembered": _one_value_twice,
}


@pytest.mark.parametrize("math", KNOWN)
def test_what_torch_can_write_into_buffers_is_run_in_pieces_and_equal(math: str, pieces: list[chunks.Pieces]) -> None:
    rule = apply(KNOWN[math], {"a": 0.5, "b": 0.25}, defaults={"gain": 1.5})
    found = run(chain(heavy(), rule), "chunks")
    assert pieces and all(p.run is not None for p in pieces)
    assert distance(found, run(chain(heavy(), rule), "eager")) < 1e-12


@pytest.mark.parametrize("math", UNKNOWN)
def test_what_it_cannot_is_run_whole_and_equal(math: str) -> None:
    rule = apply(UNKNOWN[math], {"a": 0.5, "b": 0.25})
    assert distance(run(chain(heavy(), rule), "chunks"), run(chain(heavy(), rule), "eager")) < 1e-12


@pytest.mark.parametrize(
    "rule", [adam(), chain(lion()), momentum(0.9, nesterov=True), chain(clip(0.1), adam()), sign()], ids=repr
)
def test_the_usual_rules_run_in_pieces(rule: Any, pieces: list[chunks.Pieces]) -> None:
    """Else they would be several times slower where there is no compiler."""
    found = run(rule, "chunks")
    assert pieces and all(p.run is not None for p in pieces)
    assert distance(found, run(rule, "eager")) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_and_the_size_of_pieces_change_no_bit(
    threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(adam(), "chunks", dtype)
    finally:
        torch.set_num_threads(held)
    monkeypatch.setattr(chunks, "PIECE", 16384)
    monkeypatch.setattr(chunks, "_local", threading.local())
    assert same(found, run(adam(), "chunks", dtype))


def test_two_programs_of_different_types_do_not_share_buffers() -> None:
    rule = apply(_many_temporaries, {"b": 0.0})
    first = run(rule, "chunks", torch.float32)
    run(rule, "chunks", torch.float64)
    assert same(run(rule, "chunks", torch.float32), first)


def test_pieces_are_only_made_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(chunks, "Pieces", never)
    run(adam(), "eager")
    with pytest.raises(AssertionError):
        run(adam(), "chunks")
    assert Flat.__module__.endswith("flat")
