"""Against optax, in float64; its Muon iterates in the dtype of the gradient, and has Turbo-Muon's start."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from poise.optim import SGD, AdamW, Lion, LionK, Muon, OptAMSGrad, Signum, StoSignSGD, TrustRegion, TurboMuon

from .case import MATRICES, Case, Problem, Side, Trajectory, stepping
from .package_cases import LION
from .torch_cases import ADAM

MATRIX = Problem(MATRICES)
ADDED = "the reference adds 1e-8 to the norm that it divides by"


def transformed(make: Callable[[Any], Any]) -> Side:
    """The side of a gradient transformation of optax."""

    def run(problem: Problem, optax: Any) -> Trajectory:
        jax: Any = importlib.import_module("jax")
        jax.config.update("jax_enable_x64", True)
        weights = [jax.numpy.asarray(p.detach().numpy()) for p in problem.start()]
        transformation = make(optax)
        state = transformation.init(weights)
        found = [_back(weights)]
        for t in range(problem.steps):
            gradients = [jax.numpy.asarray(g.numpy()) for g in problem.gradients(t, _back(weights))]
            updates, state = transformation.update(gradients, state, weights)
            weights = optax.apply_updates(weights, updates)
            found.append(_back(weights))
        return found

    return run


def _back(weights: Any) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(w)) for w in weights]


def adam(optax: Any) -> Any:
    return optax.adamw(ADAM["lr"], *ADAM["betas"], weight_decay=ADAM["weight_decay"])


def amsgrad(optax: Any) -> Any:
    return optax.amsgrad(1e-2, bias_correction_mu=False, bias_correction_nu=False)


def case(rule: str, reference: str, ours: Any, theirs: Any, bound: float = 1e-13, settings: str = "", **more: Any) -> Case:
    return Case(rule, "optax", reference, stepping(ours), transformed(theirs), bound, settings, **more)


def signum(optax: Any) -> Any:
    return optax.signum(1e-2, 0.9)


def muon(**settings: Any) -> Any:
    def make(optax: Any) -> Any:
        sides = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
        if settings.get("ns_steps"):  # it refuses its own five for four steps
            settings["ns_coeffs"] = tuple(optax.contrib._muon._DION_NS_COEFFS[-settings["ns_steps"] :])
        return optax.contrib.muon(0.02, weight_decay=0.1, muon_weight_dimension_numbers=lambda p: [sides] * len(p), **settings)

    return make


CASES = (
    case("adamw", "adamw", lambda p, o: AdamW(p, **ADAM, **o), adam),
    case(
        "lion",
        "lion",
        lambda p, o: Lion(p, **LION, **o),
        lambda m: m.lion(LION["lr"], *LION["betas"], weight_decay=LION["weight_decay"]),
    ),
    case(
        "lion-k",
        "lion",
        lambda p, o: LionK(p, **LION, kappa="l1", **o),
        lambda m: m.lion(LION["lr"], *LION["betas"], weight_decay=LION["weight_decay"]),
        settings="kappa='l1'",
        note="rounding; a special case, since no code of the authors was found",
    ),
    case(
        "sgd",
        "sgd",
        lambda p, o: SGD(p, lr=0.05, momentum=0.9, nesterov=True, **o),
        lambda m: m.sgd(0.05, 0.9, nesterov=True),
        settings="momentum, nesterov",
    ),
    case("signum", "signum", lambda p, o: Signum(p, lr=1e-2, momentum=0.9, **o), signum),
    case(
        "stosignsgd",
        "signum",
        lambda p, o: StoSignSGD(p, lr=1e-2, momentum=0.9, max_beta=0.0, **o),
        signum,
        settings="max_beta=0",
        note="rounding; the special case without chance, since no code of the authors was found",
    ),
    case(
        "trust-region",
        "signum",
        lambda p, o: TrustRegion(p, lr=1e-2, momentum=0.9, norm="linf", start="zeros", **o),
        signum,
        settings="norm='linf', start='zeros'",
        note="rounding; a special case, since no code of the authors was found",
    ),
    case(
        "trust-region",
        "contrib.muon",
        lambda p, o: TrustRegion(p, lr=0.02, weight_decay=0.1, method="ns5", start="zeros", **o),
        muon(nesterov=False),
        1e-7,
        "norm='spectral', method='ns5', start='zeros'",
        note=f"{ADDED}. Matrices that are not higher than wide, whose scale is 1 in the reference",
        problem=Problem(((8, 12), (10, 10))),
    ),
    case(
        "opt-amsgrad",
        "amsgrad",
        lambda p, o: OptAMSGrad(p, lr=1e-2, predictor="none", **o),
        amsgrad,
        settings="predictor='none'",
        note="rounding; without prediction it is AMSGrad without bias correction",
    ),
    case(
        "muon",
        "contrib.muon",
        lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", nesterov=False, **o),
        muon(nesterov=False),
        1e-7,
        "method='ns5', nesterov=False",
        note=ADDED,
        problem=MATRIX,
    ),
    case(
        "muon",
        "contrib.muon",
        lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", **o),
        muon(),
        0.1,
        "method='ns5', nesterov=True",
        note="the reference corrects the bias of momentum and gradient apart before it mixes them, which turns the first "
        "directions; the author's release and torch do not",
        problem=MATRIX,
    ),
    case(
        "muon",
        "contrib.muon",
        lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="dyn5", nesterov=False, **o),
        muon(ns_coeffs="dion", nesterov=False),
        1e-7,
        "method='dyn5', nesterov=False",
        note=ADDED,
        problem=MATRIX,
    ),
    case(
        "turbo-muon",
        "contrib.muon",
        lambda p, o: TurboMuon(p, lr=0.02, weight_decay=0.1, nesterov=False, **o),
        muon(ns_steps=4, preconditioning="aol", nesterov=False),
        settings="preconditioning='aol' there, nesterov=False",
        problem=MATRIX,
    ),
)
