"""Solvers: minima of functions of few enough unknowns, with their curvature."""
