"""Solvers whose unknown is a tensor, not a model: minima, fixed points, systems of equations and fits."""
