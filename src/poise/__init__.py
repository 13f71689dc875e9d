"""poise optimizes the weights of neural networks: every published method behind one plain interface, proven and weighed.

    from poise.optim import AdamW, Lion, Muon
    opt = Muon(model, lr=0.02)          # a torch.optim.Optimizer; opt.plan() says which parameter gets which rule, and why

Nothing heavy is imported here: a room (`poise.optim`, `poise.memory`, `poise.compare`, ...) is imported when it is asked for.
"""

__version__ = "0.1.0.dev0"
