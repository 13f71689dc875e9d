"""Protocols: comparisons of several comparisons."""
