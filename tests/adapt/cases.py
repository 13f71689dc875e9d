"""Models that adapters stand in, and settings with which every method of the family can be made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from poise import catalog
from poise.adapt import Attached, attach
from poise.adapt.targets import Targets
from poise.models import GPT, GPTConfig

# What a method needs beyond its defaults to stand in models this small.
SETTINGS: dict[str, dict[str, Any]] = {
    "diffora": {"steps": 3},
    "goat": {"rank": 8, "experts": 4, "dropout": 0.0},
    "compacter": {"n": 2, "reduction": 4},
    "pair-customization": {"content_rank": 4, "style_rank": 4},
    "kappatune": {"dropout": 0.0},
    "lora-sb": {"rank": 4, "batches": 2, "first_lr": 1e-3},
}
NAMES = [m.name for m in catalog.methods("adapt") if m.kind == "adapter"]


def gpt(tied: bool = False) -> GPT:
    torch.manual_seed(0)
    return GPT(
        GPTConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.2,
            tie_word_embeddings=tied,
        )
    )


class Conv1D(nn.Module):
    """As transformers' own: y = x W + b, the weight stored (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.randn(nf) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Mixed(nn.Module):
    """A layer of every kind: words to vectors, a convolution over them, layers that store inputs first and outputs first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 16, padding_idx=0)
        self.blocks = nn.ModuleList([nn.Sequential(Conv1D(24, 16), nn.GELU(), nn.Linear(24, 16))])
        self.mix = nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular")
        self.twice = nn.Linear(16, 16)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x)
        h = h + self.blocks[0](h)
        h = h + self.mix(h.transpose(1, 2)).transpose(1, 2)
        return self.out(self.twice(torch.tanh(self.twice(h))))


def tokens(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 64 if isinstance(model, GPT) else 20, (3, 8), generator=generator)


def losses(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Of batches, without end: the first tokens are the targets of all."""
    x = tokens(model)
    while True:
        yield lambda: loss_of(model, x)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), x.flatten() % logits.shape[-1])


def put(name: str, model: nn.Module, targets: Targets | None = None, **more: Any) -> Attached:
    """Attach a method with the settings of these tests."""
    return attach(model, name, targets, seed=0, losses=losses(model), **{**SETTINGS.get(name, {}), **more})


def stirred(model: nn.Module) -> nn.Module:
    """The model with all that trains moved, as training would move it."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
    return model


def output(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(tokens(model))
