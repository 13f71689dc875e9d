"""Post-training in small: two fine-tunings of one language model, on code and on prose, fused, and all measured alike.

    python examples/fusion_study.py --steps 400

The start has read both kinds of text, a little; each variant goes on with one kind; the score is the loss on held-out text of
both. What lies between the parents is better at both kinds together than either of them.
"""

import argparse
import inspect
import pydoc_data.topics

import torch
import torch.nn.functional as F

from poise.merge.methods.fusion_study import fusion_study
from poise.models import GPT, GPTConfig
from poise.optim import AdamW

LENGTH, BATCH = 64, 16
CONFIG = GPTConfig(hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=2)


def texts():
    """Rows of bytes of each kind: sources of this Python's own modules, and the text of its documentation."""
    import argparse as a
    import collections as b
    import inspect as c
    import tarfile as d
    import typing as e

    code = "\n".join(inspect.getsource(module) for module in (a, b, c, d, e))
    prose = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    found = {}
    for kind, text in (("code", code), ("prose", prose)):
        stream = torch.tensor(list(text.encode()))[:400_000]
        found[kind] = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    return found


def loss_of(model, rows):
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(weights, rows, steps, lr, seed):
    """The weights after `steps` steps on random rows; without weights, from scratch."""
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    if weights is not None:
        model.load_state_dict(weights)
    opt = AdamW(model, lr=lr, weight_decay=0.1)
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, rows[torch.randint(len(rows), (BATCH,))]).backward()
        opt.step()
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def study(steps=400, coefficients=(0.25, 0.5, 0.75)):
    parts = texts()
    held_out = torch.cat([rows[::20][:64] for rows in parts.values()])
    train_rows = {kind: rows[torch.arange(len(rows)) % 20 > 0] for kind, rows in parts.items()}
    start = train(None, torch.cat(list(train_rows.values())), steps, lr=2e-3, seed=0)
    code, prose = (train(start, train_rows[kind], steps // 2, lr=1e-3, seed=1) for kind in ("code", "prose"))
    model = GPT(CONFIG)

    @torch.no_grad()
    def score(weights):
        model.load_state_dict(weights)
        return float(loss_of(model, held_out))

    return fusion_study(start, code, prose, score, names=("code", "prose"), coefficients=coefficients)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    print(study(parser.parse_args().steps))
