"""From GGUF's names of tensors and metadata to those of transformers, for decoders of the Llama, Gemma and Qwen families."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .header import Block, Passed

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Later Gemmas normalize before and after both halves of a layer.
_SANDWICH = {
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Not weights: factors of the rotation, which transformers computes from its config.
COMPUTED = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


@dataclass(frozen=True)
class Family:
    """Attributes: transformers' model_type and class; names inside a layer; what llama.cpp changed in the weights.

    rotated: rows of q and k are interleaved, so that pairs that are rotated together lie side by side.
    shifted: norms hold 1 + w.
    """

    model_type: str
    architecture: str
    layer: Mapping[str, str]
    rotated: bool = False
    shifted: bool = False


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _LAYER, rotated=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _LAYER),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _LAYER),
    "gemma": Family("gemma", "GemmaForCausalLM", _LAYER, shifted=True),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", _SANDWICH, shifted=True),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", _SANDWICH, shifted=True),
}

_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "rope.freq_base": "rope_theta",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "vocab_size": "vocab_size",
}
_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


def rename(name: str, family: Family) -> str | None:
    """transformers' name of a tensor; None for one that the family does not have."""
    found = re.fullmatch(r"(?:blk\.(\d{1,6})\.)?(\w+)\.(weight|bias)", name, re.ASCII)
    if found is None:
        return None
    layer, stem, kind = found.groups()
    inner = (_OUTER if layer is None else family.layer).get(stem)
    if inner is None:
        return None
    return f"{inner}.{kind}" if layer is None else f"model.layers.{int(layer)}.{inner}.{kind}"


def to_config(metadata: Mapping[str, Any], blocks: Mapping[str, Block], family: Family) -> dict[str, Any]:
    """What the metadata say, as a `config.json` says it. What they do not say is left to the class's defaults."""
    prefix = f"{metadata['general.architecture']}."
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    for key, renamed in _KEYS.items():
        value = metadata.get(prefix + key)
        # A list is one value a layer, which these configs cannot say.
        if value is not None and not isinstance(value, list | Passed):
            config[renamed] = value
    if family.rotated and "head_dim" not in config and f"{prefix}rope.dimension_count" in metadata:
        config["head_dim"] = metadata[f"{prefix}rope.dimension_count"]
    for key, renamed in _TOKENS.items():
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[renamed] = metadata[f"tokenizer.ggml.{key}_token_id"]
    if "token_embd.weight" in blocks:
        config["vocab_size"] = blocks["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in blocks
    return config


def heads(config: Mapping[str, Any], name: str) -> int:
    """How many heads' rows a projection of queries or keys stacks; 0 if the metadata do not say."""
    count = config.get("num_attention_heads")
    if ".k_proj." in name:
        count = config.get("num_key_value_heads", count)
    return count if isinstance(count, int) else 0


def rotation(rows: int, count: int) -> torch.Tensor:
    """For every row as transformers orders it, the row of the file that it is.

    A head of d rows holds the pairs (i, i + d/2) there, and (2i, 2i + 1) in the file.
    """
    return torch.arange(rows).reshape(count, -1, 2).transpose(1, 2).reshape(-1)
