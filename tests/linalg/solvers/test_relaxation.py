"""SOR and its tuner (Learning to Relax: Setting Solver Parameters Across a Sequence of Linear System Instances, 2310.02246)."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from torch import Tensor

from poise import catalog
from poise.linalg.solvers.relaxation import (
    ContextualTsallisINF,
    TsallisINF,
    optimal_omega,
    sor,
    ssor_pcg,
    tsallis_probabilities,
)

GRID = torch.linspace(1, 1.95, 20).tolist()


def laplacian(side: int) -> Tensor:
    """Of a grid of side x side unknowns: 4 on the diagonal, -1 for each neighbour."""
    line = 2 * torch.eye(side, dtype=torch.float64) - torch.diag(torch.ones(side - 1).double(), 1)
    line = line - torch.diag(torch.ones(side - 1).double(), -1)
    one = torch.eye(side, dtype=torch.float64)
    return torch.kron(line, one) + torch.kron(one, line)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(n: int) -> Tensor:
    root = normal(n, n)
    return root @ root.T / n + 0.5 * torch.eye(n).double()


@pytest.mark.parametrize("omega", [1.0, 1.4])
def test_each_iterate_is_the_sweep_over_unknowns_one_by_one(omega: float) -> None:
    A, b, x = positive(8), normal(8, seed=1), normal(8, seed=2)
    by_hand = x.clone()
    for steps in range(1, 6):
        for i in range(8):
            solved = (b[i] - A[i] @ by_hand + A[i, i] * by_hand[i]) / A[i, i]
            by_hand[i] = (1 - omega) * by_hand[i] + omega * solved
        found = sor(A, b, omega, x, limit=steps)
        assert (found.x - by_hand).abs().max() < 1e-13
        assert found.residual == pytest.approx(float((b - A @ by_hand).norm() / (b - A @ x).norm()), rel=1e-9)


def test_the_best_omega_of_a_grid_is_known_and_is_the_best() -> None:
    """A grid of 10 x 10 has beta = cos(pi / 11), so that omega = 2 / (1 + sin(pi / 11)) = 1.5604."""
    A, b = laplacian(10), torch.ones(100, dtype=torch.float64)
    best = optimal_omega(A)
    assert best == pytest.approx(2 / (1 + math.sin(math.pi / 11)), abs=1e-12)
    assert best == pytest.approx(1.5604, abs=5e-5)
    counts = {omega: sor(A, b, omega).iterations for omega in (1.0, best - 0.1, best, best + 0.1)}
    assert counts[best] == min(counts.values())
    assert counts[best] < 45 and counts[1.0] > 5 * counts[best]
    # in the long run Gauss-Seidel gains a factor cos(pi / 11)^2 a step
    assert 0.8 < counts[1.0] / (math.log(1e-8) / math.log(math.cos(math.pi / 11) ** 2)) < 1.1


def test_preconditioned_conjugate_gradients_are_best_in_their_krylov_space() -> None:
    """After k steps the error is the least, in the norm of A, over x_0 + span{(P^-1 A)^j P^-1 r}; P is built entry by entry."""
    A, b, start, omega = positive(9), normal(9, seed=1), normal(9, seed=2), 1.3
    D, L = torch.diag(A.diagonal()), A.tril(-1)
    P = (D + omega * L) @ torch.linalg.inv(D) @ (D + omega * L).T / (omega * (2 - omega))
    exact = torch.linalg.solve(A, b)
    root = torch.linalg.cholesky(A).T  # ||root e|| is the norm of A
    v = torch.linalg.solve(P, b - A @ start)
    basis: list[Tensor] = []
    for k in range(1, 5):
        basis.append(v / v.norm())
        v = torch.linalg.solve(P, A @ v)
        span = torch.linalg.qr(torch.stack(basis, 1)).Q
        wanted = start + span @ torch.linalg.lstsq(root @ span, (root @ (exact - start))[:, None]).solution[:, 0]
        assert (ssor_pcg(A, b, omega, start, limit=k).x - wanted).abs().max() < 1e-9


def test_with_either_order_of_the_triangles_it_takes_as_many_steps_but_for_one() -> None:
    """The other order is this one with the unknowns numbered backwards."""
    for seed, omega in itertools.product(range(5), (0.8, 1.2, 1.6)):
        A, b = laplacian(7) + 0.1 * seed * torch.eye(49).double(), normal(49, seed=seed)
        one, other = ssor_pcg(A, b, omega), ssor_pcg(A.flip(0, 1), b.flip(0), omega)
        assert abs(one.iterations - other.iterations) <= 1
        assert (A @ one.x - b).norm() < 1.1e-8 * b.norm()
        assert one.iterations < sor(A, b, omega).iterations


def test_a_solved_system_takes_no_step_and_one_that_does_not_converge_says_so() -> None:
    A, b = positive(5), normal(5)
    assert sor(A, torch.zeros(5).double()).iterations == 0
    indefinite = A - 3 * torch.eye(5).double()
    found = sor(indefinite, b, limit=7)
    assert found.iterations == 7 and found.residual > 1e-8
    with pytest.raises(ValueError, match="Jacobi"):
        optimal_omega(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"A": torch.ones(3, 4)}, r"A: shape \(3, 4\)"),
        ({"x": torch.ones(4)}, r"x: shape \(4,\)"),
        ({"omega": 2.0}, r"omega=2\.0"),
        ({"omega": 0.0}, r"omega=0\.0"),
        ({"A": torch.ones(3, 3) - torch.eye(3)}, "zeros"),
    ],
)
@pytest.mark.parametrize("solver", [sor, ssor_pcg])
def test_what_does_not_fit_is_refused(solver: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver(**({"A": torch.eye(3), "b": torch.ones(3)} | change))


# -- the bandit ----------------------------------------------------------------------------------------------------------


def test_probabilities_sum_to_one_wherever_the_estimates_lie() -> None:
    """Newton's method from -1, in 20 steps, is what the released code does: on many of these it lands far away."""
    generator = random.Random(0)
    lost = 0
    for _ in range(300):
        d, t = generator.choice([1, 2, 20, 100]), generator.choice([1, 10, 1000, 10**6])
        k = torch.tensor([10 ** generator.uniform(-3, 6) * generator.random() for _ in range(d)], dtype=torch.float64)
        eta = 2 / math.sqrt(t)
        p = tsallis_probabilities(k, eta)
        assert abs(float(p.sum()) - 1) < 1e-12
        x = k - 2 / (eta * p.sqrt())
        assert float(x.max() - x.min()) <= 1e-9 * float(k.abs().max() + 1 / eta), "one x for all"
        below = float(k.min()) - float(x[0])
        assert 2 / eta * (1 - 1e-9) <= below <= 2 * math.sqrt(d) / eta * (1 + 1e-9)
        x = torch.tensor(-1.0).double()
        for _ in range(20):
            q = 4 / (eta * (k - x)).square()
            x = x - (q.sum() - 1) / (eta * q.pow(1.5).sum())
        lost += not abs(float((4 / (eta * (k - x)).square()).sum()) - 1) < 1e-6
    assert lost > 30


