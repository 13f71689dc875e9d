"""Routing: what a parameter is, how `params` is read, and which rule takes what."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from poise.optim.routing import (
    Assigned,
    Route,
    assign,
    by_name,
    by_role,
    check_used,
    collect,
    everything,
    hidden_matrices,
)
from poise.optim.transform import Param, Transform

WIDTH, VOCABULARY, CONTEXT = 16, 50, 32


class Attention(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = 4, kv_heads: int | None = None) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        self.n_heads, self.n_kv_heads = heads, kv_heads
        self.c_attn = nn.Linear(width, width + 2 * width * kv_heads // heads)
        self.c_proj = nn.Linear(width, width)


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, kv_heads: int | None = None) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.RMSNorm(width)
        self.attn = Attention(width, kv_heads=kv_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class GPT(nn.Module):
    def __init__(self, *, tied: bool = True, width: int = WIDTH, context: int = CONTEXT, kv_heads: int | None = None) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_head=4)
        self.wte = nn.Embedding(VOCABULARY, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList([Block(width, kv_heads) for _ in range(2)])
        self.ln_f = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.ConvTranspose2d(8, 4, 3))
        self.classifier = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 10))


class Experts(nn.Module):
    def __init__(self, number: int = 4) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.ones(number, 8, 6))
        self.gate_up_proj_bias = nn.Parameter(torch.ones(number, 6))


class Holder(nn.Module):
    """A module that owns the given parameters and submodules directly."""

    def __init__(self, **owned: Any) -> None:
        super().__init__()
        for name, value in owned.items():
            setattr(self, name, nn.Parameter(value) if isinstance(value, Tensor) else value)


class FSDP1(nn.Module):
    """Stands where FSDP1 does, which needs processes to be built."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


class Rule(Transform):
    pass


def described(params: Any) -> dict[str, Param]:
    return {param.name: param for group in collect(params) for param in group.described}


def roles(params: Any) -> dict[str, str]:
    return {name: param.role for name, param in described(params).items()}


def param(role: str, *shape: int, name: str = "layer.weight") -> Param:
    return Param(name, torch.Size(shape), torch.float32, role=role)


