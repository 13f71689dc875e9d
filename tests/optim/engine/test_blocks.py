"""Rules that see blocks of neighbouring elements: the same mathematics however a parameter falls into blocks and is stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.toys import apply, gain, heavy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from poise.optim import Context, Optimizer, Param, Slot, Transform, chain
from poise.optim.engine import kernels, tiles
from poise.optim.engine.bucket import Bucket
from poise.optim.engine.flat import Flat
from poise.optim.engine.members import Member
from poise.optim.engine.tiled import Tiled
from poise.optim.transform import State

Runs = tuple[tuple[int, int], ...] | None
Where = Runs | Callable[[Param], Runs]


def rows(p: Param) -> Runs:
    """One block for each output."""
    count = p.matrix[0] if len(p.shape) > 1 else p.shape.numel()
    return ((count, p.shape.numel() // max(count, 1)),)


class balanced(Transform):
    """Uses everything that a rule for blocks may: momentum, and one number for each block.

    `a <- 0.9 a + 0.1 u`, `s_b <- 0.8 s_b + 0.2 mean_b(u^2)`, result, in block b,
    `a / (1 - 0.9^t) / (sqrt(s_b) + 0.1) + 0.01 x + 0.1 g mean_b(x)`.
    """

    unit = "block"

    def __init__(self, where: Where = rows) -> None:
        self.where = where

    def blocks(self, p: Param) -> Runs:
        return self.where(p) if callable(self.where) else self.where

    def slots(self, p: Param) -> dict[str, Slot]:
        told = self.blocks(p)
        number = tuple(p.shape) if told is None else (sum(count for count, _ in told),)
        return {"average": Slot(tuple(p.shape)), "size": Slot(number, kind="nonneg")}

    def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float]:
        return {"debias": 1 / (1 - 0.9**step)}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        a = state["average"] = 0.9 * state["average"] + 0.1 * u
        s = state["size"] = 0.8 * state["size"] + 0.2 * (u * u).mean(1, keepdim=True)
        return k.debias * a / (s.sqrt() + 0.1) + 0.01 * x + 0.1 * k.grad * x.mean(1, keepdim=True)


def oracle(start: Tensor, grads: Sequence[Tensor | None], runs: Runs, lr: float, decay: float) -> Tensor:
    """One block after another, in float64; `2 u` reaches the rule, as `gain` makes it."""
    lengths = [length for count, length in runs or ((start.numel(), 1),) for _ in range(count)]
    ends = []
    for x, *mine in zip(
        *[t.double().reshape(-1).split(lengths) for t in [start, *[g for g in grads if g is not None]]], strict=True
    ):
        a, s = torch.zeros_like(x), 0.0
        for t, g in enumerate(mine, 1):
            u = 2 * g
            a = 0.9 * a + 0.1 * u
            s = 0.8 * s + 0.2 * float((u * u).mean())
            u = a / (1 - 0.9**t) / (s**0.5 + 0.1) + 0.01 * x + 0.1 * g * x.mean()
            x = x - lr * u - lr * decay * x
        ends.append(x)
    return torch.cat(ends).reshape(start.shape) if ends else start.double()


def trained(
    rule: Transform, shape: Sequence[int], backend: Any, dtype: torch.dtype, seed: int = 0, **options: Any
) -> dict[str, Tensor]:
    """Weights and state after four steps."""
    start, grads = draw([tuple(shape)], 4, dtype=dtype, seed=seed)
    params = leaves(start)
    opt = Optimizer(params, rule, lr=0.05, weight_decay=0.1, backend=backend, **options)
    play(opt, params, grads)
    return {"weight": params[0].detach(), **opt.state[params[0]]}


# shape, runs; tiles are made to hold 300 elements
LAID: dict[str, tuple[tuple[int, ...], Runs]] = {
    "rows": ((70, 24), ((70, 24),)),
    "rows longer than a tile": ((5, 700), ((5, 700),)),
    "rows of seven": ((33, 7), ((33, 7),)),
    "rows of one": ((50, 1), ((50, 1),)),
    "heads": ((32, 10), ((4, 80),)),
    "heads longer than a tile": ((64, 10), ((2, 320),)),
    "heads, then rows": ((24, 11), ((2, 44), (2, 44), (8, 11))),
    "rows, then one block of the rest": ((24, 11), ((8, 11), (1, 176))),
    "single elements, then a block": ((40,), ((7, 1), (1, 33))),
    "one block": ((60, 40), ((1, 2400),)),
    "convolution": ((6, 3, 3, 3), ((6, 27),)),
    "each element": ((9, 13), None),
    "vector": ((333,), ((1, 333),)),
    "vector in three": ((333,), ((3, 111),)),
    "one number": ((), ((1, 1),)),
    "no rows": ((0, 5), ((0, 5),)),
    "rows of nothing": ((5, 0), ((5, 0),)),
}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE_OF_BLOCKS", 300)
    monkeypatch.setattr(tiles, "TILE", 100)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("laid", LAID)
@pytest.mark.parametrize("backend", ["tiles", "chunks", "eager"])
def test_a_rule_does_to_each_block_what_it_says(backend: Any, laid: str) -> None:
    shape, runs = LAID[laid]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        start, grads = draw([shape], 5, dtype=dtype, missing=[(2, 0)])
        params = leaves(start)
        opt = Optimizer(params, chain(gain(), balanced(runs)), lr=0.05, weight_decay=0.1, backend=backend)
        wanted = oracle(start[0], [row[0] for row in grads], runs, 0.05, 0.1)
        assert distance(play(opt, params, grads), [wanted.to(dtype)]) < tolerance
        assert not opt.state[params[0]]["size"].isnan().any()


def test_torch_compile_runs_the_same_rule() -> None:
    """The way of GPUs, here on the CPU: blocks of two lengths, of one element, and a single one."""
    for laid in ("heads, then rows", "each element", "vector"):
        shape, runs = LAID[laid]
        found, wanted = (trained(balanced(runs), shape, b, torch.float32) for b in ("inductor", "eager"))
        assert distance(list(found.values()), list(wanted.values())) < 1e-6


def test_the_sum_of_a_block_of_millions_keeps_its_first_digits() -> None:
    """Kernels add in float32, several numbers side by side."""
    shape, runs = (3, 1_000_003), ((1, 3_000_009),)
    found, wanted = (trained(balanced(runs), shape, b, d) for b, d in (("tiles", torch.float32), ("eager", torch.float64)))
    assert float(found["size"].double() / wanted["size"]) == pytest.approx(1.0, abs=1e-3)
    assert distance([found["weight"]], [wanted["weight"]]) < 1e-3


def test_links_around_it_run_in_its_kernel() -> None:
    """Momentum, the rule, learning rate, decay and the write of the weights are one stretch, whatever the length of blocks."""
    params = leaves(draw([(8, 5), (3, 70), (64,)], 0, dtype=torch.float32)[0])
    opt = Optimizer(params, chain(heavy(), balanced()), lr=0.1, weight_decay=0.1, backend="tiles")
    engine = opt._engine
    assert engine is not None
    assert all([s.positions for s in bucket.segments] == [(0, 1, 2, 3)] for bucket in engine.buckets)
    assert len(engine.buckets) == 2  # the vector has one block for each element
    play(opt, params, [[torch.ones_like(p) for p in params]])
    assert all(isinstance(runner, Tiled) for bucket in engine.buckets for runner in bucket.runners.values())
    before = kernels.compiled_count()
    others = leaves(draw([(5, 9), (3000,), (2, 3, 4)], 0, dtype=torch.float32)[0])
    opt = Optimizer(others, chain(heavy(), balanced()), lr=0.1, weight_decay=0.1, backend="tiles")
    play(opt, others, [[torch.ones_like(p) for p in others]] * 3, [1.0, 0.5, 0.1])
    assert kernels.compiled_count() == before


def test_links_that_see_other_blocks_are_another_stretch() -> None:
    whole = balanced(lambda p: ((1, p.shape.numel()),))
    for backend in ("tiles", "eager"):
        params = leaves(draw([(6, 5)], 0)[0])
        opt = Optimizer(params, chain(balanced(), gain(), whole, balanced()), lr=0.1, backend=backend)
        assert opt._engine is not None
        assert [s.positions for s in opt._engine.buckets[0].segments] == [(0, 1), (2,), (3, 4, 5)]
        ends = play(opt, params, draw([(6, 5)], 3)[1])
        alone = leaves(draw([(6, 5)], 0)[0])
        rule = chain(balanced(), gain(), balanced(((1, 30),)), balanced())
        assert distance(ends, play(Optimizer(alone, rule, lr=0.1, backend="eager"), alone, draw([(6, 5)], 3)[1])) < 1e-13


# -- formats, noise ----------------------------------------------------------------------------------------------------

# 256, 200 and 1280 elements a row: what some, none and all codecs' blocks divide
CODED: dict[str, tuple[tuple[int, ...], Runs]] = {
    "rows": ((40, 256), ((40, 256),)),
    "rows no block divides": ((40, 200), ((40, 200),)),
    "heads": ((16, 1280), ((4, 5120),)),
    "heads of rows no block divides": ((40, 200), ((5, 1600),)),
    "heads, then rows": ((48, 256), ((4, 2048), (16, 256))),
    "one block": ((40, 200), ((1, 8000),)),
    "vector": ((5000,), ((1, 5000),)),
    "vector in two": ((5000,), ((2, 2500),)),
    "each element": ((40, 200), None),
}


@pytest.mark.parametrize("laid", CODED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format_of_state_and_weights_is_written_alike(dtype: torch.dtype, laid: str) -> None:
    """Codes differ where a value lies at the edge between two of them and its last bit differs: rarely, and by one."""
    shape, runs = CODED[laid]
    for state in ("bf16", "int8", "int4"):
        found, wanted = (trained(balanced(runs), shape, b, dtype, state=state) for b in ("tiles", "eager"))
        assert found.keys() == wanted.keys()
        assert any(value.dtype in (torch.bfloat16, torch.uint8, torch.int8) for value in wanted.values())
        for name, value in wanted.items():
            other = found[name]
            assert other.dtype is value.dtype and other.shape == value.shape, name
            if value.numel() > 1:
                close = (
                    torch.isclose(other.float(), value.float(), rtol=1e-4, atol=1e-6)
                    if value.dtype is torch.float32
                    else other == value
                )
                assert float(close.double().mean()) > 0.99, (state, name)


def test_what_is_kept_for_a_block_is_never_encoded() -> None:
    params = leaves([torch.zeros(5000, 64)])
    opt = Optimizer(params, balanced(), lr=0.1, state="int8")
    assert opt.state[params[0]]["size"].dtype is torch.float32
    assert opt.state_bytes() < 1.1 * (5000 * 64 + 4 * 5000)


@pytest.mark.parametrize("tile", [1, 77, 100_000])
@pytest.mark.parametrize("laid", ["heads, then rows", "rows no block divides", "vector"])
def test_the_size_of_tiles_and_the_number_of_threads_change_no_bit(
    laid: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, runs = CODED[laid]
    wanted = trained(balanced(runs), shape, "tiles", torch.bfloat16, state="int8")
    monkeypatch.setattr(tiles, "TILE_OF_BLOCKS", tile)
    held = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = trained(balanced(runs), shape, "tiles", torch.bfloat16, state="int8")
            assert same(list(found.values()), list(wanted.values()))
    finally:
        torch.set_num_threads(held)


class noisy(balanced):
    """Whatever noise gives, times the block's number of elements."""

    def slots(self, p: Param) -> dict[str, Slot]:
        return {}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.uniform() + torch.ones_like(u).sum(1, keepdim=True)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("backend", ["tiles", "eager"])
