"""Rules of layers: a weight and its bias as one matrix [W.reshape(out, -1) | b]."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.problems import distance, draw, leaves, play, same
from optim.toys import apply, apply_layer, gain, heavy, optimizer, zeros
from torch import Tensor, nn

from poise.optim import Context, Param, Slot, chain
from poise.optim.engine.layers import join, joined, parted
from poise.optim.transform import State


class watching(apply_layer):
    """Writes down what it is given, under the name of the leading parameter."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.seen: dict[str, Tensor] = {}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        assert u.shape == x.shape == k.grad.shape == k.param.shape
        assert k.param.name not in self.seen, "once a step"
        self.seen[k.param.name] = u.clone()
        return u


def gradients(model: nn.Module, seed: int = 0) -> list[Tensor]:
    return draw([tuple(p.shape) for p in model.parameters()], 0, seed=seed)[0]


def network() -> nn.Sequential:
    layers = [nn.Conv2d(2, 4, 3), nn.Linear(3, 5), nn.Linear(5, 2, bias=False), nn.LayerNorm(6)]
    return nn.Sequential(*layers).double()


def test_weight_and_bias_are_one_matrix_and_a_lone_vector_one_column() -> None:
    model, rule = network(), watching()
    conv, conv_bias, full, full_bias, bare, scale, shift = grads = gradients(model)
    play(optimizer(model, rule, lr=1.0), list(model.parameters()), [list(grads)])
    wanted = {
        "0.weight": torch.cat([conv.reshape(4, 18), conv_bias[:, None]], 1),
        "1.weight": torch.cat([full, full_bias[:, None]], 1),
        "2.weight": bare,
        "3.weight": scale[:, None],
        "3.bias": shift[:, None],
    }
    assert rule.seen.keys() == wanted.keys()
    for name, matrix in wanted.items():
        assert torch.equal(rule.seen[name], matrix), name


def test_each_part_of_the_joint_update_goes_back_to_its_parameter() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    grads = gradients(model)
    found = play(optimizer(model, chain(gain(3.0), watching(), gain(3.0)), lr=0.1), list(model.parameters()), [list(grads)])
    assert distance(found, [w - 0.9 * g for w, g in zip(before, grads, strict=True)]) < 1e-14


def test_a_layer_rule_mixes_weight_and_bias() -> None:
    """The preconditioner of K-FAC's kind: (A A^T + I)^-1 A of the joint matrix."""
    model = nn.Linear(3, 4).double()
    rule = apply_layer(lambda u, state, x, k: torch.linalg.solve(u @ u.T + torch.eye(4, dtype=u.dtype), u))
    w, b = gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    found = play(optimizer(model, rule, lr=1.0), list(model.parameters()), [[w, b]])
    joint = torch.cat([w, b[:, None]], 1)
    moved = torch.linalg.solve(joint @ joint.T + torch.eye(4, dtype=torch.float64), joint)
    assert distance(found, [before[0] - moved[:, :3], before[1] - moved[:, 3]]) < 1e-13


