"""The polar factor of a matrix, by every method that optimizers use: one registry behind one function.

The polar factor of `M = U diag(s) V^T` is `U V^T`: the closest matrix with orthonormal rows (or columns), and among all updates
of spectral norm 1 the one that points furthest along M. A new method is one entry of `METHODS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .newton_schulz import Form, NewtonSchulz, Triple, is_tall

# On a CPU, matrices are worked on in chunks of about this many elements. Small ones gain by being multiplied as a batch (five
# times at 32 x 32); from 256 x 512 on it gains nothing, and one matrix after the other stays in cache and needs less memory.
CHUNK = 2**17


def orthogonalize(
    M: Tensor,
    method: str = "polar_express",
    *,
    steps: int | None = None,
    form: Form = "auto",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Polar factor of each matrix in `M`, nearly or exactly: `U V^T` for `M = U diag(s) V^T`.

    | method          | start                   | steps | where singular values end                                    |
    |-----------------|-------------------------|-------|--------------------------------------------------------------|
    | `ns5`           | divided by its norm     | 5     | in [0.68, 1.21] from 0.002 of the norm on, never settling    |
    | `dyn5`          | divided by its norm     | 5     | in [0.97, 1.04] from 0.01 of the norm on                     |
    | `turbo4`        | each row scaled (AOL)   | 4     | as `dyn5`, of a matrix turned a little by the scaling        |
    | `polar_express` | divided by 1.01 norms   | 5     | in [0.84, 1.13] from 0.001 on; with 6 steps in [0.99, 1.01]  |
    | `qdwh`          | divided by a norm bound | 6     | at 1                                                         |
    | `svd`           |                         |       | at 1                                                         |

    The scale of M makes no difference, and a power of two changes no bit. (The authors' programs add 1e-7 to the norm, which
    shrinks the result of smaller matrices; `turbo4`'s adds it to squared lengths of rows, which misses rows shorter than 3e-4.
    Neither is needed here.) Zero, and a matrix of subnormal numbers, returns zero. Singular directions that are zero to
    rounding stay zero; only `qdwh` completes them, arbitrarily. A matrix with nan or infinity returns nan.

    Args:
        M: shape (..., rows, columns), any strides; each matrix is treated by itself. Not modified.
        method: a name in `METHODS`.
        steps: iterations; None for the method's own number, which for `qdwh` means until converged. For `qdwh` an upper bound,
            and its final polish always follows; `svd` takes none.
        form: how polynomials are applied. "plain" multiplies the whole matrix in each step; "gram" iterates on its small Gram
            matrix, the same up to rounding (`newton_schulz.gram`); "auto" takes "gram" from an aspect ratio of 2, where it
            becomes faster (measured on a CPU in float32: 1.1 times at 2, 1.5 at 4, 1.9 at 8), but not in bfloat16, which is too
            coarse for it.
        dtype: precision of the arithmetic. None: float64 for float64 matrices, else bfloat16 where the device multiplies it in
            hardware (`fast_bfloat16`), else float32. `qdwh` and `svd` never go below float32.

    Returns:
        Tensor of the shape and dtype of `M`, contiguous. No gradient flows through it.

    Raises:
        TypeError: `M` is not a real floating-point tensor.
        ValueError: `M` has fewer than two dimensions, or `check_options` refuses the rest.

    Sources: `ns5`: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). `dyn5`: the code of
    "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295. `turbo4`: "Turbo-Muon: Accelerating Orthogonality-Based
    Optimization with Pre-Conditioning", arXiv 2512.04632. `polar_express`: "The Polar Express: Optimal Matrix Sign Methods and
    Their Application to the Muon Algorithm", arXiv 2505.16932. `qdwh`: Nakatsukasa, Bai, Gygi, "Optimizing Halley's Iteration
    for Computing the Matrix Polar Decomposition", SIAM J. Matrix Anal. Appl. 31 (2010). Gram form: gram-newton-schulz (code) of
    Dao-AILab.
    """
    check_options(method, steps, form, dtype)
    if not M.is_floating_point():
        raise TypeError(f"orthogonalize(M): M must be a real floating-point tensor, got {M.dtype}")
    if M.ndim < 2:
        raise ValueError(f"orthogonalize(M): M must have at least two dimensions, got shape {tuple(M.shape)}")
    if M.numel() == 0:
        return torch.zeros_like(M)
    if dtype is None:
        fast = M.dtype != torch.float64 and fast_bfloat16(M.device.type)
        dtype = torch.bfloat16 if fast else torch.promote_types(M.dtype, torch.float32)

    X = near_one(M.detach().reshape(-1, *M.shape[-2:]))  # the only fresh memory of this size, and in the end the result
    chunk = max(1, CHUNK // X[0].numel()) if M.device.type == "cpu" else len(X)
    for part in X.split(chunk):
        part.copy_(METHODS[method](part, steps, form, dtype))
    return X.to(M.dtype).view(M.shape)


def check_options(method: str, steps: int | None, form: str, dtype: torch.dtype | None) -> None:
    """Raise ValueError for options that `orthogonalize` does not know, so that a rule can fail when it is built."""
    if method not in METHODS:
        raise ValueError(f"method={method!r}: unknown; known: {', '.join(METHODS)}")
    solver = METHODS[method]
    if form not in get_args(Form):
        raise ValueError(f"form={form!r}: must be one of {', '.join(get_args(Form))}")
    if form == "gram" and isinstance(solver, Exact):
        raise ValueError(f"form='gram': method {method!r} is no polynomial and has no Gram form; leave form='auto'")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"steps={steps!r}: must be a whole number of at least 1, or None for the method's own")
    if steps is not None and isinstance(solver, Exact) and not solver.takes_steps:
        raise ValueError(f"steps={steps!r}: method {method!r} takes no steps; leave None")
    if dtype not in (None, torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype!r}: must be float64, float32, bfloat16, float16, or None to choose by device")


