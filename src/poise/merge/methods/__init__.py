"""Merge methods, one paper a file."""