def ones(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


# ------------------------------------------------------------------------------------------------- roles from a module


def test_a_gpt_has_the_roles_its_layers_say() -> None:
    found = roles(GPT(tied=False))
    assert found == {
        "wte.weight": "embedding",
        "wpe.weight": "embedding",
        **{
            f"h.{i}.{name}": role
            for i in range(2)
            for name, role in {
                "ln_1.weight": "norm",
                "ln_1.bias": "norm",
                "ln_2.weight": "norm",
                "attn.c_attn.weight": "matrix",
                "attn.c_attn.bias": "bias",
                "attn.c_proj.weight": "matrix",
                "attn.c_proj.bias": "bias",
                "mlp.0.weight": "matrix",
                "mlp.0.bias": "bias",
                "mlp.2.weight": "matrix",
                "mlp.2.bias": "bias",
            }.items()
        },
        "ln_f.weight": "norm",
        "ln_f.bias": "norm",
        "lm_head.weight": "head",
    }


def test_a_tied_weight_stands_once_and_is_an_embedding() -> None:
    model = GPT(tied=True)
    (group,) = collect(model)
    assert [id(t) for t in group.tensors] == [id(p) for p in model.parameters()]
    assert [(p.name, p.role) for p in group.described if p.tied] == [("wte.weight", "embedding")]


def test_a_tied_weight_is_an_embedding_though_the_head_is_registered_first() -> None:
    embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    head.weight = embedding.weight
    assert described(Holder(lm_head=head, wte=embedding))["lm_head.weight"].role == "embedding"


def test_a_module_used_at_two_places_is_tied() -> None:
    shared = nn.Linear(WIDTH, WIDTH)
    found = described(Holder(first=shared, second=shared, third=nn.Linear(WIDTH, WIDTH)))
    assert {name: p.tied for name, p in found.items()} == {
        "first.weight": True,
        "first.bias": True,
        "third.weight": False,
        "third.bias": False,
    }


def test_index_and_count_number_the_group() -> None:
    (group,) = collect(nn.Linear(2, 3))
    assert [(p.index, p.count) for p in group.described] == [(0, 2), (1, 2)]


@pytest.mark.parametrize("width", [WIDTH, 64])
def test_a_position_table_as_long_as_the_model_is_wide_makes_no_layer_a_head(width: int) -> None:
    found = roles(GPT(tied=False, width=width, context=width))
    assert [name for name, role in found.items() if role == "head"] == ["lm_head.weight"]


def test_a_position_table_as_long_as_a_fused_projection_makes_no_layer_in_a_block_a_head() -> None:
    found = roles(GPT(tied=False, context=3 * WIDTH))  # 48 rows: no layer reads 48, and c_attn writes it
    assert [name for name, role in found.items() if role == "head"] == ["lm_head.weight"]


def test_a_linear_with_one_output_per_token_is_a_head_whatever_its_name() -> None:
    model = Holder(tokens=nn.Embedding(VOCABULARY, WIDTH), body=nn.Linear(WIDTH, WIDTH), readout=nn.Linear(WIDTH, VOCABULARY))
    assert roles(model)["readout.weight"] == "head"
    assert roles(model)["body.weight"] == "matrix"


def test_the_vocabulary_may_be_in_another_group_than_the_head() -> None:
    body, readout = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
    groups = collect([{"params": body}, {"params": readout}])
    assert [p.role for p in groups[1].described] == ["head", "bias"]


@pytest.mark.parametrize("name", ["head", "lm_head", "classifier", "output", "fc", "fc3", "score", "cls_head"])
def test_the_last_linear_is_a_head_when_its_name_says_output(name: str) -> None:
    found = roles(Holder(fc1=nn.Linear(4, 8), **{name: nn.Linear(8, 3)}))
    assert found == {"fc1.weight": "matrix", "fc1.bias": "bias", f"{name}.weight": "head", f"{name}.bias": "bias"}


@pytest.mark.parametrize("name", ["proj", "2", "linear", "out_proj", "overhead"])
def test_the_last_linear_with_another_name_is_a_matrix(name: str) -> None:
    assert roles(Holder(first=nn.Linear(4, 8), **{name: nn.Linear(8, 3)}))[f"{name}.weight"] == "matrix"


def test_every_head_outside_the_blocks_is_one_and_not_only_the_last_layer() -> None:
    found = roles(Holder(head=nn.Linear(8, 3), head_dist=nn.Linear(8, 3), fc=nn.Linear(3, 8), proj=nn.Linear(8, 8)))
    assert {name for name, role in found.items() if role == "head"} == {"head.weight", "head_dist.weight"}


def test_a_table_as_long_as_the_width_says_nothing_of_layers_outside_blocks_either() -> None:
    model = Holder(positions=nn.Embedding(WIDTH, WIDTH), first=nn.Linear(WIDTH, WIDTH), second=nn.Linear(WIDTH, 3))
    assert roles(model)["first.weight"] == "matrix"


def test_a_head_in_a_wrapper_is_found_by_the_name_of_its_place() -> None:
    model = Holder(first=nn.Linear(4, 8), classifier=FSDP1(nn.Linear(8, 3)), last=nn.Linear(4, 8))
    assert roles(model)["classifier.weight"] == "head"


@pytest.mark.parametrize("stack", [nn.ModuleList, lambda b: nn.Sequential(*b), lambda b: Holder(first=b[0], second=b[1])])
@pytest.mark.parametrize("wrapper", [lambda block: block, FSDP1])
def test_a_layer_inside_repeated_blocks_is_no_head_whatever_its_name(stack: Any, wrapper: Any) -> None:
    blocks = [wrapper(Holder(up=nn.Linear(4, 8), head=nn.Linear(8, 4), fc=nn.Linear(8, 4))) for _ in range(2)]
    assert set(roles(Holder(blocks=stack(blocks))).values()) == {"matrix", "bias"}


def test_a_single_block_in_a_list_of_blocks_has_no_head_either() -> None:
    model = Holder(blocks=nn.ModuleList([Holder(up=nn.Linear(4, 8), head=nn.Linear(8, 4))]))
    assert set(roles(model).values()) == {"matrix", "bias"}


def test_a_convolution_net_has_its_roles_and_only_the_last_layer_of_its_classifier_is_the_head() -> None:
    assert roles(ConvNet()) == {
        "features.0.weight": "embedding",
        "features.0.bias": "bias",
        "features.1.weight": "norm",
        "features.1.bias": "norm",
        "features.2.weight": "vector",
        "features.3.weight": "conv",
        "features.3.bias": "bias",
        "classifier.0.weight": "matrix",
        "classifier.0.bias": "bias",
        "classifier.2.weight": "head",
        "classifier.2.bias": "bias",
    }


def test_only_a_first_convolution_that_reads_the_data_is_an_embedding() -> None:
    assert roles(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)))["0.weight"] == "embedding"
    assert roles(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)))["0.weight"] == "conv", "as wide as what layers make"
    assert roles(nn.Sequential(nn.Linear(5, 8), nn.Conv1d(8, 4, 3)))["1.weight"] == "conv"
    blocks = nn.ModuleList([Holder(conv=nn.Conv2d(3, 8, 3)) for _ in range(3)])
    assert roles(Holder(blocks=blocks))["blocks.0.conv.weight"] == "conv", "in a block"


class Turned(nn.Module):
    """A layer that keeps its weight (in, out), and says so as GPT-2's Conv1D does."""

    def __init__(self, nx: int, nf: int) -> None:
        super().__init__()
        self.nx, self.nf = nx, nf
        self.weight = nn.Parameter(torch.zeros(nx, nf))


class Stacked(nn.Module):
    def __init__(self, width: int, inner: int, *, inputs_first: bool, name: str) -> None:
        super().__init__()
        setattr(self, name, width)
        self.gate_up_proj = nn.Parameter(torch.zeros((4, width, 2 * inner) if inputs_first else (4, 2 * inner, width)))
        self.down_proj = nn.Parameter(torch.zeros((4, inner, width) if inputs_first else (4, width, inner)))


def test_a_weight_stored_inputs_first_is_known_and_split_by_its_outputs() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.c_attn, self.c_proj = Turned(16, 48), nn.Linear(16, 16)

    model = Holder(attn=Attention(), up=nn.ConvTranspose2d(8, 4, 3), down=nn.Conv2d(4, 8, 3))
    found = {p.name: p for group in collect(model) for p in group.described}
    assert {name for name, p in found.items() if p.inputs_first} == {"attn.c_attn.weight", "up.weight"}
    assert found["attn.c_attn.weight"].matrix == (48, 16) and found["attn.c_attn.weight"].splits == (16, 16, 16)
    assert found["up.weight"].matrix == (4, 8 * 9) and found["down.weight"].matrix == (8, 4 * 9)


@pytest.mark.parametrize("inputs_first", [True, False])
@pytest.mark.parametrize("name", ["hidden_size", "hidden_dim"])
def test_experts_say_by_their_width_which_side_their_inputs_are(name: str, inputs_first: bool) -> None:
    """As gpt-oss and Llama 4 keep them, and as Mixtral and DeepSeek do."""
    model = Holder(experts=Stacked(16, 24, inputs_first=inputs_first, name=name))
    found = {p.name: p for group in collect(model) for p in group.described}
    assert {p.role for p in found.values()} == {"experts"}
    assert {p.inputs_first for p in found.values()} == {inputs_first}
    assert found["experts.gate_up_proj"].matrix == (48, 16) and found["experts.down_proj"].matrix == (16, 24)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm([3, 4]),
        nn.RMSNorm(4),
        nn.GroupNorm(2, 4),
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.InstanceNorm2d(4, affine=True),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norm_layers_own_norms(norm: nn.Module) -> None:
    assert set(roles(norm).values()) == {"norm"}


