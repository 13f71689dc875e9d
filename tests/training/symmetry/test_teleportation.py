"""Teleportation: a walk along the level set of the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn

from poise.training.symmetry.functional import Network
from poise.training.symmetry.landscape import along, curve_curvature, gradient_norm, sharpness
from poise.training.symmetry.symmetries import mix_units, pairs_of
from poise.training.symmetry.teleportation import Teleportation, teleport

GROUPS: dict[str, dict[str, Any]] = {
    "diagonal": {"group": "diagonal", "lr_tele": 0.1},
    "data": {"group": "data", "lr_tele": 0.01},
    "data, projected": {"group": "data", "lr_tele": 0.01, "project": True},
    "inverse": {"group": "inverse", "lr_tele": 0.003},
}
groups = pytest.mark.parametrize("how", GROUPS.values(), ids=GROUPS)


def mlp(
    *, dims: Sequence[int] = (20, 16, 12, 5), dtype: torch.dtype = torch.float64, s: nn.Module | None = None
) -> nn.Sequential:
    """Three layers, two pairs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in pairwise(dims):
            layers += [nn.Linear(a, b), s or nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1]).to(dtype)


class OnBatch:
    """Cross-entropy on `n` random samples."""

    def __init__(self, n: int = 8) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(n, 20, generator=generator, dtype=torch.float64)
        self.y = torch.randint(5, (n,), generator=generator)

    def __call__(self, model: nn.Module) -> Tensor:
        p = next(model.parameters())
        return nn.functional.cross_entropy(model(self.x.to(p.dtype)), self.y)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def steepness(model: nn.Module, loss: OnBatch) -> float:
    """sum ||grad||^2 over all weights."""
    return sum(float(g.square().sum()) for g in torch.autograd.grad(loss(model), list(model.parameters())))


@groups
def test_outputs_on_the_batch_stay_as_they_are_while_the_weights_go_far(how: dict[str, Any]) -> None:
    model, loss = mlp(), OnBatch()
    before, outputs = values(model), model(loss.x).detach()
    arrival = teleport(model, loss, **how)
    assert distance([model(loss.x)], [outputs]) < 1e-10
    assert abs(arrival.loss[1] - arrival.loss[0]) < 1e-12
    assert all(distance([a], [b]) > 1e-3 for a, b in zip(values(model)[::2], before[::2], strict=True))


