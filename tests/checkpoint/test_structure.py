"""What the tensors of a model are, on what transformers writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from poise.checkpoint import StateDict, open_checkpoint
from poise.checkpoint.structure import ROLES, Structure, describe, layers
from poise.checkpoint.structure.ties import asks

from .layouts import CONFIGS, build, save

LLAMA = {
    "model.embed_tokens.weight": "embedding",
    "lm_head.weight": "head",
    "model.norm.weight": "norm",
    "model.layers.1.input_layernorm.weight": "norm",
    "model.layers.1.self_attn.q_proj.weight": "attention.q",
    "model.layers.1.self_attn.k_proj.weight": "attention.k",
    "model.layers.1.self_attn.v_proj.weight": "attention.v",
    "model.layers.1.self_attn.o_proj.weight": "attention.o",
}
MLP = {
    "model.layers.1.mlp.gate_proj.weight": "mlp.gate",
    "model.layers.1.mlp.up_proj.weight": "mlp.up",
    "model.layers.1.mlp.down_proj.weight": "mlp.down",
}
MEGATRON = {"dense_h_to_4h": "mlp.up", "dense_4h_to_h": "mlp.down"}
BIASES = {f"model.layers.1.self_attn.{one}_proj.bias": "bias" for one in "qkv"}
EXPERTS = "model.layers.1.block_sparse_moe"

EXPECTED: dict[str, dict[str, str]] = {
    "llama": LLAMA | MLP,
    "llama-tied": {name: role for name, role in (LLAMA | MLP).items() if role != "head"},
    "qwen2": LLAMA | MLP | BIASES,
    "phi3": {
        "model.layers.1.self_attn.qkv_proj.weight": "attention.qkv",
        "model.layers.1.mlp.gate_up_proj.weight": "mlp.gate_up",
        "model.layers.1.mlp.down_proj.weight": "mlp.down",
    },
    "gpt2": {
        "transformer.wte.weight": "embedding",
        "transformer.wpe.weight": "embedding",
        "transformer.h.1.ln_1.weight": "norm",
        "transformer.h.1.ln_1.bias": "norm",
        "transformer.h.1.attn.c_attn.weight": "attention.qkv",
        "transformer.h.1.attn.c_attn.bias": "bias",
        "transformer.h.1.attn.c_proj.weight": "attention.o",
        "transformer.h.1.mlp.c_fc.weight": "mlp.up",
        "transformer.h.1.mlp.c_proj.weight": "mlp.down",
        "transformer.ln_f.weight": "norm",
    },
    "mixtral": LLAMA
    | {
        f"{EXPERTS}.gate.weight": "router",
        f"{EXPERTS}.experts.3.w1.weight": "expert.gate",
        f"{EXPERTS}.experts.3.w3.weight": "expert.up",
        f"{EXPERTS}.experts.3.w2.weight": "expert.down",
    },
    "deepseek": {
        "model.layers.0.mlp.gate_proj.weight": "mlp.gate",
        "model.layers.1.mlp.gate.weight": "router",
        "model.layers.1.mlp.gate.e_score_correction_bias": "bias",
        "model.layers.1.mlp.experts.3.gate_proj.weight": "expert.gate",
        "model.layers.1.mlp.shared_experts.gate_proj.weight": "mlp.gate",
        "model.layers.1.self_attn.q_b_proj.weight": "attention.q",
        "model.layers.1.self_attn.kv_b_proj.weight": "attention.kv",
        "model.layers.1.self_attn.q_a_layernorm.weight": "norm",
    },
    "gpt-oss": {
        "model.layers.1.mlp.router.weight": "router",
        "model.layers.1.mlp.experts.gate_up_proj": "expert.gate_up",
        "model.layers.1.mlp.experts.gate_up_proj_bias": "bias",
        "model.layers.1.mlp.experts.down_proj": "expert.down",
        "model.layers.1.self_attn.sinks": "vector",
    },
    "gpt-neox": {
        "gpt_neox.embed_in.weight": "embedding",
        "embed_out.weight": "head",
        "gpt_neox.layers.1.attention.query_key_value.weight": "attention.qkv",
        "gpt_neox.layers.1.attention.query_key_value.bias": "bias",
        "gpt_neox.layers.1.attention.dense.weight": "attention.o",
    }
    | {f"gpt_neox.layers.1.mlp.{name}.weight": role for name, role in MEGATRON.items()},
    "bert": {
        "bert.embeddings.word_embeddings.weight": "embedding",
        "bert.embeddings.position_embeddings.weight": "embedding",
        "bert.embeddings.LayerNorm.bias": "norm",
        "bert.encoder.layer.1.attention.self.query.weight": "attention.q",
        "bert.encoder.layer.1.attention.self.value.bias": "bias",
        "bert.encoder.layer.1.attention.output.dense.weight": "attention.o",
        "bert.encoder.layer.1.attention.output.LayerNorm.weight": "norm",
        "bert.encoder.layer.1.intermediate.dense.weight": "mlp.up",
        "bert.encoder.layer.1.output.dense.weight": "mlp.down",
        "cls.predictions.transform.dense.weight": "matrix",
        "cls.predictions.bias": "bias",
    },
    "vit": {
        "vit.embeddings.cls_token": "vector",
        "vit.embeddings.position_embeddings": "embedding",
        "vit.embeddings.patch_embeddings.projection.weight": "conv",
        "vit.encoder.layer.1.attention.attention.query.weight": "attention.q",
        "vit.encoder.layer.1.attention.output.dense.weight": "attention.o",
        "vit.encoder.layer.1.intermediate.dense.weight": "mlp.up",
        "vit.encoder.layer.1.layernorm_after.bias": "norm",
        "classifier.weight": "head",
    },
    "t5": {
        "shared.weight": "embedding",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "embedding",
        "encoder.block.1.layer.0.SelfAttention.q.weight": "attention.q",
        "decoder.block.1.layer.1.EncDecAttention.o.weight": "attention.o",
        "decoder.block.1.layer.2.DenseReluDense.wi_0.weight": "mlp.gate",
        "decoder.block.1.layer.2.DenseReluDense.wi_1.weight": "mlp.up",
        "decoder.block.1.layer.2.DenseReluDense.wo.weight": "mlp.down",
    },
    "resnet": {
        "resnet.embedder.embedder.convolution.weight": "conv",
        "resnet.embedder.embedder.normalization.weight": "norm",
        "resnet.embedder.embedder.normalization.running_var": "buffer",
        "resnet.encoder.stages.1.layers.1.layer.0.convolution.weight": "conv",
        "classifier.1.weight": "head",
    },
}
STACKS = {
    "t5": {"encoder.block": 2, "decoder.block": 2},
    "resnet": {"resnet.encoder.stages.*.layers": 3},
    "gpt2": {"transformer.h": 2},
    "deepseek": {"model.layers": 2},
    "bert": {"bert.encoder.layer": 2},
}
FUSED = ["gpt2", "gpt-neox", "bloom", "falcon", "falcon-groups", "phi3", "mpt"]

pytestmark = pytest.mark.hf


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Structure]:
    """The structure of a layout as it is written, each written once."""
    known: dict[str, Structure] = {}

    def get(name: str) -> Structure:
        if name not in known:
            known[name] = describe(open_checkpoint(save(name, tmp_path_factory.mktemp(name))))
        return known[name]

    return get


@pytest.mark.parametrize("name", EXPECTED)
def test_every_tensor_is_what_it_is(described: Callable, name: str) -> None:
    found = described(name)
    assert {tensor: found[tensor].role for tensor in EXPECTED[name]} == EXPECTED[name]
    assert {one.role for one in found.tensors.values()} <= set(ROLES)


@pytest.mark.parametrize("name", STACKS)
def test_layers_are_counted_where_blocks_repeat(described: Callable, name: str) -> None:
    found = described(name)
    assert dict(found.stacks) == STACKS[name]
    assert {one.layer for one in found.tensors.values() if one.stack is not None} == set(range(max(STACKS[name].values())))


def test_what_lies_in_a_layer_knows_which(described: Callable) -> None:
    found = described("deepseek")
    inside = found["model.layers.1.mlp.experts.3.gate_proj.weight"]
    assert (inside.layer, inside.stack, inside.expert) == (1, "model.layers", 3)
    assert found["model.norm.weight"].layer is None and found["model.norm.weight"].stack is None
    stages = described("resnet")
    assert stages["resnet.encoder.stages.1.layers.1.layer.0.convolution.weight"].layer == 2


def test_conv1d_is_stored_inputs_first_and_its_square_one_too(described: Callable) -> None:
    found = described("gpt2")
    turned = {name for name, one in found.tensors.items() if one.inputs_first}
    assert turned == {name for name in found.tensors if ".c_" in name and name.endswith(".weight")} and len(turned) == 8
    for name in set(EXPECTED) - {"gpt2", "gpt-oss"}:
        assert not any(one.inputs_first for one in described(name).tensors.values())


def test_the_experts_of_gpt_oss_are_stacked_inputs_first_and_their_gates_alternate(described: Callable) -> None:
    found = described("gpt-oss")
    both = found["model.layers.0.mlp.experts.gate_up_proj"]
    assert (both.experts, both.inputs_first, both.outputs) == (4, True, 2)
    assert [(part.role, part.ranges) for part in both.parts] == [
        ("expert.gate", (range(0, 96, 2),)),
        ("expert.up", (range(1, 96, 2),)),
    ]
    bias = found["model.layers.0.mlp.experts.gate_up_proj_bias"]
    assert (bias.of, bias.experts, bias.parts) == ("expert.gate_up", 4, both.parts)
    assert found["model.layers.0.mlp.experts.down_proj"].inputs_first


def test_a_square_stack_goes_as_the_others_of_its_layers() -> None:
    tensors = {}
    for layer in range(2):
        tensors[f"layers.{layer}.mlp.experts.gate_up_proj"] = torch.zeros(2, 16, 32)
        tensors[f"layers.{layer}.mlp.experts.down_proj"] = torch.zeros(2, 16, 16)
    found = describe(StateDict(tensors, {"hidden_size": 16}))
    assert all(one.inputs_first for one in found.tensors.values())


@pytest.mark.parametrize("name", FUSED)
def test_with_its_values_zero_attention_no_longer_hangs_on_queries_and_keys(name: str) -> None:
    model = build(name)
    found = describe(StateDict(model))
    tokens = torch.arange(12)[None] * 7 % 96
    fused = [one for one in found.tensors if found[one].parts and "qkv" in (found[one].of or found[one].role)]
    assert fused

    def change(role: str, put: Callable[[torch.Tensor], Any]) -> None:
        for tensor in fused:
            weight, what = model.state_dict()[tensor], found[tensor]
            part = next(part for part in what.parts if part.role == role)
            assert what.outputs is not None
            places = weight.index_select(what.outputs, part.index)
            weight.index_copy_(what.outputs, part.index, put(places))

    with torch.no_grad():
        change("attention.k", torch.randn_like)
        before = model(tokens).logits
        change("attention.q", torch.randn_like)
        assert not torch.allclose(model(tokens).logits, before, atol=1e-5)
        change("attention.v", torch.zeros_like)
        silent = model(tokens).logits
        change("attention.q", torch.randn_like)
        change("attention.k", torch.randn_like)
        torch.testing.assert_close(model(tokens).logits, silent, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["phi3", "mixtral", "gpt-oss"])
def test_with_its_gates_zero_an_mlp_no_longer_hangs_on_what_they_gate(name: str) -> None:
    model = build(name)
    found = describe(StateDict(model))
    tokens = torch.arange(12)[None] * 7 % 96
    fused = [one for one in found.tensors if "gate_up" in (found[one].of or found[one].role)]
    assert fused
    with torch.no_grad():
        outputs = []
        for part, fill in ((0, 0.0), (1, 3.0)):
            for tensor in fused:
                what = found[tensor]
                assert what.outputs is not None and len(what.parts) == 2
                model.state_dict()[tensor].index_fill_(what.outputs, what.parts[part].index, fill)
            outputs.append(model(tokens).logits)
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=0)


def test_parts_of_a_fused_projection_cover_it_once(described: Callable) -> None:
    for name in (*FUSED[:1], "gpt-neox", "phi3", "gpt-oss"):
        for tensor, what in described(name).tensors.items():
            if what.parts:
                places = torch.cat([part.index for part in what.parts]).sort().values
                assert places.tolist() == list(range(len(places))), tensor
                assert sum(part.size for part in what.parts) == len(places)


def test_a_fused_order_that_nothing_tells_is_not_claimed() -> None:
    tensors = {f"model.layers.{i}.attention.wqkv.weight": torch.zeros(64, 32) for i in range(2)}
    config = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    (one, _) = describe(StateDict(tensors, config)).tensors.values()
    assert [part.size for part in one.parts] == [32, 16, 16]
    (one, _) = describe(StateDict(tensors, config | {"auto_map": {"AutoModel": "modeling.Model"}})).tensors.values()
    assert one.role == "attention.qkv" and one.parts == ()
    (one, _) = describe(StateDict(tensors, config | {"num_attention_heads": 3, "head_dim": 16})).tensors.values()
    assert one.parts == ()


def test_the_vocabulary_is_a_dimension_of_embedding_and_head(described: Callable) -> None:
    found = described("llama")
    dims = {name: one.vocabulary for name, one in found.tensors.items() if one.vocabulary is not None}
    assert found.vocabulary == 96 and dims == {"model.embed_tokens.weight": 0, "lm_head.weight": 0}
    bert = described("bert")
    dims = {name: one.vocabulary for name, one in bert.tensors.items() if one.vocabulary is not None}
    assert dims == {"bert.embeddings.word_embeddings.weight": 0, "cls.predictions.bias": 0}
    assert described("vit").vocabulary is None


def test_a_head_is_stored_or_shared_and_one_that_is_neither_is_a_problem(described: Callable) -> None:
    assert described("llama").tied.head == "lm_head.weight" and not described("llama").tied.shared
    for name in ("llama-tied", "gpt2", "t5", "bert"):
        tied = described(name).tied
        assert tied.shared and tied.head is None and tied.problem is None, name
    weights = {"model.embed_tokens.weight": torch.zeros(8, 4)}
    lost = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    assert "random" in (describe(StateDict(weights, lost)).tied.problem or "")
    bare = describe(StateDict(weights, {"architectures": ["LlamaModel"], "tie_word_embeddings": False}))
    assert bare.tied.problem is None


def test_names_alone_are_enough_for_layers() -> None:
    rows = layers([f"features.{i}.weight" for i in (0, 3, 6)] + ["classifier.1.weight"])
    assert {name: where.layer for name, where in rows.items()} == {f"features.{i}.weight": i for i in (0, 3, 6)}
    one = layers(["model.layers.0.mlp.up.weight", "model.layers.0.norm.weight", "model.norm.weight"])
    assert [where.layer for where in one.values()] == [0, 0]


def test_what_nobody_knows_is_a_matrix_or_a_vector() -> None:
    found = describe(StateDict({"a": torch.zeros(3, 4), "b": torch.zeros(5), "c": torch.zeros(()), "d": torch.arange(3)}))
    assert [one.role for one in found.tensors.values()] == ["matrix", "vector", "vector", "buffer"]
    assert found.width is None and found.vocabulary is None and found.heads is None


def test_layouts_are_all_looked_at() -> None:
    assert set(EXPECTED) | set(FUSED) == set(CONFIGS)


def test_a_folder_is_described_as_its_module_is(tmp_path: Path) -> None:
    on_disk = describe(open_checkpoint(save("gpt2", tmp_path)))
    in_memory = describe(StateDict(build("gpt2")))
    assert {name: on_disk[name] for name in on_disk.tensors} == dict(in_memory.tensors)
    assert in_memory.ties == {"lm_head.weight": "transformer.wte.weight"} and in_memory.tied.shared


@pytest.mark.parametrize(
    "config, tied",
    [
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": None}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "vision_config": {"tie_word_embeddings": True}}, False),
    ],
    ids=str,
)
def test_a_config_asks_for_a_tie_unless_it_or_its_text_model_says_otherwise(config: dict[str, Any], tied: bool) -> None:
    assert asks(config) is tied
