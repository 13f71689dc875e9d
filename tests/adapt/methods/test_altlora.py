"""AltLoRA and AltLoRA+ (Towards Better Gradient Approximation in Low-Rank Adaptation, arXiv 2505.12455)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt.cases import gpt, loss_of, tokens
from conformance.cases import mutated
from torch import Tensor, nn

from poise import catalog
from poise.adapt import AltLoRA, AltLoRAPlus, attach, attached, pairs
from poise.compare import tasks
from poise.compare.entries import parse
from poise.compare.fit import Fit, fit
from poise.optim import SGD, AdamW
from poise.training import SAM

OUT, IN, RANK = 7, 9, 3
Trajectory = list[Tensor]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(A: Tensor | None = None, B: Tensor | None = None, alpha: float = 6.0, outputs: int = OUT) -> Any:
    """One linear layer in float64 with a pair beside it, s = 2 unless told otherwise."""
    model: Any = nn.Sequential(nn.Linear(IN, outputs, bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(drawn(outputs, IN, seed=1))
    attach(model, "lora", "0", rank=RANK, alpha=alpha, seed=0)
    (pair,) = pairs(model)
    with torch.no_grad():
        pair.A.copy_(drawn(RANK, IN, seed=2) if A is None else A)
        pair.B.copy_(drawn(outputs, RANK, seed=3) if B is None else B)
    return model


def product(model: Any) -> Tensor:
    return model[0].adapter.change().detach().clone()


def backward(model: Any) -> Tensor:
    """A loss that depends on the weight as a whole; returns its gradient there."""
    outputs = len(model[0].weight)
    x, y = drawn(30, IN, seed=4), drawn(30, outputs, seed=5)
    model.zero_grad()
    error = torch.tanh(model(x)) - y
    error.square().mean().backward()
    with torch.no_grad():
        z = torch.tanh(model(x))
        return (2 * (z - y) * (1 - z * z) / z.numel()).T @ x


def run(model: Any, opt: torch.optim.Optimizer, steps: int) -> Trajectory:
    found = []
    for _ in range(steps):
        backward(model)
        opt.step()
        found.append(product(model))
    return found


def gap(one: Trajectory, other: Trajectory) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


# -- what the paper promises ---------------------------------------------------------------------------------------------


def test_without_momentum_and_ridge_the_weight_moves_by_the_gradient_projected_through_the_other_factor() -> None:
    model = layer()
    opt = AltLoRA(model, lr=0.3, momentum=0.0, weight_decay=0.0, ridge=0.0)
    (pair,) = pairs(model)
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    before, G = product(model), backward(model)
    opt.step()
    rows = A.T @ torch.linalg.solve(A @ A.T, A)
    torch.testing.assert_close(product(model) - before, -0.3 * G @ rows, rtol=1e-11, atol=1e-13)
    assert torch.equal(pair.A, A) and not torch.equal(pair.B, B)
    B = pair.B.detach().clone()
    before, G = product(model), backward(model)
    opt.step()
    columns = B @ torch.linalg.solve(B.T @ B, B.T)
    torch.testing.assert_close(product(model) - before, -0.3 * columns @ G, rtol=1e-11, atol=1e-13)
    assert torch.equal(pair.B, B) and not torch.equal(pair.A, A)


Q = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.3, -1.0], [0.5, 0.0, 5.0]], dtype=torch.float64)
EXACT: dict[str, Any] = {"lr": 0.3, "weight_decay": 0.0, "ridge": 0.0}


def refactored(make: Callable[[Any], torch.optim.Optimizer], steps: int = 6) -> float:
    """How far apart (A, B) and (Q A, B Q^-1) come to be."""
    A, B = drawn(RANK, IN, seed=2), drawn(OUT, RANK, seed=3)
    models = [layer(A, B), layer(Q @ A, B @ torch.linalg.inv(Q))]
    return gap(*[run(model, make(model), steps) for model in models])


@pytest.mark.parametrize("how", [{}, {"period": 2}, {"joint": True}, {"scaled": False}])
def test_how_the_product_is_factored_does_not_matter_momentum_included(how: dict[str, Any]) -> None:
    assert refactored(lambda model: AltLoRA(model, **EXACT, **how)) < 1e-11


def test_lora_by_other_optimizers_depends_on_how_the_product_is_factored() -> None:
    assert refactored(lambda model: SGD(model, lr=0.1)) > 1e-2
    assert refactored(lambda model: AdamW(model, lr=0.01)) > 1e-2
    assert refactored(lambda model: AltLoRAPlus(model, lr=0.01, ridge=0.0)) > 1e-3


def refactored_on_the_way(make: Callable[[Any], torch.optim.Optimizer]) -> float:
    """How far a run comes from itself if A and B become Q A and B Q^-1 after three steps and again after the fifth."""
    model, plain = layer(), layer()
    opt, found, (pair,) = make(model), [], pairs(model)
    for steps in (3, 2, 3):
        found += run(model, opt, steps)
        with torch.no_grad():
            pair.A.copy_(Q @ pair.A)
            pair.B.copy_(pair.B @ torch.linalg.inv(Q))
    return gap(found, run(plain, make(plain), 8))


@pytest.mark.parametrize("how", [{}, {"period": 2}, {"joint": True}, {"scaled": False}])
def test_momentum_is_carried_over_where_the_factors_change_under_it(how: dict[str, Any]) -> None:
    wrong: Any = mutated(catalog.get("altlora"))
    assert refactored_on_the_way(lambda model: AltLoRA(model, **EXACT, **how)) < 1e-11
    assert refactored_on_the_way(lambda model: wrong(model, **EXACT, **how)) > 1e-3
    assert refactored_on_the_way(lambda model: wrong(model, **{**EXACT, "momentum": 0.0}, **how)) < 1e-11


def steps_needed(model: Any, opt: torch.optim.Optimizer, target: Tensor, most: int = 1000) -> int:
    for step in range(most):
        loss = (model[0].adapter.change() - target).square().sum()
        if loss < 1e-6 * target.square().sum():
            return step
        opt.zero_grad()
        loss.backward()
        opt.step()
        if not torch.isfinite(loss):
            return most
    return most


def test_badly_scaled_factors_do_not_slow_it_down() -> None:
    target = drawn(OUT, RANK, seed=7) @ drawn(RANK, IN, seed=8)
    scales = torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    A, B = scales[:, None] * drawn(RANK, IN, seed=2), drawn(OUT, RANK, seed=3) * 0.1

    def best(make: Any, rates: tuple[float, ...]) -> int:
        found = []
        for lr in rates:
            model = layer(A, B, alpha=float(RANK))
            found.append(steps_needed(model, make(model, lr), target))
        return min(found)

    assert best(lambda model, lr: AltLoRA(model, lr=lr, momentum=0.0, weight_decay=0.0), (0.5,)) <= 6  # least squares in turn
    assert best(lambda model, lr: AltLoRA(model, lr=lr, weight_decay=0.0), (0.1, 0.3)) < 200
    assert best(lambda model, lr: SGD(model, lr=lr), (3e-4, 1e-3, 3e-3)) == 1000


# -- the update, written down a second time -------------------------------------------------------------------------------


class Written:
    """One pair by the formulas of the paper, step by step."""

    def __init__(self, A: Tensor, B: Tensor, s: float, **settings: Any) -> None:
        self.A, self.B, self.s = A.clone(), B.clone(), s
        self.lr, self.wd, self.ridge, self.period, self.joint, self.scaled = 1.0, 0.05, 1e-2, 1, False, True
        self.b1, self.b2, self.eps, self.plus = 0.9, 0.99, 1e-4, False
        self.__dict__.update(settings)
        self.MA, self.MB, self.vA, self.vB = (torch.zeros_like(t) for t in (A, B, A, B))
        self.A_before, self.B_before = torch.zeros_like(A), torch.zeros_like(B)
        self.tA = self.tB = self.clock = 0

    def step(self, gA: Tensor, gB: Tensor) -> None:
        if self.joint:
            self.move_A(gA)
            self.move_B(gB)
        elif (self.clock // self.period) % 2 == 0:
            self.move_B(gB)
        else:
            self.move_A(gA)
        self.clock += 1

    def move_A(self, gA: Tensor) -> None:
        C = torch.linalg.inv(self.B.T @ self.B + self.ridge * torch.eye(RANK, dtype=torch.float64))
        g = C @ gA / (self.s**2 if self.scaled else 1)
        self.MA = self.b1 * C @ self.B.T @ self.B_before @ self.MA + (1 - self.b1) * g
        self.vA = self.b2 * self.vA + (1 - self.b2) * g * g
        self.tA, self.B_before = self.tA + 1, self.B.clone()
        self.A = self.moved(self.A, self.MA, self.vA, self.tA)

    def move_B(self, gB: Tensor) -> None:
        C = torch.linalg.inv(self.A @ self.A.T + self.ridge * torch.eye(RANK, dtype=torch.float64))
        g = gB @ C / (self.s**2 if self.scaled else 1)
        self.MB = self.b1 * self.MB @ self.A_before @ self.A.T @ C + (1 - self.b1) * g
        self.vB = self.b2 * self.vB + (1 - self.b2) * g * g
        self.tB, self.A_before = self.tB + 1, self.A.clone()
        self.B = self.moved(self.B, self.MB, self.vB, self.tB)

    def moved(self, P: Tensor, M: Tensor, v: Tensor, t: int) -> Tensor:
        P = P - self.lr / (1 - self.b1**t) * M / ((v.sqrt() + self.eps) if self.plus else 1)
        return P - self.lr * self.wd * P


HOW: list[dict[str, Any]] = [{}, {"period": 3}, {"joint": True}, {"scaled": False}, {"joint": True, "scaled": False}]


def against_the_formulas(make: Any, how: dict[str, Any], plus: bool) -> float:
    model = layer()
    hyper: dict[str, Any] = {"betas": (0.9, 0.99)} if plus else {"momentum": 0.9}
    opt = make(model, lr=1.0, weight_decay=0.05, ridge=1e-2, **hyper, **how)
    (pair,) = pairs(model)
    mine = Written(pair.A.detach(), pair.B.detach(), pair.scale, plus=plus, **how)
    apart = 0.0
    for _ in range(14):
        G = backward(model)
        mine.step(mine.s * mine.B.T @ G, mine.s * G @ mine.A.T)
        opt.step()
        apart = max(apart, *(float((p.detach() - q).abs().max()) for p, q in ((pair.A, mine.A), (pair.B, mine.B))))
    return apart


@pytest.mark.parametrize("how", HOW)
def test_altlora_is_its_formulas(how: dict[str, Any]) -> None:
    assert against_the_formulas(AltLoRA, how, plus=False) < 1e-11
    assert against_the_formulas(mutated(catalog.get("altlora")), how, plus=False) > 1e-3


@pytest.mark.parametrize("how", HOW)
def test_altlora_plus_is_its_formulas(how: dict[str, Any]) -> None:
    assert against_the_formulas(AltLoRAPlus, how, plus=True) < 1e-11
    assert against_the_formulas(mutated(catalog.get("altlora-plus")), how, plus=True) > 1e-3


# -- who moves ------------------------------------------------------------------------------------------------------------


def moves(model: Any, opt: torch.optim.Optimizer, steps: int) -> str:
    """Which factors of the first pair moved, step by step: a, b, or c for both."""
    found, pair = "", pairs(model)[0]
    for _ in range(steps):
        before = pair.A.detach().clone(), pair.B.detach().clone()
        opt.zero_grad()
        loss_of(model, tokens(model)).backward()
        opt.step()
        found += "-abc"[(not torch.equal(pair.A, before[0])) + 2 * (not torch.equal(pair.B, before[1]))]
    return found


@pytest.mark.parametrize("kind", [AltLoRA, AltLoRAPlus])
def test_factors_take_turns(kind: Any) -> None:
    def of(targets: str, **how: Any) -> str:
        model = gpt()
        attach(model, "lora", targets, rank=4, seed=0)
        return moves(model, kind(model, **how), 7)

    assert of("linear") == "bababab"
    assert of("linear", period=2) == "bbaabba"
    assert of("linear", joint=True, weight_decay=0.0) == "bcccccc"  # A has no gradient while B is zero
    assert of("embedding") == "abababa"


def test_a_factor_without_a_partner_that_trains_moves_in_every_step() -> None:
    model = gpt()
    attach(model, "lora", rank=4, seed=0)
    for pair in pairs(model):
        pair.A.requires_grad_(False)
    assert moves(model, AltLoRA(model), 3) == "bbb"


def test_a_factor_whose_partner_is_left_out_for_a_while_moves_in_every_step() -> None:
    model = gpt()
    attach(model, "lora", rank=4, seed=0)
    opt = AltLoRA(model)
    assert moves(model, opt, 3) == "bab"
    opt.keep_only([p for name, p in model.named_parameters() if name.endswith("lora_B")])
    assert moves(model, opt, 2) == "bb"
    opt.keep_only(None)
    assert set(moves(model, opt, 2)) == {"a", "b"}


def test_it_goes_round_in_other_drivers() -> None:
    model = gpt()
    attach(model, "lora", rank=4, seed=0)
    opt = SAM(AltLoRA(model), rho=0.01)
    x = tokens(model)

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    found = [float(opt.step(closure).detach()) for _ in range(30)]
    assert found[-1] < 0.7 * found[0]


def test_gradients_are_left_where_they_were() -> None:
    model = layer()
    opt = AltLoRA(model)
    backward(model)
    before = [p.grad for p in model.parameters()]
    opt.step()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), before, strict=True))


def test_everything_else_that_trains_goes_to_adamw() -> None:
    def norms(make: Callable[[nn.Module], torch.optim.Optimizer]) -> list[Tensor]:
        model = gpt()
        attach(model, "lora", rank=4, seed=0, also="*norm*")
        for pair in pairs(model):  # so that both see the same gradients
            pair.B.register_hook(torch.zeros_like)
        opt = make(model)
        for _ in range(4):
            opt.zero_grad()
            loss_of(model, tokens(model)).backward()
            opt.step()
        return [p.detach() for n, p in model.named_parameters() if "norm" in n]

    mine = norms(lambda model: AltLoRA(model, weight_decay=0.0, adamw_lr=0.02, adamw_weight_decay=0.1))
    theirs = norms(
        lambda model: AdamW([p for n, p in model.named_parameters() if "norm" in n], lr=0.02, weight_decay=0.1, decay="after")
    )
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert any(not torch.equal(a, torch.ones_like(a)) for a in mine)


# -- where it cannot be projected ----------------------------------------------------------------------------------------


def test_where_the_other_factor_has_no_inverse_the_gradient_is_taken_as_it_is() -> None:
    A = drawn(RANK, IN, seed=2)
    A[1] = 0.0
    model = layer(A)
    (pair,) = pairs(model)
    before = pair.B.detach().clone()
    opt = AltLoRA(model, lr=0.1, momentum=0.5, weight_decay=0.0, ridge=0.0)
    backward(model)
    assert pair.B.grad is not None
    g = pair.B.grad.clone()
    opt.step()
    torch.testing.assert_close(pair.B.detach(), before - 0.1 * g, rtol=1e-12, atol=1e-14)
    model = layer(A, torch.zeros(OUT, RANK, dtype=torch.float64))
    for found in run(model, AltLoRA(model, ridge=0.0), 5):
        assert bool(torch.isfinite(found).all())


def test_a_rank_above_the_width_is_held_by_the_ridge() -> None:
    model = layer(outputs=2)

    def loss() -> float:
        with torch.no_grad():
            return float((torch.tanh(model(drawn(30, IN, seed=4))) - drawn(30, 2, seed=5)).square().mean())

    before = loss()
    run(model, AltLoRA(model, lr=1.0), 60)
    assert loss() < 0.9 * before


# -- an optimizer like the others -----------------------------------------------------------------------------------------


def trained(model: nn.Module, opt: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, tokens(model)).backward()
        opt.step()


def begun(kind: Any, state: str = "fp32", dtype: torch.dtype = torch.float32, method: str = "lora", **more: Any) -> Any:
    model = gpt().to(dtype)
    attach(model, method, seed=0, rank=4)
    return model, kind(model, lr=0.1 if kind is AltLoRA else 1e-3, state=state, **more)


@pytest.mark.parametrize("kind", [AltLoRA, AltLoRAPlus])
@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_state_format_trains(kind: Any, state: str, method: str) -> None:
    model, opt = begun(kind, state, method=method)
    first = float(loss_of(model, tokens(model)).detach())
    trained(model, opt, 20)
    assert float(loss_of(model, tokens(model)).detach()) < 0.9 * first


@pytest.mark.parametrize("kind", [AltLoRA, AltLoRAPlus])
def test_momentum_is_encoded_and_what_it_is_carried_by_is_not(kind: Any) -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    attach(model, "lora", "0", rank=64, seed=0)
    full, small = (kind(model, state=state).state_bytes() for state in ("fp32", "int8"))
    numbers, factor = sum(p.numel() for pair in pairs(model) for p in (pair.A, pair.B)), 2 if kind is AltLoRAPlus else 1
    assert full == pytest.approx(4 * numbers * (1 + factor))
    assert small == pytest.approx((4 + 1 * factor) * numbers, rel=0.05)


@pytest.mark.parametrize("kind", [AltLoRA, AltLoRAPlus])
@pytest.mark.parametrize("how", [{}, {"period": 2}, {"joint": True}])
def test_training_goes_on_exactly(kind: Any, how: dict[str, Any]) -> None:
    model, opt = begun(kind, "int8", **how)
    trained(model, opt, 3)
    saved = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    copied, its = pickle.loads(pickle.dumps((model, opt)))
    trained(model, opt, 4)
    other, fresh = begun(kind, "int8", **how)
    other.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    trained(other, fresh, 4)
    trained(copied, its, 4)
    for again in (other, copied):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_preview_is_the_step_and_changes_nothing() -> None:
    model, opt = begun(AltLoRA)
    trained(model, opt, 2)
    loss_of(model, tokens(model)).backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in named.items()}
    expected = opt.preview()
    assert all(torch.equal(named[n], before[n]) for n in named)
    opt.step()
    moved = {n for n in named if not torch.equal(named[n], before[n])}
    assert moved == {n for n in named if n.endswith("lora_B")}
    for n in moved:
        torch.testing.assert_close(named[n].detach(), before[n] + expected[n])
    assert "altlora" in str(opt.plan())


def test_a_closure_and_hooks_are_asked_once_a_step() -> None:
    called = {"closure": 0, "hook": 0}
    model, opt = begun(AltLoRA, joint=True)

    def hook(*_: Any) -> None:
        called["hook"] += 1

    def closure() -> Tensor:
        called["closure"] += 1
        opt.zero_grad()
        loss = loss_of(model, tokens(model))
        loss.backward()
        return loss

    opt.register_step_post_hook(hook)
    twin, other = begun(AltLoRA, joint=True)
    for _ in range(3):
        opt.step(closure)
    trained(twin, other, 3)
    assert called == {"closure": 3, "hook": 3}
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_bfloat16_models_are_trained() -> None:
    model, opt = begun(AltLoRA, dtype=torch.bfloat16)
    first = float(loss_of(model, tokens(model)).detach())
    trained(model, opt, 20)
    assert float(loss_of(model, tokens(model)).detach()) < 0.9 * first
    for pair in pairs(model):
        pair.A.data, pair.B.data = pair.A.data.bfloat16(), pair.B.data.bfloat16()
    trained(model, AltLoRA(model), 4)


def test_it_is_weighed_around_an_adapter() -> None:
    entry = parse("mine=lora(around=altlora,rank=4)")["mine"]
    assert set(entry.space) == {"alpha", "lr", "momentum"}
    model = gpt()
    opt = pickle.loads(pickle.dumps(entry)).build(model, lr=0.2, momentum=0.95, alpha=16.0)
    assert isinstance(opt, AltLoRA) and attached(model) is not None
    assert opt.param_groups[0]["lr"] == 0.2 and pairs(model)[0].scale == 4.0
    trained(model, opt, 2)


def test_the_loop_of_the_scale_trains_with_it(tmp_path: Path) -> None:
    run = Fit(tasks.load("digits"), parse("lora(around=altlora,rank=4,lr=0.3)")["lora"], 0, 6, tmp_path, 100, "cpu")
    assert fit(run).passes == 6 and (tmp_path / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"momentum": 1.0}, r"momentum=1.0: must be in \[0, 1\)"),
        ({"ridge": -1.0}, "ridge=-1.0: must not be negative"),
        ({"period": 0}, "period=0: must be a whole number of at least 1"),
        ({"period": 1.5}, "period=1.5"),
        ({"lr": -1.0}, "lr"),
        ({"adamw_lr": -1.0}, "adamw_lr"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AltLoRA(layer(), **settings)


def test_a_model_without_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="attach"):
        AltLoRA(gpt())
    with pytest.raises(TypeError, match="must be the adapted model"):
        AltLoRA(list(layer().parameters()))  # pyright: ignore[reportArgumentType]
    model = layer()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no pair of the model has a factor that trains"):
        AltLoRA(model)
    with pytest.raises(ValueError, match=r"betas"):
        AltLoRAPlus(layer(), betas=(1.0, 0.9))
