"""Whatever tensors a model has: every shape, layout and tie, and a clear word about those that cannot be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from poise.catalog import Method

from .cases import build, grads_like
from .problems import distance, draw, leaves, play, same

EVERY_SHAPE = [(), (1,), (0,), (0, 5), (7,), (3, 5), (1, 6), (2, 3, 4), (2, 3, 4, 5), (2, 1, 2, 1, 2)]


@pytest.mark.usefixtures("float32_products")
def test_tensors_of_every_shape_move_and_stay_what_they_are(entry: Method) -> None:
    start, grads = draw(EVERY_SHAPE, 3, dtype=torch.float32)
    params, twins = leaves(start), leaves(start, torch.float64)
    found = play(build(entry, params), params, grads)
    wanted = play(build(entry, twins, backend="eager"), twins, grads)
    assert distance(found, wanted) < 1e-5
    for before, after in zip(start, found, strict=True):  # an odd number of equal steps cannot lead back
        assert after.shape == before.shape
        assert before.numel() == 0 or not torch.equal(before, after)


def layouts() -> dict[str, torch.Tensor]:
    """A (16, 8, 3, 4) tensor of the same values in several layouts of memory."""
    (values,), _ = draw([(16, 8, 3, 4)], 0, dtype=torch.float32)
    wide = torch.empty(16, 8, 3, 8)
    wide[..., ::2] = values
    return {
        "contiguous": values,
        "channels_last": values.contiguous(memory_format=torch.channels_last),
        "transposed": values.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": wide[..., ::2],
    }


@pytest.mark.parametrize(
    "layout, dtype", [("channels_last", torch.bfloat16), ("transposed", torch.float32), ("strided", torch.bfloat16)], ids=str
)
def test_the_layout_of_a_weight_changes_nothing_and_is_kept(entry: Method, layout: str, dtype: torch.dtype) -> None:
    _, grads = draw([(16, 8, 3, 4)], 3, dtype=dtype)
    values = layouts()
    plain = [torch.nn.Parameter(values["contiguous"].to(dtype))]
    laid = [torch.nn.Parameter(values[layout].to(dtype))]
    if layout == "strided":
        laid = [torch.nn.Parameter(torch.empty(16, 8, 3, 8, dtype=dtype)[..., ::2])]
        laid[0].data.copy_(values[layout])
    strides = laid[0].stride()
    assert strides != plain[0].stride()
    wanted = play(build(entry, plain, state="int8"), plain, grads)
    found = play(build(entry, laid, state="int8"), laid, grads)
    assert laid[0].stride() == strides
    assert distance(found, wanted) < 1e-6  # bfloat16 too: the rounding noise belongs to the element, not to its place in memory


def test_the_layout_of_a_gradient_changes_nothing(entry: Method) -> None:
    start, grads = draw([(64, 128)], 3, dtype=torch.float32)
    plain, laid = leaves(start), leaves(start)
    wanted = play(build(entry, plain, backend="eager"), plain, grads)
    opt = build(entry, laid)
    for (g,) in grads:
        assert g is not None
        laid[0].grad = g.t().contiguous().t()
        opt.step()
    assert distance(laid, wanted) < 1e-6


def test_an_expanded_gradient_is_read_as_the_full_one(entry: Method) -> None:
    """`loss = weight.sum()` gives one: a single number with strides of 0."""
    start, _ = draw([(64, 128)], 0, dtype=torch.float32)
    full, expanded = leaves(start), leaves(start)
    full[0].grad = torch.full((64, 128), 0.5)
    expanded[0].grad = torch.tensor(0.5).expand(64, 128)
    build(entry, full).step()
    build(entry, expanded).step()
    assert same(full, expanded)


def test_a_tied_weight_is_one_parameter(entry: Method) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Embedding(40, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 40, bias=False))
    model[2].weight = model[0].weight
    opt = build(entry, model, backend="eager")
    assert sum(len(group["params"]) for group in opt.param_groups) == 3
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    play(opt, params, grads_like(params, 2))
    assert model[2].weight is model[0].weight
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_sparse_gradient_is_refused_before_anything_moves(entry: Method) -> None:
    start, _ = draw([(8,), (6, 4)], 0, dtype=torch.float32)
    params = leaves(start)
    opt = build(entry, params)
    params[0].grad = torch.ones(8)
    params[1].grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), torch.ones(2, 4), (6, 4), check_invariants=True)
    with pytest.raises((TypeError, ValueError), match="sparse"):
        opt.step()
    assert same(params, start)


def test_a_complex_parameter_is_refused_when_it_comes(entry: Method) -> None:
    with pytest.raises((TypeError, ValueError), match="complex"):
        build(entry, [torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))])


@pytest.mark.parametrize("params", [[], [{"params": []}]], ids=["nothing", "an empty group"])
def test_nothing_to_train_is_refused(entry: Method, params: Any) -> None:
    with pytest.raises(ValueError, match=r"empty|no param|nothing"):
        build(entry, params)


def test_a_parameter_in_two_groups_is_refused(entry: Method) -> None:
    params = leaves(draw(dtype=torch.float32)[0])
    with pytest.raises(ValueError, match=r"more than one|earlier group|twice"):
        build(entry, [{"params": params}, {"params": params[:1]}])
