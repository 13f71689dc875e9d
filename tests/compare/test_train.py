"""One run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise.compare.entries import parse
from poise.compare.loop import Loop, warmup_then_decay
from poise.compare.train import state_bytes, train
from poise.optim import AdamW, Sophia

from .toys import ADAM, SGD, Toy, entry, toy_noise, toy_sgd


def test_the_rate_climbs_to_its_peak_and_ends_near_zero() -> None:
    factors = [warmup_then_decay(done, 100) for done in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(1 / 90) and warmup_then_decay(100, 100) == 0.0


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_the_shortest_runs_still_take_a_whole_step(passes: int) -> None:
    assert warmup_then_decay(0, passes) == 1.0


def test_a_run_follows_the_schedule() -> None:
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    def spy(model: nn.Module, lr: float) -> Spy:
        return Spy(model.parameters(), lr=lr)

    train(Toy(), entry(spy), {"lr": 0.5}, number=0, seed=0, passes=20, split="tune")
    assert seen == pytest.approx([0.5 * warmup_then_decay(done, 20) for done in range(20)])


def test_equal_seeds_give_equal_runs_and_other_seeds_other_ones() -> None:
    def loss(seed: int) -> float | None:
        return train(Toy(), SGD, {"lr": 0.1}, number=0, seed=seed, passes=5, split="tune").loss

    assert loss(1) == loss(1) != loss(2)


def test_runs_of_two_methods_with_one_seed_start_from_the_same_weights_and_data() -> None:
    ours, theirs = (
        train(Toy(), method, {"lr": 0.1}, number=0, seed=7, passes=3, split="tune") for method in (SGD, entry(toy_noise))
    )
    assert ours.initial_loss == theirs.initial_loss and ours.curve == theirs.curve


def test_a_run_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    train(Toy(), SGD, {"lr": 0.1}, number=0, seed=7, passes=3, split="tune")
    assert torch.equal(torch.rand(1), expected)


def test_the_curve_ends_at_the_last_pass_and_keeps_the_mean() -> None:
    found = train(Toy(), SGD, {"lr": 0.0}, number=0, seed=0, passes=120, split="tune")
    ends = [passes for passes, _ in found.curve]
    assert ends[-1] == 120 and ends == sorted(ends) and 30 <= len(ends) <= 50
    widths = [b - a for a, b in pairwise([0, *ends])]
    stream = Toy().batches("train", 0)
    torch.manual_seed(0)
    model = Toy().model()
    mean = sum(float(Toy().loss(model, next(stream)).detach()) for _ in range(120)) / 120
    assert sum(width * loss for width, (_, loss) in zip(widths, found.curve, strict=True)) / 120 == pytest.approx(mean)


def test_a_step_that_looks_twice_pays_twice() -> None:
    class Twice(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            assert closure is not None
            closure()
            return super().step(closure)

    def twice(model: nn.Module, lr: float) -> Twice:
        return Twice(model.parameters(), lr=lr)

    told: list[int] = []
    found = train(Toy(), entry(twice), {"lr": 0.1}, number=0, seed=0, passes=10, split="tune", advance=told.append)
    assert found.passes == 10 and told == [2] * 5


def test_a_step_without_a_pass_is_an_error() -> None:
    class Blind(torch.optim.SGD):
        def step(self, closure: Callable[[], Any] | None = None) -> None:
            return None

    def blind(model: nn.Module, lr: float) -> Blind:
        return Blind(model.parameters(), lr=lr)

    with pytest.raises(RuntimeError, match="Blind took a step without calling its closure"):
        train(Toy(), entry(blind), {"lr": 0.1}, number=0, seed=0, passes=10, split="tune")


def test_a_run_stops_where_its_loss_is_not_finite() -> None:
    found = train(Toy(), SGD, {"lr": 1e30}, number=0, seed=0, passes=50, split="tune")
    assert found.diverged and found.loss is None and found.passes < 10
    assert all(math.isfinite(loss) for _, loss in found.curve)


class Shifted(Toy):
    """Held-out data far from the training data."""

    def batches(self, split: Any, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x, y + 100 * (split != "train")) for x, y in super().batches(split, seed))


def test_a_loss_that_began_high_on_the_held_out_data_has_not_diverged() -> None:
    found = train(Shifted(), SGD, {"lr": 0.1}, number=0, seed=0, passes=5, split="tune")
    assert not found.diverged and found.loss is not None and found.initial_loss is not None
    assert found.loss > 2 * found.initial_loss


def test_a_run_that_ends_far_above_its_start_has_diverged_though_its_loss_is_a_number() -> None:
    found = train(Toy(), SGD, {"lr": 2.0}, number=0, seed=0, passes=5, split="tune")
    assert found.diverged and found.loss is None and found.passes == 5


def test_a_rate_too_small_to_learn_anything_has_not_diverged() -> None:
    for seed in range(20):  # the first batch is easy in some of them
        assert not train(Toy(), SGD, {"lr": 1e-9}, number=0, seed=seed, passes=5, split="tune").diverged


def test_a_hopeless_run_is_not_finished() -> None:
    class Rising(Toy):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            self.asked.append(("train", 0))
            return super().loss(model, batch) + len(self.asked) / 4

    found = train(Rising(), SGD, {"lr": 0.0}, number=0, seed=0, passes=400, split="tune")
    assert found.diverged and found.loss is None and 40 < found.passes < 300


def test_state_is_measured() -> None:
    found = train(Toy(), ADAM, {"lr": 0.1}, number=0, seed=0, passes=2, split="tune")
    assert found.parameters == 5 and found.state_bytes == 2 * 4 * 5 + 2 * 4  # two moments, and a step count for each tensor
    assert train(Toy(), SGD, {"lr": 0.1}, number=0, seed=0, passes=2, split="tune").state_bytes == 0


def test_an_optimizers_own_account_of_its_state_comes_first() -> None:
    class Packed(torch.optim.SGD):
        def state_bytes(self) -> int:
            return 17

    assert state_bytes(Packed(nn.Linear(2, 2).parameters())) == 17
    assert state_bytes(toy_sgd(nn.Linear(2, 2))) == 0


def test_what_is_measured_are_the_weights_that_a_driver_shows() -> None:
    """An average that never moves from the first weights has their loss, however the training went."""
    runs = {
        name: train(Toy(), parse(f"{name}={method}")[name], {"lr": 0.1}, number=0, seed=0, passes=12, split="tune")
        for name, method in (("still", "ema(p=1e-12)"), ("moved", "ema(p=1.0)"), ("plain", "adamw"))
    }
    assert runs["still"].loss is not None
    assert runs["moved"].loss is not None
    assert runs["moved"].loss == runs["plain"].loss
    assert runs["still"].loss > 1.2 * runs["moved"].loss
    assert runs["still"].curve == runs["plain"].curve
    assert runs["still"].state_bytes == runs["plain"].state_bytes + 5 * 4


def test_a_driver_that_takes_two_gradients_a_step_takes_half_the_steps() -> None:
    run = train(Toy(), parse("sam")["sam"], {"lr": 0.1}, number=0, seed=0, passes=12, split="tune")
    assert [at for at, _ in run.curve] == [2, 4, 6, 8, 10, 12]


def test_a_filter_takes_its_steps_on_one_batch_and_pays_for_each() -> None:
    run = train(Toy(), parse("implicit-map(steps=3)")["implicit-map"], {"lr": 0.1}, number=0, seed=0, passes=12, split="tune")
    assert run.passes == 12
    assert [at for at, _ in run.curve] == [3, 6, 9, 12]


def test_a_rule_that_may_be_fed_the_hessian_is_fed_in_every_tenth_step_and_pays_for_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loop = Loop(Toy(), lambda model: Sophia(model, lr=0.01, backend="eager"), seed=0, passes=30)
        while not loop.finished:
            loop.step()
    assert loop.taken == [1] * 10 + [3] + [1] * 9 + [3] + [1] * 5
    assert isinstance(loop.optimizer, Sophia)
    assert all(bool(loop.optimizer.state[p]["hessian"].any()) for p in loop.model.parameters())
    assert Loop(Toy(), AdamW, seed=0, passes=30).step() == 1