def test_noise_belongs_to_the_element_and_not_to_its_block(backend: Any) -> None:
    def drawn(runs: Runs, **options: Any) -> Tensor:
        params = leaves([torch.zeros(48, 11)])
        opt = Optimizer(params, noisy(runs), lr=1.0, backend=backend, **options)
        return -play(opt, params, [[torch.ones(48, 11)]])[0] % 1.0

    wanted = drawn(None)
    for runs in (((48, 11),), ((2, 88), (32, 11)), ((1, 528),)):
        assert distance([drawn(runs)], [wanted]) < 1e-4  # what is added and taken away costs that many digits
    assert distance([drawn(None, seed=1)], [wanted]) > 0.1


# -- measures, feeds, layouts in memory ----------------------------------------------------------------------------------


class limited(balanced):
    """`u <- target u / sum over all blocks of the largest magnitude in it`."""

    feeds = ("target",)

    def slots(self, p: Param) -> dict[str, Slot]:
        return {}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"sum": u.abs().amax(1).sum()}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return k.target * u / (k.total["sum"] + k.own["sum"])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reads", ["grad", "update"])
@pytest.mark.parametrize("backend", ["tiles", "chunks", "eager"])
def test_measured_sums_run_over_all_blocks(backend: Any, reads: Any) -> None:
    rule = limited(lambda p: ((10, 24), (2, 720)) if p.shape.numel() == 1680 else rows(p))
    rule.reads = reads
    start, grads = draw([(70, 24), (9, 700), (0, 4)], 1, seed=3)
    params = leaves([torch.zeros_like(p) for p in start])
    opt = Optimizer(params, chain(gain(3.0), rule), lr=1.0, backend=backend)
    opt.feed(target=[torch.full_like(p, 2.0) for p in params])
    found = play(opt, params, grads)
    g = [t for t in grads[0] if t is not None]
    factor = 3.0 if reads == "update" else 1.0
    pieces = [[*g[0][:10], *g[0][10:].reshape(2, 720)], list(g[1]), []]
    own = [factor * sum(float(block.abs().max()) for block in blocks) for blocks in pieces]
    assert distance(found, [-2 * 3 * t / (sum(own) + o) for t, o in zip(g, own, strict=True)]) < 1e-13