def averaged(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
    state["buffer"] = 0.5 * state["buffer"] + u
    return state["buffer"]


def test_state_is_kept_once_with_the_weight() -> None:
    model = network()
    opt = optimizer(model, apply_layer(averaged, {"buffer": 0.0}), lr=0.1)
    shapes = {n: tuple(s["buffer"].shape) if "buffer" in (s := opt.state[p]) else None for n, p in model.named_parameters()}
    wanted = {"0.weight": (4, 19), "1.weight": (5, 4), "2.weight": (2, 5), "3.weight": (6, 1), "3.bias": (6, 1)}
    assert shapes == wanted | {"0.bias": None, "1.bias": None}


def test_joint_state_trains_as_separate_state_does() -> None:
    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    rows = [gradients(model, seed) for seed in range(4)]
    found = play(
        optimizer(model, apply_layer(averaged, {"buffer": 0.0}), lr=0.1), list(model.parameters()), [list(r) for r in rows]
    )
    assert same(found, play(optimizer(twin, heavy(), lr=0.1), list(twin.parameters()), [list(r) for r in rows]))


def test_joint_state_is_saved_and_restored() -> None:
    model, twin = network(), network()
    rows: list[Any] = [gradients(model, seed) for seed in range(4)]
    opt = optimizer(model, apply_layer(averaged, {"buffer": 0.0}), lr=0.1)
    play(opt, list(model.parameters()), rows[:2])
    twin.load_state_dict(model.state_dict())
    saved = copy.deepcopy(opt.state_dict())
    wanted = play(opt, list(model.parameters()), rows[2:])
    again = optimizer(twin, apply_layer(averaged, {"buffer": 0.0}), lr=0.1)
    again.load_state_dict(saved)
    assert same(play(again, list(twin.parameters()), rows[2:]), wanted)


@pytest.mark.parametrize("missing", ["weight", "bias"])
def test_the_part_that_has_no_gradient_counts_as_zeros_and_is_not_moved(missing: str) -> None:
    model = nn.Linear(3, 4).double()
    rule = watching()
    w, b = gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    row = [None, b] if missing == "weight" else [w, None]
    opt = optimizer(model, chain(rule), lr=1.0, weight_decay=0.5)
    found = play(opt, list(model.parameters()), [row])
    zero = [torch.zeros_like(w), b] if missing == "weight" else [w, torch.zeros_like(b)]
    assert torch.equal(rule.seen["weight"], torch.cat([zero[0], zero[1][:, None]], 1))
    still = 0 if missing == "weight" else 1
    assert torch.equal(found[still], before[still])
    assert not torch.equal(found[1 - still], before[1 - still])


def test_a_layer_of_which_nothing_has_a_gradient_is_not_seen() -> None:
    model, rule = network(), watching()
    grads: list[Any] = gradients(model)
    play(optimizer(model, rule, lr=1.0), list(model.parameters()), [[None, None, *grads[2:]]])
    assert "0.weight" not in rule.seen and "1.weight" in rule.seen


def test_refresh_and_measure_see_the_joint_matrix_too() -> None:
    class both(watching):
        every = 2

        def slots(self, p: Param) -> dict[str, Slot]:
            return {"held": Slot(tuple(p.shape))}

        def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
            assert u.shape == x.shape == state["held"].shape
            state["held"] = u * 1.0

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            assert u.shape == x.shape == state["held"].shape
            return {"sum": u.sum()}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            assert torch.equal(k.own["sum"], k.grad.sum())
            return state["held"] / k.total["sum"]

    model = network()
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    rows: list[Any] = [[g.abs() for g in gradients(model, seed)] for seed in range(3)]
    opt = optimizer(model, both(), lr=1.0)
    found = play(opt, params, rows[:2])
    totals = [sum(float(g.sum()) for g in row) for row in rows]
    wanted = [w - a / totals[0] - a / totals[1] for w, a in zip(before, rows[0], strict=True)]
    assert distance(found, wanted) < 1e-13
    assert distance(play(opt, params, rows[2:]), [w - a / totals[2] for w, a in zip(wanted, rows[2], strict=True)]) < 1e-13


def test_a_layer_of_which_only_the_bias_has_a_gradient_is_refreshed_before_it_is_run() -> None:
    class fresh(watching):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"held": Slot(tuple(p.shape))}

        every = 1

        def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
            state["held"] = u + 0.0

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            assert torch.equal(state["held"], k.grad)
            return state["held"]

    model = network()
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    grads: list[Any] = gradients(model)
    found = play(optimizer(model, fresh(), lr=1.0), params, [[None, *grads[1:]]])
    assert same(found[:2], [before[0], before[1] - grads[1]])


def test_inner_rules_of_a_layer_rule_see_the_joint_matrix_and_keep_their_state_once() -> None:
    class driving(apply_layer):
        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return k.inner[0].apply(u)

    model, twin = network(), network()
    twin.load_state_dict(model.state_dict())
    rows: list[Any] = [gradients(model, seed) for seed in range(3)]
    opt = optimizer(model, driving(inner=(heavy(),)), lr=0.1)
    assert sum(len(opt.state[p]) - 1 for p in model.parameters()) == 5
    found = play(opt, list(model.parameters()), rows)
    assert same(found, play(optimizer(twin, heavy(), lr=0.1), list(twin.parameters()), rows))


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8"])
def test_weight_and_bias_stay_one_layer_however_the_state_before_it_is_kept(state: str) -> None:
    """A large weight is encoded and its small bias is not."""
    model = nn.Linear(128, 64)
    rule = watching()
    w, b = (g.float() for g in gradients(model))
    play(optimizer(model, chain(heavy(), rule), lr=1.0, state=state), list(model.parameters()), [[w, b]])
    assert rule.seen.keys() == {"weight"}
    assert distance([rule.seen["weight"]], [torch.cat([w, b[:, None]], 1)]) < 1e-6


