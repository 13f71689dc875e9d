"""Solvers: methods that train a network of a known form on all of its data at once."""