def test_a_class_called_norm_owns_norms_but_a_matrix_in_it_stays_a_matrix() -> None:
    class LlamaRMSNorm(Holder):
        pass

    class NormedLinear(nn.Linear):
        pass

    assert roles(LlamaRMSNorm(weight=torch.ones(4))) == {"weight": "norm"}
    assert roles(NormedLinear(4, 5))["weight"] == "matrix"


def test_multihead_attention_has_splits_and_heads() -> None:
    found = described(nn.MultiheadAttention(WIDTH, 4, add_bias_kv=True))
    assert {name: p.role for name, p in found.items()} == {
        "in_proj_weight": "matrix",
        "in_proj_bias": "bias",
        "bias_k": "bias",
        "bias_v": "bias",
        "out_proj.weight": "matrix",
        "out_proj.bias": "bias",
    }
    assert found["in_proj_weight"].splits == (WIDTH, WIDTH, WIDTH)
    assert found["out_proj.weight"].splits == ()
    assert found["in_proj_weight"].heads == found["out_proj.weight"].heads == 4


def test_heads_belong_to_attention_and_not_to_the_mlp_beside_it() -> None:
    found = described(GPT())
    assert {name for name, p in found.items() if p.heads} == {
        f"h.{i}.attn.{layer}.{own}" for i in range(2) for layer in ("c_attn", "c_proj") for own in ("weight", "bias")
    }
    assert found["h.0.attn.c_attn.weight"].heads == 4


@pytest.mark.parametrize(
    "says, heads",
    [
        ({"num_heads": 2}, 2),
        ({"n_heads": 2}, 2),
        ({"num_attention_heads": 2}, 2),
        ({"n_head": 2}, 2),
        ({"config": SimpleNamespace(num_attention_heads=2)}, 2),
        ({"num_heads": [2, 4]}, None),
        ({"num_heads": True}, None),
        ({}, None),
    ],
)
def test_heads_are_read_from_the_attention_module_or_its_config(says: dict[str, Any], heads: int | None) -> None:
    model = Holder(self_attn=Holder(proj=nn.Linear(4, 4), **says), mlp=Holder(proj=nn.Linear(4, 4), config=says.get("config")))
    found = described(model)
    assert found["self_attn.proj.weight"].heads == heads
    assert found["mlp.proj.weight"].heads is None


def test_attention_is_known_by_its_class_where_its_place_has_another_name() -> None:
    class CausalSelfAttention(Holder):
        pass

    mixer = CausalSelfAttention(config=SimpleNamespace(n_head=2), to_out=nn.Sequential(nn.Linear(4, 4)))
    assert described(Holder(mixer=mixer))["mixer.to_out.0.weight"].heads == 2


def test_only_projections_have_heads() -> None:
    model = Holder(
        num_heads=2,
        proj=nn.Linear(4, 4),
        lm_head=nn.Linear(4, 4),
        wte=nn.Embedding(4, 4),
        norm=nn.LayerNorm(4),
        scale=torch.ones(4),
    )
    assert [name for name, p in described(model).items() if p.heads] == ["proj.weight", "proj.bias"]


def test_a_module_by_another_name_is_believed_about_its_own_layers_only() -> None:
    model = Holder(num_heads=2, proj=nn.Linear(4, 4), mlp=Holder(up=nn.Linear(4, 4)))
    found = described(model)
    assert found["proj.weight"].heads == 2
    assert found["mlp.up.weight"].heads is None


def test_keys_and_values_shared_by_queries_have_their_own_number_of_heads() -> None:
    attn = Holder(num_heads=4, num_key_value_heads=2, q_proj=nn.Linear(16, 16), k_proj=nn.Linear(16, 8), down=nn.Linear(15, 5))
    found = described(Holder(attn=attn))
    assert [found[f"attn.{name}.weight"].heads for name in ("q_proj", "k_proj", "down")] == [4, 2, None]


@pytest.mark.parametrize("name", ["qkv", "c_attn", "Wqkv", "in_proj", "qkv_proj", "to_qkv"])
def test_a_fused_projection_of_three_times_the_width_has_three_splits(name: str) -> None:
    model = Holder(**{name: nn.Linear(8, 24)})
    assert described(model)[f"{name}.weight"].splits == (8, 8, 8)
    assert described(model.named_parameters())[f"{name}.weight"].splits == (8, 8, 8)


def test_shared_keys_and_values_are_split_by_head_counts() -> None:
    assert described(GPT(kv_heads=2))["h.0.attn.c_attn.weight"].splits == (16, 8, 8)


def test_the_head_size_decides_where_heads_do_not_fill_the_width() -> None:
    attn = Holder(num_heads=4, num_kv_heads=1, head_dim=8, qkv=nn.Linear(16, 48))  # 48 = 3 * 16, and yet 32 + 8 + 8
    assert described(Holder(attn=attn))["attn.qkv.weight"].splits == (32, 8, 8)


@pytest.mark.parametrize(
    "layer",
    [
        {"qkv": nn.Linear(8, 20)},  # rows that neither the width nor head counts explain
        {"up": nn.Linear(8, 24)},  # the right shape under another name
        {"query_key_value": nn.Linear(8, 24)},  # query, key and value alternate head by head
        {"c_attn": Holder(weight=torch.ones(8, 24))},  # transformers' Conv1D keeps (in, out): the parts are columns
    ],
    ids=["unexplained", "other name", "interleaved", "transposed"],
)
def test_no_splits_without_evidence(layer: dict[str, nn.Module]) -> None:
    (weight, *_) = described(Holder(**layer)).values()
    assert (weight.role, weight.splits) == ("matrix", ())


