"""One behaviour of `torch.optim` or of poise after another, each tested over the whole catalog."""
