"""Solvers: methods that train a network of a known form on all of its data at once, or tune what it is trained with."""
