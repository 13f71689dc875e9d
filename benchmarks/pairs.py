"""Timing what is compared in turns, so that a slow moment of the machine meets everyone, and what the machine itself can do."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch

Step = Callable[[], object]

SHORTEST = 0.01  # seconds: a shorter step is repeated until that much has passed


def seconds(step: Step) -> float:
    """Seconds per call, over as many calls as fill `SHORTEST`; one if it is longer."""
    start, calls = time.perf_counter(), 0
    while True:
        step()
        calls += 1
        taken = time.perf_counter() - start
        if taken >= SHORTEST:
            return taken / calls


def alternate(steps: Sequence[Step], rounds: int, budget: float) -> list[list[float]]:
    """Time every step once in each round, in an order that turns from round to round: AB, BA, AB, ... for two.

    Returns the seconds per call of each step, one list for each, entry i of all lists from round i. Stops after `rounds`, or
    before a round that would end after `budget` seconds; the first always runs.
    """
    taken: list[list[float]] = [[] for _ in steps]
    start = time.perf_counter()
    for i in range(rounds):
        for offset in range(len(steps)):
            j = (i + offset) % len(steps)
            taken[j].append(seconds(steps[j]))
        if (time.perf_counter() - start) * (i + 2) / (i + 1) > budget:
            break
    return taken


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


def copy_bandwidth(megabytes: int = 256, repeats: int = 7) -> float:
    """GB/s of `b.copy_(a)` between tensors far larger than any cache: bytes read plus bytes written, median of `repeats`.

    The line that a copy is about to overwrite is read first, and that is not counted. What updates in place reads it anyway, so
    it can exceed this figure by up to a half.
    """
    a = torch.ones(megabytes * 2**20 // 4)
    b = torch.zeros_like(a)
    return 2 * a.nbytes / statistics.median(seconds(lambda: b.copy_(a)) for _ in range(repeats)) / 1e9


def newton_schulz_products(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, iterations: int) -> Step:
    """The matrix products alone that plain Newton-Schulz iterations need for matrices of these shapes, each in its own memory.

    Each iteration multiplies `A = X X^T`, `A A` and `A X`, or of a tall matrix `X^T X`, `A A` and `X A`.
    """
    matrices = [torch.randn(shape).to(dtype) / math.sqrt(max(shape)) for shape in shapes]

    def step() -> None:
        for X in matrices:
            tall = X.shape[0] > X.shape[1]
            for _ in range(iterations):
                A = X.mT @ X if tall else X @ X.mT
                _ = A @ A, X @ A if tall else A @ X

    return step
