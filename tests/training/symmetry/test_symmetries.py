"""Moves of the weights that leave what a network computes as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn

from poise.training.symmetry.symmetries import Pair, check_group, mix_outputs, mix_units, pairs_of, scale_units

LEAKY = nn.LeakyReLU(0.1)


def draw(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs h (n, 20), a lower layer of 16 units, an upper one of 5 outputs, and T of size 0.1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {"h": normal(n, 20), "V": normal(16, 20) / 4, "b": normal(16), "U": normal(5, 16) / 4, "T": 0.1 * normal(16, 16)}


def outputs(h: Tensor, V: Tensor, b: Tensor | None, U: Tensor, s: Callable[[Tensor], Tensor]) -> Tensor:
    """Sample by sample."""
    return torch.stack([U @ s(V @ x + (0 if b is None else b)) for x in h])


ACTIVATIONS = {"leaky": LEAKY, "relu": torch.relu, "tanh": torch.tanh, "gelu": nn.functional.gelu}


@pytest.mark.parametrize("s", ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("project", [True, False])
def test_mixed_units_give_the_same_outputs_while_the_batch_is_no_wider_than_the_layer(
    s: Callable[[Tensor], Tensor], bias: bool, project: bool
) -> None:
    for n in (1, 8, 12):
        d = draw(n)
        b = d["b"] if bias else None
        g = torch.eye(16).double() + d["T"]
        V, moved, U = mix_units(d["V"], b, d["U"], d["h"], g, s, project)
        assert distance([outputs(d["h"], V, moved, U, s)], [outputs(d["h"], d["V"], b, d["U"], s)]) < 1e-10
        assert distance([V], [d["V"]]) > 0.01


def test_on_a_wider_batch_mixing_moves_the_outputs() -> None:
    d = draw(200)
    V, b, U = mix_units(d["V"], d["b"], d["U"], d["h"], torch.eye(16).double() + d["T"], LEAKY)
    before = outputs(d["h"], d["V"], d["b"], d["U"], LEAKY)
    change = outputs(d["h"], V, b, U, LEAKY) - before
    assert 0.05 < float(change.norm() / before.norm()) < 1.0


@pytest.mark.parametrize("n", [8, 16, 200])
def test_the_projected_form_is_the_published_formula(n: int) -> None:
    d = draw(n)
    g = torch.eye(16).double() + d["T"]
    z = d["V"] @ d["h"].T + d["b"][:, None]
    wanted = d["U"] @ LEAKY(z) @ torch.linalg.pinv(LEAKY(g @ z))
    assert distance([mix_units(d["V"], d["b"], d["U"], d["h"], g, LEAKY, project=True)[2]], [wanted]) < 1e-10


def test_the_two_forms_differ_only_on_batches_smaller_than_the_layer() -> None:
    for n in (8, 200):
        d = draw(n)
        g = torch.eye(16).double() + d["T"]
        forms = [mix_units(d["V"], d["b"], d["U"], d["h"], g, LEAKY, project)[2] for project in (False, True)]
        assert (distance(*([form] for form in forms)) < 1e-10) == (n == 200)


def test_without_projection_the_upper_layer_moves_no_more_than_it_must() -> None:
    """Of all U' with the same outputs it is the nearest: the change lies in the span of the new activations."""
    d = draw(8)
    g = torch.eye(16).double() + d["T"]
    U = mix_units(d["V"], d["b"], d["U"], d["h"], g, LEAKY)[2]
    new = LEAKY(g @ (d["V"] @ d["h"].T + d["b"][:, None]))
    off = torch.eye(16).double() - new @ torch.linalg.pinv(new)
    assert distance([(U - d["U"]) @ off], [torch.zeros(5, 16).double()]) < 1e-12


def test_the_identity_leaves_the_upper_layer_alone_but_for_the_projection() -> None:
    d = draw(8)
    eye = torch.eye(16).double()
    V, b, U = mix_units(d["V"], d["b"], d["U"], d["h"], eye, LEAKY)
    assert b is not None
    assert distance([V, b, U], [d["V"], d["b"], d["U"]]) < 1e-14
    projected = mix_units(d["V"], d["b"], d["U"], d["h"], eye, LEAKY, project=True)[2]
    assert distance([projected], [d["U"]]) > 0.01


