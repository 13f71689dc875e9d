"""CompAct (CompAct: Compressed Activations for Memory-Efficient LLM Training, arXiv 2410.15352)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conformance.cases import build, mutated
from torch import Tensor, nn
from torch.nn.functional import linear

from poise.catalog import Method, get
from poise.models.gpt import GPT, GPTConfig
from poise.optim import SGD, AdamW, Optimizer, adam, chain, debias
from poise.training import EMA, SAM, CompAct, kept_bytes
from poise.training.layers.compact import Sketch

F64 = torch.float64


def network(dtype: torch.dtype = F64, bias: bool = True) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10, bias), nn.Tanh(), nn.Linear(10, 4, bias)).to(dtype)


def batches(steps: int, dtype: torch.dtype = F64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 6, generator=generator, dtype=F64).to(dtype) for _ in range(steps)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4] * x[:, 2:]).square().mean()


def train(model: nn.Module, opt: torch.optim.Optimizer, xs: Sequence[Tensor]) -> None:
    for x in xs:
        opt.zero_grad()
        loss(model, x).backward()
        opt.step()


def attached(kind: Any = CompAct, dtype: torch.dtype = F64, **options: Any) -> Any:
    return kind.attach(network(dtype), "*", **options)


def authors(model: nn.Module, lr: float, weight_decay: float = 0.0) -> Optimizer:
    rule = chain(adam((0.9, 0.999), 1e-6, correct_bias=False), debias((0.9, 0.999)))
    return Optimizer(model, rule, lr, weight_decay, decay="after", backend="eager")


def projection(features: int, r: int, seed: int) -> Tensor:
    return torch.randn(features, r, generator=torch.Generator().manual_seed(seed), dtype=F64) / math.sqrt(r)


def reference(
    model: Any, xs: Sequence[Tensor], seeds: Sequence[int], *, r: int, gap: int, scale: float, lr: float, weight_decay: float
) -> list[Tensor]:
    """The two weights after Adam on compressed gradients, and the decay that comes last, from gradients of the whole matrix."""
    plain = copy.deepcopy(model)
    moments: list[list[Tensor]] = [[torch.zeros(layer.out_features, r, dtype=F64) for _ in range(2)] for layer in plain[::2]]
    for t, x in enumerate(xs, 1):
        plain.zero_grad()
        loss(plain, x).backward()
        for layer, seed, (m, v) in zip(plain[::2], seeds, moments, strict=True):
            P = projection(layer.in_features, r, seed + (t - 1) // gap)
            g = layer.weight.grad @ P
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            step = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t)
            with torch.no_grad():
                layer.weight -= step * scale * (m / (v.sqrt() + 1e-6)) @ P.T
                layer.weight *= 1 - lr * weight_decay
    return [layer.weight.detach() for layer in plain[::2]]


def gap(kind: Any, weight_decay: float = 0.0) -> float:
    model, xs = network(bias=False), batches(8)
    mine = kind.attach(copy.deepcopy(model), "*", rank=3, gap=3, scale=0.5)
    seeds = [layer.sketch.seed for layer in mine[::2]]
    wanted = reference(model, xs, seeds, r=3, gap=3, scale=0.5, lr=0.03, weight_decay=weight_decay)
    opt = authors(mine, 0.03, weight_decay)
    kind.follow(opt, mine)
    train(mine, opt, xs)
    return max(float((layer.weight - w).detach().abs().max()) for layer, w in zip(mine[::2], wanted, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_it_is_adam_in_the_compressed_space_with_moments_kept_when_the_projection_changes(weight_decay: float) -> None:
    assert gap(CompAct, weight_decay) < 1e-13


def test_the_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("compact"))) > 1e-3


def test_the_gradient_is_right_in_the_mean_and_its_variance_is_what_the_rank_says() -> None:
    """`E[G_c P^T] = G` and `E ||G_c P^T - G||^2 = (in + 1) / r ||G||^2`."""
    layer = CompAct(10, 3, rank=4, dtype=F64)
    x, dy = torch.randn(20, 10, dtype=F64), torch.randn(20, 3, dtype=F64)
    G = dy.mT @ x
    total, square, draws = torch.zeros_like(G), 0.0, 1500
    for layer.sketch.seed in range(draws):
        layer.compressed.grad = None
        layer(x).backward(dy)
        assert layer.compressed.grad is not None
        error = layer.compressed.grad @ layer.sketch.matrix(x).mT - G
        total += error / draws
        square += float(error.square().sum() / G.square().sum()) / draws
    assert float(total.norm() / G.norm()) < 4 * math.sqrt(11 / 4 / draws)
    assert square == pytest.approx(11 / 4, rel=0.05)


@pytest.mark.parametrize("shape", [(6,), (7, 6), (2, 3, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_the_other_gradients_are_nn_linears_bit_for_bit(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5, bias).to(dtype)
    mine: Any = CompAct.attach(copy.deepcopy(plain), "*", rank=2)
    found = []
    for layer in (plain, mine):
        torch.manual_seed(1)
        x = torch.randn(shape, dtype=dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.randn_like(y))
        found.append([y, x.grad, *([layer.bias.grad] if bias else [])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert mine.weight.grad is None and mine.compressed.grad.shape == (5, 2)


def orthogonal(sketch: Sketch, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(sketch.steps)
    return torch.linalg.qr(torch.randn(sketch.features, sketch.features, generator=generator, dtype=like.dtype)).Q


@pytest.mark.parametrize("decay", ["coupled", "independent", "after"])
def test_with_an_orthogonal_matrix_sgd_is_uncompressed_sgd(monkeypatch: pytest.MonkeyPatch, decay: Any) -> None:
    monkeypatch.setattr(Sketch, "matrix", orthogonal)
    plain, mine = network(), attached(rank=1.0, scale=1.0)
    for model in (plain, mine):
        opt = SGD(model, lr=0.1, momentum=0.0, weight_decay=0.2, decay=decay, backend="eager")
        if model is mine:
            CompAct.follow(opt, model)
        opt.param_groups[0]["initial_lr"] = 0.3
        train(model, opt, batches(5))
    for a, b in zip(plain[::2], mine[::2], strict=True):
        assert float((a.weight - b.weight).detach().abs().max()) < 1e-12
        assert float((a.bias - b.bias).detach().abs().max()) < 1e-12


def test_a_driver_that_displaces_parameters_displaces_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAM, whose displacement and its norm an orthogonal matrix leaves what they are."""
    monkeypatch.setattr(Sketch, "matrix", orthogonal)
    plain, mine = network(), attached(rank=1.0, scale=1.0)
    for model in (plain, mine):
        opt = SAM(SGD(model, lr=0.1, backend="eager"), rho=0.3)
        if model is mine:
            CompAct.follow(opt, model)
        for x in batches(4):

            def closure(model: nn.Module = model, opt: SAM = opt, x: Tensor = x) -> Tensor:
                opt.zero_grad()
                value = loss(model, x)
                value.backward()
                return value

            opt.step(closure)
    assert max(float((a.weight - b.weight).detach().abs().max()) for a, b in zip(plain[::2], mine[::2], strict=True)) < 1e-12


