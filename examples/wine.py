"""A task of your own, from data you have: which of 3 growers made a wine, from 13 chemical measurements.

    poise compare examples/wine.py --methods adamw,lion,sgd --trials 8 --steps 200 --seeds 5

Three functions are all that poise asks for. The data are scikit-learn's (178 wines, UCI Machine Learning Repository); replace
`measurements` by your own.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_wine
from torch import nn

unit = "nats"
BATCH = 16


def measurements(split):
    """Standardised measurements and growers of every fifth wine for "tune", of another fifth for "report", else the rest."""
    x, y = load_wine(return_X_y=True)
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    fifth = torch.arange(len(y)) % 5
    train = fifth >= 2
    x = (x - x[train].mean(0)) / x[train].std(0)
    chosen = {"train": train, "tune": fifth == 0, "report": fifth == 1}[split]
    return x[chosen], y[chosen]


def model():
    """Drawn from torch's global generator, which poise has seeded."""
    return nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))


def batches(split):
    """One epoch in a new order for "train", which poise starts again when it ends; everything at once for the others."""
    x, y = measurements(split)
    if split != "train":
        yield x, y
        return
    for some in torch.randperm(len(y)).split(BATCH):
        yield x[some], y[some]


def loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y)
