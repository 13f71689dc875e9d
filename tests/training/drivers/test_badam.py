"""BAdam (A Memory Efficient Full Parameter Optimization Method for LLMs, arXiv 2404.02827)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.problems import distance, same
from torch import Tensor, nn
from training.cases import Bowl, Task, bowl_task, classify, play, trained

from poise.optim import SGD, AdamW, Muon
from poise.training import EMA, BAdam

CASES: list[dict[str, Any]] = [
    {"switch_every": 1, "order": "ascending", "active": []},
    {"switch_every": 3, "order": "descending", "active": []},
    {"switch_every": 2, "order": "random", "seed": 3, "active": []},
    {"switch_every": 2, "order": "fixed", "active": ["weights.2"]},
]
NEUTRAL: dict[str, Any] = {"blocks": ["*"], "active": [], "switch_every": 50}
TYPICAL: dict[str, Any] = {"switch_every": 3, "order": "ascending", "active": ["4.*"]}


def needs(opt: torch.optim.Optimizer, task: Task) -> dict[str, Any]:
    return {"model": task.model}


def has_state(model: Any) -> list[nn.Parameter]:
    """In its typical setting the first layer, and the last, which is in every block."""
    return [p for name, p in model.named_parameters() if name.startswith(("0.", "4."))]


def reference(
    bowl: Bowl,
    *,
    lr: float,
    steps: int,
    switch_every: int = 50,
    order: str = "random",
    seed: int = 0,
    active: list[str] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Descent on one of three weights, and on those that always take part; of a random order, on the driver's own."""
    x = bowl.start()
    always = [int(name.removeprefix("weights.")) for name in active or []]
    drawn = BAdam(SGD(bowl), bowl, order="random", seed=seed)
    rows = {"ascending": [0, 1, 2], "descending": [2, 1, 0], "fixed": [0]}
    for t in range(steps):
        visit = t // switch_every
        mine = int(drawn.block(visit).removeprefix("weights.")) if order == "random" else rows[order][visit % len(rows[order])]
        g = bowl.gradient(x, t)
        x = [a - lr * b if i == mine or i in always else a for i, (a, b) in enumerate(zip(x, g, strict=True))]
    return x, x


def test_one_block_is_adamw_with_float32_weights_and_one_cast_bit_for_bit() -> None:
    task, twin = classify(dtype=torch.bfloat16), classify(dtype=torch.bfloat16)
    opt = BAdam(AdamW(task.model, lr=0.01, weights="split", backend="eager"), task.model, ["*"], switch_every=20)
    found = play(opt, task, 20)
    masters = [nn.Parameter(p.detach().float()) for p in twin.model.parameters()]
    by_hand = AdamW(masters, lr=0.01, backend="eager")
    for step in range(20):
        for p, master in zip(twin.model.parameters(), masters, strict=True):
            p.data.copy_(master)
            p.grad = None
        twin.loss(twin.model, step % twin.batches).backward()
        for p, master in zip(twin.model.parameters(), masters, strict=True):
            assert p.grad is not None
            master.grad = p.grad.float()
        by_hand.step()
    assert same(found, [master.detach().bfloat16() for master in masters])


@pytest.mark.parametrize("torchs", [False, True], ids=["poise", "torch"])
def test_after_k_steps_of_a_block_all_others_are_what_they_were_and_have_neither_state_nor_gradient(torchs: bool) -> None:
    task = classify()
    model: Any = task.model
    bare: Any = torch.optim.AdamW(model.parameters(), lr=0.01) if torchs else AdamW(model, lr=0.01, backend="eager")
    opt = BAdam(bare, model, switch_every=4, order="descending")
    before = dict(zip(opt.names.values(), trained(task), strict=True))
    for step in range(4):
        assert {name for p, name in opt.names.items() if p.requires_grad} == {"4.weight", "4.bias"}
        play(opt, task, 1, step)
        if step < 3:
            assert {opt.names[p] for p in opt.state} == {"4.weight", "4.bias"}
    assert {name for p, name in opt.names.items() if p.requires_grad} == {"2.weight", "2.bias"}
    after = dict(zip(opt.names.values(), trained(task), strict=True))
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"4.weight", "4.bias"}
    assert all(p.grad is None for p, name in opt.names.items() if not name.startswith("2."))
    assert {opt.names[p] for p in opt.state} == (set() if torchs else {"2.weight", "2.bias"})


