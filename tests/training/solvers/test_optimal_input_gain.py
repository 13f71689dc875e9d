"""Optimal input gain (Optimal Input Gain: All You Need to Supercharge a Feed-Forward Neural Network, arXiv 2303.17732)."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.training import BypassMLP, OptimalInputGain
from poise.training.solvers import optimal_input_gain

CASES: list[dict[str, Any]] = [
    {"direction": direction, "gains": gains} for direction in ("hwo", "bp") for gains in ("input", "scalar")
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(samples: int = 60, inputs: int = 4, outputs: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs of unlike scales that hang together, and targets that no linear map gives."""
    x = normal(samples, inputs) @ normal(inputs, inputs, seed=1) + 0.5
    x = x * torch.logspace(-0.5, 0.5, inputs, dtype=torch.float64)
    return x, torch.sin(x @ normal(inputs, outputs, seed=2)) + 0.1 * normal(samples, outputs, seed=3)


def network(inputs: int = 4, hidden: int = 5, outputs: int = 2, activation: nn.Module | None = None) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(inputs, hidden), activation or nn.Tanh(), nn.Linear(hidden, outputs)).double()


def bypassed(inputs: int = 4, hidden: int = 5, outputs: int = 2) -> BypassMLP:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return BypassMLP(inputs, hidden, outputs).double()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def errors(model: nn.Module, x: Tensor, t: Tensor, iterations: int, **case: Any) -> list[float]:
    solver = OptimalInputGain(model, **case)
    return [found.solved for found in solver.fit(x, t, iterations)] + [solver.error(x, t)]


def reference(model: nn.Sequential, x: Tensor, t: Tensor, iterations: int, direction: str, gains: str) -> list[float]:
    """Errors after each solve of the output weights, for tanh without bypass, by loops over samples, outputs and inputs."""
    first: Any = model[0]
    W = np.hstack([first.weight.detach().numpy(), first.bias.detach().numpy()[:, None]])
    X, T = np.hstack([x.numpy(), np.ones((len(x), 1))]), t.numpy()
    count, inputs, outputs = len(X), X.shape[1], T.shape[1]

    def solve(W: np.ndarray) -> np.ndarray:
        return np.linalg.lstsq(np.hstack([np.tanh(X @ W.T), np.ones((count, 1))]), T, rcond=None)[0].T

    def error(W: np.ndarray, Wo: np.ndarray) -> float:
        return sum(
            float(np.sum((T[p] - Wo @ np.append(np.tanh(W @ X[p]), 1.0)) ** 2)) for p in range(count)
        ) / count  # fmt: skip

    found = []
    for _ in range(iterations):
        Wo = solve(W)
        found.append(error(W, Wo))
        G, R = np.zeros_like(W), np.zeros((inputs, inputs))
        for p in range(count):
            f = np.tanh(W @ X[p])
            e = T[p] - Wo @ np.append(f, 1.0)
            G += 2 / count * np.outer((1 - f**2) * (Wo[:, :-1].T @ e), X[p])
            R += np.outer(X[p], X[p]) / count
        D = G @ np.linalg.inv(R) if direction == "hwo" else G
        H = np.zeros((inputs, inputs))
        for p in range(count):
            slope = 1 - np.tanh(W @ X[p]) ** 2
            for i in range(outputs):
                v = np.array([X[p][m] * sum(Wo[i, k] * slope[k] * D[k, m] for k in range(len(W))) for m in range(inputs)])
                H += 2 / count * np.outer(v, v)
        g = (G * D).sum(0)
        r = np.linalg.solve(H, g) if gains == "input" else np.full(inputs, g.sum() / H.sum())
        while error(W + D * r, Wo) > found[-1]:
            r = r / 2
        W = W + D * r
    return [*found, error(W, solve(W))]


@every_case
def test_it_is_the_formula(case: dict[str, Any]) -> None:
    x, t = problem()
    assert np.allclose(errors(network(), x, t, 6, **case), reference(network(), x, t, 6, **case), rtol=1e-9, atol=0)


def test_the_reference_tells_it_from_its_mutant() -> None:
    x, t = problem()
    wrong = mutated(catalog.get("optimal-input-gain"))
    for case in CASES:
        model = network()
        found = [one.solved for one in wrong(model, **case).fit(x, t, 6)]
        assert not np.allclose(found, reference(network(), x, t, 5, **case), rtol=1e-4)


# -- what the paper says of it -------------------------------------------------------------------------------------------


