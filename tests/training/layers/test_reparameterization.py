"""Layers that hold their weight as something else, whatever the kind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conformance.cases import build
from torch import Tensor, nn
from torch.nn.utils import parametrize

from poise.catalog import Method
from poise.models.convnet import ConvNet
from poise.models.gpt import GPT, GPTConfig
from poise.modules import Rows
from poise.optim import Muon
from poise.optim.routing import collect
from poise.training import Reparameterization, WeightConditioning, WeightNorm, fold, reparameterize

KINDS = [WeightNorm, WeightConditioning]
TINY = GPTConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_attention_heads=2, max_position_embeddings=8)


class Doubled(Reparameterization):
    """Half of the weight is stored, and a factor for each row beside it."""

    def make(self, matrix: Tensor, *beside: Tensor) -> Tensor:
        return 2 * matrix * beside[0].unsqueeze(1)

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        return (torch.full((len(matrix),), 0.5, dtype=matrix.dtype),)


def mlp(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 3)).to(dtype)


def tied_gpt() -> Any:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**vars(TINY), "tie_word_embeddings": True}))


def stored(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if "parametrizations" in name]


# ---------------------------------------------------------------------------------------------------------- which layers


def test_by_default_linear_layers_and_convolutions_are_held_and_nothing_else() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Embedding(5, 2), nn.LayerNorm(4), nn.ConvTranspose2d(2, 3, 3), nn.Linear(4, 4))
    assert reparameterize(model, WeightConditioning) is model
    assert stored(model) == [f"{i}.parametrizations.weight.original" for i in (0, 3, 4)]


@pytest.mark.parametrize(
    "layers, held",
    [
        ("model.layers.0.mlp.*", [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]),
        (nn.Embedding, ["model.embed_tokens"]),
        ((nn.Embedding, nn.RMSNorm), ["model.embed_tokens"]),  # gains have one dimension
        (lambda path, layer: path.endswith("q_proj"), [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]),
    ],
    ids=["glob", "type", "types", "function"],
)
def test_layers_are_chosen_by_path_type_or_function(layers: Any, held: list[str]) -> None:
    model = reparameterize(GPT(TINY), WeightConditioning, layers)
    assert stored(model) == [f"{path}.parametrizations.weight.original" for path in held]


def test_a_model_that_is_one_layer_and_another_parameter_name() -> None:
    assert stored(reparameterize(nn.Linear(3, 4), WeightNorm)) == [f"parametrizations.weight.original{i}" for i in (0, 1)]
    attention: Any = nn.MultiheadAttention(8, 2)
    reparameterize(attention, WeightNorm, nn.MultiheadAttention, parameter="in_proj_weight")
    assert attention.parametrizations["in_proj_weight"].original0.shape == (24,)


@pytest.mark.parametrize("groups", [1, 2])
def test_rows_of_a_transposed_convolution_are_its_output_channels(groups: int) -> None:
    layer = nn.ConvTranspose2d(4, 6, 3, groups=groups, bias=False)
    rows = Rows.of(layer, layer.weight)
    matrix = rows.view(layer.weight.detach())
    assert matrix.shape == (6, 4 // groups * 9)
    assert torch.equal(rows.stored(matrix, layer.weight.shape), layer.weight)
    for channel in range(6):  # an output channel that has no row of its own is silent
        layer.weight.data = rows.stored(matrix * (torch.arange(6) != channel).unsqueeze(1), layer.weight.shape)
        loud = layer(torch.ones(1, 4, 5, 5)).abs().sum((0, 2, 3)) > 0
        assert loud.tolist() == [other != channel for other in range(6)]


def test_a_layer_that_stores_its_inputs_first_has_outputs_as_rows() -> None:
    layer: Any = nn.Module()
    layer.nf, layer.weight = 6, nn.Parameter(torch.randn(4, 6))
    assert torch.equal(Rows.of(layer, layer.weight).view(layer.weight), layer.weight.T)


# --------------------------------------------------------------------------------------------------------- what it refuses


def refused(model: nn.Module, *args: Any, error: type[Exception], match: str, **options: Any) -> None:
    before = [(name, id(p), p.detach().clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    with pytest.raises(error, match=match):
        reparameterize(model, *args, **options)
    after = list(model.named_parameters(remove_duplicate=False))
    assert [(name, i) for name, i, _ in before] == [(name, id(p)) for name, p in after]
    assert all(torch.equal(old, p) for (_, _, old), (_, p) in zip(before, after, strict=True))


def with_zero_row() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[3].weight[1] = 0
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_held_is_refused_by_name_and_nothing_is_changed(kind: type[Reparameterization]) -> None:
    refused(mlp(), kind, "1?.*", error=ValueError, match="no such layer with a 'weight'")
    refused(mlp(), kind, 3, error=TypeError, match="layers=3")
    refused(mlp(), kind, nonsense=1, error=TypeError, match="nonsense")
    refused(tied_gpt(), kind, error=ValueError, match=r"'lm_head\.weight' is tied to 'model\.embed_tokens\.weight'.*both")
    refused(with_zero_row(), kind, error=ValueError, match=r"'3\.weight': row 1 of 3 is zero")
    stack = nn.Module()
    stack.weight = nn.Parameter(torch.ones(2, 3, 4))
    refused(stack, kind, nn.Module, error=ValueError, match="which of its dimensions are the outputs")


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet"):
        reparameterize(nn.Sequential(nn.LazyLinear(3)), WeightNorm)


def test_a_weight_that_is_held_already_is_refused() -> None:
    model = reparameterize(mlp(), WeightNorm, "0")
    with pytest.raises(ValueError, match=r"'0\.weight' is parametrized already, by WeightNorm; fold"):
        reparameterize(model, WeightConditioning)
    assert stored(model) == [f"0.parametrizations.weight.original{i}" for i in (0, 1)]


# ----------------------------------------------------------------------------------------------------------- fold and copies


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*KINDS, Doubled])
def test_folding_gives_the_plain_layers_and_the_same_outputs_bit_for_bit(
    kind: type[Reparameterization], dtype: torch.dtype
) -> None:
    plain, model = mlp(dtype), reparameterize(mlp(dtype), kind)
    x = torch.randn(7, 5, dtype=dtype)
    wanted = model(x)
    assert fold(model) is model
    assert torch.equal(model(x), wanted)
    assert [type(layer) for layer in model] == [type(layer) for layer in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.is_leaf and p.requires_grad and p.dtype == dtype for p in model.parameters())
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_folds_while_the_model_trains_on(kind: type[Reparameterization]) -> None:
    model = reparameterize(mlp(), kind)
    x = torch.randn(7, 5, dtype=torch.float64)
    exported = fold(copy.deepcopy(model))
    assert torch.equal(exported(x), model(x))
    assert stored(exported) == [] and len(stored(model)) > 0
    before = exported(x)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    assert torch.equal(exported(x), before)
    assert not torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_apart(kind: type[Reparameterization]) -> None:
    model = reparameterize(mlp(), kind)
    twin = copy.deepcopy(model)
    x = torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(twin(x), model(x))
    twin.get_parameter(stored(twin)[-1]).data.mul_(torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64))
    assert not torch.equal(twin(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_dict_carries_it_to_another_model(kind: type[Reparameterization]) -> None:
    model = reparameterize(mlp(), kind)
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 3)).double()
    reparameterize(other, kind)
    other.load_state_dict(model.state_dict())
    x = torch.randn(7, 5, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


def test_what_others_have_parametrized_is_left_alone() -> None:
    model = mlp()
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    bias = model[0].bias.detach().clone()
    reparameterize(model, WeightNorm)
    twin = copy.deepcopy(model)
    x = torch.randn(7, 5, dtype=torch.float64)
    wanted = model(x)
    fold(model)
    assert stored(model) == ["0.parametrizations.bias.original"]
    assert torch.equal(model(x), wanted) and torch.equal(model[0].bias, bias)
    assert torch.equal(twin(x), wanted)
    assert torch.equal(fold(model)(x), wanted)


def test_a_frozen_weight_stays_frozen() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    reparameterize(model, WeightNorm)
    assert [p.requires_grad for p in model[0].parametrizations.parameters()] == [False, False]
    fold(model)
    assert [p.requires_grad for p in (model[0].weight, model[3].weight)] == [False, True]


def test_assigning_to_the_weight_sets_what_is_stored_and_shares_no_memory() -> None:
    for kind in (WeightNorm, Doubled, WeightConditioning):
        model = reparameterize(mlp(), kind)
        weight = torch.randn(12, 5, dtype=torch.float64)
        weight /= weight.norm(dim=1, keepdim=True)  # what conditioning leaves as it is
        kept = weight.clone()
        model[0].weight = weight
        assert torch.allclose(model[0].weight, kept, rtol=1e-12)
        weight.zero_()
        assert torch.allclose(model[0].weight, kept, rtol=1e-12)


# ------------------------------------------------------------------------------------------------------------------------ ties


@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_weight_is_held_once_and_tied_again_when_folded(kind: type[Reparameterization]) -> None:
    model = tied_gpt()
    before = sum(p.numel() for p in model.parameters())
    reparameterize(model, kind, (nn.Embedding, nn.Linear))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    beside = sum(p.numel() for name, p in model.named_parameters() if name.endswith("original0"))
    assert sum(p.numel() for p in model.parameters()) == before + beside
    tokens = torch.randint(40, (2, 8))
    model(tokens).square().sum().backward()
    held = model.lm_head.parametrizations.weight
    assert held is model.model.embed_tokens.parametrizations.weight
    twin = copy.deepcopy(model)
    assert twin.lm_head.parametrizations.weight is twin.model.embed_tokens.parametrizations.weight
    wanted = model(tokens)
    for one in (fold(twin), fold(model)):
        assert one.lm_head.weight is one.model.embed_tokens.weight
        assert torch.equal(one(tokens), wanted)


# ------------------------------------------------------------------------------------------------------------------ optimizers


def roles(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    (group,) = collect(model)
    found = {}
    for p in group.described:
        name = p.name.replace(".parametrizations", "").replace("parametrizations.", "")
        name = name.removesuffix(".original").removesuffix(".original1")
        found[name] = (p.role, p.shape, p.layer, p.heads, p.splits, p.tied, p.inputs_first)
    return found


class Mixer(nn.Module):
    """A block that owns a matrix of its own beside a layer called as a last layer might be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.fc = nn.Linear(4, 4)