@pytest.mark.parametrize("layout", ["transposed", "channels last", "strided"])
def test_weights_of_any_layout_are_worked_on_where_they_are(layout: str) -> None:
    laid = {
        "transposed": lambda: torch.empty(200, 70).t(),
        "channels last": lambda: torch.empty(5, 40, 7, 10).to(memory_format=torch.channels_last),
        "strided": lambda: torch.empty(70, 400)[:, ::2],
    }[layout]()
    p = nn.Parameter(laid)
    start, grads = draw([tuple(p.shape)], 3, dtype=torch.float32)
    p.data.copy_(start[0])
    plain = leaves(start)
    wanted = play(Optimizer(plain, balanced(), lr=0.1, backend="tiles", state="int8"), plain, grads)
    assert same(play(Optimizer([p], balanced(), lr=0.1, backend="tiles", state="int8"), [p], grads), wanted)
    assert not p.is_contiguous()


@pytest.mark.parametrize("backend", ["tiles", "chunks", "eager"])
def test_outputs_come_first_however_a_weight_is_stored(backend: Any) -> None:
    """A transposed convolution is stored (in, out, kernel): one block for each output, as if it were (out, in, kernel)."""
    start, grads = draw([(3, 8, 4, 4)], 4, dtype=torch.float64)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ConvTranspose2d(3, 8, 4), nn.Conv2d(8, 2, 1)).double()
    weight = model.get_parameter("1.weight")
    for rule in (balanced(), balanced(lambda p: ((2, 96), (4, 48)) if p.shape.numel() == 384 else rows(p))):
        weight.data.copy_(start[0])
        turned = leaves([start[0].movedim(1, 0).contiguous()])
        found = play(Optimizer(model, rule, lr=0.1, backend=backend), [weight], grads)
        moved: Grads = [[g.movedim(1, 0) for g in row if g is not None] for row in grads]
        wanted = play(Optimizer(turned, rule, lr=0.1, backend="eager"), turned, moved)
        assert distance([found[0].movedim(1, 0)], wanted) < 1e-13


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The first of two ranks, as far as bookkeeping goes."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield DeviceMesh("cpu", [0, 1])
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "shape, runs, placement, gathers",
    [
        ((8, 6), ((8, 6),), Shard(0), False),
        ((7, 6), ((7, 6),), Shard(0), False),
        ((8, 6), ((8, 6),), Shard(1), True),
        ((8, 6), ((8, 6),), Replicate(), False),
        ((8, 6), ((2, 24),), Shard(0), True),
        ((8, 6), ((16, 3),), Shard(0), True),  # state of 16 numbers is not cut as 8 rows are
        ((8, 6), ((1, 48),), Shard(0), True),
        ((8,), ((1, 8),), Shard(0), True),
        ((8, 6), None, Shard(1), False),
    ],
)  # fmt: skip
def test_shards_are_put_together_only_where_they_cut_a_block(
    shape: tuple[int, ...], runs: Runs, placement: Any, gathers: bool, mesh: DeviceMesh
) -> None:
    p = nn.Parameter(
        DTensor.from_local(
            torch.zeros(4, 4), mesh, [placement], run_check=False, shape=torch.Size(shape), stride=torch.zeros(shape).stride()
        )
    )
    m = Member(p, Param("p", torch.Size(shape), torch.float32), {}, chain(balanced(runs)), None, "auto", 0)
    (layout,) = m.layouts.values()
    assert layout.gathers == gathers
    if isinstance(placement, Shard) and not gathers and runs is not None:
        assert m.dims["size"] == (0,)
        assert layout.runs == ((4, 6),)
        assert m.stores["size"].shape == (4,)


