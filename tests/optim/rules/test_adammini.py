"""Adam-mini (Adam-mini: Use Fewer Learning Rates To Gain More, arXiv 2406.16793)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from torch import Tensor, nn

from poise.optim import AdamMini, AdamW

# Mathematics needs no compiler; that compiled mathematics is the same is shown for all rules at once in tests/conformance.
mini = partial(AdamMini, backend="eager")

CASES: list[dict[str, Any]] = [
    {},
    {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    {"blocks": {"param_0": "tensor", "param_1": 8, "param_2": "element", "*": "row"}, "weight_decay": 0.1, "decay": "after"},
    {"blocks": {"*": 2}},
]


def block_of(index: int, shape: torch.Size, blocks: dict[str, Any]) -> Tensor:
    """The number of the block that each element of a bare tensor belongs to, as rows of (outputs, inputs)."""
    rows, columns = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (math.prod(shape), 1)
    spec = next((spec for pattern, spec in blocks.items() if fnmatchcase(f"param_{index}", pattern)), "row")
    if spec == "element":
        return torch.arange(rows * columns).reshape(rows, columns)
    if isinstance(spec, int):
        block = torch.arange(rows) // (rows // spec)
    elif spec == "tensor" or len(shape) < 2:
        block = torch.zeros(rows, dtype=torch.int64)
    else:
        block = torch.arange(rows)
    return block[:, None].expand(rows, columns)


def reference(
    params: Sequence[Tensor],
    grads: Grads,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    blocks: dict[str, Any] | None = None,
    decay: str = "coupled",
) -> list[Tensor]:
    """One number v for each block, block after block; vectors do not decay."""
    rates = list(lr) if isinstance(lr, Sequence) else [lr] * len(grads)
    b1, b2 = betas
    ends = []
    for index, start in enumerate(params):
        block = block_of(index, start.shape, blocks or {})
        w = start.double().reshape(block.shape).clone()
        wd = weight_decay if start.ndim > 1 else 0.0
        m, v, t = torch.zeros_like(w), torch.zeros(int(block.max()) + 1).double(), 0
        for rate, row in zip(rates, grads, strict=True):
            gradient = row[index]
            if gradient is None:
                continue
            g = gradient.double().reshape(w.shape)
            t += 1
            if decay == "coupled":
                w = w - rate * wd * w
            m = b1 * m + (1 - b1) * g
            for b in range(len(v)):
                v[b] = b2 * v[b] + (1 - b2) * (g[block == b] ** 2).mean()
                step = rate * (m / (1 - b1**t)) / ((v[b] / (1 - b2**t)).sqrt() + eps)
                w = torch.where(block == b, w - step, w)
            if decay == "after":
                w = w - rate * wd * w
        ends.append(w.reshape(start.shape))
    return ends


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, fused: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = heads, kv_heads
        head = width // heads
        if fused:
            self.qkv_proj = nn.Linear(width, width + 2 * kv_heads * head, bias=bias)
        else:
            self.q_proj = nn.Linear(width, width, bias=bias)
            self.k_proj = nn.Linear(width, kv_heads * head, bias=bias)
            self.v_proj = nn.Linear(width, kv_heads * head, bias=bias)
        self.o_proj = nn.Linear(width, width, bias=bias)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, inner: int, **attention: bool) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads, **attention)
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.LayerNorm(width)


class Llama(nn.Module):
    def __init__(
        self, width: int = 16, heads: int = 4, kv_heads: int = 2, inner: int = 24, tokens: int = 30, **attention: bool
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(tokens, width)
        self.layers = nn.ModuleList([Block(width, heads, kv_heads, inner, **attention) for _ in range(2)])
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, tokens, bias=False)


def steps(model: nn.Module, count: int, seed: int = 0, **hyper: Any) -> AdamMini:
    """An optimizer that has taken steps with random gradients."""
    opt = mini(model, **hyper)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        opt.step()
    return opt


def test_a_llama_is_cut_by_heads_rows_and_whole_norms() -> None:
    found = AdamMini(Llama()).blocks()
    assert found["embed_tokens.weight"] == found["lm_head.weight"] == ((30, 1),)
    block = {name.removeprefix("layers.1."): runs for name, runs in found.items() if name.startswith("layers.1.")}
    assert block == {
        "self_attn.q_proj.weight": ((4, 4),),
        "self_attn.k_proj.weight": ((2, 4),),  # fewer heads of the same size
        "self_attn.v_proj.weight": ((8, 1),),
        "self_attn.o_proj.weight": ((16, 1),),
        "gate_proj.weight": ((24, 1),),
        "up_proj.weight": ((24, 1),),
        "down_proj.weight": ((16, 1),),
        "norm1.weight": ((1, 16),),
        "norm2.weight": ((1, 16),),
        "norm2.bias": None,
    }


def test_second_moments_are_fewer_than_one_in_a_thousand_parameters_of_a_llama() -> None:
    with torch.device("meta"):
        model = Block(2048, 16, 4, 5632)
    opt = AdamMini(nn.ModuleList([model, nn.Module()]))
    blocks = {name: sum(count for count, _ in runs or ((2048, 1),)) for name, runs in opt.blocks().items()}
    kept = {p: opt.state[p]["exp_avg_sq"].numel() for p in model.parameters()}
    assert list(kept.values()) == list(blocks.values())
    assert sum(kept.values()) == 16 + 4 + 512 + 2048 + 5632 + 5632 + 2048 + 2 + 2048
    assert sum(kept.values()) < 1e-3 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("value", ["row", "tensor"])
def test_a_fused_projection_is_cut_as_its_parts_would_be(value: Literal["row", "tensor"]) -> None:
    ours = mini(Llama(fused=True), value=value).blocks()
    apart = mini(Llama(), value=value).blocks()
    name = "layers.0.self_attn.{}_proj.weight"
    assert ours[name.format("qkv")] == (*apart[name.format("q")], *apart[name.format("k")], *apart[name.format("v")])
    assert apart[name.format("v")] == (((8, 1),) if value == "row" else ((1, 8),))

    fused, split = Llama(fused=True).double(), Llama().double()
    joint = fused.get_parameter(name.format("qkv"))
    three: list[Tensor] = [split.get_parameter(name.format(part)) for part in "qkv"]
    joint.data.copy_(torch.cat([p.detach() for p in three]))
    opts = mini(fused, value=value), mini(split, value=value)
    (grads,) = draw([tuple(joint.shape)], 4)[1:]
    for (g,) in grads:
        assert g is not None
        joint.grad = g
        for p, part in zip(three, g.split([16, 8, 8]), strict=True):
            p.grad = part.clone()
        for opt in opts:
            opt.step()
    assert distance([joint], [torch.cat(three)]) < 1e-14


def test_names_stand_in_for_a_model_and_a_head_size_for_its_heads() -> None:
    named = list(Llama().named_parameters())
    name = "layers.0.self_attn.k_proj.weight"
    assert AdamMini(named, head_dim=4).blocks()[name] == ((2, 4),)
    assert AdamMini(named).blocks()[name] == ((8, 1),)


@pytest.mark.parametrize("hyper", [{}, {"betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.3}], ids=["defaults", "others"])
def test_with_blocks_of_one_element_it_is_adamw(hyper: dict[str, Any]) -> None:
    start, grads = draw([(16, 8), (4, 3, 3, 3), (16,), ()], 30)
    ours, theirs = leaves(start), leaves(start)
    found = play(mini(ours, blocks={"*": "element"}, decay_vectors=True, **hyper), ours, grads)
    settings: dict[str, Any] = {"weight_decay": 0.0, **hyper}
    wanted = play(AdamW(theirs, backend="eager", **settings), theirs, grads)
    assert same(found, wanted)


def test_biases_follow_adamw_without_decay_and_norms_do_not_decay_either() -> None:
    model = Llama(bias=True).double()
    bias, norm = model.get_parameter("layers.0.self_attn.q_proj.bias"), model.norm.weight
    twin = nn.Parameter(bias.detach().clone())
    opt = mini(model, weight_decay=0.5)
    reference_opt = AdamW([twin], weight_decay=0.0, backend="eager")
    assert opt.blocks()["layers.0.self_attn.q_proj.bias"] is None
    before = norm.detach().clone()
    for row in draw([tuple(bias.shape)], 5)[1]:
        bias.grad = twin.grad = row[0]
        norm.grad = torch.zeros_like(norm)
        reference_opt.step()
        opt.step()
    assert same([bias], [twin])
    assert torch.equal(norm, before)


def test_thirty_steps_equal_the_formula() -> None:
    start, grads = draw([(16, 24), (8, 4, 3, 3), (24,), ()], 30, missing=[(0, 1), (4, 0), (7, 2)])
    for hyper in ({}, {"weight_decay": 0.3, "blocks": {"param_0": 4, "param_1": "tensor", "*": "element"}}):
        params = leaves(start)
        found = play(mini(params, lr=0.01, **hyper), params, grads)
        assert distance(found, reference(start, grads, lr=0.01, **hyper)) < 1e-12


def test_the_columns_of_a_row_may_change_places() -> None:
    start, grads = draw([(8, 12)], 10)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    plain, moved = leaves(start), leaves([start[0][:, order]])
    turned: Grads = [[g[:, order] for g in row if g is not None] for row in grads]
    found = play(mini(moved, weight_decay=0.1), moved, turned)
    assert distance(found, [play(mini(plain, weight_decay=0.1), plain, grads)[0][:, order]]) < 1e-14


def test_a_heads_gradients_change_no_other_head() -> None:
    ends = []
    for factor in (1.0, 10.0):
        torch.manual_seed(0)
        model = Llama().double()
        q = model.get_parameter("layers.0.self_attn.q_proj.weight")
        opt = mini(model)
        for (g,) in draw([(16, 16)], 5)[1]:
            assert g is not None
            q.grad = g.clone()
            q.grad[4:8] *= factor
            opt.step()
        ends.append(q.detach().clone())
    rest = [i for i in range(16) if not 4 <= i < 8]
    assert torch.equal(ends[0][rest], ends[1][rest])
    assert distance([ends[0][4:8]], [ends[1][4:8]]) < 1e-6  # and its own step has no scale


def test_rows_of_one_head_share_their_second_moment() -> None:
    ends = []
    for factor in (1.0, 10.0):
        params = leaves([torch.zeros(8, 4, dtype=torch.float64)])
        gradient = torch.ones(8, 4, dtype=torch.float64)
        gradient[0] *= factor
        ends.append(play(mini(params, lr=1.0, blocks={"*": 2}), params, [[gradient]])[0])
    shrunk = 1 / math.sqrt((100 + 3) / 4)
    assert distance([ends[1][1:4]], [ends[0][1:4] * shrunk]) < 1e-7
    assert torch.equal(ends[1][4:], ends[0][4:])


@pytest.mark.parametrize("blocks, low, high", [(2, 0.0, 1e-11), (1, 1.0, 10.0)])
def test_a_block_for_each_curvature_solves_what_one_for_both_does_not(blocks: int, low: float, high: float) -> None:
    """Ten coordinates of curvature 1 and ten of 10,000, from 1, lr 0.03 falling to 0 in 400 steps."""
    curvature = torch.cat([torch.ones(10), torch.full((10,), 1e4)]).double()
    x = nn.Parameter(torch.ones(20, dtype=torch.float64))
    opt = mini([x], lr=0.03, blocks={"*": blocks})
    for t in range(400):
        opt.param_groups[0]["lr"] = 0.03 * (1 - t / 400)
        x.grad = curvature * x.detach()
        opt.step()
    loss = float((curvature * x.detach() ** 2).sum() / 2)
    assert low <= loss < high


def test_a_convolution_has_a_second_moment_for_each_output_channel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 6, 3))
    opt = steps(model, 1)
    weights = [model.get_parameter(f"{i}.weight") for i in range(3)]
    assert [tuple(opt.state[weight]["exp_avg_sq"].shape) for weight in weights] == [(4,), (8,), (6,)]
    weight = weights[2]  # stored (in, out, kernel)
    assert weight.grad is not None
    wanted = 1e-3 * weight.grad.square().mean((0, 2, 3))
    assert distance([opt.state[weight]["exp_avg_sq"]], [wanted]) < 1e-8


@pytest.mark.parametrize("spec", ["row", "tensor", 2])
def test_each_of_stacked_experts_has_blocks_of_its_own(spec: Any) -> None:
    start, grads = draw([(3, 4, 6)], 5)
    stack, alone = leaves(start), leaves(list(start[0]))
    found = play(mini([("experts.up", stack[0])], blocks={"*": spec}), stack, grads)
    wanted = play(mini(alone, blocks={"*": spec}), alone, [list(g) for row in grads for g in row if g is not None])
    assert distance(list(found[0]), wanted) < 1e-14


def test_a_vector_caught_by_a_pattern_for_matrices_is_one_block() -> None:
    vector = nn.Parameter(torch.zeros(8))
    for spec in ("row", "head", "tensor"):
        assert mini([("mlp.ln.weight", vector)], blocks={"mlp.*": spec}).blocks() == {"mlp.ln.weight": ((1, 8),)}


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"blocks": {"param_0": "column"}}, r"blocks\['param_0'\]='column'"),
        ({"blocks": {"param_0": 0}}, "blocks"),
        ({"blocks": {"param_0": 3}}, "8 rows"),
        ({"blocks": {"param_0": "head"}}, "head_dim"),
        ({"blocks": {"param_0": "head"}, "head_dim": 3}, "multiple of 3"),
        ({"blocks": {"layer.*": "row"}}, "matches no parameter"),
        ({"head_dim": 0}, "head_dim"),
        ({"value": "column"}, "value"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mini(leaves(draw([(8, 4)], 0)[0]), **hyper)
