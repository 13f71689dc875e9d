"""Against other libraries for torch: timm, pytorch-optimizer, heavyball."""

from __future__ import annotations

from typing import Any

import torch

from poise.optim import SGD, SOAP, AdamMini, AdamW, Lion, Muon, Signum
from poise.training import SAM

from .case import MATRICES, Case, Problem, stepping
from .torch_cases import ADAM, IN_BFLOAT16, SHORT

LION = {"lr": 1e-2, "betas": (0.9, 0.98), "weight_decay": 0.1}
ARBITRARY = (
    "of a matrix that is not square, the first of the longer side's statistics has no full rank, so that part of its basis is "
    "arbitrary: rounding decides"
)
SINGLE = Problem(dtype=torch.float32)
MATRIX = Problem(MATRICES, dtype=torch.float32)

soap = stepping(lambda p, o: SOAP(p, lr=1e-2, weight_decay=0.01, form="full", **o))


class TwoPasses:
    """`step(closure)` for a SAM that finds the gradients of the first pass in place, and calls the closure for the second."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt

    def step(self, closure: Any) -> None:
        closure()
        self.opt.step(closure)


def sam(params: Any, module: Any) -> Any:
    return TwoPasses(module.SAM(params, torch.optim.SGD, rho=0.5, lr=0.05, momentum=0.9))


ours_sam = stepping(lambda p, o: SAM(SGD(p, lr=0.05, momentum=0.9, **o), rho=0.5), closure=True)

CASES = (
    Case(
        "adamw",
        "timm",
        "optim.adamw.AdamWLegacy",
        stepping(lambda p, o: AdamW(p, **ADAM, **o)),
        stepping(lambda p, m: m.adamw.AdamWLegacy(p, **ADAM)),
        1e-13,
    ),
    Case(
        "lion",
        "timm",
        "optim.lion.Lion",
        stepping(lambda p, o: Lion(p, **LION, **o)),
        stepping(lambda p, m: m.lion.Lion(p, **LION)),
        1e-13,
    ),
    Case(
        "sgd",
        "timm",
        "optim.sgdw.SGDW",
        stepping(lambda p, o: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, decay="coupled", **o)),
        stepping(lambda p, m: m.sgdw.SGDW(p, lr=0.05, momentum=0.9, weight_decay=0.1)),
        1e-13,
        "decay='coupled'",
    ),
    Case(
        "muon",
        "timm",
        "optim.muon.Muon",
        stepping(lambda p, o: Muon(p, lr=0.02, method="ns5", weight_decay=0.1, **o)),
        stepping(
            lambda p, m: m.muon.Muon(
                p, lr=0.02, weight_decay=0.1, nesterov=True, adjust_lr_fn="original", ns_coefficients="original"
            )
        ),
        3e-2,
        "method='ns5'",
        IN_BFLOAT16,
        SHORT,
    ),
    Case(
        "lion",
        "pytorch_optimizer",
        "Lion",
        stepping(lambda p, o: Lion(p, decay="independent", **LION, **o)),
        stepping(lambda p, m: m.Lion(p, fixed_decay=True, **LION)),
        1e-13,
        "decay='independent'",
    ),
    Case(
        "signum",
        "pytorch_optimizer",
        "SignSGD",
        stepping(lambda p, o: Signum(p, lr=1e-2, momentum=0.9, weight_decay=0.1, **o)),
        stepping(lambda p, m: m.SignSGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1)),
        1e-13,
    ),
    Case(
        "muon",
        "pytorch_optimizer",
        "Muon",
        stepping(lambda p, o: Muon(p, lr=0.02, method="ns5", **o)),
        stepping(lambda p, m: m.Muon([{"params": p, "use_muon": True}], lr=0.02, weight_decay=0.0)),
        3e-2,
        "method='ns5'",
        IN_BFLOAT16,
        SHORT,
    ),
    Case(
        "soap",
        "pytorch_optimizer",
        "SOAP",
        soap,
        stepping(lambda p, m: m.SOAP(p, lr=1e-2, weight_decay=0.01)),
        0.6,
        "form='full'",
        ARBITRARY,
        MATRIX,
        1e-7,
    ),
    Case(
        "adam-mini",
        "pytorch_optimizer",
        "AdamMini",
        stepping(lambda p, o: AdamMini(p, lr=1e-2, weight_decay=0.1, blocks={"*": "tensor"}, decay_vectors=True, **o)),
        stepping(lambda p, m: m.AdamMini(torch.nn.ParameterList(p), lr=1e-2, weight_decay=0.1)),
        1e-6,
        "one block a tensor",
        "the reference keeps its state in float32",
    ),
    Case(
        "sam",
        "pytorch_optimizer",
        "SAM",
        ours_sam,
        stepping(sam, closure=True),
        1e-8,
        "rho=0.5, over SGD with momentum",
        "the reference takes the norm in float32",
    ),
    Case(
        "adamw",
        "heavyball",
        "AdamW",
        stepping(lambda p, o: AdamW(p, **ADAM, **o)),
        stepping(lambda p, m: m.AdamW(p, **ADAM)),
        1e-4,
        note="rounding of float32",
        problem=SINGLE,
    ),
    Case(
        "sgd",
        "heavyball",
        "SGD",
        stepping(lambda p, o: SGD(p, lr=0.05, momentum=0.9, **o)),
        stepping(lambda p, m: m.SGD(p, lr=0.05, beta=0.9)),
        1e-5,
        "momentum",
        "rounding of float32",
        SINGLE,
    ),
)
