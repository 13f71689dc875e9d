"""DiffoRA (arXiv 2502.08905): a search for the layers that deserve an adapter, and LoRA beside them."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, losses, output, stirred, tokens
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import DiffoRA, LoRA, adapters, attach, attached, detach, disabled, export, fold, load, pairs
from poise.adapt.relaxing import Relaxed, Shares, largest, row_and_kind, rows_of, search
from poise.adapt.targets import places


class Slices(nn.Module):
    """Eight layers that each read a part of the input of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(6, 16, bias=False) for _ in range(8)])

    def forward(self, x: Tensor) -> Tensor:
        parts = [torch.tanh(f(p)) for f, p in zip(self.steps, x.split(6, -1), strict=True)]
        return torch.stack(parts).sum(0)


class Planted:
    """A model, and data for which two of its layers, and no others, must change."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.wanted = Slices(), tuple(f"steps.{i}" for i in sorted(random.Random(seed).sample(range(8), 2)))
        teacher = copy.deepcopy(self.model)
        with torch.no_grad():
            for path in self.wanted:
                weight: Any = teacher.get_submodule(path).weight
                weight += 0.3 * torch.randn(16, 2) @ torch.randn(2, 6)

        def batch(count: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(count, 48)
            with torch.no_grad():
                return x, teacher(x) + 0.1 * torch.randn(count, 16)

        self.data, self.test = [batch(32) for _ in range(16)], batch(1000)

    def losses(self) -> Iterator[Callable[[], Tensor]]:
        return iter([lambda x=x, y=y: self.error((x, y)) for x, y in self.data])

    def error(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (self.model(batch[0]) - batch[1]).square().mean()

    def trained(self, method: DiffoRA) -> tuple[float, int]:
        """Error on new data after training beside the layers of `method`, and how many parameters trained."""
        kept = attach(self.model, method, nn.Linear, losses=self.losses(), seed=0)
        opt = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
        for _, loss in zip(range(60), cycle(self.losses()), strict=False):
            opt.zero_grad()
            loss().backward()
            opt.step()
        with torch.no_grad():
            found = float(self.error(self.test))
        detach(self.model)
        return found, kept.trainable


SMALL: dict[str, Any] = {"rank": 2, "alpha": 2.0, "keep": 0.25, "steps": 30, "search_lr": 0.01, "share": False}


def relaxed(model: nn.Module, theta: float, relaxation: Any = "sigmoid") -> Shares:
    attach(model, Relaxed(DiffoRA()._pair, relaxation), seed=0)
    stirred(model)
    shares: Any = next(iter(adapters(model).values()))
    with torch.no_grad():
        shares.shares.theta.fill_(theta)
    return shares.shares


def test_a_share_of_one_everywhere_is_lora() -> None:
    model, plain = gpt().double(), gpt().double()
    relaxed(model, torch.inf)
    attach(plain, LoRA(), seed=0)
    for one, other in zip(adapters(model).values(), adapters(plain).values(), strict=True):
        a, b = dict(one.named_parameters()), dict(other.named_parameters())
        with torch.no_grad():
            b["lora_A"].copy_(a["lora_A"])
            b["lora_B"].copy_(a["lora_B"])
    assert torch.equal(output(model), output(plain))
    torch.testing.assert_close(output(fold(model)), output(fold(plain)), rtol=0, atol=0)


def test_a_share_of_zero_everywhere_is_the_base_and_no_factor_has_a_gradient() -> None:
    model = gpt().double()
    before = output(model)
    relaxed(model, -torch.inf)
    assert torch.equal(output(model), before)
    next(losses(model))().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    assert len(grads) == 28
    assert not any(g is None or g.any() for g in grads.values())


@pytest.mark.parametrize("relaxation", ["sigmoid", "softmax"])
def test_the_search_ranks_two_layers_that_matter_before_six_that_do_not(relaxation: Any) -> None:
    found = []
    for seed in range(5):
        planted = Planted(seed)
        settled = DiffoRA(**SMALL, relaxation=relaxation).settle(
            planted.model, places(planted.model, nn.Linear), seed, planted.losses()
        )
        found.append(settled.selected == planted.wanted)
    assert sum(found) >= 4


def test_at_equal_parameters_it_beats_layers_chosen_at_random() -> None:
    for seed in range(3):
        planted = Planted(seed)
        ours, count = planted.trained(DiffoRA(**SMALL))
        paths, draws = [f"steps.{i}" for i in range(8)], random.Random(seed)
        chosen = [tuple(sorted(draws.sample(paths, 2))) for _ in range(4)]
        others = [planted.trained(DiffoRA(**SMALL, selected=some)) for some in chosen if some != planted.wanted]
        assert {n for _, n in others} == {count} == {2 * 2 * (6 + 16)}
        assert ours < 0.8 * min(error for error, _ in others)


def test_the_search_is_two_alternating_optimizations() -> None:
    """By hand: y = W2 W1 x with pairs at both, every second batch held out, each step at what the other has come to."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)).double()
    data = [(torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)) for _ in range(4)]
    method = DiffoRA(rank=2, alpha=3.0)
    given: dict[str, Any] = {}

    def pair(place: Any, draw: Any) -> Any:
        given[place.path] = method._pair(place, draw)
        return place.layout, *(t.clone() for t in given[place.path][1:3]), *given[place.path][3:]

    def make(x: Tensor, y: Tensor) -> Callable[[], Tensor]:
        return lambda: (model(x) - y).square().mean()

    found = search(model, places(model, nn.Linear), pair, [make(x, y) for x, y in data], steps=5, lr=0.02, share_lr=0.1)
    A = [given[str(i)][1].requires_grad_() for i in range(2)]
    B = [given[str(i)][2].requires_grad_() for i in range(2)]
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    fitting, weighing = torch.optim.Adam([*A, *B], 0.02), torch.optim.Adam([theta], 0.1, (0.5, 0.999))
    for t in range(5):
        for opt, (x, y) in ((fitting, data[2 * (t % 2)]), (weighing, data[2 * (t % 2) + 1])):
            W = [layer.weight + theta.sigmoid()[i] * 1.5 * B[i] @ A[i] for i, layer in enumerate(model)]
            opt.zero_grad()
            (x @ W[0].T @ W[1].T - y).square().mean().backward()
            opt.step()
    torch.testing.assert_close(torch.tensor(list(found.values())), theta.detach().sigmoid().float(), rtol=1e-6, atol=0)
    assert abs(found["0"] - 0.5) > 0.05