@pytest.mark.parametrize("s", [LEAKY, torch.relu], ids=["leaky", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_units_give_the_same_outputs_on_any_input(s: Callable[[Tensor], Tensor], bias: bool) -> None:
    d = draw(500)
    b = d["b"] if bias else None
    scale = (5 * d["T"][0]).exp()
    V, moved, U = scale_units(d["V"], b, d["U"], scale)
    assert distance([outputs(d["h"], V, moved, U, s)], [outputs(d["h"], d["V"], b, d["U"], s)]) < 1e-12
    assert distance([V], [d["V"]]) > 0.1


def test_scaling_by_one_is_bitwise_nothing() -> None:
    d = draw(1)
    V, b, U = scale_units(d["V"], d["b"], d["U"], torch.zeros(16).double().exp())
    assert b is not None
    assert same([V, b, U], [d["V"], d["b"], d["U"]])


@pytest.mark.parametrize("s", [LEAKY, nn.Tanh(), nn.Sigmoid()], ids=["leaky", "tanh", "sigmoid"])
def test_mixed_outputs_give_the_same_outputs_while_the_batch_is_no_wider_than_the_inputs(s: nn.Module) -> None:
    d = draw(8)
    g = torch.eye(16).double() + 0.01 * d["T"]
    V, b, U = mix_outputs(d["V"] / 10, d["b"] / 10, d["U"], d["h"], g, Pair("", "", (s,)))
    before = outputs(d["h"], d["V"] / 10, d["b"] / 10, d["U"], s)
    assert distance([outputs(d["h"], V, b, U, s)], [before]) < 1e-10
    assert distance([U], [d["U"]]) > 1e-4


def test_the_published_first_order_inverse_would_move_them() -> None:
    d = draw(8)
    eye = torch.eye(16).double()
    V, b, _ = mix_outputs(d["V"], d["b"], d["U"], d["h"], eye + d["T"], Pair("", "", (LEAKY,)))
    before = outputs(d["h"], d["V"], d["b"], d["U"], LEAKY)
    assert distance([outputs(d["h"], V, b, d["U"] @ (eye - d["T"]), LEAKY)], [before]) > 1e-2


def found(model: nn.Module) -> list[tuple[str, str]]:
    return [(pair.lower, pair.upper) for pair in pairs_of(model)]


def test_pairs_are_neighbours_in_a_sequential_with_activations_between() -> None:
    one = nn.ReLU()  # stands twice
    model = nn.Sequential(nn.Linear(4, 5), one, nn.Linear(5, 6), one, nn.Dropout(0.5), nn.Linear(6, 3))
    assert found(model) == [("0", "2"), ("2", "5")]
    assert [len(pair.between) for pair in pairs_of(model)] == [1, 2]
    nested = nn.ModuleDict({"a": model, "b": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))})
    assert found(nested) == [("a.0", "a.2"), ("a.2", "a.5")]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act, self.conv = nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU(), nn.Conv1d(1, 1, 1)


def test_pairs_may_be_named_with_a_function_or_the_name_of_a_module_between() -> None:
    model = Named()
    for s in (torch.relu, "act"):
        (pair,) = pairs_of(model, [("fc1", "fc2", s)])
        assert torch.equal(pair.s(torch.tensor([-1.0, 2.0])), torch.tensor([0.0, 2.0]))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    return model


def normed() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    "model, named, message",
    [
        (nn.Sequential(nn.Linear(4, 4)), None, "no nn.Sequential in it"),
        (Named(), None, "no nn.Sequential in it"),
        (Named(), [], r"pairs=\[\]"),
        (Named(), [("fc1", "conv", torch.relu)], "'conv' is a Conv1d"),
        (Named(), [("fc2", "fc1", torch.relu)], "'fc2' gives 3 values, 'fc1' takes 4"),
        (tied(), None, "0.weight and 2.weight are one tensor"),
        (normed(), [("0", "2", torch.relu)], "the weight of '0' is computed from others"),
    ],
)
def test_what_is_no_pair_is_refused_by_name(model: nn.Module, named: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pairs_of(model, named)


@pytest.mark.parametrize("s", [nn.ReLU(), nn.LeakyReLU(0.3), nn.PReLU(5), nn.Identity(), nn.Dropout(0.5), torch.relu])
def test_only_what_scales_with_its_input_may_be_scaled(s: Any) -> None:
    check_group([Pair("a", "b", (s,))], "diagonal")
    for wrong, name in ((nn.Tanh(), "Tanh"), (nn.functional.gelu, "gelu"), (nn.Softplus(), "Softplus")):
        with pytest.raises(ValueError, match=f"'a' and 'b' stands {name}"):
            check_group([Pair("a", "b", (s, wrong))], "diagonal")


def test_only_what_can_be_inverted_may_be_inverted() -> None:
    check_group([Pair("a", "b", (nn.Tanh(), nn.Dropout(), LEAKY))], "inverse")
    with pytest.raises(ValueError, match=r"ReLU.*no inverse"):
        check_group([Pair("a", "b", (nn.ReLU(),))], "inverse")
    x = torch.linspace(-0.9, 0.9, 7).double()
    pair = Pair("a", "b", (LEAKY, nn.Tanh()))
    assert distance([pair.s_inverse(pair.s(x))], [x]) < 1e-14
