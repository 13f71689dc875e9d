"""GOAT (Make LoRA Great Again, arXiv 2502.16894)."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from adapt.cases import gpt, loss_of, tokens
from conformance.cases import mutated
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise import catalog
from poise.adapt import adapters, attach, fold
from poise.adapt.methods.goat import GOAT, Experts, segments

E, K = 6, 2


def layer(**settings: Any) -> tuple[nn.Linear, Experts]:
    torch.manual_seed(0)
    made = nn.Linear(20, 18, dtype=torch.float64)
    attach(made, GOAT(**{"rank": 12, "experts": E, "top_k": K, "dropout": 0.0, **settings}), targets=nn.Linear, seed=0)
    beside: Any = adapters(made)[""]
    return made, beside


def batch(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stirred(one: Experts) -> None:
    with torch.no_grad():
        for i, p in enumerate(one.parameters()):
            p += 0.3 * batch(*p.shape, seed=10 + i)


@pytest.mark.parametrize("scale", ["theory", "alpha"])
def test_the_mean_over_all_choices_of_experts_is_the_base(scale: str) -> None:
    made, one = layer(scale=scale)
    x = batch(7, 20)
    x[:, 0] = 1.0  # through it the gate chooses, for all alike
    found = []
    for chosen in combinations(range(E), K):
        with torch.no_grad():
            one.gate.zero_()[list(chosen), 0] = 50.0
        found.append(made(x))
    base = nn.functional.linear(x, made.weight, made.bias)
    torch.testing.assert_close(torch.stack(found).mean(0), base, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(found[0], base, rtol=1e-4)


def test_a_shift_of_all_experts_in_place_of_their_mean_is_seen() -> None:
    made = nn.Linear(20, 18, dtype=torch.float64)
    attach(made, mutated(catalog.get("goat"))(rank=12, experts=E, dropout=0.0), targets=nn.Linear, seed=0)
    one: Any = adapters(made)[""]
    x = batch(7, 20)
    x[:, 0] = 1.0
    found = []
    for chosen in combinations(range(E), K):
        with torch.no_grad():
            one.gate.zero_()[list(chosen), 0] = 50.0
        found.append(made(x))
    assert not torch.allclose(torch.stack(found).mean(0), nn.functional.linear(x, made.weight, made.bias), rtol=1e-3)


def test_one_expert_with_rho_1_is_pissa() -> None:
    """The product is the principal part of the weight, and the rest of it is what stays frozen."""
    made, one = layer(rank=5, experts=1, top_k=1, rho=1.0)
    U, S, V = torch.linalg.svd(made.weight.detach())
    principal = (U[:, :5] * S[:5]) @ V[:5]
    torch.testing.assert_close(one.scale * one.lora_B @ one.lora_A, principal, rtol=1e-12, atol=1e-13)
    x = batch(7, 20)
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight, made.bias), rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        one.lora_B.zero_()
    torch.testing.assert_close(made(x), nn.functional.linear(x, made.weight - principal, made.bias), rtol=1e-12, atol=1e-13)
    stirred(one)
    wanted = made(x)
    torch.testing.assert_close(fold(made)(x), wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(20,), (7, 20), (3, 7, 20), (2, 3, 7, 20), (0, 20)])
def test_outputs_are_those_of_a_loop_over_tokens_and_experts(shape: tuple[int, ...]) -> None:
    made, one = layer()
    start = [one.lora_A.detach().clone(), one.lora_B.detach().clone()]
    stirred(one)
    x = batch(*shape)
    rows = []
    for token in x.reshape(-1, 20):
        p = (one.gate @ token).softmax(0)
        best = p.argsort(descending=True)[:K].tolist()
        y = made.weight @ token + made.bias
        for i in range(E):
            part = slice(2 * i, 2 * i + 2)
            y = y - one.scale / E * start[1][:, part] @ (start[0][part] @ token)
            if i in best:
                y = y + one.scale * p[i] / p[best].sum() * one.lora_B[:, part] @ (one.lora_A[part] @ token)
        rows.append(y)
    wanted = torch.stack(rows) if rows else x.new_zeros(0, 18)
    torch.testing.assert_close(made(x), wanted.reshape(*shape[:-1], 18), rtol=1e-12, atol=1e-12)


def test_segments_are_disjoint_and_go_from_large_to_small_values() -> None:
    parts = segments(18, E, 2).view(E, 2)
    assert parts.tolist() == [[0, 1], [3, 4], [6, 7], [9, 10], [12, 13], [15, 16]]
    assert segments(32, 8, 4).tolist() == list(range(32))
    assert segments(35, 8, 2).view(8, 2)[:, 0].tolist() == [4 * i for i in range(8)]
    made, one = layer(rho=4.0)
    S = torch.linalg.svdvals(made.weight.detach())
    for i in range(E):
        product = one.scale * one.lora_B[:, 2 * i : 2 * i + 2] @ one.lora_A[2 * i : 2 * i + 2]
        torch.testing.assert_close(torch.linalg.svdvals(product)[:2], S[parts[i]] / 4, rtol=1e-12, atol=0)


def test_scales_are_those_of_the_theory_and_of_alpha() -> None:
    assert layer()[1].scale == math.sqrt(3 * 20 / 2)
    assert layer(eta=2.0)[1].scale == math.sqrt(3 * 2 * 20 / 2)
    assert layer(scale="alpha")[1].scale == 2 * E  # alpha = 2 rank over rank / E
    assert layer(scale="alpha", alpha=6.0)[1].scale == 3.0


def balanced(weight: float) -> nn.Module:
    model = gpt().double()
    attach(model, "goat", rank=8, experts=4, dropout=0.0, balance=weight, seed=0)
    return model


def test_the_gradient_has_that_of_the_balance_loss_in_it() -> None:
    model = balanced(1e-3)
    x = tokens(model)
    loss_of(model, x).backward()
    plain = balanced(0.0)
    total = loss_of(plain, x)
    kept: list[Tensor] = []
    with torch.no_grad():
        losses = {path: one.imbalance for path, one in adapters(model).items()}
    for path, one in adapters(plain).items():
        at: Any = plain.get_submodule(path)
        at.register_forward_hook(lambda at, given, _, one=one: kept.append(counted(one.gate, given[0])))
        assert losses[path] == one.imbalance
    total = loss_of(plain, x) + 1e-3 * sum(kept)
    total.backward()
    assert len(kept) == 14
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14, msg=name)


def counted(gate: Any, x: Tensor) -> Tensor:
    p = (x @ gate.T).softmax(-1).flatten(0, 1)
    often = torch.zeros(len(gate), dtype=p.dtype)
    for row in p.argsort(-1, descending=True)[:, :2]:
        often[row] += 1 / len(p)
    return len(gate) * (often * p.mean(0)).sum()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing_gradients_are_the_same(reentrant: bool) -> None:
    found = []
    for kept in (True, False):
        made, one = layer(balance=0.1)
        stirred(one)
        x = batch(5, 20).requires_grad_()
        y: Any = made(x) if kept else checkpoint(made, x, use_reentrant=reentrant)
        y.square().sum().backward()
        found.append([p.grad for p in one.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_dropout_is_of_the_experts_input_alone() -> None:
    made, one = layer(dropout=0.5)
    x = batch(3, 20)
    base = nn.functional.linear(x, made.weight, made.bias)
    with torch.no_grad():
        one.lora_B.zero_()
    first = one.scale / E * x @ one.first_A.T @ one.first_B.T
    torch.testing.assert_close(made(x), base - first, rtol=1e-12, atol=1e-13)
    stirred(one)
    assert not torch.equal(made(x), made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def test_layers_narrower_than_the_rank_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(4, 16))
    assert attach(model, GOAT(rank=8), targets=nn.Linear).layers == ("0",)
    with pytest.raises(ValueError, match="adapts none of those layers"):
        attach(nn.Sequential(nn.Linear(16, 16)), GOAT(rank=32), targets=nn.Linear)


def test_bad_settings_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rank": 30}, "rank=30: must be a multiple of experts=8"),
        ({"experts": 0}, "experts=0"),
        ({"top_k": 9}, "top_k=9: must be a whole number from 1 to experts=8"),
        ({"scale": "rs"}, "scale='rs'"),
        ({"rho": 0.0}, "rho=0.0"),
        ({"eta": -1.0}, "eta=-1.0"),
        ({"balance": -1.0}, "balance=-1.0"),
    ]
    for settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            GOAT(**settings)