@functools.cache
def fast_bfloat16(device_type: str) -> bool:
    """Whether matrices of bfloat16 are multiplied in hardware; elsewhere they can be a hundred times slower than float32."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    # Private names of torch, so each may be missing.
    checks = [getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")]
    return any(check() for check in checks if check is not None)


# The exponent bits of a number: alone they are the power of two below it, 0 for a subnormal number.
_EXPONENT = {torch.float32: (torch.int32, 0x7F80_0000), torch.float64: (torch.int64, 0x7FF0_0000_0000_0000)}


def near_one(M: Tensor) -> Tensor:
    """A contiguous copy of M in float32 or float64, each matrix divided by the power of two that brings its largest entry into
    [1, 2).

    Exact, and from here on squares neither overflow nor vanish. A matrix of nothing but subnormal numbers becomes zero: a
    momentum without gradients decays no further than to these, and would go on making full steps with what is left of it.
    """
    M = M.to(torch.promote_types(M.dtype, torch.float32))
    integer, mask = _EXPONENT[M.dtype]
    # twelve times as fast on a CPU as vector_norm of order infinity, and nan stays nan
    largest = torch.maximum(M.amax((-2, -1), keepdim=True), -M.amin((-2, -1), keepdim=True))
    power = (largest.view(integer) & mask).view(M.dtype)
    copy = torch.empty_like(M, memory_format=torch.contiguous_format)
    return torch.div(M, power.masked_fill(power == 0, torch.inf), out=copy)


@dataclass(frozen=True)
class Exact:
    """A method that ends at the polar factor itself, in float32 or better: `solve(X, steps)`, X a batch of wide matrices."""

    solve: Callable[[Tensor, int | None], Tensor]
    takes_steps: bool = True

    def __call__(self, X: Tensor, steps: int | None, form: Form, dtype: torch.dtype) -> Tensor:
        X = X.to(torch.promote_types(dtype, torch.float32))
        return self.solve(X.mT, steps).mT if is_tall(X) else self.solve(X, steps)


def qdwh(X: Tensor, steps: int | None) -> Tensor:
    """Halley's iteration `X <- (a I + b X X^T) (I + c X X^T)^(-1) X`, its weights chosen by a lower bound l of singular values.

    By QR while c is large, where forming `I + c X X^T` would lose digits, then by Cholesky. One Newton-Schulz step of the third
    degree ends it, also after fewer steps.
    """
    norm_1, norm_inf = X.abs().sum(-2).amax(-1), X.abs().sum(-1).amax(-1)
    X = X / (norm_1 * norm_inf).sqrt().clamp_min(1.0)[:, None, None]  # at least ||X||_2
    rows = X.shape[-2]
    eye = torch.eye(rows, dtype=X.dtype, device=X.device).expand(len(X), rows, rows)
    eps = torch.finfo(X.dtype).eps
    l, done = eps, 0
    while l + 5 * eps < 1 and (steps is None or done < steps):
        d = (4 * (1 / l**2 - 1) / l**2) ** (1 / 3)
        a = math.sqrt(1 + d) + math.sqrt(2 - d + 2 * (2 - l**2) / (l**2 * math.sqrt(1 + d)))
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        if c > 100:
            Q, _ = torch.linalg.qr(torch.cat([math.sqrt(c) * X.mT, eye], dim=-2))
            Q1, Q2 = Q[:, :-rows], Q[:, -rows:]
            X = torch.baddbmm(X, Q2, Q1.mT, beta=b / c, alpha=(a - b / c) / math.sqrt(c))
        else:
            L, _ = torch.linalg.cholesky_ex(torch.baddbmm(eye, X, X.mT, alpha=c))
            X = (b / c) * X + (a - b / c) * torch.cholesky_solve(X, L)
        l = l * (a + b * l**2) / (1 + c * l**2)
        done += 1
    return torch.baddbmm(X, X @ X.mT, X, beta=1.5, alpha=-0.5)


def svd(X: Tensor, steps: int | None) -> Tensor:
    """`U V^T` of the singular value decomposition, without the directions whose singular value is zero to rounding."""
    finite = X.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # LAPACK gives up on a batch with one nan
    U, s, Vh = torch.linalg.svd(torch.where(finite, X, 0.0), full_matrices=False)
    # Zeros come out at up to 8 eps of the largest (measured at 512 columns), with arbitrary vectors.
    nonzero = s > math.sqrt(X.shape[-1]) * torch.finfo(X.dtype).eps * s[:, :1]
    return torch.where(finite, (U * nonzero[:, None, :]) @ Vh, torch.nan)


_JORDAN: Triple = (3.4445, -4.7750, 2.0315)
_YOU: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# The greedy minimax sequence for singular values in [0.001, 1]. All but the limit are shrunk by 1.01, so that what rounding has
# pushed past 1 is not thrown out further by the next step.
_POLAR_EXPRESS: tuple[Triple, ...] = (
    *(
        (a / 1.01, b / 1.01**3, c / 1.01**5)
        for a, b, c in (
            (8.28721201814563, -23.595886519098837, 17.300387312530933),
            (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
            (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
            (3.3184196573706015, -2.488488024314874, 0.51004894012372),
            (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
            (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
            (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        )
    ),
    (1.875, -1.25, 0.375),
)

METHODS: dict[str, NewtonSchulz | Exact] = {
    "ns5": NewtonSchulz((_JORDAN,), steps=5),
    # Fewer steps drop the first triples: with the first three alone singular values are left anywhere in [0.38, 1.25].
    "dyn5": NewtonSchulz(_YOU, steps=5, tail=True),
    "turbo4": NewtonSchulz(_YOU, steps=4, start="aol", tail=True),
    "polar_express": NewtonSchulz(_POLAR_EXPRESS, steps=5, margin=1.01),
    "qdwh": Exact(qdwh),
    "svd": Exact(svd, takes_steps=False),
}