def test_every_block_has_k_steps_the_first_one_too() -> None:
    task = classify()
    opt = BAdam(AdamW(task.model, lr=0.01, backend="eager"), task.model, switch_every=5, order="ascending")
    seen = []
    for step in range(15):
        seen.append(opt.own["block"])
        play(opt, task, 1, step)
    assert seen == ["0"] * 5 + ["2"] * 5 + ["4"] * 5


def test_each_round_is_a_fresh_permutation_of_all_blocks() -> None:
    task = classify(more=[nn.Linear(24, 24), nn.Linear(24, 24)])
    opt = BAdam(SGD(task.model), task.model, seed=1)
    rounds = [[opt.block(5 * turn + place) for place in range(5)] for turn in range(40)]
    assert all(sorted(names) == ["0", "2", "3", "4", "6"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 25
    assert opt.block(7) == BAdam(SGD(task.model), task.model, seed=1).block(7)


def test_bytes_of_state_and_gradients_stay_below_16_for_each_parameter_of_the_largest_block() -> None:
    task = classify(dtype=torch.bfloat16)
    opt = BAdam(AdamW(task.model, lr=0.01, backend="eager"), task.model, switch_every=2, order="random")
    largest = max(sum(p.numel() for p in params) for params in opt.blocks.values())
    whole = sum(p.numel() for p in task.model.parameters())
    worst = 0
    for step in range(12):
        play(opt, task, 1, step)
        gradients = sum(p.grad.nbytes for p in task.model.parameters() if p.grad is not None)
        worst = max(worst, opt.state_bytes() + gradients)
    assert worst <= 16 * largest
    assert opt.state_bytes() < 8 * whole
    assert AdamW(classify(dtype=torch.bfloat16).model).state_bytes() == 8 * whole


class Apart(nn.Module):
    """A loss that is the sum of one for each of three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ParameterList([nn.Parameter(torch.linspace(1, 2, 6).double() * (i + 1)) for i in range(3)])

    def forward(self, only: int | None = None) -> Tensor:
        terms = [((i + 1.0) * torch.linspace(0.1, 3, 6) * w**2).sum() for i, w in enumerate(self.layers)]
        return terms[only] if only is not None else torch.stack(terms).sum()


def test_where_blocks_do_not_meet_one_round_is_k_steps_of_adam_on_each_of_them_alone() -> None:
    task = Task(Apart(), lambda model, _: model(), 1)
    opt = BAdam(AdamW(task.model, lr=0.05, backend="eager"), task.model, switch_every=7)
    found = play(opt, task, 21)
    wanted = []
    for i in range(3):
        alone: Any = Apart()
        single = AdamW([alone.layers[i]], lr=0.05, backend="eager")
        for _ in range(7):
            single.zero_grad()
            alone(i).backward()
            single.step()
        wanted.append(alone.layers[i].detach())
    assert same(found, wanted)


def test_a_schedule_runs_on_the_steps_of_all_blocks() -> None:
    task = bowl_task()
    opt = BAdam(SGD(task.model, lr=0.1), task.model, switch_every=2, order="ascending")
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    play(opt, task, 1)
    schedule.step()
    play(opt, task, 1, 1)
    schedule.step()
    before = trained(task)
    (_, g, _) = Bowl().gradient(before, 2)
    assert distance(play(opt, task, 1, 2)[1:2], [before[1] - 0.1 * 0.25 * g]) < 1e-15


@pytest.mark.parametrize("rest", ["frozen", "block"])
def test_parameters_outside_of_numbered_layers_are_frozen_or_a_block_of_their_own(rest: Any) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "layers": nn.ModuleList([nn.Linear(4, 4) for _ in range(11)])})
    model["head"] = nn.Linear(4, 5)
    opt = BAdam(SGD(model), model, order="ascending", rest=rest)
    assert opt.rounds() == [f"layers.{i}" for i in range(11)] + (["rest"] if rest == "block" else [])
    assert len(opt.blocks["layers.1"]) == 2, "and nothing of layer 10"
    if rest == "block":
        assert [opt.names[p] for p in opt.blocks["rest"]] == ["embed.weight", "head.weight", "head.bias"]


def test_what_is_frozen_when_it_comes_is_never_trained() -> None:
    task = classify()
    weight = task.model.get_parameter("2.weight").requires_grad_(False)
    before = weight.detach().clone()
    opt = BAdam(AdamW(task.model, lr=0.01, backend="eager"), task.model, switch_every=1)
    play(opt, task, 6)
    assert torch.equal(weight, before)
    assert not weight.requires_grad


def test_split_weights_keep_their_lower_halves_while_they_wait() -> None:
    task = classify(dtype=torch.bfloat16)
    bare = AdamW(task.model, lr=1e-4, weights="split", backend="eager")
    opt = BAdam(bare, task.model, switch_every=3, order="ascending")
    play(opt, task, 3)
    first: Any = task.model.get_parameter("0.weight")
    kept = {key: value.clone() for key, value in opt.state[first].items()}
    assert set(kept) == {"weight.low"}
    assert int(kept["weight.low"].abs().max()) > 0
    play(opt, task, 6, 3)
    assert set(opt.state[first]) == {"step", "exp_avg", "exp_avg_sq", "weight.low"}
    assert torch.equal(opt.state[first]["weight.low"], kept["weight.low"])


def test_a_run_that_is_loaded_in_another_block_goes_on_in_the_saved_one() -> None:
    task, twin = classify(), classify()
    opt = BAdam(AdamW(task.model, lr=0.01, backend="eager"), task.model, switch_every=4, order="ascending")
    halfway = play(opt, task, 6)
    saved = opt.state_dict()
    assert len(saved["state"]) == 2
    again = BAdam(AdamW(twin.model, backend="eager"), twin.model, switch_every=4, order="ascending")
    for p, value in zip(twin.model.parameters(), halfway, strict=True):
        p.data.copy_(value)
    again.load_state_dict(saved)
    assert twin.model.get_parameter("2.weight").requires_grad
    assert same(play(again, twin, 4, 6), play(opt, task, 4, 6))
    other = BAdam(AdamW(twin.model, backend="eager"), twin.model, ["*"])
    with pytest.raises(ValueError, match="'block' is '2'"):
        other.load_state_dict(saved)


def test_a_shadow_around_it_or_inside_keeps_all_weights() -> None:
    task, twin = classify(), classify()
    outside = EMA(BAdam(AdamW(task.model, lr=0.01, backend="eager"), task.model, switch_every=2, order="ascending"), p=0.5)
    inside = BAdam(EMA(AdamW(twin.model, lr=0.01, backend="eager"), p=0.5), twin.model, switch_every=2, order="ascending")
    assert same(play(outside, task, 5), play(inside, twin, 5))
    with outside.evaluating(), inside.evaluating():
        assert same(trained(task), trained(twin))


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"switch_every": 0}, "switch_every=0"),
        ({"order": "upwards"}, "order='upwards'"),
        ({"rest": "active"}, "rest='active'"),
        ({"blocks": ["7.*"]}, r"'7\.\*'"),
        ({"active": ["head"]}, "'head'"),
        ({"blocks": []}, "blocks"),
        ({"model": nn.Linear(2, 2)}, "not the model's"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(hyper: dict[str, Any], message: str) -> None:
    task = classify()
    with pytest.raises(ValueError, match=message):
        BAdam(Muon(task.model), **{"model": task.model, **hyper})
