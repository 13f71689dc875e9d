"""Phase one: what links measure, over which parameters it is added up, and what comes of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conformance.problems import Grads, distance, draw, leaves, play, same
from optim.toys import apply, apply_matrix, apply_tensor, gain, heavy, optimizer, ramp, update_of, zeros
from torch import Tensor

from poise.optim import Context, Param, Route, Slot, Transform, by_name, chain, everything
from poise.optim.transform import State
from poise.optim.transforms.adaptive import adam


class over(Transform):
    """`u <- u / (sum of what it measured)`, over all parameters or, with `own`, over this one."""

    def __init__(self, reads: Any = "grad", absent: Any = "skip", own: bool = False) -> None:
        self.reads, self.absent, self.own = reads, absent, own

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"sum": u.double().sum()}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u / (k.own if self.own else k.total)["sum"]


class over_matrices(over):
    unit = "matrix"


class over_tensors(over):
    unit = "tensor"


class over_pieces(over):
    unit = "piece"


KINDS = [over, over_matrices, over_tensors, over_pieces]
A, B = ramp(2, 2), 10 * ramp(2, 3)  # sums 10 and 210


@pytest.mark.parametrize("kind", KINDS)
def test_totals_run_over_all_parameters(kind: type[over]) -> None:
    assert distance(update_of(kind(), A, B), [A / 220, B / 220]) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_measured_of_one_parameter_is_its_own(kind: type[over]) -> None:
    assert distance(update_of(kind(own=True), A, B), [A / 10, B / 210]) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_by_default_the_raw_gradient_is_measured_wherever_the_link_stands(kind: type[over]) -> None:
    assert distance(update_of(chain(gain(7.0), kind()), A, B), [7 * A / 220, 7 * B / 220]) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_that_asks_for_it_measures_the_update_that_reaches_it(kind: type[over]) -> None:
    assert distance(update_of(chain(gain(3.0), kind("update"), gain(3.0)), A, B), [3 * A / 220, 3 * B / 220]) < 1e-14


def test_every_link_that_measures_the_update_sees_what_those_before_it_made_of_it() -> None:
    """Normalized, then averaged, then normalized again: the second total can only be known after the first was applied."""
    start, grads = draw([(4, 3), (5,)], 5)
    params = leaves(start)
    found = play(optimizer(params, chain(over("update"), heavy(), over("update")), lr=0.1), params, grads)
    weights, buffers = [w.clone() for w in start], [torch.zeros_like(w) for w in start]
    for row in grads:
        total = torch.stack([g.sum() for g in row if g is not None]).sum()
        for i, g in enumerate(row):
            assert g is not None
            buffers[i] = 0.5 * buffers[i] + g / total
        again = torch.stack([b.sum() for b in buffers]).sum()
        for w, b in zip(weights, buffers, strict=True):
            w -= 0.1 * b / again
    assert distance(found, weights) < 1e-12


@pytest.mark.parametrize("reads", ["grad", "update"])
def test_totals_run_over_parameters_of_different_formats(reads: str) -> None:
    grads: Any = [torch.ones(4), torch.ones(4, dtype=torch.float64), torch.ones(8, dtype=torch.bfloat16)]
    params = leaves([torch.zeros_like(g) for g in grads])
    assert same(play(optimizer(params, over(reads), lr=1.0), params, [grads]), [-g / 16 for g in grads])


@pytest.mark.parametrize("reads", ["grad", "update"])
def test_one_link_in_two_rules_is_one_link_over_the_parameters_of_both(reads: str) -> None:
    shared = over(reads)
    params = zeros((2, 2), (2, 3))
    routes = [Route("a", chain(shared, gain(2.0)), by_name("a*")), Route("b", chain(heavy(), shared), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    assert distance(play(opt, params, [[A, B]]), [-2 * A / 220, -B / 220]) < 1e-15


@pytest.mark.parametrize("reads", ["grad", "update"])
def test_two_links_that_are_only_equal_have_totals_of_their_own(reads: str) -> None:
    params = zeros((2, 2), (2, 3))
    routes = [Route("a", chain(over(reads)), by_name("a*")), Route("b", chain(over(reads)), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    assert distance(play(opt, params, [[A, B]]), [-A / 10, -B / 210]) < 1e-15


def test_two_rules_that_wait_for_each_other_are_refused() -> None:
    """Each would need the other's total first."""
    first, second = over("update"), over("update")
    params = zeros((2, 2), (2, 3))
    named = [("a", params[0]), ("b", params[1])]
    routes = [Route("a", chain(first, second), by_name("a*")), Route("b", chain(second, first), everything)]
    with pytest.raises(ValueError, match="opposite orders"):
        play(optimizer(named, routes, lr=1.0), params, [[A, B]])