def test_the_diagonal_group_keeps_outputs_on_any_input() -> None:
    model = mlp()
    x = 10 * torch.randn(500, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    outputs = model(x).detach()
    teleport(model, OnBatch(200), group="diagonal", lr_tele=0.1)
    assert distance([model(x)], [outputs]) < 1e-10


@groups
def test_every_step_of_an_ascent_raises_the_gradient_norm_at_equal_loss(how: dict[str, Any]) -> None:
    model, loss = mlp(), OnBatch()
    before = steepness(model, loss)
    arrival = teleport(model, loss, **how)
    climbed = [*arrival.objective, steepness(model, loss)]
    if not how.get("project"):
        assert climbed[0] == pytest.approx(before, rel=1e-12)
    assert len(climbed) == 11
    assert all(b > a for a, b in pairwise(climbed))
    assert arrival.loss[1] == pytest.approx(arrival.loss[0], rel=1e-12)


@groups
def test_every_step_down_lowers_it(how: dict[str, Any]) -> None:
    model, loss = mlp(), OnBatch()
    arrival = teleport(model, loss, direction="down", **how)
    climbed = [*arrival.objective, steepness(model, loss)]
    assert all(b < a for a, b in pairwise(climbed))


@groups
@pytest.mark.parametrize("still", [{"lr_tele": 0.0}, {"steps": 0}, {"cap": 0.0}], ids=str)
def test_t_of_zero_is_bitwise_nothing(how: dict[str, Any], still: dict[str, Any]) -> None:
    model = mlp()
    before = values(model)
    teleport(model, OnBatch(), **{**how, **still})
    assert same(values(model), before)


def test_the_walk_stops_before_the_step_that_begins_above_the_cap() -> None:
    model, loss = mlp(), OnBatch()
    free = teleport(mlp(), loss, group="data", lr_tele=0.01)
    cap = free.objective[4] - 1e-9
    arrival = teleport(model, loss, group="data", lr_tele=0.01, cap=cap)
    assert arrival.objective == free.objective[:5]
    assert steepness(model, loss) == pytest.approx(free.objective[4], rel=1e-9)


@groups
def test_t_is_lr_tele_times_the_derivative_of_the_objective(how: dict[str, Any]) -> None:
    """By differences of the norm of the gradient at weights moved by T, in one entry after another."""
    model, loss = mlp(dims=(20, 5, 4, 5)), OnBatch(3)
    settings = Teleportation(**{**how, "steps": 1})
    network = Network(model, loss)
    start = {name: p.detach() for name, p in model.named_parameters()}
    pairs = pairs_of(model)
    found = settings._ascent(network, start, pairs)[1]
    for pair, derivative in enumerate(found):
        flat = derivative.flatten()
        for entry in range(0, len(flat), 3):
            ends = []
            for sign in (1, -1):
                moves = [torch.zeros_like(T) for T in found]
                moves[pair].view(-1)[entry] = sign * 1e-5
                moved = settings.act(network, start, pairs, moves)
                ends.append(gradient_norm(network, {n: w.detach().requires_grad_() for n, w in moved.items()})[0])
            assert float(flat[entry]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_the_second_pair_sees_the_activations_of_the_layers_that_have_moved() -> None:
    """With the old ones, as published, the loss moves on a batch of 8 under 16 and 12 units."""
    model, loss = mlp(), OnBatch()
    settings, network, pairs = Teleportation(group="data"), Network(model, loss), pairs_of(model)
    start = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    moves = [0.1 * torch.randn(k, k, generator=generator, dtype=torch.float64) for k in (16, 12)]
    with torch.no_grad():
        before = float(network.loss(start))
        after = float(network.loss(settings.act(network, start, pairs, moves)))
        first = settings.act(network, start, pairs[:1], moves[:1])
        layers = first["2.weight"], first["2.bias"], first["4.weight"]
        V, b, U = mix_units(*layers, network.seen(start, "2")[0], torch.eye(12).double() + moves[1], pairs[1].s)
        assert b is not None
        stale = first | {"2.weight": V, "2.bias": b, "4.weight": U}
        published = float(network.loss(stale))
    assert after == pytest.approx(before, rel=1e-12)
    assert abs(published - before) > 1e-4
    assert distance([network.seen(first, "2")[0]], [network.seen(start, "2")[0]]) > 0.01


def test_a_loss_that_moves_is_refused_and_the_weights_stay() -> None:
    model = mlp()
    before = values(model)
    with pytest.raises(ValueError, match=r"moved the loss from .* group='diagonal'"):
        teleport(model, OnBatch(200), group="data", lr_tele=0.5)
    assert same(values(model), before)


def test_or_it_warns_and_goes_on_if_told_so_or_says_nothing_within_its_tolerance() -> None:
    model = mlp()
    before = values(model)
    with pytest.warns(UserWarning, match="moved the loss"):
        teleport(model, OnBatch(200), group="data", lr_tele=0.5, check="warn")
    assert not same(values(model), before)
    arrival = teleport(mlp(), OnBatch(200), group="data", lr_tele=0.5, tolerance=100.0)
    assert abs(arrival.loss[1] - arrival.loss[0]) > 1e-5


def test_a_loss_that_is_no_number_is_refused() -> None:
    model = mlp(s=nn.Tanh())
    before = values(model)
    with pytest.raises(ValueError, match="to nan"):
        teleport(model, OnBatch(), group="inverse", lr_tele=1e3, steps=1)
    assert same(values(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_fewer_bits_the_loss_is_kept_to_their_rounding(dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    before = values(model)
    arrival = teleport(model, OnBatch(), group="data", lr_tele=0.01)
    assert arrival.loss[1] == pytest.approx(arrival.loss[0], rel=1e-5 if dtype == torch.float32 else 0.05)
    assert not same(values(model), before)
    assert model[0].weight.dtype == dtype


@pytest.mark.parametrize("how", [GROUPS["diagonal"], GROUPS["data"]], ids=["diagonal", "data"])
@pytest.mark.parametrize("objective", ["sharpness", "curvature"])
def test_sharpness_and_curvature_go_up_and_down_at_equal_loss(how: dict[str, Any], objective: Any) -> None:
    for direction, sign in (("up", 1), ("down", -1)):
        settings: dict[str, Any] = {**how, "objective": objective, "direction": direction, "directions": 2, "lr_tele": 0.01}
        arrival = teleport(mlp(), OnBatch(), **settings, steps=4)
        steps = [sign * (b - a) for a, b in pairwise(arrival.objective)]
        assert len(steps) == 3
        assert min(steps) > 1e-9
        assert arrival.loss[1] == pytest.approx(arrival.loss[0], rel=1e-12)


def test_sharpness_is_the_mean_loss_at_nine_distances() -> None:
    """Of a loss that is linear plus the squared length of all weights together, half of the directions apart: 1 + mean r^2."""
    model = nn.Linear(40, 50, bias=True).double()
    network = Network(model, lambda m: torch.stack([p.square().sum() for p in m.parameters()]).sum())
    zeros = {name: torch.zeros_like(p, requires_grad=True) for name, p in model.named_parameters()}
    value, slopes = sharpness(network, zeros, 5, seed=0)
    assert value == pytest.approx(sum((r / 10) ** 2 for r in range(1, 10)) / 9, rel=1e-12)
    again, _ = sharpness(network, zeros, 5, seed=1)
    assert again == pytest.approx(value, rel=1e-12)
    assert {name: tuple(slope.shape) for name, slope in slopes.items()} == {"weight": (50, 40), "bias": (50,)}


def test_the_slope_of_sharpness_is_the_mean_gradient_at_its_points() -> None:
    model, loss = mlp(dims=(20, 4, 5)), OnBatch(3)
    network = Network(model, loss)
    start = {name: p.detach() for name, p in model.named_parameters()}
    _, slopes = sharpness(network, {n: w.clone().requires_grad_() for n, w in start.items()}, 2, seed=3)
    ends = []
    for sign in (1, -1):
        moved = {n: w.clone() for n, w in start.items()}
        moved["0.weight"][1, 2] += sign * 1e-5
        ends.append(sharpness(network, {n: w.requires_grad_() for n, w in moved.items()}, 2, seed=3)[0])
    assert float(slopes["0.weight"][1, 2]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_the_curvature_of_a_circle_is_one_over_its_radius_and_that_of_a_helix_known() -> None:
    for r, c in ((2.0, 0.0), (0.5, 3.0)):

        def helix(t: Tensor, r: float = r, c: float = c) -> Tensor:
            return torch.stack([r * torch.cos(t), r * torch.sin(t), c * t])

        found, slope = along(lambda t, helix=helix: curve_curvature(helix, t), torch.tensor(0.7, dtype=torch.float64))
        assert float(found) == pytest.approx(r / (r**2 + c**2), rel=1e-12)
        assert abs(float(slope)) < 1e-12


def test_the_derivative_of_curvature_is_that_of_a_parabola() -> None:
    """y = t^2: 2 / (1 + 4 t^2)^(3/2)."""
    t = 0.3
    found, slope = along(lambda s: curve_curvature(lambda t: torch.stack([t, t * t]), s), torch.tensor(t, dtype=torch.float64))
    assert float(found) == pytest.approx(2 / (1 + 4 * t**2) ** 1.5, rel=1e-12)
    assert float(slope) == pytest.approx(-24 * t / (1 + 4 * t**2) ** 2.5, rel=1e-12)


def test_the_orbit_of_the_diagonal_group_has_the_curvature_of_its_closed_form() -> None:
    """V(t) = exp(t m) V, b(t) = exp(t m) b, U(t) = U exp(-t m), so velocity and acceleration are products with m and m^2."""
    model, loss = mlp(dims=(20, 6, 5)), OnBatch()
    arrival = Teleportation(objective="curvature", steps=1, lr_tele=0.0, seed=4).search(model, loss)
    m = torch.rand(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    V, b, U, c = values(model)
    first = torch.cat([(m[:, None] * V).flatten(), m * b, (-U * m).flatten(), torch.zeros_like(c)])
    second = torch.cat([(m[:, None] ** 2 * V).flatten(), m**2 * b, (U * m**2).flatten(), torch.zeros_like(c)])
    area = float(first @ first) * float(second @ second) - float(first @ second) ** 2
    assert arrival.objective[0] == pytest.approx(math.sqrt(area) / float(first.norm()) ** 3, rel=1e-10)


def test_dropout_and_batch_statistics_play_no_part_and_are_left_as_they_are() -> None:
    norm, drop = nn.BatchNorm1d(20), nn.Dropout(0.5)
    model = nn.Sequential(norm, nn.Linear(20, 16), nn.ReLU(), drop, nn.Linear(16, 5)).double()
    drop.eval()
    state = torch.get_rng_state()
    before = [b.clone() for b in norm.buffers()]
    arrival = teleport(model, OnBatch(), lr_tele=0.1)
    assert same(list(norm.buffers()), before)
    assert model.training and norm.training and not drop.training
    assert torch.equal(torch.get_rng_state(), state)
    assert arrival.loss[1] == pytest.approx(arrival.loss[0], rel=1e-12)


class Wired(nn.Module):
    """Layers in attributes; `skip` adds what the first one gives to what the second one takes."""

    def __init__(self, skip: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.fc1, self.fc2, self.apart = nn.Linear(20, 16).double(), nn.Linear(16, 5).double(), nn.Linear(5, 16).double()
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        z = self.fc1(x)
        return self.fc2(z.relu() + z if self.skip else z.relu())


def test_layers_in_attributes_are_teleported_by_name_and_sequences_too() -> None:
    model = Wired()
    x = torch.randn(3, 4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    outputs = model(x).detach()
    for group in ("data", "diagonal"):
        arrival = teleport(model, lambda m: m(x).square().mean(), pairs=[("fc1", "fc2", torch.relu)], group=group, lr_tele=0.01)
        assert arrival.objective[-1] > arrival.objective[0]
        assert distance([model(x)], [outputs]) < 1e-10


def test_a_wrong_function_or_another_path_between_two_layers_is_noticed() -> None:
    x = torch.randn(4, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(model: nn.Module) -> Tensor:
        return model(x).square().mean()

    for model, s in ((Wired(), torch.nn.functional.leaky_relu), (Wired(skip=True), torch.relu)):
        with pytest.raises(ValueError, match="what 'fc2' takes in is not the given function of what 'fc1' gives out"):
            teleport(model, loss, pairs=[("fc1", "fc2", s)])
    with pytest.raises(ValueError, match="does not come through 'apart'"):
        teleport(Wired(), loss, pairs=[("apart", "fc2", torch.relu)])


@pytest.mark.parametrize(
    "wrong",
    [
        {"group": "all"},
        {"objective": "loss"},
        {"direction": "left"},
        {"check": "no"},
        {"lr_tele": -1.0},
        {"steps": -1},
        {"directions": 0},
        {"tolerance": math.nan},
    ],
)
def test_an_impossible_setting_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        Teleportation(**wrong)
