"""Drop-Muon (Drop-Muon: Update Less, Converge Faster, arXiv 2510.02239)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training.cases import Bowl, Task, bowl_task, classify, play, trained

from poise.optim import SGD, Muon
from poise.training import SAM, DropMuon

CASES: list[dict[str, Any]] = [{}, {"starts": (0.2, 0.5, 0.3), "seed": 4}, {"starts": "epoch_shift", "total_steps": 12}]
NEUTRAL: dict[str, Any] = {"starts": (1.0, 0.0, 0.0, 0.0, 0.0, 0.0)}  # of the six parameters of `classify`


def needs(opt: torch.optim.Optimizer, task: Task) -> dict[str, Any]:
    return {"layers": task.layers()}


def reference(
    bowl: Bowl, *, lr: float, steps: int, starts: Any = "uniform", seed: int = 0, **more: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Descent on the layers from s on, with the driver's own s: what it must get right is which layers stand still."""
    x = bowl.start()
    driver = DropMuon(SGD(bowl), [[w] for w in bowl.weights], starts, seed=seed, **more)
    for t in range(steps):
        s, g = driver.start(t), bowl.gradient(x, t)
        x = [a - lr * b if i + 1 >= s else a for i, (a, b) in enumerate(zip(x, g, strict=True))]
    return x, x


def first(b: int) -> list[float]:
    """P(s = 1) = 1."""
    return [1.0] + [0.0] * (b - 1)


def test_starting_always_at_the_first_layer_is_muon_bit_for_bit() -> None:
    task, twin = classify(), classify()
    opt = DropMuon(Muon(task.model, lr=0.02, backend="eager"), task.model, first(3))
    assert same(play(opt, task, 6), play(Muon(twin.model, lr=0.02, backend="eager"), twin, 6))


@pytest.mark.parametrize("s", [1, 2, 3])
def test_layers_before_s_keep_weights_and_momentum_and_have_no_gradient(s: int) -> None:
    task = classify()
    inner = Muon(task.model, lr=0.02, backend="eager")
    opt = DropMuon(inner, task.model, first(3))
    play(opt, task, 2)
    starts = [0.0, 0.0, 0.0]
    starts[s - 1] = 1.0
    opt.starts = starts
    before = trained(task)
    state = [{k: v.clone() for k, v in inner.state[p].items()} for p in task.model.parameters()]
    after = play(opt, task, 1)
    for number, p in enumerate(task.model.parameters()):
        skipped = number // 2 + 1 < s
        assert (p.grad is None) == skipped
        assert same([after[number]], [before[number]]) == skipped
        assert same(list(inner.state[p].values()), list(state[number].values())) == skipped
        assert p.requires_grad


def test_layer_i_of_b_is_trained_in_a_share_of_i_over_b_of_the_steps() -> None:
    b, draws = 5, 10_000
    opt = driver_of(b)
    counts = [0] * b
    for step in range(draws):
        for layer in range(opt.start(step), b + 1):
            counts[layer - 1] += 1
    for i, count in enumerate(counts, 1):
        share = i / b
        assert abs(count - draws * share) <= 3 * math.sqrt(draws * share * (1 - share)), (i, count)


def driver_of(b: int, **hyper: Any) -> DropMuon:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(b)]
    return DropMuon(SGD(params), [[p] for p in params], **hyper)


def test_the_work_of_the_backward_pass_falls_with_s() -> None:
    """Counted, not timed: of equal layers, the first trained one needs its weight's gradient, later ones their inputs' too."""
    width, b = 32, 6
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(b)])
    task = Task(model, lambda m, _: m(torch.ones(8, width)).square().mean(), 1)
    forward = b * 2 * 8 * width**2
    found = []
    for s in range(1, b + 1):
        starts = [0.0] * b
        starts[s - 1] = 1.0
        opt = DropMuon(SGD(model, lr=0.0), model, starts)
        with FlopCounterMode(display=False) as counter:
            opt.step(task.closure(opt))
        found.append(counter.get_total_flops() - forward)
    assert found == [(2 * (b - s) + 1) * 2 * 8 * width**2 for s in range(1, b + 1)]