def test_two_rules_may_measure_two_links_in_one_order() -> None:
    first, second = over("update"), over("update")
    params = zeros((2, 2), (2, 3))
    routes = [Route("a", chain(first, gain(3.0), second), by_name("a*")), Route("b", chain(first, second), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    total = (3 * 10 + 210) / 220  # of what the first link made, on its way to the second
    assert distance(play(opt, params, [[A, B]]), [-3 * A / 220 / total, -B / 220 / total]) < 1e-15


def test_a_rule_without_the_link_does_not_wait_for_it() -> None:
    params = zeros((2, 2), (2, 3))
    routes = [Route("a", chain(gain(2.0)), by_name("a*")), Route("b", chain(over("update")), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    assert distance(play(opt, params, [[A, B]]), [-2 * A, -B / 210]) < 1e-15


# -- parameters without gradient -------------------------------------------------------------------------------------------


class counting(Transform):
    """The mean gradient entry, and the size of all weights that were counted."""

    def __init__(self, absent: Any, reads: Any = "grad") -> None:
        self.absent, self.reads = absent, reads

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"sum": u.sum(), "count": torch.ones_like(u).sum(), "weights": x.sum()}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return 0 * u + k.total["sum"] / k.total["count"] + k.total["weights"]


@pytest.mark.parametrize("reads", ["grad", "update"])
@pytest.mark.parametrize(("absent", "wanted"), [("skip", 10 / 4 + 4.0), ("zeros", 10 / 10 + 10.0)])
def test_a_parameter_without_gradient_is_left_out_or_counts_as_zeros(absent: str, wanted: float, reads: str) -> None:
    params = leaves([torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)])
    found = play(optimizer(params, counting(absent, reads), lr=1.0), params, [[A, None]])
    assert torch.equal(found[0], torch.full_like(A, 1 - wanted))
    assert torch.equal(found[1], torch.ones_like(B))


def test_parameters_of_a_rule_that_has_no_gradient_at_all_are_counted_too() -> None:
    shared = counting("zeros")
    params = leaves([torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)])
    routes = [Route("a", chain(shared), by_name("a*")), Route("b", chain(shared, heavy()), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    assert torch.equal(play(opt, params, [[A, None]])[0], torch.full_like(A, 1 - 11.0))
    assert int(opt.state[params[1]]["step"]) == 0


def test_counting_a_parameter_without_gradient_does_not_write_to_its_state() -> None:
    class remembering(counting):
        def slots(self, p: Param) -> dict[str, Slot]:
            return {"times": Slot(tuple(p.shape))}

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            state["times"] = state["times"] + 1
            return super().measure(u, state, x, k)

    params = zeros((2, 2), (2, 3))
    opt = optimizer(params, remembering("zeros"), lr=1.0)
    play(opt, params, [[A, None]])
    assert torch.equal(opt.state[params[0]]["times"], torch.ones_like(A))
    assert torch.equal(opt.state[params[1]]["times"], torch.zeros_like(B))


# -- measure and state -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", [apply, apply_matrix, apply_tensor])
@pytest.mark.parametrize("returns", [{}, {"sum": True}], ids=["nothing", "a sum"])
def test_what_measure_writes_is_seen_by_update(link: type[apply], returns: dict[str, bool]) -> None:
    def measure(u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        state["seen"] = state["seen"] + u
        return {name: u.sum() for name in returns}

    measuring = type(link.__name__, (link,), {"measure": lambda self, u, state, x, k: measure(u, state, x, k)})
    rule = measuring(lambda u, state, x, k: state["seen"], {"seen": 100.0})
    params = zeros((2, 2))
    opt = optimizer(params, chain(gain(3.0), rule), lr=1.0)
    assert torch.equal(play(opt, params, [[A]])[0], -(100 + A))
    assert torch.equal(opt.state[params[0]]["seen"], 100 + A)


def test_scalars_are_there_in_measure_and_reduce() -> None:
    class weighted(over):
        defaults = {"weight": 3.0}

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            return {"sum": k.weight * u.sum()}

        def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
            return {"sum": totals["sum"] + k.weight}

    assert distance(update_of(chain(gain(), weighted()), A), [2 * A / 33]) < 1e-15


# -- reduce ----------------------------------------------------------------------------------------------------------------


class record(Transform):
    """Gradients over the largest total so far; counts the steps in which it rose."""

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"largest": Slot((), shared=True), "rises": Slot((), dtype=torch.int64, kind="exact", shared=True)}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"sum": u.double().sum()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        shared["rises"] = shared["rises"] + (totals["sum"] > shared["largest"])
        shared["largest"] = torch.maximum(shared["largest"], totals["sum"].to(shared["largest"].dtype))
        return {"divisor": shared["largest"]}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u / k.total["divisor"]


def test_shared_state_is_kept_once_for_all_parameters_of_a_link() -> None:
    params = zeros((2, 2), (2, 3), (4,))
    opt = optimizer([{"params": params[:2]}, {"params": params[2:]}], record(), lr=1.0)
    assert [list(opt.state[p]) for p in params] == [["step", "largest", "rises"], ["step"], ["step"]]


def test_shared_state_of_two_links_is_kept_apart() -> None:
    params = zeros((2, 2), (2, 3))
    routes = [Route("a", chain(record()), by_name("a*")), Route("b", chain(record()), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    play(opt, params, [[A, B]])
    assert [float(opt.state[p]["largest"]) for p in params] == [10.0, 210.0]


def test_what_reduce_makes_of_the_totals_is_what_update_sees() -> None:
    params = zeros((2, 2), (2, 3))
    opt = optimizer(params, record(), lr=1.0)
    assert distance(play(opt, params, [[A, B]]), [-A / 220, -B / 220]) < 1e-15
    assert distance(play(opt, params, [[A, A.new_zeros(2, 3)]]), [-2 * A / 220, -B / 220]) < 1e-15
    assert int(opt.state[params[0]]["rises"]) == 1


def test_shared_state_moves_on_though_the_parameter_that_keeps_it_has_no_gradient() -> None:
    params = zeros((2, 2), (2, 3))
    opt = optimizer(params, record(), lr=1.0)
    play(opt, params, [[None, B]])
    assert float(opt.state[params[0]]["largest"]) == 210.0
    assert int(opt.state[params[0]]["step"]) == 0


def test_shared_state_is_saved_and_restored() -> None:
    params, fresh = zeros((2, 2), (2, 3)), zeros((2, 2), (2, 3))
    opt, again = optimizer(params, record(), lr=1.0), optimizer(fresh, record(), lr=1.0)
    play(opt, params, [[A, B], [2 * A, B]])
    saved = copy.deepcopy(opt.state_dict())
    assert [sorted(slots) for slots in saved["state"].values()] == [["largest", "rises", "step"], ["step"]]
    again.load_state_dict(saved)
    small: Grads = [[0.5 * A, 0.5 * B]]
    before = [p.detach().clone() for p in params]
    moved = [a - b for a, b in zip(play(opt, params, small), before, strict=True)]
    assert distance(play(again, fresh, small), moved) < 1e-15
    assert int(again.state[fresh[0]]["rises"]) == 2


def test_reduce_is_called_once_for_each_link_and_step() -> None:
    calls: list[float] = []

    class once(over):
        def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
            calls.append(float(totals["sum"]))
            return totals

    link = once()
    params = zeros((2, 2), (2, 3))
    opt = optimizer([{"params": params[:1]}, {"params": params[1:]}], chain(link, gain()), lr=1.0)
    play(opt, params, [[A, B], [A, None]])
    assert calls == [220.0, 10.0]


class watching(over):
    """Writes down what reduce is told beside the totals."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        self.seen.append((k.clock, None if k.loss is None else float(k.loss)))
        return totals


def test_the_loss_of_the_closure_reaches_reduce() -> None:
    link = watching()
    params = zeros((2, 2))
    opt = optimizer(params, link, lr=1.0)
    params[0].grad = A
    opt.step(lambda: torch.tensor(1.25))
    opt.step()
    assert link.seen == [(1, 1.25), (2, None)]


@pytest.mark.parametrize("backend", ["eager", "tiles", "chunks", "inductor"])
def test_the_loss_of_the_closure_reaches_compiled_updates(backend: str) -> None:
    """A new loss is no new kernel, and a rule that does not ask for it is none either."""

    def by_loss(u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u if k.loss is None else u * k.loss

    params = zeros((2, 2), (2, 3), dtype=torch.float32)
    opt = optimizer(params, chain(gain(), apply(by_loss)), lr=1.0, backend=backend)
    for p in params:
        p.grad = torch.ones_like(p)
    for loss in (3.0, 0.5, None):
        opt.step(None if loss is None else lambda loss=loss: torch.tensor(loss))
    assert same([p.detach() for p in params], [torch.full_like(p, -2.0 * (3.0 + 0.5 + 1.0)) for p in params])


def test_a_link_that_needs_the_loss_has_it_or_says_so_before_anything_changes() -> None:
    """A closure may return a number as well; a preview, which has no closure, takes it for 1."""
    params = zeros((2, 2))
    opt = optimizer(
        params, chain(apply(lambda u, state, x, k: u * k.loss if k.loss is not None else u, needs_loss=True), heavy()), lr=1.0
    )
    params[0].grad = A
    with pytest.raises(RuntimeError, match=r"needs the loss.*closure"):
        opt.step()
    assert same([params[0].detach()], [torch.zeros_like(A)])
    assert opt.state[params[0]]["step"] == 0
    assert same(list(opt.preview().values()), [-A])
    assert opt.plan().lines[0].update_rms > 0
    opt.step(lambda: 0.5)
    assert same([params[0].detach()], [-0.5 * A])
    opt.step(lambda: torch.tensor(2.0))
    assert same([params[0].detach()], [-0.5 * A - 2.25 * A])


def test_the_clock_counts_the_steps_of_a_rule_over_its_parameters() -> None:
    first, second = watching(), watching()
    params = zeros((2, 2), (2, 2), (2, 3))
    named = [("a0", params[0]), ("a1", params[1]), ("b", params[2])]
    routes = [Route("a", chain(first), by_name("a*")), Route("b", chain(second), everything)]
    opt = optimizer(named, routes, lr=1.0)
    play(opt, params, [[A, None, None], [None, A, None], [A, A, B], [A, None, B]])
    assert [clock for clock, _ in first.seen] == [1, 2, 3, 4]
    assert [clock for clock, _ in second.seen] == [1, 2]


def test_noise_is_not_offered_where_there_are_no_elements() -> None:
    class noisy(over):
        def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
            return {"sum": k.uniform()}

    params = zeros((2, 2))
    with pytest.raises(RuntimeError, match="uniform"):
        play(optimizer(params, noisy(), lr=1.0), params, [[A]])


# -- abandoning a step -----------------------------------------------------------------------------------------------------


class careful(Transform):
    """Abandons a step whose total is negative, and counts it."""

    def __init__(self, reads: Any = "grad") -> None:
        self.reads = reads

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"skipped": Slot((), shared=True)}

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        return {"sum": u.sum()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        skip = totals["sum"] < 0
        shared["skipped"] = shared["skipped"] + skip
        return {"skip": skip}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u


class careful_with_state(careful):
    def slots(self, p: Param) -> dict[str, Slot]:
        return {"seen": Slot(tuple(p.shape))}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        return {"skip": totals["sum"] < 0}


class busy(Transform):
    """Writes state in every phase of a step."""

    every = 1

    def slots(self, p: Param) -> dict[str, Slot]:
        return {"measured": Slot(tuple(p.shape)), "refreshed": Slot(tuple(p.shape)), "total": Slot((), shared=True)}

    def refresh(self, u: Tensor, state: State, x: Tensor, k: Context) -> None:
        state["refreshed"] = state["refreshed"] + u

    def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
        state["measured"] = state["measured"] + u
        return {"sum": u.sum()}

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        shared["total"] = shared["total"] + totals["sum"]
        return {"total": shared["total"]}

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        return u + state["measured"] + state["refreshed"] + k.total["total"]


@pytest.mark.parametrize("careful_first", [True, False])
def test_an_abandoned_step_leaves_weights_state_and_step_counts_as_they_were(careful_first: bool) -> None:
    start, grads = draw([(3, 2), (4,)], 3)
    good: Any = [[g.abs() for g in row if g is not None] for row in grads]
    bad: Any = [-g for g in good[1]]
    params, twin = leaves(start), leaves(start)

    def build(over: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        links = [careful(), busy()] if careful_first else [busy(), careful()]
        return optimizer(over, chain(heavy(), *links), lr=0.1, weight_decay=0.5)

    opt, clean = build(params), build(twin)
    before = play(opt, params, [good[0]])
    clocks = [group["clock"] for group in opt.param_groups]
    assert same(play(opt, params, [bad]), before)
    assert [int(opt.state[p]["step"]) for p in params] == [1, 1]
    assert [group["clock"] for group in opt.param_groups] == clocks
    assert same(play(opt, params, [good[2]]), play(clean, twin, [good[0], good[2]]))
    for p, q in zip(params, twin, strict=True):
        for key in set(opt.state[p]) - {"skipped"}:
            assert torch.equal(opt.state[p][key], clean.state[q][key]), key
    assert float(opt.state[params[0]]["skipped"]) == 1.0  # what reduce keeps is its own


def test_a_step_is_abandoned_for_all_parameters_even_if_one_rule_asks() -> None:
    params = zeros((2, 2), (2, 3))
    routes = [Route("a", chain(careful()), by_name("a*")), Route("b", chain(heavy()), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    assert same(play(opt, params, [[-A, B]]), [torch.zeros_like(A), torch.zeros_like(B)])
    assert torch.equal(opt.state[params[1]]["buffer"], torch.zeros_like(B))


@pytest.mark.parametrize("link", [careful("update"), careful_with_state()], ids=["reads the update", "keeps state"])
def test_a_link_that_may_have_written_already_cannot_abandon_a_step(link: Transform) -> None:
    (p,) = params = zeros((2, 2))
    with pytest.raises(ValueError, match=r"careful.*'skip'"):
        play(optimizer(params, chain(heavy(), link), lr=1.0), params, [[-A]])
    assert torch.equal(p, torch.zeros_like(A))


def test_a_preview_of_an_abandoned_step_is_empty_and_counts_nothing() -> None:
    params = zeros((2, 2))
    opt = optimizer(params, careful(), lr=1.0)
    assert opt.preview([-A]) == {}
    assert float(opt.state[params[0]]["skipped"]) == 0.0
    assert opt.preview([A]).keys() == {"param_0"}


def test_an_error_in_reduce_leaves_everything_as_it_was() -> None:
    """FloatingPointError is what clipping raises on request; whoever catches it may go on."""

    class strict(careful):
        def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
            if totals["sum"] < 0:
                raise FloatingPointError("negative")
            return totals

    start, grads = draw([(3, 2)], 2)
    good: Any = [[g.abs() for g in row if g is not None] for row in grads]
    params, twin = leaves(start), leaves(start)
    opt = optimizer(params, chain(strict(), adam()), lr=0.1)
    play(opt, params, [good[0]])
    with pytest.raises(FloatingPointError):
        play(opt, params, [[-good[1][0]]])
    assert int(opt.state[params[0]]["step"]) == 1
    assert same(play(opt, params, [good[1]]), play(optimizer(twin, chain(adam()), lr=0.1), twin, good))


def test_gathering_parameters_are_measured_but_not_moved() -> None:
    class late(over):
        def scalars(self, step: int, hyper: Mapping[str, Any]) -> dict[str, float] | None:
            return {} if step > 1 else None

    params = zeros((2, 2), (2, 3))
    opt = optimizer(params, late(), lr=1.0)
    found = play(opt, params, [[A, None], [A, B]])
    assert distance(found, [-A / 220, torch.zeros_like(B)]) < 1e-15


# -- what each parameter measured --------------------------------------------------------------------------------------------


class over_largest(over):
    """`u <- u / (the largest of what was measured)`."""

    def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
        return {"sum": k.each["sum"].amax()}


class over_largest_matrix(over_largest):
    unit = "matrix"


class over_largest_layer(over_largest):
    unit = "layer"


@pytest.mark.parametrize("reads", ["grad", "update"])
@pytest.mark.parametrize("kind", [over_largest, over_largest_matrix])
def test_reduce_may_look_at_what_each_parameter_measured(kind: type[over], reads: str) -> None:
    assert distance(update_of(kind(reads), A, B), [A / 210, B / 210]) < 1e-15
    assert distance(update_of(kind(reads), -A, -B), [A / 10, B / 10]) < 1e-15


def test_reduce_sees_each_parameter_of_every_rule_that_holds_the_link() -> None:
    shared = over_largest()
    params = zeros((2, 2), (2, 3))
    routes = [Route("a", chain(shared, gain(2.0)), by_name("a*")), Route("b", chain(heavy(), shared), everything)]
    opt = optimizer([("a", params[0]), ("b", params[1])], routes, lr=1.0)
    assert distance(play(opt, params, [[A, B]]), [-2 * A / 210, -B / 210]) < 1e-15


def test_a_layer_is_one_of_those_that_measured() -> None:
    """Its weight and bias measure together: the bias is no layer of its own, whose sum of 0 would be the largest."""
    params = zeros((2, 2), (2,))
    opt = optimizer([("l.weight", params[0]), ("l.bias", params[1])], over_largest_layer(), lr=1.0)
    bias = torch.ones(2, dtype=torch.float64)
    assert distance(play(opt, params, [[-A, -bias]]), [-A / 12, -bias / 12]) < 1e-15


@pytest.mark.parametrize("unit", ["matrix", "tensor", "piece"])
def test_a_vector_is_measured_as_a_number_is(unit: Any) -> None:
    class moments(Transform):
        def __init__(self) -> None:
            self.unit = unit  # type: ignore[misc]

        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            return {"size": u.double().abs().amax(), "powers": torch.stack([(u.double() ** n).sum() for n in (0, 1, 2)])}

        def reduce(self, totals: dict[str, Tensor], shared: State, k: Context) -> dict[str, Tensor]:
            assert totals["powers"].shape == (3,)
            assert k.each["powers"].shape == (2, 3)
            assert k.each["size"].shape == (2,)
            return {"all": totals["powers"], "size": k.each["size"].amax()}

        def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
            return (k.total["all"] / k.own["powers"] / k.total["size"])[1] * u

    assert distance(update_of(moments(), A, B), [220 / 10 / 60 * A, 220 / 210 / 60 * B]) < 1e-15


def test_measuring_is_told_the_rules_own_steps() -> None:
    seen: list[tuple[int, int]] = []

    class counted(over_tensors):
        def measure(self, u: Tensor, state: State, x: Tensor, k: Context) -> dict[str, Tensor]:
            seen.append((k.step, k.clock))
            return super().measure(u, state, x, k)

    params = zeros((2, 2), (2, 3))
    play(optimizer(params, counted(), lr=1.0), params, [[A, None], [A, B]])
    assert sorted(seen) == [(1, 1), (1, 2), (2, 2)]
