"""Step times: which of several processes counts, and what a rule is held against."""

from __future__ import annotations

import pytest
import report
import step_time
from rows import Row

KEY = "poise:lion"


def test_the_process_in_the_middle_counts_whole() -> None:
    runs = [{KEY: {"ratio_to_torch_fused_adamw": ratio, "rounds": n}} for n, ratio in enumerate([0.9, 0.7, 0.8])]
    found = step_time.middle(runs)[KEY]
    assert found["rounds"] == 2  # all figures are of one process
    assert found["ratios_of_processes"] == [0.7, 0.8, 0.9]


def test_matrix_rules_are_ordered_by_what_they_take_beside_their_products() -> None:
    ratios = [(1.5, 5.0), (1.1, 4.0), (1.2, 9.0)]
    runs = [{KEY: {"ratio_to_products": own, "ratio_to_torch_fused_adamw": fused}} for own, fused in ratios]
    assert step_time.middle(runs)[KEY]["ratio_to_torch_fused_adamw"] == 9.0


def test_a_failure_in_one_process_is_the_rows() -> None:
    runs: list[dict[str, step_time.Known]] = [{KEY: {"ratio_to_torch_fused_adamw": 0.8}}, {KEY: {"failed": "crashed"}}]
    assert step_time.middle([*runs, runs[0]])[KEY]["failed"] == "crashed"


@pytest.mark.parametrize("again, target", [(0, 1.3 * 20 / 28), (8, 1.3)])
def test_a_target_is_of_the_bytes_that_must_move(again: int, target: float) -> None:
    """SGD with momentum moves 20 bytes a parameter; what it had to read twice would count twice."""
    row = Row("sgd", "poise", "poise.optim", "SGD", of_traffic=1.3, again=again)
    assert report.result(row, {"least_bytes_per_param": 20.0 + again})["target_ratio"] == pytest.approx(target)
