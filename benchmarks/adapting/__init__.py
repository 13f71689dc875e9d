"""Adapters weighed: on what, which, what their papers say, and the page."""
