"""Against the authors' repositories: Muon and Turbo-Muon."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from poise.optim import Muon, TurboMuon

from .case import MATRICES, Case, Problem, stepping
from .torch_cases import IN_BFLOAT16, SHORT, widened

MATRIX = Problem(MATRICES)
CONVOLUTION = Problem(((6, 4, 3, 3), (12, 2, 3, 3)), steps=20, dtype=torch.float32)


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
    Case(
        "muon",
        "KellerJordan/Muon",
        "SingleDeviceMuon",
        stepping(lambda p, o: Muon(p, lr=0.02, **o)),
        widened(stepping(lambda p, m: m.SingleDeviceMuon(p, lr=0.02))),
        None,
        "method='polar_express'; bfloat16 there replaced by float64",
        "poise's default iteration comes closer to the polar factor in as many steps",
        MATRIX,
    ),
    Case(
        "muon",
        "KellerJordan/Muon",
        "SingleDeviceMuon",
        stepping(lambda p, o: Muon(p, lr=0.02, method="ns5", **o)),
        widened(stepping(lambda p, m: m.SingleDeviceMuon(p, lr=0.02))),
        None,
        "method='ns5', convolutions; bfloat16 there replaced by float64",
        "the scale comes from the kernel's sides there, and from outputs and inputs here",
        Problem(((6, 4, 3, 3), (24, 2, 3, 3))),
    ),
)
