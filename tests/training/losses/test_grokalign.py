"""GrokAlign (GrokAlign: Geometric Characterisation and Acceleration of Grokking, arXiv 2506.12284)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from conformance.cases import mutated
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import AdamW

from poise.catalog import get
from poise.training import centroid_alignment, jacobian_penalty, rank_one_share

F64 = torch.float64


def relu_net(outputs: int, inputs: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [inputs, 12, 12, outputs]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def samples(batch: int, inputs: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, inputs, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def jacobians(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(batch, outputs, inputs), one sample at a time."""
    return torch.stack([torch.func.jacrev(model)(one.detach()).flatten(1) for one in x])


def reference(model: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """The mean over samples of the expected square, ||J_b||_F^2."""
    J = jacobians(model, x)
    return sum(float(entry) ** 2 for entry in J.detach().flatten()) / len(x)


def gap(penalty: Any) -> float:
    """How far the mean over many projections is from ||J||_F^2, relatively."""
    model, x = relu_net(4), samples(3)
    wanted = reference(model, x)
    generator = torch.Generator().manual_seed(0)
    found = penalty(model(x), x, 1.0, projections=3000, squared=True, generator=generator)
    return abs(float(found.detach()) / wanted - 1)


def test_over_random_directions_it_is_the_frobenius_norm_of_the_jacobian() -> None:
    assert gap(jacobian_penalty) < 0.02


def test_the_reference_tells_it_from_its_mutant() -> None:
    assert gap(mutated(get("grokalign"))) > 0.5


def test_with_one_output_it_is_exactly_the_norm_of_the_gradient() -> None:
    model, x = relu_net(1), samples(5)
    norms = jacobians(model, x).flatten(1).norm(dim=1)
    assert torch.allclose(jacobian_penalty(model(x), x, 0.5), 0.5 * norms.mean(), rtol=1e-12)
    assert torch.allclose(jacobian_penalty(model(x), x, 1.0, squared=True, projections=3), norms.square().mean(), rtol=1e-12)


def test_directions_have_length_1_so_that_an_orthogonal_map_gives_its_size_without_noise() -> None:
    x = samples(4, inputs=5)
    assert torch.allclose(jacobian_penalty(3 * x, x, 1.0), torch.tensor(3 * 5**0.5, dtype=F64), rtol=1e-12)


def test_of_a_linear_map_the_expectation_is_its_squared_norm_at_every_sample() -> None:
    W = torch.randn(4, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    for seed in (1, 2):
        x = samples(2000, seed=seed)
        found = jacobian_penalty(x @ W.T, x, 1.0, squared=True, projections=4, generator=torch.Generator().manual_seed(seed))
        assert abs(float(found / W.square().sum()) - 1) < 0.03


def test_the_root_is_taken_of_each_sample_and_guarded_at_1e_8() -> None:
    x = samples(2, inputs=3)
    scale = torch.tensor([[2.0], [0.0]], dtype=F64)
    y = (scale * x).sum(1, keepdim=True)  # one output: gradients of length 2 sqrt(3) and 0
    assert torch.allclose(jacobian_penalty(y, x, 1.0), torch.tensor((2 * 3**0.5 + 1e-4) / 2, dtype=F64), rtol=1e-12)


def test_its_gradient_is_that_of_the_jacobians_norm() -> None:
    model, x = relu_net(1), samples(5)
    jacobian_penalty(model(x), x, 1.0).backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.func.vmap(torch.func.grad(lambda one: torch.func.functional_call(model, dict(model.named_parameters()), one).sum()))(
        x.detach()
    ).norm(dim=1).mean().backward()
    for a, p in zip(found, model.parameters(), strict=True):
        assert a is not None and p.grad is not None and torch.allclose(a, p.grad, atol=1e-12)
    assert any(float(p.grad.abs().max()) > 1e-3 for p in model.parameters() if p.grad is not None)


def test_of_a_token_model_it_is_taken_at_the_embedding() -> None:
    torch.manual_seed(0)
    table, layer = nn.Embedding(9, 4).double(), nn.Linear(4, 3).double()
    embedded = table(torch.randint(9, (5, 6)))
    penalty = jacobian_penalty(layer(embedded).tanh(), embedded, 1.0)
    penalty.backward()
    assert table.weight.grad is not None and float(table.weight.grad.abs().max()) > 0
    assert float(penalty) > 0


def test_in_bfloat16_squares_are_summed_in_float32() -> None:
    x = torch.ones(2, 5000, dtype=torch.bfloat16, requires_grad=True)
    penalty = jacobian_penalty(x.sum(1, keepdim=True), x, 1.0, squared=True)
    assert penalty.dtype == torch.float32
    assert float(penalty) == pytest.approx(5000)


def test_a_generator_makes_it_repeatable() -> None:
    model, x = relu_net(4), samples(3)
    found = [float(jacobian_penalty(model(x), x, generator=torch.Generator().manual_seed(s)).detach()) for s in (1, 1, 2)]
    assert found[0] == found[1] != found[2]


# ---------------------------------------------------------------------------------------------------------------- diagnostics


def test_of_a_linear_map_the_alignment_is_the_cosine_of_the_summed_rows() -> None:
    W = torch.randn(4, 6, dtype=F64)
    x = samples(7)
    wanted = torch.nn.functional.cosine_similarity(W.sum(0).expand(7, 6), x.detach(), dim=1)
    assert torch.allclose(centroid_alignment(x @ W.T, x), wanted, rtol=1e-12)


def test_a_relu_net_without_biases_is_its_jacobian_times_the_sample() -> None:
    model, x = relu_net(1), samples(20)
    y = model(x)
    mu = jacobians(model, x).flatten(1)
    found = centroid_alignment(y, x) * mu.norm(dim=1) * x.detach().norm(dim=1)
    assert torch.allclose(found, y.detach().squeeze(1), atol=1e-12)
    assert float(y.detach().abs().max()) > 1e-2


def test_perfect_alignment_is_1_opposite_minus_1_and_nothing_0() -> None:
    x = samples(6)
    half = x.square().sum(1, keepdim=True) / 2  # its gradient is x itself
    assert torch.allclose(centroid_alignment(half, x), torch.ones(6, dtype=F64), rtol=1e-12)
    assert torch.allclose(centroid_alignment(-half, x), -torch.ones(6, dtype=F64), rtol=1e-12)
    assert torch.equal(centroid_alignment(0 * half, x), torch.zeros(6, dtype=F64))


def test_the_share_of_rank_one_is_that_of_the_singular_values() -> None:
    model, x = relu_net(4), samples(5)
    wanted = []
    for J in jacobians(model, x):
        s = torch.linalg.svdvals(J)
        wanted.append(s[0] ** 2 / sum(s**2))
    assert torch.allclose(rank_one_share(model(x), x), torch.stack(wanted), rtol=1e-10)
    u, v = torch.randn(4, dtype=F64), torch.randn(6, dtype=F64)
    assert torch.allclose(rank_one_share((x @ v).unsqueeze(1) * u, x), torch.ones(5, dtype=F64), rtol=1e-12)
    assert torch.allclose(rank_one_share(2 * x, x), torch.full((5,), 1 / 6, dtype=F64), rtol=1e-12)
    assert torch.equal(rank_one_share(0 * x, x), torch.zeros(5, dtype=F64))


def test_diagnostics_leave_the_graph_for_the_backward_pass_that_follows() -> None:
    model, x = relu_net(4), samples(5)
    y = model(x)
    centroid_alignment(y, x)
    rank_one_share(y, x)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("measure", [jacobian_penalty, centroid_alignment, rank_one_share])
def test_what_cannot_be_differentiated_is_refused(measure: Any) -> None:
    x = samples(3)
    for outputs, inputs, message in (
        (x.detach() * 2, x, "outputs do not require grad"),
        (2 * x, x.detach(), "inputs do not require grad"),
        (2 * x, samples(3), "not made from inputs"),
        ((2 * x)[:2], x, "must share their first dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(outputs, inputs)


def test_settings_that_make_no_sense_are_refused() -> None:
    x = samples(3)
    for bad, message in (({"projections": 0}, "projections=0"), ({"strength": -1.0}, r"strength=-1\.0")):
        with pytest.raises(ValueError, match=message):
            jacobian_penalty(2 * x, x, **bad)  # pyright: ignore[reportArgumentType]


def first_step_above(threshold: float, strength: float, steps: int) -> int | None:
    """Of a network on 1024 digits whose start is eight times too large: the step at which it first tells new ones that well."""
    digits: Any = load_digits()
    images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    order = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(len(images), generator=order)
    known, new = shuffled[:1024], shuffled[1024:]
    torch.manual_seed(0)
    sizes = [64, 196, 196, 196, 10]
    model = nn.Sequential(*[part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())][:-1])
    with torch.no_grad():
        for p in model.parameters():
            p *= 8
    opt = AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(1, steps + 1):
        batch = known[torch.randint(1024, (256,), generator=order)]
        x = images[batch].requires_grad_(strength > 0)
        outputs = model(x)
        loss = cross_entropy(outputs, labels[batch])
        opt.zero_grad()
        (loss + jacobian_penalty(outputs, x, strength) if strength else loss).backward()
        opt.step()
        if step % 50 == 0:
            with torch.no_grad():
                told = model(images[new]).argmax(1) == labels[new]
            if float(told.float().mean()) >= threshold:
                return step
    return None


@pytest.mark.slow
def test_a_network_that_begins_too_large_generalizes_sooner() -> None:
    """Without the penalty it knows the training set after a few hundred steps, and generalizes no better for thousands."""
    sooner = first_step_above(0.93, 0.1, 1500)
    assert sooner is not None
    assert first_step_above(0.93, 0.0, 2 * sooner) is None