class Mixers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixer(), Mixer()


@pytest.mark.parametrize("kind", [*KINDS, Doubled])
@pytest.mark.parametrize(
    "make, layers",
    [
        (mlp, None),
        (ConvNet, None),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(6, 6), nn.Linear(6, 2)), None),
        (lambda: GPT(TINY), (nn.Linear, nn.Embedding)),
        (tied_gpt, (nn.Linear, nn.Embedding)),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False), None),
        (Mixers, nn.Module),
    ],
    ids=["mlp", "convnet", "transposed", "gpt", "tied gpt", "transformer", "blocks"],
)
def test_optimizers_see_what_the_weight_is_and_a_vector_beside_it(kind: Any, make: Any, layers: Any) -> None:
    plain, held = roles(make()), roles(reparameterize(make(), kind, layers))
    beside = {name: found for name, found in held.items() if name.endswith(".original0")}
    assert {name: found for name, found in held.items() if name not in beside} == plain
    assert all(found[0] == "vector" and len(found[1]) == 1 for found in beside.values())
    assert bool(beside) == (kind is not WeightConditioning)


def test_muon_moves_the_same_matrices_as_in_the_plain_model() -> None:
    def taken(model: nn.Module) -> list[tuple[Any, ...]]:
        return sorted(line.shape for line in Muon(model, backend="eager").plan() if line.rule == "muon")

    plain = taken(GPT(TINY))
    assert len(plain) == 14
    for kind in KINDS:
        assert taken(reparameterize(GPT(TINY), kind)) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_moves_every_weight(rule: Method, kind: type[Reparameterization], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = [nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()]
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), *hidden, nn.Linear(8, 3))
    reparameterize(model.to(dtype), kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = build(rule, model, lr=0.05, backend="eager")
    x, y = torch.randn(16, 1, 4, 4, dtype=dtype), torch.randint(3, (16,))
    for _ in range(4):
        opt.zero_grad()
        torch.nn.functional.cross_entropy(model(x).float(), y).backward()
        opt.step()
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), name
        if "parametrizations" in name:
            assert not torch.equal(p, before[name]), name