def test_the_search_leaves_the_model_as_it_was_and_counts_its_passes() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Linear(6, 2))
    model[4].weight.requires_grad_(False)
    x = torch.randn(9, 6)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    given: list[Callable[[], Tensor]] = [lambda: model(x).square().mean()] * 3
    DiffoRA(steps=4).settle(model, places(model, nn.Linear), 0, given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))
    assert attached(model) is None and type(model[0]) is nn.Linear
    assert [p.requires_grad for p in model.parameters()] == [True] * 6 + [False, True]
    assert all(p.grad is None for p in model.parameters())
    assert attach(model, DiffoRA(steps=4), nn.Linear, losses=given, seed=0).passes == 8

    def broken() -> Tensor:
        raise OSError("no such batch")

    detach(model)
    with pytest.raises(OSError, match="no such batch"):
        attach(model, DiffoRA(), nn.Linear, losses=[broken, broken])
    assert attached(model) is None and type(model[0]) is nn.Linear


def test_an_export_has_adapters_on_the_kept_layers_only(tmp_path: Path) -> None:
    model = gpt()
    kept = attach(model, DiffoRA(keep=0.5, steps=3, share=False), losses=losses(model), seed=0)
    chosen: Any = kept.method
    assert kept.layers == chosen.selected and kept.passes == 6
    assert sorted(path.split(".")[2] for path in kept.layers) == ["0"] * 4 + ["1"] * 4
    layers: list[Any] = [model.get_submodule(path) for path in kept.layers]
    assert (
        kept.trainable
        == sum(8 * (a + b) for a, b in (layer.weight.shape for layer in layers))
        == sum(p.numel() for p in model.parameters() if p.requires_grad)
    )
    stirred(model)
    said = json.loads((export(model, tmp_path) / "adapter_config.json").read_text())
    assert said["target_modules"] == sorted(kept.layers)
    again = gpt()
    assert load(again, tmp_path).trainable == kept.trainable
    assert torch.equal(output(again), output(model))


def test_layers_of_one_kind_that_were_not_kept_share_a_pair(tmp_path: Path) -> None:
    model = gpt()
    chosen = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj")
    kept = attach(model, DiffoRA(selected=chosen), seed=0)
    found = adapters(model)
    assert len(found) == 14 and len({id(one) for one in found.values()}) == len(pairs(model)) == 3 + 6
    assert found["model.layers.0.mlp.down_proj"] is found["model.layers.1.mlp.down_proj"]
    assert found["model.layers.0.self_attn.k_proj"] is not found["model.layers.0.self_attn.v_proj"]
    assert found[chosen[0]] is not found[chosen[1]]
    own, one_each = 2 * (32 + 48) + (32 + 32), 4 * (32 + 32) + 2 * (32 + 48)  # q, k, v, o and gate, down
    assert kept.trainable == 8 * (own + one_each)
    stirred(model)
    wanted = output(model)
    with pytest.raises(ValueError, match="share one pair"):
        export(model, tmp_path, "peft")
    again = gpt()
    reread: Any = load(again, export(model, tmp_path)).method
    assert reread.selected == chosen and torch.equal(output(again), wanted)
    with disabled(model):
        assert torch.equal(output(model), output(gpt()))
    torch.testing.assert_close(output(fold(model)), wanted, rtol=1e-5, atol=1e-5)


