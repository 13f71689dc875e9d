"""Against the authors' repositories: rules that treat elements and blocks of them."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from poise.optim import AdamMini, InducedMetric, Lion, LionK, OptAMSGrad
from poise.optim.rules.inducedmetric import Variant

from .case import Absent, Case, Problem, Trajectory, copies, stepping
from .package_cases import LION

METRIC = "harveyThomas4692/Induced-Metric-Optimiser"
OPTIMISTIC = {"lr": 1e-2, "betas": (0.9, 0.99)}

NETWORK = Problem(
    ((10, 16), (16, 16), (16, 16), (16, 16), (32, 16), (32,), (16,), (10, 16)),
    ("embed.weight", "wq.weight", "wk.weight", "wv.weight", "mlp.weight", "mlp.bias", "norm.weight", "lm_head.weight"),
)


def metric(variant: Variant, reference: str, loss: bool = False, **settings: Any) -> Case:
    settings = {"lr": 0.05, "xi": 0.01, "weight_decay": 0.1, **settings}

    def theirs(params: Any, module: Any) -> Any:
        opt = getattr(module, reference)(params, **settings)
        return _Told(opt) if loss else opt

    return Case(
        "induced-metric",
        METRIC,
        reference,
        stepping(lambda p, o: InducedMetric(p, variant=variant, **settings, **o), closure=loss),
        stepping(theirs, closure=loss),
        1e-13,
        f"variant={variant!r}",
        "rounding; in one parameter group: with several, the reference keeps the first one's statistic only",
    )


class _Told:
    """`step(closure)` for an optimizer that takes the loss as a number."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def step(self, closure: Any) -> None:
        self.opt.step(closure())


def optimistic(problem: Problem, options: Any, plain: bool = False) -> Trajectory:
    """Poise's rule with one prediction for every step, there before the first; unless `plain`, Adam's correction is in lr."""
    params = problem.start()
    opt = OptAMSGrad(params, predictor="fed", **OPTIMISTIC, **options)
    b1, b2 = OPTIMISTIC["betas"]
    expected = problem.gradients(-1, params)
    for p, value in zip(params, expected, strict=True):  # the reference holds the first gradient, too, against a prediction
        opt.state[p]["prediction"].copy_(value)
    found = [copies(params)]
    for t in range(problem.steps):
        problem.set_gradients(t, params)
        if not plain:
            opt.param_groups[0]["lr"] = OPTIMISTIC["lr"] * math.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
        opt.feed(prediction=expected)
        opt.step()
        found.append(copies(params))
    return found


def optimistic_by_author(problem: Problem, module: Any) -> Trajectory:
    """It calls `.cuda()` throughout; a history longer than the run keeps it from its predictor, which torch no longer runs."""
    params = problem.start()
    helpers = problem.start()
    opt = module.Optadam_torch(params, **OPTIMISTIC, eps=1e-8, span=problem.steps + 1)
    aux = torch.optim.SGD(helpers, lr=0.0)
    expected = problem.gradients(-1, params)
    found = [copies(params)]
    with mock.patch.object(Tensor, "cuda", lambda self: self):
        for t in range(problem.steps):
            problem.set_gradients(t, params)
            for q, value in zip(helpers, expected, strict=True):
                q.grad = value.clone()
            opt.step(aux)
            found.append(copies(params))
    return found


CASES = (
    Case(
        "lion",
        "google/automl",
        "Lion",
        stepping(lambda p, o: Lion(p, **LION, **o)),
        stepping(lambda p, m: m.Lion(p, **LION)),
        1e-13,
    ),
    Case(
        "lion-k",
        "google/automl",
        "Lion",
        stepping(lambda p, o: LionK(p, **LION, kappa="l1", **o)),
        stepping(lambda p, m: m.Lion(p, **LION)),
        1e-13,
        "kappa='l1'",
        "rounding; the special case that is Lion, since no code of the authors was found",
    ),
    Case(
        "adam-mini",
        "zyushun/Adam-mini",
        "Adam_mini",
        stepping(lambda p, o: AdamMini(p, lr=1e-2, weight_decay=0.1, head_dim=4, **o)),
        stepping(lambda p, m: m.Adam_mini(p, lr=1e-2, weight_decay=0.1, dim=16, n_heads=4, verbose=False)),
        1e-13,
        "dim 16, 4 heads",
        "rounding; with names that both know: of others, the reference makes one block and poise one for each row",
        NETWORK,
    ),
    metric("plain", "CustomSGD"),
    metric("log", "CustomSGDLog", loss=True),
    metric("rms", "CustomSGDRMS", lr=1e-2, xi=1e-3),
    Case(
        "opt-amsgrad",
        "Hintonthu/optimistic-amsgrad",
        "Optadam_torch",
        optimistic,
        optimistic_by_author,
        1e-5,
        "predictor='fed'",
        "rounding of float32, which the reference computes in. Same prediction in every step; the reference's bias correction, "
        "which the paper does not have, is in poise's lr here. Not compared: the reference's predictor, whose stored weights "
        "share memory with the iterate, and which needs functions that torch no longer has",
        Problem(dtype=torch.float32),
    ),
    Case(
        "opt-amsgrad",
        "Hintonthu/optimistic-amsgrad",
        "Optadam_torch",
        lambda problem, options: optimistic(problem, options, plain=True),
        optimistic_by_author,
        None,
        "predictor='fed'",
        "as above, without the bias correction that is in the reference and not in the paper",
        Problem(dtype=torch.float32),
    ),
    Case(
        "adam-mini",
        "zyushun/Adam-mini",
        "Adam_mini",
        stepping(lambda p, o: AdamMini(p, lr=1e-2, **o)),
        stepping(lambda p, m: m.Adam_mini(p, lr=1e-2, dim=16, n_heads=4, verbose=False)),
        None,
        "names that the reference does not know",
        "a matrix is one block there, which it warns is unstable, and a block for each row here",
        Problem(((12, 8), (8, 12)), ("first.weight", "second.weight")),
    ),
)

ABSENT = (
    Absent(
        "adamw",
        "loshchil/AdamW-and-SGDW",
        "Lua Torch, which adds eps before bias correction; compared with torch, timm, heavyball and optax",
    ),
    Absent("stosignsgd", "none", "no code of the authors was found; max_beta=0, the plain sign, is compared with optax"),
    Absent("braked-sgd", "none", "no code of the authors was found; rho=0, plain momentum, is compared with torch"),
    Absent("experimental-adaptive-memory", "none", "no code of the authors was found; nothing is compared"),
)
