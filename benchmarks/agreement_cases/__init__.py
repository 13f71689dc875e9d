"""All comparisons of `agreement.py`, by where the reference comes from."""

from __future__ import annotations

from . import (
    absent,
    adapt_cases,
    compacter_cases,
    curvature_cases,
    jax_cases,
    jax_official_cases,
    layer_cases,
    low_rank_cases,
    matrix_cases,
    memory_cases,
    merge_cases,
    model_cases,
    muon_cases,
    official_cases,
    package_cases,
    peft_cases,
    torch_cases,
    training_cases,
    window_cases,
)
from .case import Absent, Case

CASES: tuple[Case, ...] = (
    *torch_cases.CASES,
    *package_cases.CASES,
    *jax_cases.CASES,
    *official_cases.CASES,
    *muon_cases.CASES,
    *matrix_cases.CASES,
    *training_cases.CASES,
    *model_cases.CASES,
    *curvature_cases.CASES,
    *memory_cases.CASES,
    *layer_cases.CASES,
    *window_cases.CASES,
    *jax_official_cases.CASES,
    *merge_cases.CASES,
    *adapt_cases.CASES,
    *compacter_cases.CASES,
    *peft_cases.CASES,
    *low_rank_cases.CASES,
)
ABSENT: tuple[Absent, ...] = (*official_cases.ABSENT, *matrix_cases.ABSENT, *training_cases.ABSENT, *absent.ABSENT)
