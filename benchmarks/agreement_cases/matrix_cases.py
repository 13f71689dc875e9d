"""Against the authors' repositories: rules for matrices."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from poise.optim import NAMO, NAMOD, SOAP, AuON, HybridAuON, Muon, PolarGrad, TurboMuon

from .case import MATRICES, Absent, Case, Problem, stepping
from .package_cases import ARBITRARY
from .torch_cases import IN_BFLOAT16, SHORT, widened

MATRIX = Problem(MATRICES)
SINGLE = Problem(MATRICES, dtype=torch.float32)
CONVOLUTION = Problem(((6, 4, 3, 3), (12, 2, 3, 3)), steps=20, dtype=torch.float32)
SQUARE = Problem(((10, 10), (16, 16)), dtype=torch.float32)
AUON = {"lr": 0.05, "weight_decay": 0.1}
NAMO_SETTINGS = {"lr": 0.05, "momentum": 0.95, "mu2": 0.99}


def turbo(params: Any, module: Any) -> Any:
    """Torch's Muon with their iteration in its place; their three kernels are for a GPU, here they are products of torch."""

    def put(value: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        return value if out is None else out.copy_(value)

    module.ns_line_1 = lambda A, out=None: put(A @ A.mT, out)
    module.ns_line_2 = lambda A, alpha, beta, out=None: put(beta * A + alpha * A @ A, out)
    module.ns_line_3 = lambda B, X, a, out=None: put(a * X + B @ X, out)
    return _Swapped(torch.optim.Muon(params, lr=0.02, weight_decay=0.1), module.newton_schulz_triton_aol)


class _Swapped:
    def __init__(self, opt: Any, orthogonalize: Any) -> None:
        self.opt, self.orthogonalize = opt, orthogonalize

    def step(self) -> None:
        with mock.patch("torch.optim._muon._zeropower_via_newtonschulz", lambda G, *_: self.orthogonalize(G)):
            self.opt.step()


def release(params: Any, module: Any) -> Any:
    return module.SingleDeviceMuon(params, lr=0.02, weight_decay=0.1)


def namo(cls: Any, name: str, reference: str, note: str) -> Case:
    return Case(
        name,
        "minxin-zhg/namo",
        reference,
        stepping(lambda p, o: cls(p, weight_decay=0.1, method="svd", **NAMO_SETTINGS, **o)),
        stepping(lambda p, m: getattr(m, reference)(wd=0.1, muon_params=p, use_exact_svd=True, **NAMO_SETTINGS)),
        1e-5,
        "exact SVD",
        note,
        MATRIX,
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
    Case(
        "muon",
        "KellerJordan/Muon",
        "SingleDeviceMuon",
        stepping(lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", **o)),
        stepping(release),
        3e-2,
        "method='ns5'",
        IN_BFLOAT16,
        SHORT,
    ),
    Case(
        "muon",
        "KellerJordan/Muon",
        "SingleDeviceMuon",
        stepping(lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", **o)),
        widened(stepping(release)),
        1e-6,
        "method='ns5'; bfloat16 there replaced by float64",
        "the reference adds 1e-7 to the norm that it divides by",
        MATRIX,
    ),
    Case(
        "muon",
        "KellerJordan/Muon",
        "SingleDeviceMuon",
        stepping(lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", scale_rule="none", **o)),
        stepping(release),
        3e-2,
        "method='ns5', scale_rule='none', convolutions",
        f"{IN_BFLOAT16}. The reference takes the scale of a convolution from its kernel, 1 for a square one; poise's "
        "default takes it from the matrix of outputs by inputs",
        CONVOLUTION,
    ),
    Case(
        "turbo-muon",
        "thib-s/flash-newton-schulz",
        "newton_schulz_triton_aol",
        stepping(lambda p, o: TurboMuon(p, lr=0.02, weight_decay=0.1, **o)),
        stepping(turbo),
        6e-2,
        "in the place of torch's Newton-Schulz",
        "other coefficients: this commit has those of an earlier release, in bfloat16, with kernels for a GPU, replaced by "
        "their products here. The current ones are compared through optax",
        SHORT,
    ),
    soap(1e-3, "", "rounding of float32, in eigenvectors and QR", {}, {}, SQUARE),
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
    namo(NAMO, "namo", "NAMO", "the reference takes the SVD, and its statistic, in float32"),
    namo(NAMOD, "namo-d", "NAMO_D", "the reference takes the SVD, and its statistics, in float32"),
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
