"""The small reference networks that tasks train and tests cut up."""

from __future__ import annotations

from poise.models.gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]
