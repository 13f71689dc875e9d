"""What a training step needs: bytes counted by part, and the peak that real steps reach."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from poise import catalog
from poise.compare import needs, tasks
from poise.compare.entries import entry_of
from poise.compare.needs.count import OUTSIDE, REST, Needs, activations, parts_of


class Toy:
    """Two layers on 32 rows of 256."""

    name, unit, fingerprint = "toy", "", "toy"

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 4, bias=False))

    def batches(self, split: str, seed: int) -> Iterator[Any]:
        while True:
            yield torch.ones(32, 256), torch.ones(32, 4)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()


class Reading(Toy):
    """A loss that looks at a number, which there is none of on the meta device."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        loss = super().loss(model, batch)
        assert loss.item() >= 0
        return loss


def counted(task: Any, method: str = "adamw", **fixed: Any) -> Needs:
    return needs.count(task, entry_of(catalog.get(method), fixed))


@pytest.mark.parametrize("task, held", [(Toy(), "meta"), (Reading(), "cpu")])
def test_every_byte_of_a_step_has_its_place(task: Any, held: str) -> None:
    found = counted(task)
    assert found.held == held and found.batch == "32x256, 32x4"
    first, middle, last, outside = (next(p for p in found.parts if p.name == name) for name in ("0", "1", "2", OUTSIDE))
    assert first.parameters == 256 * 128 + 128
    assert first.weights == first.gradients == 4 * first.parameters
    assert 0 <= first.state - 8 * first.parameters <= 64  # two moments, and the counts of steps
    assert first.activations == 4 * 32 * 256  # its input
    assert middle.activations == 4 * 32 * 128 and middle.state == 0  # its output, which is also what the next layer keeps
    assert last.activations == 0
    assert outside.activations == 4 * 32 * 4  # what is squared
    assert found.whole.total == sum(part.total for part in found.parts)


@pytest.mark.parametrize("state, per_parameter", [("int8", 2.07), ("int4", 1.07)])
def test_a_state_format_is_counted_as_it_is_stored(state: str, per_parameter: float) -> None:
    first = next(p for p in counted(Toy(), state=state).parts if p.name == "0")
    biases = 128 * 8 - 128 * per_parameter  # too small to be encoded
    assert (first.state - biases) / first.parameters == pytest.approx(per_parameter, rel=0.01)


def test_frozen_weights_have_neither_gradients_nor_state() -> None:
    class Frozen(Toy):
        def model(self) -> nn.Module:
            model = super().model()
            model[0].requires_grad_(False)  # type: ignore[index]
            return model

    first = next(p for p in counted(Frozen()).parts if p.name == "0")
    assert first.weights and not first.gradients and not first.state


def test_what_a_driver_keeps_beside_its_optimizer_counts_too() -> None:
    plain, averaged = counted(Toy()), counted(Toy(), "ema")
    extra = averaged.whole.state - plain.whole.state
    assert extra == pytest.approx(4 * plain.whole.parameters, rel=1e-3)
    assert any(part.name == REST for part in averaged.parts)


def test_parts_are_the_children_with_lists_opened_and_wrappers_looked_through() -> None:
    block = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.ModuleDict({"body": nn.ModuleList([block, nn.Linear(2, 2)]), "head": nn.Linear(2, 2)})
    assert list(parts_of(model)) == ["body.0.0", "body.0.1", "body.1", "head"]

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Bilinear(2, 2, 2)
            self.inner.extra = nn.Linear(2, 2)

    assert list(parts_of(Wrapper())) == ["inner.extra"]
    assert list(parts_of(nn.Linear(2, 2))) == ["model"]


def test_a_storage_that_two_layers_keep_counts_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 8), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x[:, :])

    model, x = Twice(), torch.ones(16, 64)
    assert activations(model, parts_of(model), lambda: model(x).sum()) == {"a": x.nbytes}


def test_the_peak_of_real_steps_lies_above_what_is_held_and_not_far() -> None:
    """Of three million parameters: measured from outside, against the bytes that were counted."""
    task = tasks.load("code-lm-large")
    found = counted(task)
    peak = needs.measure(["code-lm-large", "adamw", json.dumps(["backend='eager'"]), "0", "cpu"])
    assert peak.failed is None and peak.peak is not None and peak.between is not None
    kept = found.whole.weights + found.whole.state
    assert 0.9 * kept < peak.between < 1.5 * kept + 2**25
    assert 0.8 * found.whole.total < peak.peak < 2.5 * found.whole.total + 2**26


def test_steps_that_fail_say_why() -> None:
    found = needs.measure(["no-such-task", "adamw", "[]", "0", "cpu"])
    assert found.peak is None and found.failed is not None and "no-such-task" in found.failed