def test_at_equal_work_a_small_convolutional_network_ends_no_worse_than_muon() -> None:
    """With uniform s a step of three layers costs less, so more are taken; over four seeds the mean loss is within noise."""
    losses: dict[str, list[float]] = {"muon": [], "drop": []}
    for seed in range(4):
        for name in losses:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = nn.Sequential(
                    nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
                )
                teacher = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(64, 4))
                x = torch.randn(96, 1, 8, 8)
                y = teacher(x).argmax(1)
            task = Task(model, lambda m, i, x=x, y=y: nn.functional.cross_entropy(m(x[i * 32 :][:32]), y[i * 32 :][:32]), 3)
            inner = Muon(model, lr=0.01, adamw_lr=3e-3, backend="eager")
            opt = inner if name == "muon" else DropMuon(inner, model, seed=seed)
            with FlopCounterMode(display=False) as counter:
                step = 0
                while counter.get_total_flops() < 6e7:
                    play(opt, task, 1, step)
                    step += 1
            with torch.no_grad():
                losses[name].append(float(nn.functional.cross_entropy(model(x), y)))
    muon, drop = (torch.tensor(losses[name]) for name in ("muon", "drop"))
    assert float(drop.mean()) < float(muon.mean()) + 3 * float((drop - muon).std()) / 2 + 0.05, losses


def test_epoch_shift_begins_near_the_first_layer_and_ends_near_the_last() -> None:
    opt = driver_of(4, starts="epoch_shift", total_steps=100, alpha=0.5)
    begin, end = opt.probabilities(0), opt.probabilities(100)
    assert distance([torch.tensor(begin)], [shares(4)]) < 1e-6
    assert distance([torch.tensor(end)], [torch.tensor(begin[::-1])]) < 1e-7
    assert distance([torch.tensor(opt.probabilities(50))], [torch.full((4,), 0.25)]) < 1e-7


def shares(b: int) -> Tensor:
    """exp(alpha (b - i)) for alpha = 0.5, normalised."""
    return torch.tensor([0.5 * (b - i) for i in range(1, b + 1)]).softmax(0)


def test_the_layers_of_a_model_are_its_modules_with_weights_in_order() -> None:
    task = classify(more=[nn.LayerNorm(24)])
    opt = DropMuon(SGD(task.model), task.model)
    names = {id(p): name for name, p in task.model.named_parameters()}
    assert [[names[id(p)] for p in layer] for layer in opt.layers] == [[f"{i}.weight", f"{i}.bias"] for i in (0, 2, 3, 5)]


def test_a_tied_weight_belongs_to_the_first_of_its_layers() -> None:
    table, head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    head.weight = table.weight
    opt = DropMuon(SGD([table.weight]), [table, head])
    assert [len(layer) for layer in opt.layers] == [1]


def test_sam_inside_takes_both_its_gradients_on_the_same_layers() -> None:
    task, twin = bowl_task(), bowl_task()
    layers = [[p] for p in task.model.parameters()]
    start = trained(task)
    opt = DropMuon(SAM(SGD(task.model, lr=0.1), rho=0.3), layers, [0.0, 1.0, 0.0])
    found = play(opt, task, 2)
    assert same(found[:1], start[:1])
    twin.model.get_parameter("weights.0").requires_grad_(False)
    assert same(found, play(SAM(SGD(twin.model, lr=0.1), rho=0.3), twin, 2))


def test_an_error_in_the_closure_leaves_every_parameter_trainable() -> None:
    task = classify()
    opt = DropMuon(SGD(task.model), task.model, [0.0, 0.0, 1.0])

    def closure() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        opt.step(closure)
    assert all(p.requires_grad for p in task.model.parameters())


def test_a_frozen_layer_stays_frozen() -> None:
    task = classify()
    weight = task.model.get_parameter("0.weight").requires_grad_(False)
    play(DropMuon(SGD(task.model), task.model, [0.0, 0.0, 1.0]), task, 2)
    assert not weight.requires_grad


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"starts": "middle"}, "starts='middle'"),
        ({"starts": [0.5, 0.5]}, "2 probabilities for 3 layers"),
        ({"starts": [0.5, 0.6, 0.5]}, "add up to 1"),
        ({"starts": [-0.5, 1.0, 0.5]}, "not be negative"),
        ({"starts": "epoch_shift"}, "total_steps=None"),
        ({"layers": []}, "layers"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(hyper: dict[str, Any], message: str) -> None:
    task = classify()
    with pytest.raises(ValueError, match=message):
        DropMuon(SGD(task.model), **{"layers": task.model, **hyper})
