"""Two-timescale extragradient (Two-timescale Extragradient for Finding Local Minimax Points, arXiv 2305.16242)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Bowl, bowl_task, classify, play, trained

from poise import catalog
from poise.optim import SGD, AdamW, Muon
from poise.training import EMA, SAM, Extragradient, LocalMinimax, local_minimax

CASES: list[dict[str, Any]] = [{"tau": 10.0}, {"tau": 1.5}, {"tau": 2.0, "extrapolation": 0.5}]
NEUTRAL: dict[str, Any] = {"tau": 1.0, "extrapolation": 0.0}
TYPICAL: dict[str, Any] = {"tau": 2.0}
INNER_STEPS = 2


def reference(
    bowl: Bowl, *, lr: float, steps: int, tau: float = 10.0, extrapolation: float = 1.0
) -> tuple[list[Tensor], list[Tensor]]:
    """A slow minimiser alone: a look ahead, and the step from where it stood."""
    x = bowl.start()
    for t in range(steps):
        ahead = [a - extrapolation * lr / tau * g for a, g in zip(x, bowl.gradient(x, t), strict=True)]
        x = [a - lr / tau * g for a, g in zip(x, bowl.gradient(ahead, t), strict=True)]
    return x, x


class Game:
    """`f = a x^2 / 2 + c x y + b y^2 / 2`, or another function of x and y."""

    def __init__(self, a: float, b: float, c: float, begin: tuple[float, float] = (1.0, 1.0)) -> None:
        self.x, self.y = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in begin)
        self.value: Callable[[Tensor, Tensor], Tensor] = lambda x, y: (a * x**2 / 2 + c * x * y + b * y**2 / 2).sum()

    def driven(self, make: Callable[[Any], torch.optim.Optimizer], **hyper: Any) -> Extragradient:
        return Extragradient(make([{"params": [self.x]}, {"params": [self.y]}]), [self.y], **hyper)

    def step(self, opt: torch.optim.Optimizer) -> Tensor:
        def closure() -> Tensor:
            opt.zero_grad()
            loss = self.value(self.x, self.y)
            loss.backward()
            return loss

        return opt.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]


def radius(a: float, b: float, c: float, lr: float, tau: float, extrapolation: float = 1.0) -> float:
    """Spectral radius of one step, which is linear in (x, y)."""
    columns = []
    for begin in ((1.0, 0.0), (0.0, 1.0)):
        game = Game(a, b, c, begin)
        game.step(game.driven(lambda groups: SGD(groups, lr=lr, backend="eager"), tau=tau, extrapolation=extrapolation))
        columns.append(torch.cat([game.x, game.y]).detach())
    return float(torch.linalg.eigvals(torch.stack(columns, 1)).abs().max())


@pytest.mark.parametrize(
    "abc, lr, tau, extrapolation, wanted",
    [
        ((0.0, 0.0, 1.0), 0.1, 1.0, 0.0, 1.00499),  # bilinear: descent and ascent spiral outwards,
        ((0.0, 0.0, 1.0), 0.1, 1.0, 1.0, 0.99504),  # extragradient inwards
        ((-3.0, -2.0, 4.0), 0.1, 1.0, 1.0, 1.0149),  # a local minimax point that is no Nash equilibrium
        ((-3.0, -2.0, 4.0), 0.1, 10.0, 1.0, 0.9205),  # attracts once the minimiser is slow
        ((-0.3, 0.0, 1.0), 0.6, 20.0, 0.0, 1.0134),  # flat in y:
        ((-0.3, 0.0, 1.0), 0.6, 20.0, 1.0, 0.9958),  # two timescales alone are not enough,
        ((-0.3, 0.0, 1.0), 0.1, 20.0, 1.0, 1.0005),  # and neither is a short step
    ],
)
def test_the_spectral_radius_of_a_step_on_a_quadratic_game(
    abc: tuple[float, float, float], lr: float, tau: float, extrapolation: float, wanted: float
) -> None:
    assert radius(*abc, lr, tau, extrapolation) == pytest.approx(wanted, abs=6e-5)


@pytest.mark.parametrize("extrapolation", [0.0, 1.0])
def test_a_stationary_point_that_is_no_minimax_point_repels_on_every_timescale(extrapolation: float) -> None:
    for tau in (1.0, 3.0, 10.0, 100.0, 1000.0):
        assert radius(-10.0, -2.0, 4.0, 0.1, tau, extrapolation) > 1.0 + 1e-4


def test_with_tau_one_it_is_the_extragradient_method() -> None:
    x, y = (torch.ones(1, dtype=torch.float64) for _ in range(2))
    game = Game(0.5, -0.3, 2.0)
    opt = game.driven(lambda groups: SGD(groups, lr=0.1, backend="eager"), tau=1.0)
    for _ in range(20):
        ahead = x - 0.1 * (0.5 * x + 2.0 * y), y + 0.1 * (2.0 * x - 0.3 * y)
        x, y = x - 0.1 * (0.5 * ahead[0] + 2.0 * ahead[1]), y + 0.1 * (2.0 * ahead[0] - 0.3 * ahead[1])
        game.step(opt)
    assert distance([game.x, game.y], [x, y]) < 1e-13


def test_around_adam_the_look_ahead_is_adams_and_only_the_second_step_is_remembered() -> None:
    """Written out, with one Adam for the step and one that is thrown away for the look ahead."""

    def adam(state: list[Tensor], g: Tensor, t: int) -> tuple[Tensor, list[Tensor]]:
        m, v = 0.9 * state[0] + 0.1 * g, 0.99 * state[1] + 0.01 * g * g
        return (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8), [m, v]

    game = Game(0.5, -0.3, 2.0)
    opt = game.driven(lambda groups: AdamW(groups, lr=0.05, betas=(0.9, 0.99), weight_decay=0.0, backend="eager"), tau=4.0)
    z = torch.ones(2, dtype=torch.float64)
    rates = torch.tensor([0.05 / 4, 0.05], dtype=torch.float64)
    field = torch.tensor([[0.5, 2.0], [-2.0, 0.3]], dtype=torch.float64)
    kept = [torch.zeros(2, dtype=torch.float64)] * 2
    for t in range(1, 11):
        direction, _ = adam(kept, field @ z, t)
        direction, kept = adam(kept, field @ (z - rates * direction), t)
        z = z - rates * direction
        game.step(opt)
    assert distance([torch.cat([game.x, game.y])], [z]) < 1e-7
    assert distance([opt.state[game.y]["exp_avg"]], [kept[0][1:]]) < 1e-7


@pytest.mark.parametrize("make", [AdamW, torch.optim.AdamW], ids=["poise", "torch"])
def test_weights_rates_and_gradients_are_left_as_a_step_leaves_them(make: Callable[..., torch.optim.Optimizer]) -> None:
    game = Game(0.5, -0.3, 2.0)
    rate = torch.tensor(0.05)
    opt = game.driven(lambda groups: make(groups, lr=rate), tau=4.0)
    game.step(opt)
    assert [group["lr"] for group in opt.param_groups] == [rate, rate]
    assert all(group["lr"] is rate for group in opt.param_groups)
    before = game.x.detach().clone(), game.y.detach().clone()
    game.step(opt)
    assert game.y.grad is not None
    slope = 2.0 * before[0] - 0.3 * before[1]
    assert float(game.y.grad * slope) > 0, "df/dy, not its negative"
    assert float(game.y.detach() - before[1]) * float(slope) > 0


def test_schedules_and_settings_of_a_group_count() -> None:
    game = Game(0.0, 0.0, 1.0)
    opt = game.driven(lambda groups: SGD(groups, lr=0.1, backend="eager"))
    opt.param_groups[0]["tau"], opt.param_groups[1]["extrapolation"] = 5.0, 0.0
    opt.param_groups[1]["lr"] = 0.2
    game.step(opt)
    assert float(game.x) == pytest.approx(1 - 0.02)
    assert float(game.y) == pytest.approx(1 + 0.2 * 0.98)


def test_a_group_may_be_added_as_a_maximiser() -> None:
    game = Game(0.0, 0.0, 1.0)
    opt = Extragradient(SGD([game.x], lr=0.1, backend="eager"), tau=1.0, extrapolation=0.0)
    opt.add_param_group({"params": [game.y], "player": "max"})
    game.step(opt)
    assert float(game.x) == pytest.approx(0.9)
    assert float(game.y) == pytest.approx(1.1)
    opt.param_groups[1]["player"] = "neither"
    with pytest.raises(ValueError, match=r"player='neither' in group 1"):
        game.step(opt)


def test_both_passes_leave_out_the_same_units_and_only_the_first_counts_in_batch_statistics() -> None:
    drawn: list[Tensor] = []

    class Draw(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            drawn.append(torch.rand(4))
            return x

    norm = nn.BatchNorm1d(24)
    task = classify(more=[norm, Draw()])
    play(Extragradient(SGD(task.model), model=task.model), task, 2)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])
    assert int(norm.num_batches_tracked or 0) == 2


@pytest.mark.parametrize("torchs", [False, True])
def test_an_error_ahead_leaves_weights_state_and_rates_as_they_were(torchs: bool) -> None:
    task = classify()
    inner = torch.optim.AdamW(task.model.parameters(), lr=0.1) if torchs else AdamW(task.model, lr=0.1, backend="eager")
    opt = Extragradient(inner)
    before = play(opt, task, 2)
    kept = [value.clone() for p in task.model.parameters() for value in opt.state[p].values()]
    plain = task.closure(opt)

    def closure() -> Tensor:
        if task.calls == 5:
            raise KeyError("ahead")
        return plain()

    with pytest.raises(KeyError, match="ahead"):
        opt.step(closure)
    assert same(trained(task), before)
    assert same([value for p in task.model.parameters() for value in opt.state[p].values()], kept)
    assert opt.param_groups[0]["lr"] == 0.1


def test_an_average_inside_does_not_count_the_look_ahead() -> None:
    task = classify()
    average = EMA(SGD(task.model), p=0.1)
    play(Extragradient(average), task, 3)
    assert average.own["step"] == 3


def test_what_cannot_work_is_refused_by_name() -> None:
    task = bowl_task()
    params = list(task.model.parameters())
    inner = SGD(task.model)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tau": 0.5}, "tau=0.5"),
        ({"extrapolation": -1.0}, "extrapolation=-1"),
        ({"maximiser": params[:1]}, "group 0 has parameters of both players"),
        ({"maximiser": [*params, torch.zeros(2)]}, "maximiser: 1 of its tensors"),
    ]
    for hyper, message in cases:
        with pytest.raises(ValueError, match=message):
            Extragradient(inner, **hyper)
    with pytest.raises(ValueError, match="maximize=True"):
        Extragradient(torch.optim.SGD(params, lr=0.1, maximize=True))
    with pytest.raises(ValueError, match=r"SAM\(Extragradient"):
        Extragradient(SAM(Muon(classify().model)))


# -- the diagnostic ------------------------------------------------------------------------------------------------------


def scalars(a: float, b: float, c: float) -> tuple[Tensor, Tensor, Tensor]:
    A, B, C = (torch.tensor([[value]], dtype=torch.float64) for value in (a, b, c))
    return A, B, C


@pytest.mark.parametrize(
    "abc, outer, necessary",
    [
        ((-3.0, -2.0, 4.0), 5.0, True),  # A - C B^-1 C = -3 + 8
        ((-10.0, -2.0, 4.0), -2.0, False),
        ((-0.3, 0.0, 1.0), math.inf, True),  # flat in y: whatever x gains, y gains more
        ((-0.3, 0.0, 0.0), -0.3, False),
        ((1.0, 0.5, 0.0), 1.0, False),  # y is at a minimum
    ],
)
def test_what_the_second_derivatives_of_two_numbers_say(abc: tuple[float, float, float], outer: float, necessary: bool) -> None:
    found = local_minimax(*scalars(*abc))
    assert (found.outer, found.necessary) == (pytest.approx(outer), necessary)


def singular(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """B of rank 2 in 4 dimensions, and C that sees one direction of its null space."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    Q = torch.linalg.qr(normal(4, 4)).Q
    A, B = normal(5, 5), -(Q[:, :2] * torch.tensor([1.0, 3.0], dtype=torch.float64)) @ Q[:, :2].mT
    return A + A.mT, B, normal(5, 3) @ Q[:, :3].mT


