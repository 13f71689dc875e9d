"""A small Llama: the reference language model that tasks train and tests cut up.

It is Llama to the letter, in mathematics and in tensor names, so that its `state_dict` loads into transformers'
`LlamaForCausalLM` and whatever poise does to its weights can be shown to hold there. With tokens t and width d,

    h_0 = E[t]
    a_l = h_l + W_o Attention(W_q n(h_l), W_k n(h_l), W_v n(h_l))     causal, scaled by 1 / sqrt(d / heads), q and k rotated
    h_{l+1} = a_l + W_down (act(W_gate n(a_l)) * W_up n(a_l))
    logits = W_head n(h_L),      n(x) = g * x / sqrt(mean(x^2) + eps)

Sources: LLaMA: Open and Efficient Foundation Language Models (arXiv 2302.13971); rotary positions: RoFormer (arXiv 2104.09864);
gated MLP: GLU Variants Improve Transformer (arXiv 2002.05202); Root Mean Square Layer Normalization (arXiv 1910.07467).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.models import pretrained


@dataclass(frozen=True)
class GPTConfig:
    """What makes the model. Fields are those of transformers' `LlamaConfig`: `LlamaConfig(**asdict(config))` is its twin.

    Args:
        vocab_size: number of tokens; 256 reads bytes.
        hidden_size: width d, divisible by twice `num_attention_heads` (rotary turns pairs of channels).
        intermediate_size: width of the MLP; 8/3 of d gives it the parameters of an ungated one of 4 d.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads, each of d / heads channels.
        max_position_embeddings: longest sequence, in tokens.
        hidden_act: gate of the MLP: "silu" (SwiGLU, Llama's own) or "gelu" (GeGLU).
        rms_norm_eps: added to the mean square.
        rope_theta: base of the rotary wavelengths.
        tie_word_embeddings: the head is the embedding.
        initializer_range: standard deviation of every matrix at the start; 0.02 is Llama's.
    """

    vocab_size: int = 256
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    max_position_embeddings: int = 128
    hidden_act: Literal["silu", "gelu"] = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be divisible by 2 * num_attention_heads={2 * self.num_attention_heads}"
            )
        if self.hidden_act not in ("silu", "gelu"):
            raise ValueError(f'hidden_act={self.hidden_act!r} must be "silu" or "gelu"')


class GPT(nn.Module):
    """Byte-level causal language model: tokens `(batch, time)` of int64 to logits `(batch, time, vocab_size)`.

    Raises:
        ValueError: from `forward`, if the sequence is longer than `max_position_embeddings`.
    """

    def __init__(self, config: GPTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or GPTConfig()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        limit = self.config.max_position_embeddings
        if tokens.shape[-1] > limit:
            raise ValueError(f"tokens of length {tokens.shape[-1]}: at most max_position_embeddings={limit} are allowed")
        return self.lm_head(self.model(tokens))

    def save_pretrained(self, folder: Path | str) -> None:
        """Write a folder that `transformers.AutoModelForCausalLM.from_pretrained` loads."""
        pretrained.save(self, Path(folder))


class Decoder(nn.Module):
    """Everything but the head."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        cos, sin = rotations(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed_tokens(tokens)
        cos, sin = self.cos[: tokens.shape[-1]], self.sin[: tokens.shape[-1]]
        for layer in self.layers:
            h = layer(h, cos, sin)
        return self.norm(h)


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), cos, sin)
        return h + self.mlp(self.post_attention_layernorm(h))


class Attention(nn.Module):
    """Causal self-attention with rotary positions; `num_heads` tells routing how to cut the projections."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, d, bias=False)
        self.o_proj = nn.Linear(d, d, bias=False)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            projection(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (batch, heads, time, channels)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    """The gated MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, inner, bias=False)
        self.up_proj = nn.Linear(d, inner, bias=False)
        self.down_proj = nn.Linear(inner, d, bias=False)
        self.act = F.silu if config.hidden_act == "silu" else F.gelu

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(h)) * self.up_proj(h))


def rotations(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position * theta^(-2i / channels), `(time, channels)`, once for each half of the channels."""
    channels = config.hidden_size // config.num_attention_heads
    frequencies = config.rope_theta ** (-torch.arange(0, channels, 2) / channels)
    angles = torch.outer(torch.arange(config.max_position_embeddings), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of channels by its angle. Channel i pairs with i + channels / 2: Llama's order, not RoFormer's i + 1."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
