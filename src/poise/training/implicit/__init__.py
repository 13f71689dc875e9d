"""Derivatives of what a solver finds, without differentiating the solver."""
