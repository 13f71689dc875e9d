"""Recipes: mergekit's YAML, read unchanged."""

from .parse import parse, read
from .schema import Case, Recipe, Reference, Slice, Source, Token, Tokenizer

__all__ = ["Case", "Recipe", "Reference", "Slice", "Source", "Token", "Tokenizer", "parse", "read"]