# -- what is refused -----------------------------------------------------------------------------------------------------


def optimizer_over(rule: Any) -> Optimizer:
    return Optimizer(leaves([torch.zeros(4, 3)]), rule, lr=0.1)


@pytest.mark.parametrize("runs", [((4, 2),), ((5, 3),), ((1, 6), (1, 5)), ((-4, -3),)])
def test_blocks_that_do_not_make_up_the_parameter_are_refused(runs: Any) -> None:
    with pytest.raises(ValueError, match="blocks"):
        optimizer_over(balanced(runs))


def test_state_of_another_size_is_refused() -> None:
    rule = apply(slots={"kept": Slot((3,))}, unit="block", blocks=lambda p: ((4, 3),))
    with pytest.raises(ValueError, match=r"'kept'.*\(3,\).*4 blocks"):
        optimizer_over(rule)


@pytest.mark.parametrize(
    "attributes, what",
    [({"inner": (gain(),)}, "inner"), ({"every": 3}, "refresh"), ({"written": lambda *_: None}, "written")],
)
def test_what_a_block_rule_cannot_have_is_refused(attributes: dict[str, Any], what: str) -> None:
    kind = type("rule", (balanced,), attributes)
    with pytest.raises(ValueError, match=f"'block' has no {what}"):
        optimizer_over(kind())


def test_no_other_rule_can_drive_one() -> None:
    driver = apply(lambda u, state, x, k: k.inner[0].apply(u), inner=(balanced(),), unit="matrix")
    with pytest.raises(ValueError, match="no other rule can drive it"):
        optimizer_over(chain(driver))


def test_only_what_cannot_be_cut_into_tiles_runs_without_them() -> None:
    """Rows that no block of the format divides, in heads: these few run in plain torch, everything else does not."""

    def kind(shape: tuple[int, ...], runs: Runs, state: str) -> type:
        params = leaves([torch.zeros(shape)])
        opt = Optimizer(params, balanced(runs), lr=0.1, state=state, backend="tiles")
        play(opt, params, [[torch.ones(shape)]])
        assert opt._engine is not None
        (bucket,) = opt._engine.buckets
        assert isinstance(bucket, Bucket)
        (runner,) = bucket.runners.values()
        return type(runner)

    assert kind((40, 200), ((5, 1600),), "int8") is Flat
    assert kind((40, 200), ((5, 1600),), "bf16") is Tiled
    assert kind((40, 200), ((40, 200),), "int8") is Tiled
    assert kind((40, 256), ((5, 2048),), "int8") is Tiled
