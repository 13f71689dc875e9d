"""Real layouts: what transformers writes of tiny configs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

COMMON = dict(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
TOKENS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
LLAMA = dict(COMMON, intermediate_size=48, num_key_value_heads=2, **TOKENS)

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama-tied": ("LlamaForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=16, **TOKENS)),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4}),
    "gpt-oss": ("GptOssForCausalLM", LLAMA | {"num_local_experts": 4, "head_dim": 16}),
    "deepseek": (
        "DeepseekV3ForCausalLM",
        LLAMA
        | dict(moe_intermediate_size=16, num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, kv_lora_rank=8)
        | dict(num_experts_per_tok=2, q_lora_rank=12, qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8)
        | dict(first_k_dense_replace=1),
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", COMMON | {"intermediate_size": 48} | TOKENS),
    "bloom": ("BloomForCausalLM", dict(vocab_size=96, hidden_size=32, n_layer=2, n_head=4, **TOKENS)),
    "falcon": ("FalconForCausalLM", COMMON | {"multi_query": True, "new_decoder_architecture": False} | TOKENS),
    "falcon-groups": ("FalconForCausalLM", COMMON | {"new_decoder_architecture": True, "num_kv_heads": 2} | TOKENS),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "mpt": ("MptForCausalLM", dict(d_model=32, n_heads=4, n_layers=2, vocab_size=96, expansion_ratio=2)),
    "bert": ("BertForMaskedLM", COMMON | {"intermediate_size": 48, "max_position_embeddings": 16}),
    "vit": (
        "ViTForImageClassification",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        dict(vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"),
    ),
    "resnet": (
        "ResNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic"),
    ),
}


def build(name: str, **more: Any) -> Any:
    """The model of a config, from a seed."""
    import transformers

    kind = getattr(transformers, CONFIGS[name][0])
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    return kind(kind.config_class(**(CONFIGS[name][1] | more))).eval()


def save(name: str, folder: Path, **more: Any) -> Path:
    """Write it as transformers does, experts numbered, tied weights once."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    build(name, **more).save_pretrained(folder)
    return folder
