"""Where attention and feed-forward modules end, in models of other people."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt.cases import gpt
from torch import nn

from poise.adapt import Compacter, attach
from poise.adapt.ends import module_ends

MODELS: dict[str, tuple[str, str, dict[str, Any], list[str], list[str]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_layer": 2}, ["attn.c_proj"], ["mlp.c_proj"]),
    "gpt2 that also reads another sequence": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 2, "add_cross_attention": True},
        ["attn.c_proj"],
        ["mlp.c_proj"],
    ),
    "bert": ("BertModel", "BertConfig", {"num_hidden_layers": 2}, ["attention.output.dense"], ["N.output.dense"]),
    "llama": ("LlamaModel", "LlamaConfig", {"num_hidden_layers": 2, "num_key_value_heads": 4}, ["o_proj"], ["down_proj"]),
    "phi3": ("Phi3Model", "Phi3Config", {"num_hidden_layers": 2}, ["o_proj"], ["down_proj"]),
    "opt": ("OPTModel", "OPTConfig", {"num_hidden_layers": 2}, ["out_proj"], ["fc2"]),
    "mixtral": ("MixtralModel", "MixtralConfig", {"num_hidden_layers": 2}, ["o_proj"], []),
    "t5": ("T5Model", "T5Config", {"num_layers": 1}, ["SelfAttention.o"] * 2, ["DenseReluDense.wo"] * 2),
    "bart": ("BartModel", "BartConfig", {"encoder_layers": 1, "decoder_layers": 1}, ["self_attn.out_proj"] * 2, ["fc2"] * 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_layers_are_found(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    model, config, settings, attention, forward = MODELS[name]
    with torch.device("meta"):
        built = getattr(transformers, model)(getattr(transformers, config)(**settings))
    blocks = 1 if len(attention) == 2 else 2
    found = module_ends(built)
    for paths, wanted in zip(found, (attention, forward), strict=True):
        assert len(paths) == len(wanted) * blocks
        for path in paths:
            plain = ".".join("N" if part.isdigit() else part for part in path.split("."))
            assert any(plain.endswith(f".{end}") or plain == end for end in wanted), path


def test_a_model_without_blocks_has_none() -> None:
    assert module_ends(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == ([], [])


def test_blocks_without_attention_have_none() -> None:
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(2))
    assert module_ends(nn.Sequential(blocks)) == ([], [])


def test_an_adapted_model_has_the_same_ends() -> None:
    model = gpt()
    before = module_ends(model)
    attach(model, Compacter(n=2, reduction=4))
    assert module_ends(model) == before


def test_gpt2_whose_attention_returns_more_than_its_output_is_adapted_and_trains() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=50, n_positions=16))
    kept = attach(model, Compacter(n=2, reduction=4), seed=0)
    assert kept.layers == tuple(f"transformer.h.{i}.{end}.c_proj" for i in range(2) for end in ("attn", "mlp"))
    tokens = torch.randint(50, (2, 8))
    model(tokens, labels=tokens).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