@pytest.mark.parametrize("rank, r", [(0.25, 16), (0.5, 32), (5, 5), (1.0, 64)])
def test_each_layer_keeps_r_over_in_of_its_input(rank: float, r: int) -> None:
    plain, x = nn.Linear(64, 48), torch.randn(3, 40, 64)
    mine: Any = CompAct.attach(copy.deepcopy(plain), "*", rank=rank)
    whole, kept = kept_bytes(lambda: plain(x), plain), kept_bytes(lambda: mine(x), mine)
    assert whole == 3 * 40 * 64 * 4
    assert kept / whole == r / 64
    opt = SGD(mine, lr=0.1, backend="eager")
    CompAct.follow(opt, mine)
    mine(x).sum().backward()
    opt.step()
    assert kept_bytes(lambda: mine(x), mine) == kept


def test_a_llama_keeps_less_and_q_k_v_what_the_docstring_says() -> None:
    model = GPT(GPTConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=2))
    tokens = torch.arange(40).reshape(2, 20)
    before = kept_bytes(lambda: model(tokens), model)
    CompAct.attach(model, rank=0.25)
    compressed = [path for path, layer in model.named_modules() if isinstance(layer, CompAct)]
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert compressed == [f"model.layers.{i}.{name}" for i in (0, 1) for name in names]
    # one h for q, k, v and one for gate, up of width 32, and down's input of width 96, become a z for each
    saved = 2 * 40 * 4 * ((32 + 32 + 96) - (3 * 8 + 2 * 8 + 24))
    assert before - kept_bytes(lambda: model(tokens), model) == saved


