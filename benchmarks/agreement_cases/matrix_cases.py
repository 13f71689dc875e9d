"""Against the authors' repositories: further rules for matrices."""

from __future__ import annotations

from typing import Any

import torch

from poise.optim import NAMO, NAMOD, SOAP, AuON, HybridAuON, PolarGrad

from .case import MATRICES, Absent, Case, Problem, stepping
from .package_cases import ARBITRARY

MATRIX = Problem(MATRICES)
SINGLE = Problem(MATRICES, dtype=torch.float32)
SQUARE = Problem(((10, 10), (16, 16)), dtype=torch.float32)
AUON = {"lr": 0.05, "weight_decay": 0.1}
NAMO_SETTINGS = {"lr": 0.05, "momentum": 0.95, "mu2": 0.99}


def namo(cls: Any, name: str, reference: str) -> Case:
    def theirs(params: Any, module: Any) -> Any:
        matrices, rest = ([p for p in params if (p.ndim > 1) is there] for there in (True, False))
        settings = {"muon_params": matrices, "adamw_params": rest, "use_exact_svd": True, **NAMO_SETTINGS}
        return getattr(module, reference)(wd=0.1, **settings)

    return Case(
        name,
        "minxin-zhg/namo",
        reference,
        stepping(lambda p, o: cls(p, weight_decay=0.1, method="svd", **NAMO_SETTINGS, **o)),
        stepping(theirs),
        1e-5,
        "exact SVD",
        "the reference takes the SVD, and keeps its statistics, in float32; in its AdamW, eps is added before bias correction",
        Problem((*MATRICES, (7,))),
    )


def auon(cls: Any, name: str, reference: str, bound: float, note: str, **settings: Any) -> Case:
    return Case(
        name,
        "ryyzn9/AuON",
        reference,
        stepping(lambda p, o: cls(p, variant="raw", **AUON, **settings, **o)),
        stepping(lambda p, m: getattr(m, reference)(p, **AUON)),
        bound,
        ", ".join(["variant='raw'", *(f"{key}={value!r}" for key, value in settings.items())]),
        f"{note}. The paper's form is variant='unit', for which there is no code",
        MATRIX,
    )


def polargrad(bound: float, note: str, **settings: Any) -> Case:
    steps = settings.pop("inner_steps", None)
    return Case(
        "polargrad",
        "timlautk/polargrad",
        "PolarGrad",
        stepping(lambda p, o: PolarGrad(p, lr=0.01, weight_decay=0.1, inner_steps=steps, **settings, **o)),
        stepping(lambda p, m: m.PolarGrad(p, lr=0.01, weight_decay=0.1, inner_steps=steps or 12, **settings)),
        bound,
        ", ".join([f"inner_steps={steps or '12 there, until converged here'}", *(f"{k}={v!r}" for k, v in settings.items())]),
        note,
        MATRIX,
    )


def soap(bound: float, settings: str, note: str, ours: dict[str, Any], theirs: dict[str, Any], problem: Problem) -> Case:
    return Case(
        "soap",
        "nikhilvyas/SOAP",
        "SOAP",
        stepping(lambda p, o: SOAP(p, lr=1e-2, form="full", **ours, **o)),
        stepping(lambda p, m: m.SOAP(p, lr=1e-2, **theirs)),
        bound,
        f"form='full'{settings}",
        note,
        problem,
        1e-7 if note == ARBITRARY else 0.0,
    )


CASES = (
    soap(1e-3, "", "rounding of float32, in eigenvectors and QR", {}, {}, SQUARE),
    Case(
        "soap",
        "nikhilvyas/SOAP",
        "SOAP",
        stepping(lambda p, o: SOAP(p, lr=1e-2, **o)),
        stepping(lambda p, m: m.SOAP(p, lr=1e-2)),
        None,
        "form='compact'",
        "poise's default form keeps bases in bfloat16 and the second moment as means of rows and columns",
        SQUARE,
    ),
    soap(0.6, "", ARBITRARY, {}, {}, SINGLE),
    soap(
        1e-3,
        ", one side, normalized",
        "rounding of float32, in eigenvectors and QR",
        {"max_precond_dim": 9, "normalize_grads": True},
        {"max_precond_dim": 9, "normalize_grads": True},
        Problem(((12, 8), (8, 12)), dtype=torch.float32),
    ),
    soap(1e-5, ", no factors", "rounding", {"max_precond_dim": 1}, {"max_precond_dim": 1}, SINGLE),
    polargrad(1e-10, "rounding"),
    polargrad(1e-10, "rounding", polar_first=True),
    polargrad(1e-10, "rounding", inner_steps=2),
    Case(
        "polargrad",
        "timlautk/polargrad",
        "PolarGrad",
        stepping(lambda p, o: PolarGrad(p, lr=0.01, **o)),
        stepping(lambda p, m: m.PolarGrad(p, lr=0.01)),
        None,
        note="the reference stops QDWH after two steps, far from the polar factor; poise goes on until it has converged",
        problem=SINGLE,
    ),
    namo(NAMO, "namo", "NAMO"),
    namo(NAMOD, "namo-d", "NAMO_D"),
    auon(AuON, "auon", "AuON", 1e-13, "rounding"),
    auon(
        HybridAuON,
        "hybrid-auon",
        "HybridAuON",
        1e-6,
        "the reference adds 1e-7 to the norm that Newton-Schulz divides by",
        method="ns5",
    ),
)

ABSENT = (
    Absent("lanton", "none", "no code of the authors was found; nothing is compared"),
    Absent("trust-region", "none", "no code of the authors was found; two special cases are compared with optax"),
)
