"""EcoTTA (Memory-Efficient Continual Test-time Adaptation via Self-distilled Regularization, arXiv 2303.01904)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import EcoTTA
from poise.adapt.entropy import confident_entropy, entropy
from poise.adapt.methods.ecotta import Side

PROTOTYPES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def block(a: int, b: int, stride: int) -> nn.Sequential:
    def layers(a: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    return nn.Sequential(*layers(a, stride), *layers(b, 1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), block(8, 8, 1), block(8, 16, 2), *head)


def images(samples: int, seed: int, noise: float = 2.5, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Prototypes of four classes under noise."""
    generator = torch.Generator().manual_seed(seed)
    if labels is None:
        labels = torch.randint(4, (samples,), generator=generator)
    return PROTOTYPES[labels] + noise * torch.randn(samples, 1, 8, 8, generator=generator), labels


def made(kind: Any = EcoTTA, **settings: Any) -> tuple[Any, Tensor]:
    """In float64, of a network whose statistics are those of data, and a batch."""
    model = network().double()
    x = images(16, 1)[0].double()
    for _ in range(3):
        model(x)
    torch.manual_seed(1)
    return kind(model, ["1", "2"], x[:2], **settings), x


def by_hand(eco: Any, x: Tensor, cut: bool = False) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Logits, and of every partition what it reads, what it gives, and what both networks give."""
    model, seen = eco.model, []
    f: list[Callable[[Tensor], Tensor]] = [lambda x, k=k: nn.Sequential(*model[k])(x) for k in (1, 2)]  # no hooks run
    h = model[0](x)
    for side, partition in zip(eco.sides, f, strict=True):
        y = partition(h.detach() if cut else h)
        out = side.norm(y) + F.relu(side.conv_norm(side.conv(h)))
        seen.append((h, y, out))
        h = out
    return model[3:](h), seen


def moved(eco: Any, x: Tensor) -> list[Tensor]:
    """What a step of size 1 without momentum goes along: the gradient of every parameter of the side networks."""
    before = [p.detach().clone() for p in eco.sides.parameters()]
    eco.adapt(x)
    return [b - p.detach() for b, p in zip(before, eco.sides.parameters(), strict=True)]


def close(found: Any, wanted: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


STILL: dict[str, Any] = {"lr": 1.0, "momentum": 0.0}


def settled(kind: Any = EcoTTA) -> tuple[Any, Tensor]:
    """In eval mode, with side networks that have been somewhere."""
    eco, x = made(kind)
    with torch.no_grad():
        for p in eco.sides.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return eco.eval(), x


def test_the_output_of_a_partition_is_that_of_both_networks() -> None:
    eco, x = settled()
    torch.testing.assert_close(eco(x), by_hand(eco, x)[0], rtol=1e-12, atol=1e-12)


def test_a_mistake_in_the_side_network_is_seen() -> None:
    eco, x = settled(mutated(catalog.get("ecotta")))
    assert float((eco(x) - by_hand(eco, x)[0]).detach().abs().max()) > 1e-2


def test_a_silent_side_network_leaves_the_frozen_output_and_no_distance() -> None:
    eco, x = made()
    eco.eval()
    wanted = nn.Sequential(*(nn.Sequential(*layer) if isinstance(layer, nn.Sequential) else layer for layer in eco.model))(x)
    for side in eco.sides:
        nn.init.zeros_(side.conv_norm.weight)
        nn.init.zeros_(side.conv_norm.bias)
        side.norm.running_var.fill_(1 - side.norm.eps)
    torch.testing.assert_close(eco(x), wanted, rtol=1e-12, atol=1e-12)
    for _, y, out in by_hand(eco, x)[1]:
        assert float((out - y).detach().abs().mean()) < 1e-15


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_a_step_reaches_the_side_networks_alone(statistics: Any) -> None:
    eco, x = made(statistics=statistics)
    before = copy.deepcopy(eco.model.state_dict())
    moves = moved(eco, x)
    assert all(bool(move.any()) for move in moves)
    assert all(p.grad is None and not p.requires_grad for p in eco.model.parameters())
    changed = {name for name, t in eco.model.state_dict().items() if not torch.equal(t, before[name])}
    assert all("running" in name or "num_batches" in name for name in changed)
    assert bool(changed) == (statistics == "batch")


def test_the_distance_of_a_partition_moves_its_own_side_network_alone() -> None:
    """No sample is sure enough for margin 0, so that a step goes along the distances."""
    eco, x = made(margin=0.0, weight=0.7, **STILL)
    eco._ready()
    twin = copy.deepcopy(eco)
    wanted: list[Tensor] = []
    for side, (h, y, _) in zip(twin.sides, by_hand(twin, x)[1], strict=True):
        distance = (side(h.detach(), y.detach()) - y.detach()).abs().mean()
        wanted += torch.autograd.grad(0.7 * distance, list(side.parameters()))
    close(moved(eco, x), wanted)
    whole = torch.stack([(out - y.detach()).abs().mean() for _, y, out in by_hand(twin, x)[1]]).sum()
    through = torch.autograd.grad(0.7 * whole, list(twin.sides[0].parameters()))
    assert max(float((a - b).abs().max()) for a, b in zip(through, wanted[:5], strict=True)) > 1e-3  # what would be wrong


@pytest.mark.parametrize("through", [False, True])
def test_the_entropy_reaches_all_side_networks_by_their_own_path_or_by_every_path(through: bool) -> None:
    eco, x = made(weight=0.0, margin=0.97, through_frozen=through, **STILL)
    eco._ready()
    twin = copy.deepcopy(eco)
    logits, _ = by_hand(twin, x, cut=not through)
    kept = entropy(logits) < 0.97 * torch.tensor(4.0).log()
    assert 0 < int(kept.sum()) < len(x)
    wanted = torch.autograd.grad(entropy(logits)[kept].mean(), list(twin.sides.parameters()))
    assert torch.allclose(eco.adapt(x), logits, rtol=1e-9)
    eco, x = made(weight=0.0, margin=0.97, through_frozen=through, **STILL)
    close(moved(eco, x), wanted)
    assert all(float(g.norm()) > 1e-8 for g in wanted)


def test_both_terms_are_one_step() -> None:
    each: list[dict[str, Any]] = [{"margin": 0.0}, {"margin": 0.97, "weight": 0.0}, {"margin": 0.97}]
    moves = [moved(*made(**settings, **STILL)) for settings in each]
    close([a + b for a, b in zip(moves[0], moves[1], strict=True)], moves[2])


def test_where_no_sample_is_sure_the_entropy_is_zero() -> None:
    eco, x = made(margin=0.0, weight=0.0)
    moves = moved(eco, x)
    assert float(eco.last.entropy) == 0 and int(eco.last.kept) == 0
    assert not any(bool(move.any()) for move in moves)
    eco, x = made(margin=0.0)
    assert all(bool(move.isfinite().all()) for move in moved(eco, x)) and float(eco.last.distances.min()) > 0


def kept_bytes(run: Callable[[], Any]) -> int:
    """Of what autograd keeps for the backward pass, parameters left out; one piece of memory counts once."""
    held: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            held[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(held.values())


def test_less_is_kept_than_where_all_batch_norms_adapt_end_to_end() -> None:
    x = images(16, 1)[0]
    deep = [
        nn.Sequential(*(block(16 if i else a, 16, stride if i == 0 else 1) for i in range(3)))
        for a, stride in ((8, 1), (16, 2))
    ]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *deep, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    whole = copy.deepcopy(model)
    for module in whole.modules():
        for p in module._parameters.values():
            if p is not None:
                p.requires_grad_(isinstance(module, nn.BatchNorm2d))
    end_to_end = kept_bytes(lambda: confident_entropy(whole(x)).entropy)
    eco = EcoTTA(model, ["1", "2"], x[:2])
    alone = kept_bytes(lambda: eco.adapt(x))
    through = EcoTTA(eco.remove(), ["1", "2"], x[:2], through_frozen=True)
    assert alone < 0.5 * end_to_end and alone < 0.75 * kept_bytes(lambda: through.adapt(x))


@cache
def trained() -> nn.Module:
    model = network()
    opt = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(150):
        x, labels = images(64, 100 + step)
        opt.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        opt.step()
    return model.eval()


def accuracy(eco: Any) -> float:
    """On the source, with batch statistics as in adaptation."""
    twin = copy.deepcopy(eco)
    twin._ready()
    x, labels = images(512, 2)
    with torch.no_grad():
        return float((twin(x).argmax(1) == labels).float().mean())


@cache
def after_a_stream(weight: float) -> tuple[float, float]:
    """Accuracy on the source before and after a long stream of noisier images, most of one class for ten batches on end."""
    model = copy.deepcopy(trained())
    torch.manual_seed(3)
    eco = EcoTTA(model, ["1", "2"], images(4, 0)[0], weight=weight, lr=0.05)
    eco.warm_up([images(64, 1000 + i) for i in range(20)], epochs=4)
    before = accuracy(eco)
    for i in range(120):
        labels = torch.full((32,), i // 10 % 4)
        labels[:8] = torch.arange(8) % 4
        eco.adapt(images(32, 5000 + i, 3.0, labels)[0])
    return before, accuracy(eco)


def test_over_a_long_stream_the_source_is_forgotten_less_with_the_distances() -> None:
    (before, free), (same, held) = after_a_stream(0.0), after_a_stream(0.5)
    assert before == same > 0.9
    assert before - held < 0.6 * (before - free)


def test_the_warm_up_trains_the_side_networks_alone() -> None:
    eco, _ = made()
    before = copy.deepcopy(eco.model.state_dict())
    sides = [p.detach().clone() for p in eco.sides.parameters()]
    batches = [tuple(t.double() if t.is_floating_point() else t for t in images(32, i)) for i in range(10)]
    losses = eco.warm_up(batches, epochs=5)
    assert len(losses) == 5 and losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in eco.model.named_parameters())
    assert all(not torch.equal(p, q) for p, q in zip(eco.sides.parameters(), sides, strict=True))
    with pytest.raises(ValueError, match="gone through once only, and epochs=10"):
        eco.warm_up(iter(batches))
    assert len(eco.warm_up(iter(batches), epochs=1)) == 1


def test_adaptation_goes_on_exactly_from_what_was_saved() -> None:
    def run(steps: list[int], eco: Any) -> Any:
        for seed in steps:
            eco.adapt(images(16, seed)[0].double())
        return eco

    eco = run([1, 2, 3], made()[0])
    saved = copy.deepcopy((eco.state_dict(), eco.optimizer.state_dict()))
    other, _ = made()
    other.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    one, two = run([4, 5], eco).state_dict(), run([4, 5], other).state_dict()
    assert all(torch.equal(t, two[name]) for name, t in one.items())


def test_removed_it_leaves_the_model() -> None:
    model = network().eval()
    model[0].requires_grad_(False)
    x = images(4, 0)[0]
    wanted, before = model(x), copy.deepcopy(model.state_dict())
    eco = EcoTTA(model, ["1", "2"], x, statistics="running")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    eco.adapt(x)
    assert not torch.equal(model(x), wanted)
    assert eco.remove() is model
    assert torch.equal(model(x), wanted)
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * (len(list(model.parameters())) - 2)


def test_partitions_are_paths_modules_or_runs_of_them() -> None:
    for partitions in (["1", "2"], [network()[1]], [["1", "2"]], [["1.0", "1.1", "1.2"], ["1.3", "1.5"], "2"]):
        model = network().eval()
        if not isinstance(partitions[0], str | list):
            partitions = [model[1]]
        eco = EcoTTA(model, partitions, images(2, 0)[0])
        assert len(eco.sides) == len(partitions)
        assert eco.adapt(images(8, 1)[0]).shape == (8, 4)
        assert eco.last is not None and len(eco.last.distances) == len(partitions)


@pytest.mark.parametrize(
    ("inside", "outside"), [((7,), (4,)), ((8, 8), (8, 8)), ((9, 8), (5, 4)), ((12, 12), (3, 3)), ((4, 6, 5), (2, 3, 5))]
)
def test_the_stride_fits_the_size(inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
    x, y = torch.randn(2, 3, *inside), torch.randn(2, 5, *outside)
    assert Side(x, y, "f")(x, y).shape == y.shape


def test_bad_input_is_refused() -> None:
    x = images(2, 0)[0]
    for settings, said in (
        ({"weight": -1.0}, "weight=-1.0: must not be negative"),
        ({"margin": 1.5}, "margin=1.5: must be from 0 to 1"),
        ({"statistics": "both"}, "statistics='both': must be"),
    ):
        with pytest.raises(ValueError, match=said):
            EcoTTA(network(), ["1"], x, **settings)  # pyright: ignore[reportArgumentType]
    for partitions, said in (
        (["9"], "'9' is no module of the model"),
        ([nn.ReLU()], "a ReLU of them is no module of the model"),
        (["2", "1"], r"in order.*the model ran in 1, out 1, in 0, out 0"),
        (["1", "1.0"], "must be run once each"),
        ([], "at least one is needed"),
        ([[]], "one of them is empty"),
        (["5"], "1 to 3 axes of space"),
        ([["1", "3"]], None),
    ):
        model = network()
        if said is None:
            EcoTTA(model, partitions, x)  # pooled to one pixel: a stride of eight
            continue
        with pytest.raises(ValueError, match=said):
            EcoTTA(model, partitions, x)
        assert all(p.requires_grad for p in model.parameters()) and model.training
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="a size that no stride gives"):
        EcoTTA(nn.Sequential(nn.Conv2d(1, 1, 2)), ["0"], x)