def test_gradients_are_accumulated_and_clipped_in_the_compressed_space() -> None:
    model = attached(rank=2)
    xs = batches(2)
    for x in xs:
        loss(model, x).backward()
    total = [p.grad.clone() for p in model.parameters()]
    parts = []
    for x in xs:
        model.zero_grad()
        loss(model, x).backward()
        parts.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(t, a + b) for t, a, b in zip(total, *parts, strict=True))


def test_every_optimizer_moves_the_weights_by_the_displacement_it_makes(rule: Method) -> None:
    model = attached(dtype=torch.float32, rank=3, scale=0.5)
    opt = build(rule, model, lr=0.02, backend="eager", weight_decay=0.0)
    CompAct.follow(opt, model)
    seen: list[tuple[Tensor, Tensor]] = []
    layer = model[2]
    x = batches(1, torch.float32)[0]
    for _ in range(3):
        opt.zero_grad()
        value = loss(model, x)
        value.backward()
        before, P = layer.weight.clone(), layer.sketch.matrix(layer.weight)
        opt.step(lambda value=value: value)  # pyright: ignore[reportArgumentType, reportCallIssue]
        move = (layer.weight - before) / 0.5
        inside = torch.linalg.lstsq(P, move.mT).solution.mT @ P.mT  # the part of the move that lies in the span of P
        seen.append((move, inside))
        assert int(layer.compressed.count_nonzero()) == 0
    assert all(torch.allclose(move, inside, atol=1e-5) for move, inside in seen)
    assert any(float(move.abs().max()) > 0 for move, _ in seen)


@pytest.mark.parametrize("state, per_value", [("fp32", 8.0), ("int8", 2.0)])
def test_optimizer_state_is_of_the_compressed_size_in_any_format(state: str, per_value: float) -> None:
    model = CompAct.attach(nn.Linear(256, 128, bias=False), "*", rank=0.25)
    opt = AdamW(model, state=state, backend="eager")
    assert opt.state_bytes() / (128 * 64) == pytest.approx(per_value, rel=0.1)


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_goes_on_from_its_state_dicts_bit_for_bit(step: int) -> None:
    xs = batches(9)
    ends = []
    for resumed in (False, True):
        model = attached(rank=3, gap=4)
        opt = authors(model, 0.03)
        CompAct.follow(opt, model)
        train(model, opt, xs[:step])
        if resumed:
            kept = copy.deepcopy((model.state_dict(), opt.state_dict()))
            model = attached(rank=3, gap=4, seed=77)
            opt = authors(model, 0.03)
            CompAct.follow(opt, model)
            model.load_state_dict(kept[0])
            opt.load_state_dict(kept[1])
        train(model, opt, xs[step:])
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_without_following_a_layer_is_the_one_of_its_displaced_weight(backend: Any) -> None:
    model = attached(dtype=torch.float32, rank=3, gap=None)
    opt = AdamW(model, lr=0.05, backend=backend)
    x = batches(1, torch.float32)[0]
    train(model, opt, [x] * 4)
    layer = model[0]
    wanted = layer.weight + layer.sketch.scale * layer.compressed @ layer.sketch.matrix(layer.weight).mT
    assert float((wanted - layer.weight).detach().abs().max()) > 0.01
    assert torch.allclose(layer(x), linear(x, wanted, layer.bias), atol=1e-6)
    y = model(x)
    handle = CompAct.follow(opt, model)  # takes in what has gathered
    assert int(layer.compressed.count_nonzero()) == 0 and torch.allclose(model(x), y, atol=1e-6)
    handle.remove()
    train(model, opt, [x])
    assert int(layer.compressed.count_nonzero()) > 0 and not torch.allclose(model(x), y, atol=1e-3)
    assert torch.allclose(copy.deepcopy(model)(x), model(x))


