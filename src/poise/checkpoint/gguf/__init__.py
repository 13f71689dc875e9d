"""GGUF files, the format of llama.cpp: read, and named and shaped as transformers names and shapes them."""

from .file import GGUFFile

__all__ = ["GGUFFile"]