def test_pairs_of_their_own_for_the_layers_that_were_not_kept_are_seen() -> None:
    model = gpt()
    kept = attach(model, mutated(catalog.get("diffora"))(selected=("model.layers.0.mlp.up_proj",)), seed=0)
    right = attach(gpt(), DiffoRA(selected=("model.layers.0.mlp.up_proj",)), seed=0)
    found = adapters(model)
    assert found["model.layers.0.mlp.down_proj"] is not found["model.layers.1.mlp.down_proj"]
    assert kept.trainable > right.trainable


def test_layers_of_several_shapes_and_kinds_are_searched() -> None:
    model = Mixed()
    targets = ["words", "re:blocks.0.[02]", "mix", "twice"]
    kept = attach(model, DiffoRA(steps=3, keep=0.4, within="model", share=False), targets, losses=losses(model), seed=0)
    assert len(kept.layers) == 2


def test_blocks_and_kinds_are_told_by_the_first_number_of_a_path() -> None:
    assert row_and_kind("model.layers.11.mlp.up_proj") == ("model.layers.11", "model.layers.*.mlp.up_proj")
    assert row_and_kind("layers.0.experts.3.w1") == ("layers.0", "layers.*.experts.3.w1")
    assert row_and_kind("0.fc1") == ("0", "*.fc1")
    assert row_and_kind("layer1.0.conv2") == ("layer1.0", "layer1.*.conv2")
    assert row_and_kind("head") == ("", "head")
    assert rows_of(["a.0.x", "a.0.y", "a.1.x", "out"]) == [0, 0, 1, 2]
    assert rows_of(["0", "2", "4"]) == [0, 0, 0]


def test_the_largest_of_each_block_or_of_all_are_kept() -> None:
    shares = {"a.0.x": 0.1, "a.0.y": 0.9, "a.0.z": 0.2, "a.1.x": 0.95, "a.1.y": 0.92, "a.1.z": 0.91}
    assert largest(shares, 1 / 3, True) == ("a.0.y", "a.1.x")
    assert largest(shares, 0.5, True) == ("a.0.y", "a.0.z", "a.1.x", "a.1.y")
    assert largest(shares, 0.5, False) == ("a.1.x", "a.1.y", "a.1.z")
    assert largest(shares, 0.01, False) == ("a.1.x",)
    assert largest(shares, 1.0, True) == tuple(shares)
    assert largest(dict.fromkeys(shares, 0.5), 0.5, False) == ("a.0.x", "a.0.y", "a.0.z")


def test_a_softmax_is_over_the_layers_of_a_block() -> None:
    shares = Shares([0, 0, 1, 0, 1], "softmax", torch.zeros(1, dtype=torch.float64))
    with torch.no_grad():
        shares.theta.copy_(torch.randn(5, generator=torch.Generator().manual_seed(0)))
    found = shares()
    theta = shares.theta
    torch.testing.assert_close(found[[0, 1, 3]], theta[[0, 1, 3]].softmax(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found[[2, 4]], theta[[2, 4]].softmax(0), rtol=1e-14, atol=0)
    found[2].backward()
    assert theta.grad is not None and bool(theta.grad.isfinite().all()) and theta.grad.count_nonzero() == 2


def test_a_selection_is_written_and_needs_no_losses() -> None:
    model = gpt()
    with pytest.raises(ValueError, match=r"losses: 0 given.*at least two"):
        attach(model, "diffora")
    with pytest.raises(ValueError, match="losses: 1 given"):
        attach(model, "diffora", losses=[lambda: model(tokens(model)).sum()])
    with pytest.raises(ValueError, match="selected: 'lm_head' is not among the targets"):
        attach(model, DiffoRA(selected=["lm_head"]))
    assert attached(model) is None
    method: Any = attach(model, "diffora", selected=["model.layers.0.mlp.up_proj"], seed=0).method
    assert method.settings()["selected"] == ("model.layers.0.mlp.up_proj",)


def test_bad_settings_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"keep": 0.0}, "keep=0.0"),
        ({"within": "layer"}, "within='layer'"),
        ({"relaxation": "hard"}, "relaxation='hard'"),
        ({"steps": 0}, "steps=0"),
        ({"search_lr": 0.0}, "search_lr=0.0"),
        ({"share_lr": -1.0}, "share_lr=-1.0"),
        ({"selected": ()}, r"selected=\(\)"),
        ({"selected": "q_proj"}, "selected='q_proj'"),
        ({"rank": 0}, "rank=0"),
    ]
    for settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            DiffoRA(**settings)