def test_a_copy_of_a_followed_layer_sees_what_is_done_to_it() -> None:
    model = attached(rank=3)
    CompAct.follow(SGD(model, lr=0.1, backend="eager"), model)
    layer = copy.deepcopy(model)[0]
    for _ in range(4):  # one of these counts stood for "zero" in the original
        with torch.no_grad():
            layer.compressed.add_(0.1)
        wanted = layer.weight + layer.sketch.scale * layer.compressed @ layer.sketch.matrix(layer.weight).mT
        assert torch.allclose(layer.effective_weight(), wanted, atol=1e-14)


def test_bfloat16_weights_move_on_average_however_small_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sketch, "matrix", lambda sketch, like: torch.eye(sketch.features))
    model = CompAct.attach(nn.Linear(64, 64, bias=False).bfloat16(), "*", rank=1.0, scale=1.0)
    with torch.no_grad():
        model.weight.fill_(1.0)
    opt = SGD(model, lr=1.0, momentum=0.0, backend="eager")
    CompAct.follow(opt, model)
    model.compressed.grad = torch.full((64, 64), -1e-4).bfloat16()  # below half a spacing
    opt.step()
    moved = model.weight.float() - 1.0
    assert 0 < int(moved.count_nonzero()) < moved.numel() / 2
    assert float(moved.mean()) == pytest.approx(1e-4, rel=0.5)


@pytest.mark.parametrize("decay", ["coupled", "after"])
def test_the_attentions_output_is_uncompressed_and_its_update_is_scaled_but_not_its_decay(decay: Any) -> None:
    ends = []
    for factor in (1.0, 0.125):
        torch.manual_seed(0)
        model: Any = nn.ModuleDict({"q_proj": nn.Linear(6, 6), "o_proj": nn.Linear(6, 4)}).double()
        start = model["o_proj"].weight.detach().clone()
        CompAct.attach(model)
        assert type(model["o_proj"]) is nn.Linear
        opt = AdamW(model, lr=0.1, weight_decay=0.5, decay=decay, backend="eager")
        CompAct.follow(opt, model, output_scale=factor)
        x = batches(1)[0]
        model["o_proj"](model["q_proj"](x)).square().mean().backward()
        opt.step()
        ends.append(model["o_proj"].weight.detach() - start * (1 - 0.05))
    assert torch.allclose(ends[1], 0.125 * ends[0], rtol=1e-12, atol=1e-15)
    assert float(ends[0].abs().max()) > 0.05


def test_layers_without_gradient_are_left_alone() -> None:
    model = attached()
    opt = AdamW(model, lr=0.1, weight_decay=0.5, backend="eager")
    CompAct.follow(opt, model)
    before = model[0].weight.clone()
    model[2](torch.randn(3, 10, dtype=F64)).sum().backward()
    opt.step()
    assert torch.equal(model[0].weight, before) and model[0].sketch.steps == 0 and model[2].sketch.steps == 1