def test_a_stack_of_experts_is_told_from_a_convolution_and_from_a_learned_input() -> None:
    model = Holder(
        moe=Experts(),
        alone=Experts(number=1),
        pos_embed=torch.ones(1, 7, 8),
        queries=torch.ones(1, 7, 8),
        relation=torch.ones(3, 7, 8),
        cls_token=torch.ones(1, 1, 8),
        stem=nn.Conv1d(2, 3, 4),
        conv=nn.Conv1d(3, 3, 4),
    )
    found = roles(model)
    assert found["moe.gate_up_proj"] == found["alone.gate_up_proj"] == found["relation"] == "experts"
    assert found["moe.gate_up_proj_bias"] == "bias"
    assert found["pos_embed"] == found["queries"] == "embedding"
    assert found["cls_token"] == "vector"
    assert found["conv.weight"] == "conv"


def test_parameters_without_a_layer_are_known_by_shape_and_name() -> None:
    model = Holder(
        temperature=torch.tensor(1.0),
        gamma=torch.ones(4),
        proj=torch.ones(4, 5),
        positional_embedding=torch.ones(4, 5),
        relative_position_bias_table=torch.ones(9, 2),
        A_log=torch.ones(4, 5),
        lm_head=torch.ones(4, 5),
        kernel=torch.ones(4, 5, 3, 3),
    )
    assert roles(model) == {
        "temperature": "scalar",
        "gamma": "vector",
        "proj": "matrix",
        "positional_embedding": "embedding",
        "relative_position_bias_table": "embedding",
        "A_log": "vector",
        "lm_head": "head",
        "kernel": "conv",
    }


def test_recurrent_weights_are_matrices_and_their_biases_biases() -> None:
    assert roles(nn.LSTM(3, 4)) == {
        "weight_ih_l0": "matrix",
        "weight_hh_l0": "matrix",
        "bias_ih_l0": "bias",
        "bias_hh_l0": "bias",
    }


def test_what_parametrize_keeps_has_the_role_and_the_layer_of_the_weight() -> None:
    model = Holder(
        tokens=nn.Embedding(VOCABULARY, WIDTH),
        body=weight_norm(nn.Linear(WIDTH, WIDTH)),
        conv=weight_norm(nn.Conv1d(WIDTH, 4, 5)),
        square=orthogonal(nn.Linear(WIDTH, WIDTH, bias=False)),
        readout=weight_norm(nn.Linear(WIDTH, VOCABULARY)),
    )
    found = described(model)
    where = "parametrizations.weight.original"
    assert {name: p.role for name, p in found.items()} == {
        "tokens.weight": "embedding",
        "body.bias": "bias",
        f"body.{where}0": "vector",
        f"body.{where}1": "matrix",
        "conv.bias": "bias",
        f"conv.{where}0": "vector",
        f"conv.{where}1": "conv",
        f"square.{where}": "matrix",
        "readout.bias": "bias",
        f"readout.{where}0": "vector",
        f"readout.{where}1": "head",
    }
    assert found[f"body.{where}1"].layer == found["body.bias"].layer == "body"


def test_a_parametrization_is_not_run_to_describe_it() -> None:
    class Counted(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counted.calls += 1
            return x

    layer = nn.Linear(3, 4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Counted())
    before = Counted.calls
    collect(layer)
    assert Counted.calls == before


def test_a_weight_and_its_bias_share_the_path_of_their_layer() -> None:
    found = described(GPT())
    assert found["h.1.mlp.2.weight"].layer == found["h.1.mlp.2.bias"].layer == "h.1.mlp.2"
    assert {p.layer for p in described(nn.Linear(2, 3)).values()} == {""}


# -------------------------------------------------------------------------------------------- wrappers, shards, laziness


def wrapped_within() -> nn.Module:
    model = GPT(tied=False)
    for i, block in enumerate(model.h):
        block.attn = FSDP1(cast(nn.Module, block.attn))
        model.h[i] = checkpoint_wrapper(block)
    model.lm_head = FSDP1(model.lm_head)  # type: ignore[assignment]
    return nn.DataParallel(torch.compile(FSDP1(model)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: nn.DataParallel(GPT(tied=False)),
        lambda: torch.compile(GPT(tied=False)),
        lambda: nn.DataParallel(torch.compile(GPT(tied=False))),  # type: ignore[arg-type]
        lambda: FSDP1(GPT(tied=False)),
        wrapped_within,
    ],
    ids=["parallel", "compiled", "both", "fsdp", "within"],
)
def test_wrappers_change_neither_names_nor_roles(wrapped: Any) -> None:
    plain, found = described(GPT(tied=False)), described(wrapped())
    assert found == plain
    assert roles(wrapped().named_parameters()) == roles(GPT(tied=False).named_parameters())


def test_a_submodule_called_module_keeps_its_name_where_two_would_become_one() -> None:
    model = Holder(module=nn.Linear(2, 3, bias=False), weight=torch.ones(4, 5))
    assert set(described(model)) == {"weight", "module.weight"}


def test_a_lazy_module_is_refused_until_it_has_shapes() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet.*one batch"):
        collect(model)
    with pytest.raises(ValueError, match="has no shape yet"):
        collect(model.named_parameters())
    model(torch.ones(2, 3))
    assert roles(model) == {"0.weight": "matrix", "0.bias": "bias"}


@pytest.fixture
def two_ranks() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_a_sharded_parameter_has_the_shape_of_the_whole() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_module, distribute_tensor

    def shard(name: str, module: nn.Module, mesh: Any) -> None:
        for own, tensor in list(module.named_parameters(recurse=False)):
            module.register_parameter(own, nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)])))

    model = distribute_module(Holder(proj=nn.Linear(6, 8)), init_device_mesh("cpu", (2,)), shard)
    (group,) = collect(model)
    assert cast(DTensor, group.tensors[0]).to_local().shape == (4, 6)
    assert (group.described[0].shape, group.described[0].role) == ((8, 6), "matrix")


