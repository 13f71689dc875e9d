"""One rule, run in every way there is, over every format of state and weights: the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play, same
from optim.toys import heavy
from torch import Tensor

from poise.optim import Context, Optimizer, Param, Slot, Transform, chain
from poise.optim.engine import tiles
from poise.optim.engine.flat import Flat
from poise.optim.transform import State
from poise.optim.transforms.adaptive import adam


class everything(Transform):
    """Totals, own values, noise, both kinds of state, the weights, the raw gradient and what was fed, in one update."""

    feeds = ("target",)

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"average": Slot(tuple(p.shape)), "square": Slot(tuple(p.shape), kind="nonneg")}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return {"beta": 0.9, "debias": 1 / (1 - 0.9**step)}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"squares": (u * u).double().sum(), "count": torch.ones_like(u).sum()}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        state["average"] = k.beta * state["average"] + (1 - k.beta) * u
        state["square"] = torch.maximum(k.beta * state["square"], u * u)
        size = (k.total["squares"] / k.total["count"]).sqrt() + (k.own["squares"] / k.own["count"]).sqrt()
        noisy = torch.where(k.uniform() < 0.5, u, k.grad)
        return k.debias * state["average"] / (state["square"].sqrt() + size) + 0.1 * noisy + 0.01 * (x - k.target)


# (70, 200) has rows that no block divides, (300_000,) many tiles, and the others stay in full precision.
SHAPES = ((70, 200), (33,), (5, 4, 3, 3), ())
LARGE = ((300_000,), (3, 100_007))


def run(
    rule: Transform, backend: Any, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, steps: int = 4, **options: Any
) -> dict[str, Tensor]:
    """Weights and state after some steps, one of them without a gradient."""
    start, grads = draw(shapes, steps, dtype=dtype, missing=[(1, 0)])
    targets, _ = draw(shapes, 0, seed=5, dtype=dtype)
    params = leaves(start)
    opt = Optimizer(params, rule, lr=0.05, weight_decay=0.1, backend=backend, **options)
    for row in grads:
        if isinstance(rule, everything) or "everything" in repr(rule):
            opt.feed(target=targets)
        play(opt, params, [row])
    state = {f"{i}/{key}": value for i, p in enumerate(params) for key, value in opt.state[p].items()}
    return {f"weight {i}": p.detach() for i, p in enumerate(params)} | state


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return distance(list(a.values()), list(b.values()))


@pytest.mark.parametrize("backend", ["tiles", "chunks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_a_rule_that_uses_everything_is_the_same_rule(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    rule = chain(heavy(), everything())
    assert gap(run(rule, backend, dtype=dtype), run(rule, "eager", dtype=dtype)) < tolerance


def test_torch_compile_runs_the_same_rule() -> None:
    """The way of GPUs, here on the CPU."""
    rule = chain(heavy(), everything())
    assert gap(run(rule, "inductor"), run(rule, "eager")) < 1e-6


def test_torch_compile_runs_more_optimizers_at_once_than_it_recompiles_a_function() -> None:
    """It compiles anew for no element and for one, and gives a function up after eight times: each optimizer has its own."""
    alive = []
    for _ in range(5):
        params = [torch.nn.Parameter(torch.zeros(size)) for size in (5, 1, 0)]
        for p in params:
            p.grad = torch.ones_like(p)
        alive.append(Optimizer(params, adam(), lr=1.0, backend="inductor"))
        alive[-1].step()
    assert len({params[0].detach().sum().item() for opt in alive for params in [opt.param_groups[0]["params"]]}) == 1


@pytest.mark.parametrize("backend", ["tiles", "chunks"])
@pytest.mark.parametrize("state", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_of_state_is_written_alike(backend: str, state: str, dtype: torch.dtype) -> None:
    """Codes differ where a value lies at the edge between two of them and its last bit differs: rarely, and by one."""
    found, wanted = (run(adam(), b, dtype=dtype, state=state) for b in (backend, "eager"))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        other = found[name]
        assert other.dtype is value.dtype and other.shape == value.shape, name
        if name.startswith("weight") or value.dtype is torch.float32:
            close = torch.isclose(other.float(), value.float(), rtol=2.0**-6 if dtype is torch.bfloat16 else 1e-5, atol=1e-5)
            assert float(close.double().mean()) > 0.995, name
        elif value.numel() > 1:
            assert float((other == value).double().mean()) > 0.995, name


@pytest.mark.parametrize("backend", ["tiles", "chunks"])
def test_large_tensors_are_the_same_as_small_ones(backend: str) -> None:
    rule = chain(heavy(), everything())
    assert gap(run(rule, backend, LARGE, steps=2), run(rule, "eager", LARGE, steps=2)) < 1e-6


@pytest.mark.parametrize("backend", ["tiles", "chunks", "eager"])
@pytest.mark.parametrize("state", ["fp32", "int8"])
def test_the_number_of_threads_changes_no_bit(backend: str, state: str) -> None:
    held = torch.get_num_threads()
    rule = chain(adam())
    ends = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            ends.append(run(rule, backend, LARGE, torch.bfloat16, steps=2, state=state))
    finally:
        torch.set_num_threads(held)
    assert same(list(ends[0].values()), list(ends[1].values()))


def test_totals_over_many_tiles_are_added_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever thread ran a tile, sums are bitwise the same in every run."""
    monkeypatch.setattr(tiles, "TILE", 1000)
    held = torch.get_num_threads()
    rule = chain(heavy(), everything())
    ends = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            ends.append(run(rule, "tiles", LARGE, steps=2))
    finally:
        torch.set_num_threads(held)
    assert all(same(list(ends[0].values()), list(end.values())) for end in ends)


