"""State as it is kept: which slots are encoded, how rows and blocks lie, and that shards encode as the whole does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from conformance.problems import draw, leaves, play, same
from optim.toys import apply, heavy, optimizer
from torch import Tensor

from poise.memory.codec import Codec, Kind, Part
from poise.optim import Param, Slot
from poise.optim.engine.storage import Store, codec_for


@dataclass(frozen=True)
class Steps(Codec):
    """Whole numbers up to 127 times the block's largest entry over 127: simple enough to know the codes beforehand."""

    block: int = 16

    def parts(self, kind: Kind) -> dict[str, Part]:
        return {"codes": Part(torch.int8, self.block), "scale": Part(torch.float32, 1)}

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        scale = x.abs().amax(1, keepdim=True)
        codes = torch.where(scale > 0, x * (127 / scale), 0.0).round().to(torch.int8)
        return {"codes": codes, "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        return parts["codes"].float() * (parts["scale"] / 127)


@dataclass(frozen=True)
class Halves(Codec):
    """float16, element by element."""

    def parts(self, kind: Kind) -> dict[str, Part]:
        return {"halves": Part(torch.float16, 1)}

    def encode(self, x: Tensor, kind: Kind, bits: Tensor | None = None) -> dict[str, Tensor]:
        return {"halves": x.half()}

    def decode(self, parts: Mapping[str, Tensor], kind: Kind) -> Tensor:
        return parts["halves"].float()


def store(shape: tuple[int, ...], codec: Codec | None = None, dtype: torch.dtype = torch.float32, init: float = 0.0) -> Store:
    return Store("m", Slot(shape, init=init), shape, dtype, codec)


def kept(s: Store) -> dict[str, Tensor]:
    """The state tensors of a store at their beginning."""
    return s.create(torch.zeros(s.shape), tuple(range(len(s.shape))))


SHAPES = [(5,), (16,), (100,), (4, 16), (3, 40), (2, 3, 7), (1, 5), (7, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("codec", [None, Steps(), Halves()], ids=["plain", "blocks", "elements"])
def test_what_is_written_is_read_to_the_formats_precision(shape: tuple[int, ...], codec: Codec | None) -> None:
    s = store(shape, codec)
    state = kept(s)
    (value,), _ = draw([shape], 0, dtype=torch.float32)
    s.write(state, value, None)
    found = s.read(state)
    assert found.shape == value.shape and found.dtype is torch.float32
    precision = {None: 0.0, Steps(): float(value.abs().max()) / 254 * 1.001, Halves(): 2.0**-10 * float(value.abs().max())}[
        codec
    ]
    assert float((found - value).abs().max()) <= precision


def test_a_plain_slot_is_one_tensor_and_an_encoded_one_has_its_parts_behind_a_dot() -> None:
    assert {k: v.dtype for k, v in kept(store((3, 40))).items()} == {"m": torch.float32}
    assert {k: v.dtype for k, v in kept(store((3, 40), Steps())).items()} == {"m.codes": torch.int8, "m.scale": torch.float32}
    assert {k: v.dtype for k, v in kept(store((3, 40), Halves())).items()} == {"m": torch.float16}


def test_the_last_block_of_a_row_takes_no_more_bytes_than_it_has_entries() -> None:
    state = kept(store((3, 40), Steps()))
    assert tuple(state["m.codes"].shape) == (3, 40)
    assert tuple(state["m.scale"].shape) == (3, 3)
    flat = kept(store((100,), Steps()))
    assert tuple(flat["m.codes"].shape) == (100,) and tuple(flat["m.scale"].shape) == (7,)
    cube = kept(store((2, 3, 7), Steps()))
    assert tuple(cube["m.codes"].shape) == (2, 21) and tuple(cube["m.scale"].shape) == (2, 2)


def test_blocks_do_not_cross_rows() -> None:
    """A row of large entries must not cost its neighbour its precision."""
    s = store((2, 40), Steps())
    state = kept(s)
    value = torch.cat([torch.full((1, 40), 1000.0), torch.full((1, 40), 0.001)])
    s.write(state, value, None)
    assert torch.allclose(s.read(state), value, rtol=1e-6)
    assert torch.equal(state["m.scale"], torch.tensor([[1000.0] * 3, [0.001] * 3]))


@pytest.mark.parametrize("shape", [(6, 40), (6, 3, 5), (96,)])
def test_a_shard_encodes_as_the_whole_does(shape: tuple[int, ...]) -> None:
    (value,), _ = draw([shape], 0, dtype=torch.float32)
    whole = store(shape, Steps())
    state = kept(whole)
    whole.write(state, value, None)
    piece = slice(shape[0] // 3, 2 * shape[0] // 3)
    part = store(tuple(value[piece].shape), Steps())
    mine = kept(part)
    part.write(mine, value[piece], None)
    blocks = slice(piece.start // 16, piece.stop // 16) if len(shape) == 1 else piece
    assert same([mine["m.codes"], mine["m.scale"]], [state["m.codes"][piece], state["m.scale"][blocks]])


@pytest.mark.parametrize("codec", [None, Steps(), Halves()])
@pytest.mark.parametrize("init", [0.0, 1.0])
def test_a_slot_begins_as_it_was_declared_in_every_format(codec: Codec | None, init: float) -> None:
    s = store((3, 40), codec, init=init)
    assert torch.equal(s.read(kept(s)), torch.full((3, 40), init))


def test_rules_of_float64_parameters_see_float64_whatever_the_format() -> None:
    s = store((3, 40), Steps(), torch.float64)
    assert s.read(kept(s)).dtype is torch.float64


def test_a_plain_slot_is_read_without_a_copy_and_written_in_place() -> None:
    s = store((3, 4))
    state = kept(s)
    held = state["m"]
    s.write(state, torch.ones(3, 4), None)
    assert state["m"] is held and s.read(state).data_ptr() == held.data_ptr()


# -- which slots -------------------------------------------------------------------------------------------------------

P = Param("w", torch.Size((64, 128)), torch.float32)
W = torch.zeros(64, 128)


def chosen(slot: Slot, wanted: Codec | None = Steps()) -> Codec | None:
    return codec_for(slot, P, W, wanted)


def test_a_large_slot_is_kept_in_the_format_that_was_asked_for() -> None:
    assert chosen(Slot((64, 128))) == Steps()
    assert chosen(Slot((64, 128)), None) is None
    assert chosen(Slot((64, 64))) == Steps()  # of another shape than the parameter, on one rank


@pytest.mark.parametrize(
    "slot",
    [
        Slot((64, 63)),
        Slot((64, 128), kind="exact"),
        Slot((64, 128), dtype=torch.int64),
        Slot((64, 128), shared=True),
        Slot((4096, 3)),
    ],
    ids=["small", "exact", "integers", "shared", "short rows"],
)
def test_what_would_suffer_or_save_nothing_stays_in_full_precision(slot: Slot) -> None:
    assert chosen(slot) is None


def test_a_rules_own_format_beats_the_users() -> None:
    assert chosen(Slot((64, 128), codec="fp32")) is None
    own = chosen(Slot((64, 128), codec="int8"), None)
    assert own is not None and own != Steps()


def test_a_users_codec_object_is_used_by_the_optimizer() -> None:
    start, grads = draw([(64, 128), (5,)], 2, dtype=torch.float32)
    params = leaves(start)
    opt = optimizer(params, heavy(), lr=0.1, state=Steps())
    play(opt, params, grads)
    assert opt.state[params[0]]["buffer.codes"].dtype is torch.int8
    assert opt.state[params[1]]["buffer"].dtype is torch.float32
    exact = [g for g in (grads[0][0], grads[1][0]) if g is not None]
    largest = float((0.5 * exact[0] + exact[1]).abs().max())
    found = (
        opt.state[params[0]]["buffer.codes"].reshape(64, 8, 16).float() * opt.state[params[0]]["buffer.scale"][..., None] / 127
    )
    assert float((found.reshape(64, 128) - (0.5 * exact[0] + exact[1])).abs().max()) < 2 * largest / 127


def test_a_slot_that_is_not_written_is_not_encoded_anew() -> None:
    """Else every step would round it once more."""
    start, grads = draw([(64, 128)], 3, dtype=torch.float32)
    (p,) = params = leaves(start)

    anchored = apply(lambda u, state, x, k: u + state["anchor"], {"anchor": Slot((64, 128), init="param")})
    opt = optimizer(params, anchored, lr=0.1, state=Steps())
    before = opt.state[p]["anchor.codes"].clone(), opt.state[p]["anchor.scale"].clone()
    play(opt, params, grads)
    assert same([opt.state[p]["anchor.codes"], opt.state[p]["anchor.scale"]], list(before))