def test_a_cost_counts_by_how_unlikely_it_was_to_be_seen() -> None:
    tuner = TsallisINF(GRID, seed=3)
    for cost in (40.0, 25.0, 60.0):
        before, p = tuner.k.clone(), tuner.probabilities()
        i = tuner.values.index(tuner.ask())
        tuner.tell(cost)
        before[i] += (cost - 1) / p[i]
        assert torch.allclose(tuner.k, before, rtol=1e-12)
    mean = (39.0 + 24.0 + 59.0) / 3
    assert torch.allclose(tuner.probabilities(), tsallis_probabilities(tuner.k / mean, 2 / math.sqrt(4)), rtol=1e-12)
    wrong = mutated(catalog.get("learning-to-relax"))(GRID, seed=3)
    wrong.tell(40.0)
    assert float(wrong.k.max()) < 0.5 * 39 * 20


def costs(instances: int = 24) -> Tensor:
    """Iterations of every omega on 7 x 7 grids with random shifts and right-hand sides, (instances, 20)."""
    generator = random.Random(0)
    table = []
    for number in range(instances):
        A, b = laplacian(7) + 0.5 * generator.random() * torch.eye(49).double(), normal(49, seed=number)
        table.append([float(sor(A, b, omega).iterations) for omega in GRID])
    return torch.tensor(table, dtype=torch.float64)


