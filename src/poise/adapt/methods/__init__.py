"""Ways to adapt a model, one paper a file."""