def test_weight_and_bias_stay_one_layer_in_different_formats() -> None:
    """Norms and biases are often kept in float32 beside bfloat16 matrices."""
    model = nn.Linear(3, 4)
    model.weight.data = model.weight.data.bfloat16()
    rule = watching()
    w, b = gradients(model)
    play(optimizer(model, chain(heavy(), rule), lr=1.0), list(model.parameters()), [[w, b]])
    assert torch.equal(rule.seen["weight"], torch.cat([w.bfloat16().float(), b.float()[:, None]], 1))


def test_weight_and_bias_may_have_learning_rates_of_their_own() -> None:
    model = nn.Linear(3, 4).double()
    rule = watching()
    w, b = gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    opt = optimizer(
        [{"params": [("fc.weight", model.weight)], "lr": 1.0}, {"params": [("fc.bias", model.bias)], "lr": 0.5}], rule, lr=0.1
    )
    found = play(opt, list(model.parameters()), [[w, b]])
    assert rule.seen.keys() == {"fc.weight"}
    assert same(found, [before[0] - w, before[1] - 0.5 * b])


def test_a_fed_tensor_comes_as_the_joint_matrix() -> None:
    model = nn.Linear(3, 4).double()
    rule = apply_layer(lambda u, state, x, k: u + k.target, feeds=("target",))
    w, b = gradients(model)
    before = [p.detach().clone() for p in model.parameters()]
    opt = optimizer(model, rule, lr=1.0)
    opt.feed(target=[w, b])
    zero: list[Any] = [torch.zeros_like(w), torch.zeros_like(b)]
    assert same(play(opt, list(model.parameters()), [zero]), [before[0] - w, before[1] - b])


def test_bare_tensors_are_layers_of_their_own() -> None:
    rule = watching()
    params = zeros((4, 3), (4,))
    play(optimizer(params, rule, lr=1.0), params, [[torch.ones(4, 3), torch.ones(4)]])
    assert {name: tuple(t.shape) for name, t in rule.seen.items()} == {"param_0": (4, 3), "param_1": (4, 1)}


def test_a_bias_of_another_length_is_a_layer_of_its_own() -> None:
    described = [
        Param("fc.weight", torch.Size((4, 3)), torch.float32, "matrix", layer="fc"),
        Param("fc.bias", torch.Size((5,)), torch.float32, "bias", layer="fc"),
    ]
    layers = join(described)
    assert layers["fc.weight"].partner is None and tuple(layers["fc.weight"].param.shape) == (4, 3)
    assert layers["fc.bias"].leads and tuple(layers["fc.bias"].param.shape) == (5, 1)


@pytest.mark.parametrize(("lead", "follow"), [((4, 3), (4,)), ((4, 2, 3, 3), (4,)), ((4, 3), None), ((5,), None), ((), None)])
def test_taking_a_joint_matrix_apart_undoes_joining(lead: tuple[int, ...], follow: tuple[int, ...] | None) -> None:
    shapes = [lead] if follow is None else [lead, follow]
    tensors, _ = draw(shapes, 0)
    p = Param("fc.weight", torch.Size(lead), torch.float32)
    matrix = joined(tensors[0], p, tensors[1] if follow is not None else None)
    assert matrix.ndim == 2
    found = parted(matrix, p, None if follow is None else torch.Size(follow))
    assert torch.equal(found[0], tensors[0])
    assert found[1] is None if follow is None else torch.equal(found[1], tensors[1])  # pyright: ignore[reportArgumentType]


def test_element_rules_may_stand_before_and_behind_a_layer_rule() -> None:
    start, grads = draw([(4, 3)], 3)
    params, twin = leaves(start), leaves(start)
    found = play(optimizer(params, chain(heavy(), watching_nothing(), heavy()), lr=0.1), params, grads)
    assert same(found, play(optimizer(twin, chain(heavy(), apply(), heavy()), lr=0.1), twin, grads))


def watching_nothing() -> apply_layer:
    return apply_layer(lambda u, state, x, k: u * 1.0)
