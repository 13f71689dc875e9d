"""Solvers of equations and fits whose unknown is a tensor, not a model: iterations, and what tells how they go."""
