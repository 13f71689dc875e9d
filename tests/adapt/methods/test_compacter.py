"""Compacter and Compacter++ (Efficient Low-Rank Hypercomplex Adapter Layers, arXiv 2106.04647)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapt.cases import gpt, loss_of, output, stirred, tokens
from conformance.cases import mutated
from safetensors.torch import load_file
from torch import Tensor, nn

from poise import catalog
from poise.adapt import Compacter, adapters, attach, export, load
from poise.adapt.methods.compacter import Mixing, PHMLinear

SMALL: dict[str, Any] = {"n": 2, "reduction": 4}
ENDS = [f"model.layers.{i}.{end}" for i in range(2) for end in ("self_attn.o_proj", "mlp.down_proj")]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def phm(n: int, inputs: int, outputs: int, rank: int, kind: Any = PHMLinear) -> PHMLinear:
    torch.manual_seed(0)
    s, t = drawn(n, inputs // n, rank), drawn(n, rank, outputs // n)
    return kind(Mixing(drawn(n, n, n)), s, t, drawn(outputs))


def kronecker(n: int, A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return sum((torch.kron(A[i], s[i] @ t[i]) for i in range(n)), torch.zeros(()))


@pytest.mark.parametrize(
    ("n", "inputs", "outputs", "rank"), [(4, 24, 8, 1), (4, 8, 24, 3), (3, 9, 9, 2), (1, 5, 7, 2), (2, 2, 4, 1)]
)
@pytest.mark.parametrize("lead", [(), (6,), (2, 3), (2, 2, 3), (0,)])
def test_a_map_is_a_sum_of_kronecker_products(n: int, inputs: int, outputs: int, rank: int, lead: tuple[int, ...]) -> None:
    one, x = phm(n, inputs, outputs, rank), drawn(*lead, inputs)
    wanted = x @ kronecker(n, one.mixing.A, one.s, one.t) + one.b
    torch.testing.assert_close(one(x), wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.matrix(), kronecker(n, one.mixing.A, one.s, one.t), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_dense_matrix() -> None:
    one, other = phm(4, 24, 8, 2), phm(4, 24, 8, 2)
    x = drawn(7, 24).requires_grad_()
    y = x.detach().clone().requires_grad_()
    one(x).sin().sum().backward()
    (y @ other.matrix() + other.b).sin().sum().backward()
    for a, b in zip([x, *one.parameters()], [y, *other.parameters()], strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-11)


def test_the_matrix_is_not_made() -> None:
    """Of a map from 512 to 512 features of 8 rows, nothing with half the entries of H is kept."""
    one, sizes = phm(4, 512, 512, 1), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        one(drawn(8, 512))
    assert max(sizes) < 512 * 512 / 2


def trained_output(method: Any) -> tuple[nn.Module, Tensor]:
    """A model whose adapters were moved, and the output of its first feed-forward module for a given input."""
    model = gpt().double()
    attach(model, method, seed=0)
    stirred(model)
    x = torch.linspace(-1, 1, 2 * 32, dtype=torch.float64).view(2, 32)
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    return model, mlp(x)


def by_hand(model: nn.Module) -> Tensor:
    x = torch.linspace(-1, 1, 2 * 32, dtype=torch.float64).view(2, 32)
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    y = (F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
    adapter = mlp.down_proj.adapter
    A = adapter.down.mixing.A
    down, up = (kronecker(len(A), A, part.s, part.t) for part in (adapter.down, adapter.up))
    h = y @ down + adapter.down.b
    h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
    return y + h @ up + adapter.up.b


def test_an_adapter_follows_the_whole_module_and_adds_to_its_output() -> None:
    model, y = trained_output(Compacter(**SMALL))
    torch.testing.assert_close(y, by_hand(model), rtol=1e-12, atol=1e-12)


def test_a_mistake_in_the_mixing_is_seen() -> None:
    model, y = trained_output(mutated(catalog.get("compacter"))(**SMALL))
    assert float((y - by_hand(model)).detach().abs().max()) > 1e-5


def test_one_matrix_and_the_value_one_make_a_plain_adapter_of_that_rank() -> None:
    model = gpt().double()
    attach(model, Compacter(n=1, reduction=4, rank=3), "mlp.down_proj", seed=0)
    stirred(model)
    layer: Any = model.get_submodule("model.layers.1.mlp.down_proj")
    adapter, x = layer.adapter, drawn(5, 48)
    with torch.no_grad():
        adapter.down.mixing.A.fill_(1.0)
    y = x @ layer.weight.T
    h = F.gelu(y @ adapter.down.s[0] @ adapter.down.t[0] + adapter.down.b, approximate="tanh")
    wanted = y + h @ adapter.up.s[0] @ adapter.up.t[0] + adapter.up.b
    torch.testing.assert_close(layer(x), wanted, rtol=1e-12, atol=1e-12)
    assert adapter.down.s.shape == (1, 32, 3) and adapter.down.t.shape == (1, 3, 8)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("plus", [False, True])
def test_the_number_of_parameters_is_the_papers(plus: bool, rank: int) -> None:
    """n^3 once for the whole model; r (in + out) + out for each map; the five norms of 32 features."""
    model = gpt()
    kept = attach(model, Compacter(plus=plus, n=4, reduction=8, rank=rank))
    maps = 2 if plus else 4
    assert kept.trainable == 4**3 + maps * ((rank * (32 + 4) + 4) + (rank * (4 + 32) + 32)) + 5 * 32
    assert attach(gpt(), Compacter(plus=plus, n=4, reduction=8, rank=rank, norms=False)).trainable == kept.trainable - 5 * 32


def test_all_maps_hold_one_mixing_module_and_its_gradient_is_of_all_of_them() -> None:
    model = gpt().double()
    attach(model, Compacter(**SMALL), seed=0)
    stirred(model)
    for some in (model, copy.deepcopy(model)):
        held = [part.mixing for adapter in adapters(some).values() for part in (adapter.down, adapter.up)]  # pyright: ignore[reportAttributeAccessIssue]
        assert len(held) == 8 and len({id(one) for one in held}) == 1
    loss_of(model, tokens(model)).backward()
    apart = copy.deepcopy(model)
    parts: list[Any] = [part for adapter in adapters(apart).values() for part in (adapter.down, adapter.up)]
    for part in parts:
        part.mixing = copy.deepcopy(part.mixing)
    apart.zero_grad()
    loss_of(apart, tokens(apart)).backward()
    shared: Any = next(iter(adapters(model).values()))
    grads = torch.stack([part.mixing.A.grad for part in parts])
    assert bool((grads.flatten(1).norm(dim=1) > 0).all())
    torch.testing.assert_close(shared.down.mixing.A.grad, grads.sum(0), rtol=1e-10, atol=1e-12)


def test_the_shared_part_is_written_once_and_shared_again_when_read(tmp_path: Any) -> None:
    model = gpt()
    attach(model, Compacter(**SMALL), seed=0)
    stirred(model)
    export(model, tmp_path)
    assert sum(name.endswith("mixing.A") for name in load_file(tmp_path / "adapter.safetensors")) == 1
    again = gpt()
    load(again, tmp_path)
    assert torch.equal(output(again), output(model))
    assert sum(name.endswith("mixing.A") for name, _ in again.named_parameters()) == 1


def test_at_first_the_model_is_the_base_up_to_a_thousandth() -> None:
    model = gpt().double()
    before = output(model)
    attach(model, Compacter(n=4, reduction=8), seed=0)
    moved = float((output(model) - before).norm() / before.norm())
    assert 0 < moved < 1e-3
    x = drawn(50, 32)
    for path, adapter in adapters(model).items():
        y = adapter(x, model.get_submodule(path), lambda x: x)
        assert float((y - x).detach().norm() / x.norm()) < 1e-3


def test_its_start_is_that_of_the_paper() -> None:
    """A is normal with the given spread; s and t are uniform within Glorot's bound times the square root of two, b is zero."""
    layer = nn.Linear(8, 1024)
    attach(layer, Compacter(n=8, reduction=4, rank=2, spread=0.01, norms=False), nn.Linear, seed=0)
    adapter: Any = adapters(layer)[""]
    assert abs(float(adapter.down.mixing.A.std()) - 0.01) < 1e-3
    for part, rows, columns in ((adapter.down, 128, 32), (adapter.up, 32, 128)):
        for factor, bound in ((part.s, (12 / (rows + 2)) ** 0.5), (part.t, (12 / (2 + columns)) ** 0.5)):
            assert 0.95 * bound < float(factor.detach().abs().max()) <= bound
        assert not part.b.any()