@pytest.mark.parametrize("own", ["_flat_param", "flat_param"])
def test_a_matrix_rule_refuses_what_fsdp1_flattened(own: str) -> None:
    (group,) = collect(FSDP1(Holder(**{own: torch.ones(100)})))
    assert group.described[0].name == own
    with pytest.raises(ValueError, match=r"use_orig_params=True.*fully_shard"):
        assign(group, [Route("muon", Rule(), hidden_matrices), Route("adamw", Rule(), everything)])
    (taken,) = assign(group, [Route("adamw", Rule(), everything)])  # an elementwise rule does not mind
    assert taken.reasons == ["vector"]


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 4), nn.Embedding(4, 4), nn.Conv1d(4, 4, 2)], ids=lambda layer: type(layer).__name__
)
def test_a_weight_that_fsdp1_flattened_is_a_vector_and_the_unused_matrix_rule_says_why(layer: nn.Module) -> None:
    layer.weight = ones(9)
    (group,) = collect(layer)
    assert group.described[0].role == "vector"
    routes = [Route("muon", Rule(), hidden_matrices), Route("adamw", Rule(), everything)]
    assigned = assign(group, routes)
    assert [a.route.name for a in assigned] == ["adamw"]
    with pytest.raises(ValueError, match=r"'muon' would touch nothing.*1 vector.*fully_shard"):
        check_used(routes, assigned)


# ---------------------------------------------------------------------------------------------- roles without a module


@pytest.mark.parametrize(
    "name, shape, role",
    [
        ("scale", (), "scalar"),
        ("layer.bias", (4,), "bias"),
        ("moe.down_bias", (3, 4), "bias"),
        ("ln.weight", (4,), "vector"),
        ("layer.weight", (3, 4), "matrix"),
        ("layer.weight", (1, 4), "matrix"),
        ("model.embed_tokens.weight", (9, 4), "embedding"),
        ("transformer.wte.weight", (9, 4), "embedding"),
        ("transformer.wpe.weight", (9, 4), "embedding"),
        ("tok_emb.weight", (9, 4), "embedding"),
        ("pos_embed", (1, 9, 4), "embedding"),
        ("lm_head.weight", (9, 4), "head"),
        ("module.head.weight", (9, 4), "head"),
        ("output.weight", (9, 4), "head"),
        ("classifier.6.weight", (9, 4), "head"),
        ("layers.3.attention.output.weight", (4, 4), "matrix"),
        ("layers.3.head.0.weight", (4, 4), "matrix"),
        ("remember.weight", (4, 4), "matrix"),  # "emb" in the middle of a word
        ("patch_embed.proj.weight", (8, 3, 4, 4), "conv"),
        ("conv1d.weight", (8, 3, 4), "conv"),
        ("conv3d.weight", (8, 3, 4, 4, 4), "conv"),
        ("cls_token", (1, 1, 4), "vector"),
        ("layers.0.experts.down_proj", (8, 3, 4), "experts"),
    ],
)
def test_plain_names_and_shapes_tell_the_role(name: str, shape: tuple[int, ...], role: str) -> None:
    (found,) = described([(name, ones(*shape))]).values()
    assert found.role == role


def test_bare_tensors_go_by_shape() -> None:
    shapes = [(), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)]
    found = described([ones(*shape) for shape in shapes])
    assert [p.role for p in found.values()] == ["scalar", "vector", "matrix", "conv", "conv"]
    assert [p.layer for p in found.values()] == [None] * 5


def test_plain_names_share_a_layer_only_by_a_common_path() -> None:
    found = described({"mlp.up.weight": ones(3, 4), "mlp.up.bias": ones(3), "w1": ones(3, 4), "b1": ones(3)})
    assert [p.layer for p in found.values()] == ["mlp.up", "mlp.up", None, None]


# -------------------------------------------------------------------------------------------------------- forms of params


def forms() -> dict[str, Any]:
    return {
        "module": lambda m: m,
        "pairs": lambda m: m.named_parameters(),
        "list of pairs": lambda m: [list(pair) for pair in m.named_parameters()],
        "dict": lambda m: dict(m.named_parameters()),
        "group of module": lambda m: [{"params": m}],
        "group of pairs": lambda m: ({"params": g} for g in [m.named_parameters()]),
        "group of dict": lambda m: [{"params": dict(m.named_parameters())}],
        "single group": lambda m: {"params": m, "lr": 1.0},
    }