def parts_of(
    model: nn.Module, x: Tensor, t: Tensor, direction: str
) -> tuple[Tensor, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """W with its bias, -dE/dW and D, and E as a function of W; all by autograd through the model itself."""
    hidden: Any = model.get_submodule("hidden") if isinstance(model, BypassMLP) else model.get_submodule("0")
    prefix = "hidden" if isinstance(model, BypassMLP) else "0"
    W = torch.cat([hidden.weight, hidden.bias[:, None]], 1).detach()

    def error(W: Tensor) -> Tensor:
        given = {f"{prefix}.weight": W[:, :-1], f"{prefix}.bias": W[:, -1]}
        return (t - torch.func.functional_call(model, given, (x,))).square().sum(1).mean()

    G = -torch.func.grad(error)(W)
    ahead = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    D = G @ torch.linalg.inv(ahead.mT @ ahead / len(x)) if direction == "hwo" else G
    return W, G, D, error


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tanh": network,
    "bypass": bypassed,
    "silu": lambda: network(activation=nn.SiLU()),
    "relu": lambda: network(activation=nn.ReLU()),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("direction", ["hwo", "bp"])
def test_gains_solve_newtons_equations_of_the_linearized_network(make: Callable[[], nn.Module], direction: Any) -> None:
    """g is -dE/dr at r = 0, and H is J^T J of the outputs as functions of r: both by autograd, and r = H^-1 g."""
    x, t = problem()
    model = make()
    solver = OptimalInputGain(model, direction)
    solver.solve_output(x, t)
    W, G, D, error = parts_of(model, x, t, direction)
    slope = -torch.func.grad(lambda r: error(W + D * r))(torch.zeros(5, dtype=torch.float64))
    g = (G * D).sum(0)
    assert torch.allclose(slope, g, rtol=1e-10)
    if direction == "bp":
        assert torch.allclose(slope, G.square().sum(0), rtol=1e-10)
    prefix = "hidden" if isinstance(model, BypassMLP) else "0"

    def outputs(r: Tensor) -> Tensor:
        V = W + D * r
        return torch.func.functional_call(model, {f"{prefix}.weight": V[:, :-1], f"{prefix}.bias": V[:, -1]}, (x,)).flatten()

    J = torch.func.jacrev(outputs)(torch.zeros(5, dtype=torch.float64))
    H = 2 / len(x) * J.mT @ J
    found = solver.step(x, t)
    assert torch.allclose(found.gains * 2**found.halvings, torch.linalg.solve(H, g), rtol=1e-7)


@pytest.mark.parametrize("direction", ["hwo", "bp"])
def test_gains_forced_equal_are_the_one_optimal_learning_factor(direction: Any) -> None:
    x, t = problem()
    model = network()
    solver = OptimalInputGain(model, direction, "scalar")
    solver.solve_output(x, t)
    W, _, D, error = parts_of(model, x, t, direction)

    def outputs(z: Tensor) -> Tensor:
        V = W + D * z
        return torch.func.functional_call(model, {"0.weight": V[:, :-1], "0.bias": V[:, -1]}, (x,))

    zero = torch.zeros((), dtype=torch.float64)
    v = torch.func.jvp(outputs, (zero,), (torch.ones_like(zero),))[1]
    slope = -torch.func.grad(lambda z: error(W + D * z))(zero)
    found = solver.step(x, t)
    factor = found.gains * 2**found.halvings
    assert torch.allclose(factor, slope / (2 / len(x) * v.square().sum()), rtol=1e-10)
    assert bool((factor == factor[0]).all())


@every_case
def test_other_units_of_an_input_change_nothing_but_for_plain_gradients(case: dict[str, Any]) -> None:
    x, t = problem()
    units = torch.tensor([1.0, 30.0, 0.02, 5.0], dtype=torch.float64)
    here, there = network(), network()
    with torch.no_grad():
        there[0].weight /= units  # pyright: ignore[reportOperatorIssue]
    first, second = (np.array(errors(m, some, t, 12, **case)) for m, some in ((here, x), (there, x * units)))
    gap = float(np.abs(first - second).max())
    if case == {"direction": "bp", "gains": "scalar"}:
        assert gap > 1e-3
    else:
        assert gap < 1e-10


@pytest.mark.parametrize("make", [network, bypassed])
def test_at_equal_iterations_gains_are_below_one_learning_factor(make: Callable[[], nn.Module]) -> None:
    x, t = problem(samples=200)
    for direction in ("bp", "hwo"):
        ends = {gains: errors(make(), x, t, 15, direction=direction, gains=gains)[-1] for gains in ("input", "scalar")}
        assert ends["input"] < ends["scalar"]


# -- safeguards ----------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_error_never_rises(case: dict[str, Any], dtype: torch.dtype) -> None:
    x, t = problem(outputs=1)
    x, t = x.to(dtype), (10 * t.sign()).to(dtype)
    solver = OptimalInputGain(network(outputs=1, activation=nn.GELU()).to(dtype), **case)
    history = solver.fit(x, t, 25)
    found = [value for one in history for value in (one.solved, one.moved)]
    slack = 100 * torch.finfo(dtype).eps * found[0]
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(found))
    assert all(one.moved <= one.solved for one in history)
    assert found[-1] < 0.9 * found[0]