def limit(A: Tensor, B: Tensor, C: Tensor) -> float:
    """The smallest eigenvalue of `A + C (eps - B)^-1 C^T` as eps goes to 0: where C^T x leaves the range of B it grows."""
    return float(torch.linalg.eigvalsh(A - C @ torch.linalg.solve(B - 1e-9 * torch.eye(4).double(), C.mT))[0])


@pytest.mark.parametrize("seed", range(5))
def test_the_restriction_is_the_limit_of_games_that_are_curved_in_y(seed: int) -> None:
    found = local_minimax(*singular(seed))
    assert found.outer == pytest.approx(limit(*singular(seed)), abs=1e-6)
    assert found.inner == pytest.approx(0.0, abs=1e-12)


def test_its_tests_tell_the_diagnostic_from_its_mutant() -> None:
    wrong = mutated(catalog.get("local-minimax"))
    assert abs(wrong(*singular(0)).outer - limit(*singular(0))) > 1e-3


def test_blocks_of_torchs_hessian_are_what_it_takes() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        return -1.5 * x[0] ** 2 + 4 * x[0] * y[0] - y[0] ** 2 + x[0] ** 3

    (A, C), (_, B) = torch.func.hessian(f, (0, 1))(torch.zeros(1).double(), torch.zeros(1).double())
    assert local_minimax(A, B, C) == LocalMinimax(-2.0, 5.0, True)


def test_blocks_that_do_not_fit_are_refused() -> None:
    A, B, C = singular(0)
    with pytest.raises(ValueError, match=r"C: shape \(4, 5\)"):
        local_minimax(A, B, C.mT)
    with pytest.raises(ValueError, match="A: shape"):
        local_minimax(A[:3], B, C)


def test_the_catalog_knows_both() -> None:
    assert catalog.get("extragradient").kind == "driver"
    assert catalog.get("local-minimax").kind == "diagnostic"
