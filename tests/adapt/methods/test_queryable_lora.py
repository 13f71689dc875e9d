"""Queryable LoRA (arXiv 2605.08423)."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from adapt.cases import Mixed, gpt, loss_of, output, stirred, tokens
from conformance.cases import mutated
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poise import catalog
from poise.adapt import LoRA, QueryableLoRA, adapters, attach, detach, fold
from poise.adapt.bank import Bank
from poise.adapt.methods.queryable_lora import instruct, prior_of

WIDE = ["words", "re:blocks.0.[02]", "mix", "twice"]


def queryable(model: nn.Module, targets: Any = None, **settings: Any) -> nn.Module:
    attach(model, QueryableLoRA(**settings), targets, seed=0)
    return stirred(model)


def bank_of(model: nn.Module) -> Bank:
    first: Any = next(iter(adapters(model).values()))
    return first.bank


def shared(model: nn.Module, **values: Tensor) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(bank_of(model), name).copy_(value)


def eye(rank: int = 8) -> Tensor:
    return torch.eye(rank).expand(1, rank, rank)


@pytest.mark.parametrize("make", [gpt, Mixed])
def test_with_one_atom_that_is_the_identity_it_is_lora(make: Any) -> None:
    targets = None if make is gpt else WIDE
    plain, model = make().double(), make().double()
    attach(plain, LoRA(alpha=12.0), targets, seed=0)
    queryable(model, targets, atoms=1, top_k=1, alpha=12.0)
    shared(model, atoms=eye())
    for one, other in zip(adapters(plain).values(), adapters(model).values(), strict=True):
        a, b = dict(one.named_parameters()), dict(other.named_parameters())
        with torch.no_grad():
            a["lora_A"].copy_(b["lora_A"])
            a["lora_B"].copy_(b["lora_B"])
    assert torch.equal(output(model), output(plain))
    torch.testing.assert_close(output(fold(model)), output(fold(plain)), rtol=1e-12, atol=1e-12)


def test_one_atom_that_is_not_the_identity_folds_too() -> None:
    model = queryable(gpt().double(), atoms=1, top_k=1)
    wanted = output(model)
    torch.testing.assert_close(output(fold(model)), wanted, rtol=1e-11, atol=1e-11)


def test_of_identical_atoms_it_does_not_matter_which_are_asked_for() -> None:
    model = queryable(gpt().double())
    before = output(model)
    shared(model, keys=3 * torch.randn(8, 8))
    assert not torch.allclose(output(model), before)
    shared(model, atoms=torch.randn(8, 8).expand(8, 8, 8))
    before = output(model)
    shared(model, keys=3 * torch.randn(8, 8), ask=torch.randn(8, 16))
    torch.testing.assert_close(output(model), before, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_the_core_is_no_larger_than_the_largest_atom(k: int) -> None:
    torch.manual_seed(0)
    bank = Bank(torch.randn(8, 5, 5), torch.randn(8, 5) * 9, torch.randn(5, 10), torch.zeros(0, 5), k, "none", 1.0).double()
    h = torch.randn(200, 5, dtype=torch.float64)
    shares = bank.shares(h, torch.randn(200, 5, dtype=torch.float64))
    assert bool((shares >= 0).all()) and bool(((shares > 0).sum(-1) <= k).all())
    torch.testing.assert_close(shares.sum(-1), torch.ones(200, dtype=torch.float64), rtol=1e-13, atol=0)
    core = bank.core(shares).detach()
    norms = torch.linalg.matrix_norm(core, ord=2)
    largest = torch.linalg.matrix_norm(bank.atoms, ord=2).max().detach()
    assert float(norms.max()) <= float(largest) * (1 + 1e-12)
    torch.testing.assert_close(bank.mixed(h, shares), (core @ h[..., None]).squeeze(-1), rtol=1e-12, atol=1e-12)


def test_a_prior_that_is_sure_selects_its_atom() -> None:
    model = queryable(gpt().double(), gamma=1e9)
    plain = queryable(gpt().double(), atoms=1, top_k=1)
    x = tokens(model)
    for prior in (torch.eye(8)[5], torch.full((8,), 0.1).index_fill(0, torch.tensor(5), 0.3)):
        instruct(model, prior)
        shared(plain, atoms=bank_of(model).atoms[5:6])
        for one, other in zip(adapters(model).values(), adapters(plain).values(), strict=True):
            a, b = dict(one.named_parameters()), dict(other.named_parameters())
            with torch.no_grad():
                b["lora_A"].copy_(a["lora_A"])
                b["lora_B"].copy_(a["lora_B"])
        torch.testing.assert_close(output(model), output(plain), rtol=1e-12, atol=1e-12)
    loss_of(model, x).backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    instruct(model, None)
    assert not torch.allclose(output(model), output(plain))


def test_each_sequence_has_its_own_instruction() -> None:
    model = queryable(gpt().double(), gamma=3.0)
    embedding, described = torch.randn(3, 12, dtype=torch.float64), torch.randn(8, 12, dtype=torch.float64)
    prior = prior_of(embedding, described, 0.3)
    instruct(model, prior)
    together = output(model)
    x = tokens(model)
    for i in range(3):
        instruct(model, prior_of(embedding[i], described, 0.3))
        with torch.no_grad():
            torch.testing.assert_close(model(x)[i], together[i], rtol=1e-11, atol=1e-12)
    cosines = torch.stack([torch.cosine_similarity(embedding[0], d, dim=0) for d in described])
    torch.testing.assert_close(prior[0], (cosines / 0.3).softmax(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("pool", ["causal", "sequence", "none"])
def test_only_pooling_whole_sequences_lets_a_later_token_change_earlier_outputs(pool: str) -> None:
    model = queryable(gpt().double(), pool=pool).eval()
    x = tokens(model)
    other = x.clone()
    other[:, 5] = (x[:, 5] + 7) % 64
    with torch.no_grad():
        a, b = model(x), model(other)
    assert not torch.allclose(a[:, 5:], b[:, 5:])
    assert torch.allclose(a[:, :5], b[:, :5], rtol=1e-13, atol=1e-13) == (pool != "sequence")


class Chain(nn.Module):
    def __init__(self, count: int = 6, width: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.steps = nn.ModuleList([nn.Linear(width, width) for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.tanh(step(x))
        return x


def chain(**settings: Any) -> Any:
    return queryable(Chain().double(), nn.Linear, **{"rank": 3, "atoms": 4, "blocks": 3, "gamma": 2.0, **settings})


def reference(model: Any, x: Tensor, prior: Tensor) -> Tensor:
    """Of one sequence (tokens, width), token by token, for six layers in three blocks."""
    bank = bank_of(model)
    with torch.no_grad():
        states: list[list[Tensor]] = []
        for number, layer in enumerate(model.steps):
            one: Any = layer.adapter
            h = [one.lora_A @ token for token in x]
            out = []
            if number % 2 == 0:
                states.append([])
            block = len(states) - 1
            for t, token in enumerate(x):
                state = torch.stack(h[: t + 1]).sum(0) / (t + 1)
                if number % 2 == 0:
                    states[block].append(state)
                told = [states[b][t] for b in range(block)]
                z = torch.zeros_like(state)
                if block == 1:
                    z = told[0]
                elif block == 2:
                    assert bank.depth is not None
                    a = torch.tensor([math.exp(float(bank.depth[0] @ p) / math.sqrt(3)) for p in told], dtype=x.dtype)
                    z = torch.stack([w * p for w, p in zip(a / a.sum(), told, strict=True)]).sum(0)
                q = bank.ask @ torch.cat([state, z])
                e = bank.keys @ q / math.sqrt(3) + 2.0 * prior.log()
                best = e.argsort(descending=True)[:2]
                alpha = e[best].softmax(0)
                core = sum(w * bank.atoms[j] for w, j in zip(alpha, best.tolist(), strict=True))
                out.append(torch.tanh(layer.weight @ token + layer.bias + one.scale * one.lora_B @ core @ h[t]))
            x = torch.stack(out)
    return x


def test_outputs_are_those_of_a_loop_over_layers_and_tokens() -> None:
    model = chain()
    shared(model, depth=3 * torch.randn(1, 3))
    prior = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    instruct(model, prior)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    wanted = torch.stack([reference(model, one, prior) for one in x])
    torch.testing.assert_close(model(x), wanted, rtol=1e-12, atol=1e-13)
    assert model(x[:0]).shape == (0, 7, 5) and model(x[:, :0]).shape == (2, 0, 5)
    torch.testing.assert_close(model(x.transpose(0, 1)).shape, (7, 2, 5))
    for rows in (x[0, 0], x[0]):  # without order: each is a token of its own, as the first of a sequence is
        torch.testing.assert_close(model(rows), model(rows.reshape(-1, 1, 5)).reshape(rows.shape), rtol=1e-12, atol=1e-13)


def test_states_of_single_tokens_in_place_of_pooled_ones_are_seen() -> None:
    model: Any = Chain().double()
    settings: dict[str, Any] = {"rank": 3, "atoms": 4, "blocks": 3, "gamma": 2.0}
    attach(model, mutated(catalog.get("queryable-lora"))(**settings), nn.Linear, seed=0)
    stirred(model)
    x = torch.randn(7, 5, dtype=torch.float64)
    prior = torch.full((4,), 0.25, dtype=torch.float64)
    assert not torch.allclose(model(x[None])[0], reference(model, x, prior), rtol=1e-3)


def test_layers_are_in_blocks_of_about_equally_many() -> None:
    found: list[Any] = list(adapters(chain(blocks=4)).values())
    assert [one.block for one in found] == [0, 0, 1, 2, 2, 3]
    assert [one.opens for one in found] == [True, False, True, True, False, True]
    assert [one.block for one in adapters(chain(blocks=9)).values()] == list(range(6))
    assert len({id(one.bank) for one in found}) == 1


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


def run(model: Any, x: Tensor, reentrant: bool | None) -> Tensor:
    for step in model.steps:
        some: Any = nn.Sequential(step, nn.Tanh())
        y: Any = some(x) if reentrant is None else checkpoint(some, x, use_reentrant=reentrant)
        x = y
    return x


def test_gradients_are_the_same_under_activation_checkpointing() -> None:
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for reentrant in (None, False):
        model = chain()
        for _ in range(2):
            model.zero_grad()
            run(model, x, reentrant).square().sum().backward()
        found.append(gradients(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    assert float(found[0][0].abs().max()) > 1e-6


def test_checkpointing_that_would_lose_gradients_is_refused() -> None:
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(chain(), x, True).sum().backward()
    run(chain(blocks=1), x, True).sum().backward()


def test_a_backward_pass_through_an_older_checkpointed_pass_is_refused() -> None:
    model = chain()
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    both = run(model, x, False).sum() + run(model, -x, False).sum()
    with pytest.raises(RuntimeError, match="not the model's last one"):
        both.backward()
    both = run(model, x, None).sum() + run(model, -x, None).sum()
    both.backward()  # without checkpointing there is nothing to mix up


def test_states_are_of_the_pass_under_way_in_whatever_order_layers_run() -> None:
    class Backwards(Chain):
        def forward(self, x: Tensor) -> Tensor:
            for step in reversed(self.steps):
                x = torch.tanh(step(x))
            return x

    model: Any = queryable(Backwards().double(), nn.Linear, rank=3, blocks=3)
    x, y = torch.randn(2, 2, 7, 5, dtype=torch.float64).unbind(0)
    first = model(x)
    model(y)
    assert torch.equal(model(x), first)
    first.sum().backward()
    model(x).sum().backward()


def test_a_copy_is_of_no_pass_and_a_detached_model_has_no_hook() -> None:
    model = chain()
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    wanted = model(x)  # what is told now is no leaf, and could not be copied
    twin = copy.deepcopy(model)
    assert not bank_of(twin).earlier.told and bank_of(model).earlier.told
    torch.testing.assert_close(twin(x), wanted, rtol=0, atol=0)
    assert len(model._forward_pre_hooks) == 1
    detach(twin)
    assert len(twin._forward_pre_hooks) == 0 and len(model._forward_pre_hooks) == 1


def test_blocks_whose_tokens_do_not_match_are_refused_until_they_hear_nothing() -> None:
    class Two(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self.steps[1](self.steps[0](x)[:, ::2])

    x = torch.randn(2, 7, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"pool='causal': tokens of block 1 are shaped \(2, 4\).*\(2, 7\).*pool='sequence'"):
        queryable(Two(2).double(), nn.Linear, rank=3)(x)
    assert queryable(Two(2).double(), nn.Linear, rank=3, pool="sequence")(x).shape == (2, 4, 5)
    assert queryable(Two(2).double(), nn.Linear, rank=3, blocks=1)(x).shape == (2, 4, 5)


def test_it_learns_two_maps_of_which_the_input_says_which() -> None:
    """LoRA of as many parameters can only learn their mean."""
    torch.manual_seed(0)
    base = nn.Linear(16, 16)
    changes = [torch.randn(16, 2) @ torch.randn(2, 16) / 4 for _ in range(2)]

    def batch(count: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, 16)
        x[:, 0] = x[:, 0].sign() * 2
        changed = torch.where(x[:, :1] > 0, x @ changes[0].T, x @ changes[1].T)
        with torch.no_grad():
            return x, base(x) + changed

    train, test = batch(2000), batch(1000)

    def error(method: Any) -> tuple[float, int]:
        model = copy.deepcopy(base)
        kept = attach(model, method, targets=nn.Linear, seed=0)
        opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for step in range(600):
            i = torch.arange(100) + 100 * (step % 20)
            opt.zero_grad()
            (model(train[0][i]) - train[1][i]).square().mean().backward()
            opt.step()
        with torch.no_grad():
            return float((model(test[0]) - test[1]).square().mean()), kept.trainable

    ours, count = error(QueryableLoRA(rank=4, atoms=4, top_k=2))
    theirs, least = error(LoRA(rank=8))
    assert count <= least
    assert ours < 0.5 * theirs


def test_bad_settings_are_refused() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"atoms": 0}, "atoms=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"query": 0}, "query=0"),
        ({"top_k": 9}, "top_k=9: must be a whole number from 1 to atoms=8"),
        ({"pool": "mean"}, "pool='mean'"),
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"rank": 0}, "rank=0"),
    ]
    for settings, said in wrong:
        with pytest.raises(ValueError, match=said):
            QueryableLoRA(**settings)
    model = queryable(gpt())
    for prior, said in ((torch.ones(7) / 7, "shape"), (torch.ones(8), "sum 1"), (torch.ones(1, 1, 8) / 8, "shape")):
        with pytest.raises(ValueError, match=said):
            instruct(model, prior)
    plain = gpt()
    attach(plain, "lora")
    with pytest.raises(ValueError, match="has no atoms"):
        instruct(plain, None)
    with pytest.raises(ValueError, match="temperature=0"):
        prior_of(torch.ones(3), torch.ones(2, 3), 0)