@cache
def in_tiles_of_usual_size() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return run(adam(), "tiles", dtype=torch.bfloat16, state="int8"), run(heavy(), "tiles")


@pytest.mark.parametrize(("tile", "of_strips", "strip"), [(257, 384, 384), (64, 128, 128), (64, 5000, 128), (64, 512, 256)])
def test_the_size_of_tiles_and_strips_changes_no_bit(
    tile: int, of_strips: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = in_tiles_of_usual_size()
    monkeypatch.setattr(tiles, "TILE", tile)
    monkeypatch.setattr(tiles, "TILE_OF_STRIPS", of_strips)
    monkeypatch.setattr(tiles, "STRIP", strip)
    found = run(adam(), "tiles", dtype=torch.bfloat16, state="int8"), run(heavy(), "tiles")
    for a, b in zip(found, wanted, strict=True):
        assert same(list(a.values()), list(b.values()))


@pytest.mark.parametrize("layout", ["transposed", "channels last", "strided"])
def test_tiles_work_on_weights_of_any_layout(layout: str) -> None:
    make = {
        "transposed": lambda: torch.empty(200, 70).t(),
        "channels last": lambda: torch.empty(5, 40, 7, 10).to(memory_format=torch.channels_last),
        "strided": lambda: torch.empty(70, 400)[:, ::2],
    }[layout]
    laid = torch.nn.Parameter(make())
    start, grads = draw([tuple(laid.shape)], 3, dtype=torch.float32)
    laid.data.copy_(start[0])
    assert not laid.is_contiguous()
    plain = leaves(start)
    wanted = play(Optimizer(plain, heavy(), lr=0.1, backend="tiles", state="int8"), plain, grads)
    found = play(Optimizer([laid], heavy(), lr=0.1, backend="tiles", state="int8"), [laid], grads)
    assert same(found, wanted)


def test_state_of_other_types_is_kept_as_it_is() -> None:
    class counting(Transform):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {
                "times": Slot(tuple(p.shape), dtype=torch.int32, kind="exact"),
                "sum": Slot(tuple(p.shape), dtype=torch.float64),
            }

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            state["times"] = state["times"] + (u > 0)
            state["sum"] = state["sum"] + u
            return u * state["times"]

    found = {backend: run(counting(), backend) for backend in ("tiles", "chunks", "eager")}
    for backend in ("tiles", "chunks"):
        assert gap(found[backend], found["eager"]) < 1e-6
        assert found[backend]["0/times"].dtype is torch.int32
        assert found[backend]["0/sum"].dtype is torch.float64
    assert int(found["tiles"]["0/times"].max()) == 3  # of four steps, one without gradient


@pytest.mark.parametrize("backend", ["tiles", "chunks"])
def test_what_is_remembered_is_the_value_before_the_step(backend: str) -> None:
    class remembering(Transform):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"older": Slot(tuple(p.shape)), "old": Slot(tuple(p.shape)), "weights": Slot(tuple(p.shape))}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            state["older"], state["old"], state["weights"] = state["old"], u, x
            return u + 0.5 * state["older"]

    assert gap(run(remembering(), backend), run(remembering(), "eager")) < 1e-6


@pytest.mark.parametrize("backend", ["tiles", "chunks", "eager"])
def test_a_state_tensor_that_the_user_puts_in_place_of_another_is_the_one_that_is_used(backend: Any) -> None:
    """As under torch.optim; kernels must not go on with the address of the old one."""
    (start,), ((first,), (second,)) = draw([(6, 5)], 2, dtype=torch.float32)
    assert second is not None
    (p,) = params = leaves([start])
    opt = Optimizer(params, heavy(), lr=0.1, backend=backend)
    play(opt, params, [[first]])
    old = opt.state[p]["buffer"]
    held = old.clone()
    opt.state[p]["buffer"] = torch.ones(6, 5)
    play(opt, params, [[second]])
    assert torch.equal(old, held)
    assert torch.equal(opt.state[p]["buffer"], 0.5 + second)


def test_a_rule_that_measures_and_keeps_nothing_of_it_costs_no_total() -> None:
    class gathering(Transform):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"sum": Slot(tuple(p.shape))}

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            state["sum"] = state["sum"] + u
            return {}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return u + state["sum"]

    assert gap(run(gathering(), "tiles"), run(gathering(), "eager")) < 1e-6


def test_eager_is_what_its_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The yardstick of this file must not be compiled itself."""
    made: list[Flat] = []
    original = Flat.__init__

    def noted(self: Flat, *args: Any) -> None:
        original(self, *args)
        made.append(self)

    monkeypatch.setattr(Flat, "__init__", noted)
    run(heavy(), "eager", steps=2)
    assert made and all(flat.compiled is None and flat.pieces is None for flat in made)
