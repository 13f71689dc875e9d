"""The small reference networks that tasks and tests use."""

from __future__ import annotations

from poise.models.convnet import ConvNet
from poise.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "ConvNet", "GPTConfig"]