@pytest.mark.parametrize("form", forms().values(), ids=forms())
def test_every_form_with_names_gives_the_same_tensors_and_names(form: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    (group,) = collect(form(model))
    assert [id(t) for t in group.tensors] == [id(p) for p in model.parameters()]
    assert [p.name for p in group.described] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [p.role for p in group.described] == ["matrix", "bias", "matrix", "bias"]
    assert [p.layer for p in group.described] == ["0", "0", "1", "1"]
    assert group.named


@pytest.mark.parametrize("form", [list, iter, lambda t: [{"params": t}], lambda t: [{"params": t[0]}, {"params": iter(t[1:])}]])
def test_bare_tensors_are_numbered_over_all_groups(form: Any) -> None:
    tensors = [ones(2), ones(3), ones(4)]
    groups = collect(form(tensors))
    assert [id(t) for g in groups for t in g.tensors] == [id(t) for t in tensors]
    assert [p.name for g in groups for p in g.described] == ["param_0", "param_1", "param_2"]
    assert not any(g.named for g in groups)


def test_a_parameter_may_be_called_params() -> None:
    assert set(described({"params": ones(2), "other": ones(3)})) == {"params", "other"}


def test_the_callers_dicts_and_lists_are_left_as_they_are() -> None:
    tensors, betas = [ones(2)], [0.9, 0.99]
    group: dict[str, Any] = {"params": tensors, "lr": 0.1, "betas": betas}
    params = [group]
    (found,) = collect(params)
    assigned = assign(found, [Route("adamw", Rule(), everything, {"lr": 1.0})])
    assigned[0].options["lr"] = 7.0
    found.tensors.append(ones(3))
    found.options["eps"] = 1.0
    assert params == [group]
    assert group == {"params": tensors, "lr": 0.1, "betas": betas}
    assert len(tensors) == 1


def test_group_options_are_everything_but_params() -> None:
    groups = collect([{"params": [ones(2)], "lr": 0.1, "betas": (0.5, 0.6)}, {"params": [ones(2)]}])
    assert [g.options for g in groups] == [{"lr": 0.1, "betas": (0.5, 0.6)}, {}]


def test_an_empty_group_among_others_is_allowed() -> None:
    groups = collect([{"params": []}, {"params": [ones(2)]}])
    assert [len(g.tensors) for g in groups] == [0, 1]
    assert assign(groups[0], [Route("adamw", Rule(), everything)]) == []


def test_frozen_parameters_are_kept() -> None:
    model = nn.Linear(2, 3).requires_grad_(False)
    assert set(described(model)) == {"weight", "bias"}


def test_integer_weights_of_a_module_are_left_out() -> None:
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.int8), requires_grad=False)
    assert set(described(model)) == {"bias"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_floating_type_is_taken_and_told(dtype: torch.dtype) -> None:
    (found,) = described([torch.zeros(2, dtype=dtype)]).values()
    assert found.dtype == dtype


def test_a_tensor_listed_under_two_names_is_kept_once_and_tied() -> None:
    weight, other = ones(9, 4), ones(4, 4)
    (group,) = collect({"lm_head.weight": weight, "proj.weight": other, "embed.weight": weight})
    assert [(p.name, p.role, p.tied) for p in group.described] == [
        ("lm_head.weight", "embedding", True),
        ("proj.weight", "matrix", False),
    ]
    (bare,) = collect([weight, other, weight])
    assert [(p.name, p.tied, p.index, p.count) for p in bare.described] == [("param_0", True, 0, 2), ("param_1", False, 1, 2)]


def test_equal_tensors_are_not_the_same_tensor() -> None:
    (group,) = collect([ones(2), ones(2)])
    assert len(group.tensors) == 2


def test_a_second_module_with_the_same_names_gets_a_prefix_and_layers_of_its_own() -> None:
    first, second = collect([{"params": nn.Linear(2, 3)}, {"params": nn.Linear(2, 3)}])
    assert [(p.name, p.layer) for p in first.described] == [("weight", ""), ("bias", "")]
    assert [(p.name, p.layer) for p in second.described] == [("group_1.weight", "group_1"), ("group_1.bias", "group_1")]


def test_groups_collected_later_continue_the_earlier_ones() -> None:
    tensors = [ones(2), ones(3)]
    known = collect(tensors)
    (more,) = collect({"params": [ones(4)]}, known=known)
    assert [p.name for p in more.described] == ["param_2"]
    with pytest.raises(ValueError, match="'param_2' of group 1 is in an earlier group too, as 'param_1'"):
        collect([tensors[1]], known=known)


def a_result() -> Tensor:
    return ones(2) * 2


@pytest.mark.parametrize(
    "params, error, message",
    [
        ([], ValueError, "params is empty"),
        ({}, ValueError, "params is empty"),
        (nn.ReLU(), ValueError, "params is empty"),
        ([{"params": []}], ValueError, "params is empty"),
        (iter(()), ValueError, "params is empty"),
        (ones(2), TypeError, r"not one tensor: write \[tensor\]"),
        (3, TypeError, "must be a module, tensors.*got int"),
        ("weight", TypeError, "got str"),
        ({ones(2)}, TypeError, "set, whose order"),
        ([{"params": {ones(2)}}], TypeError, "set, whose order"),
        ([1.0], TypeError, r"params\[0\] must be a tensor, got float"),
        ([ones(2), None], TypeError, r"params\[1\] must be a tensor, got NoneType"),
        ([("w", 1.0)], TypeError, r"params\['w'\] must be a tensor, got float"),
        ({"w": ones(2), "lr": 0.1}, TypeError, r"params\['lr'\] must be a tensor, got float"),
        ([nn.Linear(2, 3)], TypeError, r"params\[0\] is a module.*ModuleList"),
        ([{"params": [ones(2)]}, ones(3)], TypeError, "mixes group dicts with tensors"),
        ([{"lr": 0.1}], ValueError, r"params\[0\]: a group dict needs the key 'params', this one has \['lr'\]"),
        ([ones(2), ("w", ones(3))], ValueError, "some tensors have names"),
        ([{"params": nn.Linear(2, 3)}, {"params": [ones(2)]}], ValueError, "group 1 have no names"),
        ([("w", ones(2)), ("w", ones(3))], ValueError, "two different tensors of group 0 are called 'w'"),
        ([torch.ones(2, dtype=torch.complex64)], TypeError, "'param_0' is torch.complex64.*view_as_real"),
        ([ones(2), torch.ones(2, dtype=torch.int64)], TypeError, "'param_1' is torch.int64; only floating-point"),
        ([torch.ones(2, dtype=torch.bool)], TypeError, "'param_0' is torch.bool"),
        ([("w", a_result())], ValueError, "'w'.*can't optimize a non-leaf Tensor"),
    ],
)
def test_what_cannot_be_optimized_is_refused_by_name(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collect(params)


def test_a_complex_parameter_of_a_module_is_refused_not_left_out() -> None:
    with pytest.raises(TypeError, match=r"'freqs' is torch\.complex64.*view_as_real"):
        collect(Holder(freqs=torch.ones(3, dtype=torch.complex64)))


def test_a_result_that_keeps_its_gradient_is_allowed_as_in_torch() -> None:
    tensor = a_result()
    tensor.retain_grad()
    assert set(described([tensor])) == {"param_0"}


@pytest.mark.parametrize("named", [True, False])
def test_a_parameter_in_two_groups_is_named_in_the_error(named: bool) -> None:
    head = nn.Linear(3, 4)
    model = Holder(body=nn.Linear(2, 3), head=head)
    second = {"params": head if named else head.parameters()}
    with pytest.raises(ValueError, match=r"'(weight|param_4)' of group 1 is in an earlier group too, as 'head\.weight'"):
        collect([{"params": model}, second])


# ------------------------------------------------------------------------------------------------------------------ routes


def muon_and_adamw() -> list[Route]:
    return [
        Route("muon", Rule(), hidden_matrices, {"lr": 0.02, "momentum": 0.95}),
        Route("adamw", Rule(), everything, {"lr": 3e-4, "weight_decay": 0.1}),
    ]


def test_matrices_go_to_the_first_route_and_the_rest_to_the_second_in_the_order_given() -> None:
    model = GPT(tied=True)
    (group,) = collect(model)
    muon, adamw = assign(group, muon_and_adamw())
    names = [name for name, _ in model.named_parameters()]
    hidden = [n for n in names if re.search(r"(attn|mlp).*weight", n)]
    assert [p.name for p in muon.described] == hidden
    assert [p.name for p in adamw.described] == [n for n in names if n not in hidden]
    lookup = dict(model.named_parameters())
    for one in (muon, adamw):
        assert [id(t) for t in one.tensors] == [id(lookup[p.name]) for p in one.described]
        assert [(p.index, p.count) for p in one.described] == [(i, len(one.tensors)) for i in range(len(one.tensors))]
    assert muon.options == {"lr": 0.02, "momentum": 0.95}
    assert adamw.options == {"lr": 3e-4, "weight_decay": 0.1}


def test_reasons_say_what_each_parameter_is() -> None:
    (group,) = collect(Holder(wte=nn.Embedding(9, 4), proj=nn.Linear(4, 6), conv=nn.Conv1d(4, 3, 5), moe=Experts()))
    muon, adamw = assign(group, muon_and_adamw())
    assert muon.reasons == ["hidden matrix 6 x 4", "convolution as 3 x 20", "4 experts of 8 x 6"]
    assert adamw.reasons == ["embedding", "bias", "bias", "bias"]
    (group,) = collect(GPT(tied=True))
    assert assign(group, muon_and_adamw())[1].reasons[0] == "tied embedding"


@pytest.mark.parametrize(
    "found, taken",
    [
        (param("matrix", 2, 2), True),
        (param("matrix", 1, 9), False),
        (param("matrix", 9, 1), False),
        (param("conv", 8, 1, 3, 3), True),  # depthwise: one kernel a row
        (param("conv", 8, 3, 1, 1), True),
        (param("conv", 8, 1, 1, 1), False),
        (param("conv", 1, 3, 3, 3), False),  # one output channel is one row
        (param("experts", 4, 3, 2), True),
        (param("experts", 4, 1, 9), False),  # many experts do not make a row a matrix
        (param("experts", 4, 9, 1), False),
        *((param(role, 8, 8), False) for role in ("embedding", "head", "norm", "bias", "vector")),
        (param("scalar"), False),
    ],
)
def test_hidden_matrices_have_two_dimensions_larger_than_one(found: Param, taken: bool) -> None:
    assert (hidden_matrices(found) is not None) is taken


def test_the_first_route_that_matches_wins() -> None:
    routes = [
        Route("attention", Rule(), by_name("*.attn.*")),
        Route("tables", Rule(), by_role("embedding", "head")),
        Route("late", Rule(), by_name("h.0.*")),
        Route("rest", Rule(), everything),
    ]
    (group,) = collect(GPT(tied=False))
    by_route = {a.route.name: [p.name for p in a.described] for a in assign(group, routes)}
    assert list(by_route) == ["attention", "tables", "late", "rest"]
    assert len(by_route["attention"]) == 8
    assert by_route["tables"] == ["wte.weight", "wpe.weight", "lm_head.weight"]
    assert all(name.startswith("h.0.") and ".attn." not in name for name in by_route["late"])
    assert len(by_route["late"]) == 7


def test_what_a_group_sets_beats_the_route_and_nothing_else_does() -> None:
    groups = collect([{"params": [ones(4, 4), ones(4)], "lr": 0.5}, {"params": [ones(4, 4)]}])
    first, second = (assign(group, muon_and_adamw()) for group in groups)
    assert [a.options for a in first] == [{"lr": 0.5, "momentum": 0.95}, {"lr": 0.5, "weight_decay": 0.1}]
    assert [a.options for a in second] == [{"lr": 0.02, "momentum": 0.95}]


def test_a_group_may_ask_for_one_rule_by_name() -> None:
    (group,) = collect([{"params": [ones(4, 4), ones(4)], "rule": "adamw"}])
    (adamw,) = assign(group, muon_and_adamw())
    assert (adamw.route.name, len(adamw.tensors)) == ("adamw", 2)
    (group,) = collect([{"params": [ones(4)], "rule": "muon"}])
    with pytest.raises(ValueError, match=r"no route takes 'param_0' \(role vector, shape \(4,\)\); asked: muon"):
        assign(group, muon_and_adamw())
    (group,) = collect([{"params": [ones(4)], "rule": "lion"}])
    with pytest.raises(ValueError, match="asks for rule 'lion'; this optimizer has muon, adamw"):
        assign(group, muon_and_adamw())


def test_a_parameter_that_no_route_takes_is_an_error() -> None:
    (group,) = collect([("w", ones(4, 4)), ("b", ones(4))])
    with pytest.raises(ValueError, match=r"no route takes 'b'.*asked: muon\..*everything"):
        assign(group, muon_and_adamw()[:1])


def test_two_routes_of_one_name_are_an_error() -> None:
    (group,) = collect([ones(2)])
    with pytest.raises(ValueError, match="every name may stand once"):
        assign(group, [Route("adamw", Rule(), by_role("bias")), Route("adamw", Rule(), everything)])


def decays(assigned: list[Assigned]) -> list[tuple[str, list[str], Any]]:
    return [(a.route.name, [p.role for p in a.described], a.options.get("weight_decay")) for a in assigned]


def test_vectors_are_decayed_unless_told_otherwise() -> None:
    model = Holder(
        wte=nn.Embedding(9, 4), proj=nn.Linear(4, 6), norm=nn.LayerNorm(6), gain=torch.tensor(1.0), scale=torch.ones(3)
    )
    (group,) = collect(model)
    kept = ["matrix"], ["embedding"], ["scalar", "vector", "bias", "norm", "norm"]
    order = [p.role for p in group.described]
    everyone = assign(group, muon_and_adamw())
    assert decays(everyone) == [("muon", kept[0], None), ("adamw", [r for r in order if r != "matrix"], 0.1)]
    split = assign(group, muon_and_adamw(), decay_vectors=False)
    assert [(route, sorted(found), decay) for route, found, decay in decays(split)] == [
        ("muon", kept[0], None),
        ("adamw", kept[1], 0.1),
        ("adamw", sorted(kept[2]), 0.0),
    ]
    assert [(p.index, p.count) for p in split[2].described] == [(i, 5) for i in range(5)]
    assert split[1].route is split[2].route


def test_a_groups_own_decay_stands_where_the_group_is_all_vectors() -> None:
    mixed, sorted_by_hand = collect(
        [{"params": [ones(4, 4), ones(4)], "weight_decay": 0.5}, {"params": [ones(4)], "weight_decay": 0.5}]
    )
    routes = [Route("adamw", Rule(), everything)]
    assert decays(assign(mixed, routes, decay_vectors=False)) == [("adamw", ["matrix"], 0.5), ("adamw", ["vector"], 0.0)]
    assert decays(assign(sorted_by_hand, routes, decay_vectors=False)) == [("adamw", ["vector"], 0.5)]


def test_a_rule_that_would_touch_nothing_is_an_error() -> None:
    routes = muon_and_adamw()
    groups = collect([{"params": [ones(4)]}, {"params": [ones(1, 5)]}])
    assigned = [a for group in groups for a in assign(group, routes)]
    with pytest.raises(
        ValueError, match=r"rule 'muon' would touch nothing: it takes none of 2 parameters \(1 vector, 1 matrix\)$"
    ):
        check_used(routes, assigned)


@pytest.mark.parametrize("when", [by_role("matrix"), by_name("w*"), by_name("re:w$")], ids=["role", "glob", "expression"])
def test_a_route_can_be_pickled_with_its_optimizer(when: Any) -> None:
    (group,) = collect([("w", ones(4, 4))])
    assert pickle.loads(pickle.dumps(when))(group.described[0]) == when(group.described[0]) is not None


def test_a_rule_that_is_optional_may_touch_nothing() -> None:
    (group,) = collect([ones(4, 4)])
    routes = [Route("sign", Rule(), by_role("embedding"), optional=True), Route("adamw", Rule(), everything)]
    check_used(routes, assign(group, routes))
    with pytest.raises(ValueError, match="'sign' would touch nothing"):
        check_used([Route("sign", Rule(), by_role("embedding")), routes[1]], assign(group, routes))


def test_one_group_is_enough_to_use_a_rule_and_the_rest_may_be_nothing() -> None:
    routes = muon_and_adamw()
    groups = collect([{"params": [ones(4)]}, {"params": [ones(4, 4)]}])
    check_used(routes, [a for group in groups for a in assign(group, routes)])
    (group,) = collect([ones(4, 4)])
    check_used(routes, assign(group, routes))


@pytest.mark.parametrize(
    "pattern, name, taken",
    [
        ("*.attn.*", "h.0.attn.q.weight", True),
        ("attn", "h.0.attn.q.weight", False),  # a glob matches the whole name
        ("H.*", "h.0.attn.q.weight", False),
        ("h.[01].*", "h.1.mlp.weight", True),
        ("h.[01].*", "h.2.mlp.weight", False),
        (r"re:h\.\d+\.attn", "model.h.12.attn.q.weight", True),  # an expression may match anywhere
        (r"re:^h\.", "model.h.12.attn.q.weight", False),
        (re.compile("ATTN", re.IGNORECASE), "h.0.attn.q.weight", True),
        (re.compile("mlp"), "h.0.attn.q.weight", False),
    ],
)
def test_names_match_by_glob_or_by_regular_expression(pattern: Any, name: str, taken: bool) -> None:
    reason = by_name(pattern)(param("matrix", 4, 4, name=name))
    assert (reason is not None) is taken
    if reason:
        assert getattr(pattern, "pattern", pattern).removeprefix("re:") in reason


@pytest.mark.parametrize("asked", [(), ("matrices",), ("matrix", "Bias")])
def test_an_unknown_role_is_refused_when_the_route_is_made(asked: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="roles are matrix, conv, experts"):
        by_role(*asked)
