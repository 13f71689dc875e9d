"""What the names of tensors say, in the words that model code of all origins uses. Each expression is the whole of one idea."""

from __future__ import annotations

import re

# Names that say "output" wherever they stand outside the blocks.
HEAD = re.compile(r"(\w+_)?heads?(_\w+)?|classifier|(\w+_)?(unembed|logits)(ding)?s?|embed_out", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|(^|[._])(wte|wpe|(\w+_)?(emb|table)(_\w+)?)([._]|$)", re.IGNORECASE)
# Whole names of the table of tokens and of the head that turns into tokens, where no model's shapes are at hand to ask.
TOKENS = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings?|tok_embeddings|token_embedding|embed_in|shared|embeddings)\.weight"
)
TOKEN_HEAD = re.compile(
    r"((.*\.)?(lm_head|embed_out|proj_out|output_projection|output_layer|predictions\.decoder|lm_head\.decoder)|output)"
    r"\.(weight|qweight|weight_packed)"
)
EXPERT = re.compile(r"expert", re.IGNORECASE)
ATTENTION = re.compile(r"(attention|attn|mha)\d*$", re.IGNORECASE)
# Projections that keep query, key and value one below the other. `query_key_value` is missing on purpose: under that name,
# which comes from Megatron, they alternate head by head (GPT-NeoX, BLOOM, Falcon), and thirds would cut across all three.
FUSED = re.compile(r"(^|_)(w?qkv|c_attn|in_proj)(_|$)", re.IGNORECASE)
DOWN = re.compile(r"(^|_)(down|w2|wo|output)(_|$)", re.IGNORECASE)  # of experts: the projection back to the model's width


def is_bias(own: str) -> bool:
    """Whether the last part of a name is a bias's: `bias`, `in_proj_bias`, but also `bias_ih_l0` and `bias_k`."""
    return own.startswith("bias") or own.endswith("bias")
