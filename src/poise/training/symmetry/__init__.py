"""Weights that mean the same: actions that change weights and not outputs, and where on such an orbit to go."""
