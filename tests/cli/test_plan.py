"""`poise plan`."""

from __future__ import annotations

import json
from collections.abc import Callable


def test_the_table_says_what_each_part_needs(poise: Callable) -> None:
    ended = poise("plan", "toy.py", "--no-steps")
    assert ended.code == 0 and "adamw on toy, batch of 8x4, 8x1" in ended.out
    assert "activations" in ended.out and "total" in ended.out and "peak" not in ended.out


def test_json_says_the_same_to_a_program(poise: Callable) -> None:
    found = json.loads(poise("plan", "--model", "toy.py", "--optimizer", "lion", "--no-steps", "--json").out)
    assert found["method"] == "lion" and found["counted_on"] == "meta" and found["peak"] is None
    assert found["total"]["weights"] == 4 * 5 and found["total"]["gradients"] == 4 * 5
    assert found["total"]["total"] == sum(part["total"] for part in found["parts"])


def test_state_and_settings_reach_the_optimizer(poise: Callable) -> None:
    def state(*more: str) -> int:
        return json.loads(poise("plan", "code-lm", "--no-steps", "--json", *more).out)["total"]["state"]

    plain = state()
    assert state("--state", "int8") < 0.4 * plain
    assert state("--optimizer", "sgd", "--set", "momentum=0.9") < 0.6 * plain


def test_the_peak_is_measured_on_real_steps(poise: Callable) -> None:
    found = json.loads(poise("plan", "toy.py", "--set", "backend=eager", "--json").out)
    assert found["failed"] is None and found["peak"] >= 0 and found["between_steps"] <= found["peak"]


def test_bad_input_is_named(poise: Callable) -> None:
    ended = poise("plan", "toy.py", "--model", "other.py")
    assert ended.code == 2 and "one of the two is enough" in ended.err
    assert poise("plan", "absent.py").code == 2
    ended = poise("plan", "toy.py", "--optimizer", "nosuch")
    assert ended.code == 2 and "nosuch" in ended.err