def test_on_a_stream_of_systems_it_comes_near_the_best_fixed_omega() -> None:
    table = costs()
    means = table.mean(0)
    for seed in range(2):
        tuner, generator, seen = TsallisINF(GRID, seed=seed), random.Random(seed), []
        for _ in range(3000):
            row = table[generator.randrange(len(table))]
            seen.append(float(row[GRID.index(tuner.ask())]))
            tuner.tell(seen[-1])
        assert sum(seen) / 3000 < 1.3 * float(means.min())
        assert sum(seen[-500:]) / 500 < 1.15 * float(means.min())
        assert float(means.min()) < 0.4 * float(means[0]) and float(means.min()) < 0.5 * float(means.mean())


def test_with_a_context_each_part_of_the_interval_finds_its_own() -> None:
    """The cost of a value is how far it is from the context, so that one value for all is as bad as any."""
    values = [0.1, 0.3, 0.5, 0.7, 0.9]
    runs = {}
    for name in ("contextual", "one for all"):
        tuner, alone, generator, total = ContextualTsallisINF(values, 0.0, 1.0), TsallisINF(values), random.Random(1), 0.0
        for t in range(3000):
            c = generator.random()
            value = tuner.ask(c) if name == "contextual" else alone.ask()
            cost = 1 + 20 * abs(value - c)
            if name == "contextual":
                tuner.tell(c, cost)
            else:
                alone.tell(cost)
            total += cost if t >= 2500 else 0.0
        runs[name] = total / 500
    assert runs["contextual"] < 0.5 * runs["one for all"]


def test_contexts_belong_to_the_nearest_middle() -> None:
    tuner = ContextualTsallisINF(GRID, -0.15, 0.65, bins=5)
    middles = [-0.15 + 0.8 * (i + 0.5) / 5 for i in range(5)]
    for context in (-3.0, -0.15, 0.0, 0.02, 0.2, 0.4, 0.64, 0.65, 7.0):
        nearest = min(range(5), key=lambda i: abs(middles[i] - context))
        assert tuner.tuner(context) is tuner.tuners[nearest]


def test_asked_twice_it_answers_the_same_and_seeds_differ() -> None:
    tuner = TsallisINF(GRID)
    asked = []
    for _ in range(30):
        asked.append(tuner.ask())
        assert tuner.ask() == asked[-1]
        tuner.tell(20.0)
    other = TsallisINF(GRID, seed=1)
    again = []
    for _ in range(30):
        again.append(other.ask())
        other.tell(20.0)
    assert asked != again and len(set(asked)) > 5


def test_costs_that_are_none_and_no_values_are_refused() -> None:
    for cost in (0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="cost="):
            TsallisINF(GRID).tell(cost)
    with pytest.raises(ValueError, match="values"):
        TsallisINF([])
    with pytest.raises(ValueError, match="low=1"):
        ContextualTsallisINF(GRID, 1.0, 1.0)
    tuner = TsallisINF(GRID)
    tuner.tell(1.0)  # the least that can be: nothing is known yet
    assert float(tuner.probabilities().min()) == pytest.approx(0.05)


def test_the_catalog_knows_it_as_a_solver_with_a_path_that_imports() -> None:
    found = catalog.get("learning-to-relax")
    assert (found.family, found.kind) == ("linalg", "solver")
    module, _, name = found.import_path.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is TsallisINF