def test_a_step_that_would_raise_the_error_is_halved_until_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = problem()
    plain, pushed = network(), network()
    wanted = OptimalInputGain(plain).step(x, t)
    assert wanted.halvings == 0
    given = OptimalInputGain.move
    monkeypatch.setattr(OptimalInputGain, "move", lambda self, x, t, change, r, e: given(self, x, t, 64 * change, 64 * r, e))
    found = OptimalInputGain(pushed).step(x, t)
    assert 0 < found.halvings <= 6
    assert torch.allclose(found.gains * 2**found.halvings, 64 * wanted.gains)
    assert found.moved <= found.solved


def test_a_direction_in_which_the_error_only_rises_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = problem()
    model = network()
    given = OptimalInputGain.move
    monkeypatch.setattr(OptimalInputGain, "move", lambda self, x, t, change, r, e: given(self, x, t, -change, r, e))
    before = weights(model[0])
    found = OptimalInputGain(model).step(x, t)
    assert found.moved == found.solved
    assert not found.gains.any()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model[0]), strict=True))


@every_case
def test_inputs_that_are_constant_repeated_or_zero_change_nothing_but_for_plain_gradients(case: dict[str, Any]) -> None:
    x, t = problem()
    more = torch.cat([x, 2 * x[:, :1], torch.zeros_like(x[:, :1]), torch.full_like(x[:, :1], 3.0)], 1)
    model, wider = network(), network(inputs=7)
    with torch.no_grad():
        for mine, other in zip(wider.parameters(), model.parameters(), strict=True):
            mine.zero_()[tuple(map(slice, other.shape))] = other
    wanted, found = errors(model, x, t, 10, **case), errors(wider, more, t, 10, **case)
    if case == {"direction": "bp", "gains": "scalar"}:
        assert found[-1] < found[0]
    else:
        assert np.allclose(found, wanted, rtol=1e-7)
    assert all(bool(p.isfinite().all()) for p in wider.parameters())


@every_case
def test_fewer_samples_than_hidden_units_are_fitted_exactly(case: dict[str, Any]) -> None:
    x, t = problem(samples=4)
    model = network()
    assert max(errors(model, x, t, 3, **case)) < 1e-20
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@every_case
def test_where_nothing_is_left_to_learn_nothing_moves(case: dict[str, Any]) -> None:
    x, t = problem()
    model = network()
    before = weights(model[0])
    history = OptimalInputGain(model, **case).fit(x, torch.zeros_like(t), 2)
    assert [one.moved for one in history] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model[0]), strict=True))


def test_units_do_not_decide_what_counts_as_zero() -> None:
    """Straight to the outputs go inputs of 1e-14 and of 1e14."""
    x, t = problem()
    units = torch.tensor([1.0, 1e14, 1e-14, 1.0], dtype=torch.float64)
    here, there = bypassed(), bypassed()
    with torch.no_grad():
        there.hidden.weight /= units
    assert np.allclose(errors(there, x * units, t, 3), errors(here, x, t, 3), rtol=1e-7)


def test_two_equal_hidden_units_are_solved_with_the_least_norm() -> None:
    x, t = problem()
    model = network()
    with torch.no_grad():
        model[0].weight[1] = model[0].weight[0]  # pyright: ignore[reportIndexIssue]
        model[0].bias[1] = model[0].bias[0]  # pyright: ignore[reportIndexIssue]
    OptimalInputGain(model).solve_output(x, t)
    assert torch.allclose(model[2].weight[:, 0], model[2].weight[:, 1])  # pyright: ignore[reportIndexIssue]


# -- use -----------------------------------------------------------------------------------------------------------------