def test_it_stands_after_attention_and_feed_forward_parts_and_plus_after_the_latter() -> None:
    assert attach(gpt(), Compacter(**SMALL)).layers == tuple(ENDS)
    assert attach(gpt(), Compacter(plus=True, **SMALL)).layers == tuple(ENDS[1::2])
    assert attach(gpt(), Compacter(**SMALL), "q_proj").layers == tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(2))


def test_norms_train_by_default() -> None:
    norms = {name for name, _ in gpt().named_parameters() if "norm" in name}
    assert set(attach(gpt(), Compacter(**SMALL)).also) == norms and len(norms) == 5
    assert attach(gpt(), Compacter(norms=False, **SMALL)).also == ()
    assert set(attach(gpt(), Compacter(**SMALL), also="lm_head.weight").also) == {*norms, "lm_head.weight"}


def test_convolutions_have_it_over_their_channels() -> None:
    layer: Any = nn.Conv2d(3, 8, 3, stride=2).double()
    attach(layer, Compacter(n=2, reduction=2, norms=False), nn.Conv2d, seed=0)
    stirred(layer)
    adapter, x = layer.adapter, drawn(2, 3, 9, 9)
    y = F.conv2d(x, layer.weight, layer.bias, stride=2)
    wanted = y.clone()
    for row in range(4):
        for column in range(4):
            wanted[:, :, row, column] += adapter.up(F.gelu(adapter.down(y[:, :, row, column]), approximate="tanh"))
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0])


def test_bad_settings_are_refused() -> None:
    for name, value in (("n", 0), ("reduction", 1.5), ("rank", -1)):
        with pytest.raises(ValueError, match=f"{name}={value}: must be a whole number"):
            Compacter(**{name: value})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="spread=0"):
        Compacter(spread=0)
    with pytest.raises(
        ValueError, match=r"n=4, reduction=32: the 32 outputs of 'model.layers.0.self_attn.o_proj' and the 1 feat"
    ):
        attach(gpt(), "compacter")
    with pytest.raises(ValueError, match="no feed-forward part of a repeated block"):
        attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "compacter")