def test_an_average_of_the_model_averages_the_weights() -> None:
    model = attached()
    start = model[0].weight.clone()
    opt = EMA(SGD(model, lr=0.1, backend="eager"), model, p=0.5)
    CompAct.follow(opt, model)
    train(model, opt, batches(1))
    end = model[0].weight.clone()
    with opt.evaluating():
        assert torch.allclose(model[0].weight, (start + end) / 2)


def test_under_autocast_it_is_nn_linear() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5)
    mine: Any = CompAct.attach(copy.deepcopy(plain), "*", rank=2)
    found = []
    for layer in (plain, mine):
        x = torch.ones(4, 6).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().square().sum().backward()
        found.append((y, x.grad, layer.bias.grad))
    assert found[1][0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert mine.compressed.grad.dtype == torch.float32


def test_detaching_gives_the_plain_model_with_the_same_outputs() -> None:
    model, plain, x = attached(dtype=torch.float32), network(torch.float32), batches(1, torch.float32)[0]
    assert torch.equal(model(x), plain(x))
    opt = AdamW(model, lr=0.1, backend="eager")
    CompAct.follow(opt, model)
    train(model, opt, [x] * 2)
    y, biases = model(x), [model[0].bias, model[2].bias]
    CompAct.detach(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert list(model.state_dict()) == list(plain.state_dict()) and repr(model) == repr(plain)
    assert torch.equal(model(x), y) and model[0].bias is biases[0] and model[2].bias is biases[1]
    loss(model, x).backward()
    assert model[0].weight.grad.shape == (10, 6)


def test_layers_have_projections_of_their_own() -> None:
    model = CompAct.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "*", rank=4)
    P, Q = (layer.sketch.matrix(layer.weight) for layer in model)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert float((P - Q).abs().min()) > 0


def test_what_cannot_be_is_refused_and_nothing_is_changed() -> None:
    refused: list[dict[str, Any]] = [{"rank": 0}, {"rank": 1.5}, {"gap": 0}, {"scale": 0.0}]
    for bad in refused:
        with pytest.raises(ValueError, match=next(iter(bad))):
            CompAct.attach(network(), "*", **bad)
    with pytest.raises(ValueError, match=r"no such nn\.Linear"):
        CompAct.attach(network())
    with pytest.raises(ValueError, match="frozen"):
        CompAct.attach(network().requires_grad_(False), "*")
    tied = network()
    tied.extend([nn.Linear(4, 10), nn.Linear(10, 4)])
    tied[4].weight = tied[2].weight
    with pytest.raises(ValueError, match="'2' is shared"):
        CompAct.attach(tied, "*")
    assert all(type(layer) is not CompAct for layer in tied)
    with pytest.raises(ValueError, match=r"only a plain nn\.Linear"):
        CompAct.attach(nn.MultiheadAttention(8, 2), "*")


def test_an_optimizer_that_cannot_be_followed_is_refused() -> None:
    model = network()
    early = SGD(model, lr=0.1)
    with pytest.raises(ValueError, match="no CompAct layer"):
        CompAct.follow(early, model)
    CompAct.attach(model, "*")
    with pytest.raises(ValueError, match="make it after attach"):
        CompAct.follow(early, model)
    with pytest.raises(ValueError, match="not decoupled"):
        CompAct.follow(torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), model)
    with pytest.raises(ValueError, match="not decoupled"):
        CompAct.follow(SGD(model, lr=0.1, weight_decay=0.1, decay="l2"), model)
    with pytest.raises(ValueError, match="output_scale"):
        CompAct.follow(SGD(model, lr=0.1), model, output_scale=0.0)


def test_torchs_adamw_is_followed_with_its_decay() -> None:
    ends = []
    for kind in (torch.optim.AdamW, AdamW):
        model = attached(rank=3)
        opt: Any = kind(model.parameters(), lr=0.05, weight_decay=0.3)
        CompAct.follow(opt, model)
        train(model, opt, batches(4))
        ends.append(model[0].weight.clone())
    assert torch.allclose(*ends, rtol=0, atol=1e-9)