@every_case
def test_steps_in_two_sittings_are_bitwise_those_in_one(case: dict[str, Any]) -> None:
    x, t = problem()
    whole, first, second = network(), network(), network(activation=nn.Tanh())
    at_once = OptimalInputGain(whole, **case).fit(x, t, 6)
    begun = OptimalInputGain(first, **case).fit(x, t, 2)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    solver = OptimalInputGain(second, **case)
    rest = [solver.step(x, t) for _ in range(4)]
    solver.solve_output(x, t)
    assert [one.solved for one in begun + rest] == [one.solved for one in at_once]
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))


def test_classes_are_one_hot_targets() -> None:
    x, t = problem()
    classes = t.argmax(1)
    one_hot = nn.functional.one_hot(classes, 2).double()
    assert errors(network(), x, classes, 5) == errors(network(), x, one_hot, 5)
    model, sides = network(), (x[:, 0] > x[:, 0].median()).long()
    OptimalInputGain(model).fit(x, sides, 20)
    assert float((model(x).argmax(1) == sides).double().mean()) > 0.9


def test_one_output_takes_targets_without_a_dimension_for_it() -> None:
    x, t = problem(outputs=1)
    assert errors(network(outputs=1), x, t[:, 0], 3) == errors(network(outputs=1), x, t, 3)


def test_bypass_weights_leave_nothing_to_do_where_the_target_is_linear() -> None:
    x, _ = problem()
    t = x @ normal(4, 2, seed=5) + 1
    assert errors(bypassed(), x, t, 0)[-1] < 1e-20
    assert errors(network(), x, t, 0)[-1] > 1e-3


@pytest.mark.parametrize("where", [0, 2])
def test_layers_may_have_no_bias(where: int) -> None:
    x, t = problem()
    model = network()
    layer: Any = model[where]
    model[where] = nn.Linear(layer.in_features, layer.out_features, bias=False).double()
    history = OptimalInputGain(model).fit(x, t, 5)
    assert history[-1].solved < history[0].solved
    assert len(history[0].gains) == (4 if where == 0 else 5)


def test_samples_in_chunks_give_the_same_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t = problem()
    whole = errors(network(), x, t, 5)
    monkeypatch.setattr(optimal_input_gain, "CHUNK", 70)  # seven samples
    assert np.allclose(errors(network(), x, t, 5), whole, rtol=1e-10)


def test_the_output_weights_are_the_least_squares_solution() -> None:
    x, t = problem()
    model = bypassed()
    OptimalInputGain(model).solve_output(x, t)
    model.zero_grad()
    (t - model(x)).square().sum(1).mean().backward()
    for p in (model.output.weight, model.output.bias, model.bypass.weight):
        assert p.grad is not None
        assert float(p.grad.abs().max()) < 1e-12


@pytest.mark.parametrize(
    "model, error, message",
    [
        (nn.Linear(4, 2), TypeError, "Sequential"),
        (nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), TypeError, "Sequential"),
        (nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1), nn.Linear(5, 2)), ValueError, "by itself"),
        (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(6, 2)), ValueError, "5 hidden units"),
        (nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(torch.bfloat16), TypeError, "bfloat16"),
    ],
)
def test_other_models_are_refused(model: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OptimalInputGain(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(60, 3)}, r"x: must have shape \(samples, 4\)"),
        ({"x": torch.zeros(0, 4)}, "x: must have shape"),
        ({"t": torch.zeros(59, 2)}, r"t: must have shape \(60, 2\)"),
        ({"t": torch.zeros(60)}, "t: must have shape"),
        ({"t": torch.full((60,), 2)}, r"classes must lie in 0 \.\. 1"),
        ({"x": torch.full((60, 4), torch.nan)}, "x: must be finite"),
        ({"t": torch.full((60, 2), torch.inf)}, "t: must be finite"),
        ({"iterations": -1}, "iterations=-1"),
    ],
)
def test_data_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    x, t = problem()
    model = network()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        OptimalInputGain(model).fit(**({"x": x, "t": t, "iterations": 2} | change))
    assert all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("bad", [{"direction": "newton"}, {"gains": "none"}])
def test_unknown_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        OptimalInputGain(network(), **bad)


def test_the_catalog_knows_it_as_a_solver_with_a_path_that_imports() -> None:
    found = catalog.get("optimal-input-gain")
    assert (found.family, found.kind) == ("training", "solver")
    module, _, name = found.import_path.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is OptimalInputGain
