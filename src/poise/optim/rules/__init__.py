"""The named optimizers, one paper a file."""
