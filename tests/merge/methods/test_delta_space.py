"""Delta-space merge (Unlocking Complex Visual Generation via Closed-Loop Verified Reasoning, arXiv 2605.14876)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conformance.cases import mutated
from merge.cutting import State, draw, family, same
from torch import Tensor

from poise import catalog
from poise.merge import merge_tensors
from poise.merge.methods.delta_space import LoRA, concatenate, delta_space, fold_lora, overlap

COUNT = 2
EQUAL = {"a": 0.5, "b": 0.5}
CASES: list[dict[str, Any]] = [{}, {"a": 0.3, "b": 0.9}]


def reference(models: list[State], base: State, *, a: float = 1.0, b: float = 1.0) -> State:
    one, two = models
    return {n: w + a * (one[n] - w) + b * (two[n] - w) if w.is_floating_point() else w for n, w in base.items()}


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_one_update_alone_gives_its_model_bit_for_bit() -> None:
    base, models = family(2)
    for number, (a, b) in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        found = merge_tensors(delta_space, models, base, a=a, b=b)
        assert same({**found, "steps": models[number]["steps"]}, models[number])


def test_concatenated_factors_are_the_sum_of_the_dense_updates() -> None:
    one, two = LoRA(random(0, 4, 12), random(1, 9, 4), 2.0), LoRA(random(2, 3, 12), random(3, 9, 3), 0.5)
    joined = concatenate([one, two], [1.0, 0.7])
    assert joined.A.shape == (7, 12) and joined.B.shape == (9, 7)
    assert torch.allclose(joined.dense(), one.dense() + 0.7 * two.dense(), atol=1e-6)
    weight = random(4, 9, 12)
    base, models = {"w": weight}, [{"w": fold_lora(weight, one)}, {"w": fold_lora(weight, two)}]
    dense = merge_tensors(delta_space, models, base, a=1.0, b=0.7)["w"]
    assert torch.allclose(fold_lora(weight, joined), dense, atol=1e-5)


def test_updates_that_read_orthogonal_inputs_keep_both_behaviours_exactly() -> None:
    Q = torch.linalg.qr(random(0, 10, 10).double()).Q
    weight = random(1, 6, 10).double()
    reads = [Q[:, :4], Q[:, 4:7]]
    models = [{"w": weight + random(2 + i, 6, U.shape[1]).double() @ U.mT} for i, U in enumerate(reads)]
    found = merge_tensors(delta_space, models, {"w": weight})["w"]
    for model, U in zip(models, reads, strict=True):
        x = U @ random(9, U.shape[1], 20).double()
        assert torch.allclose(found @ x, model["w"] @ x, atol=1e-12)
        assert not torch.allclose(weight @ x, model["w"] @ x, atol=0.1)


def test_the_overlap_is_reported_of_each_tensor_and_of_the_model() -> None:
    base = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0]]), "n": torch.tensor(3)}
    one = {"a": torch.tensor([3.0, 5.0]), "b": torch.tensor([[1.0]]), "n": torch.tensor(4)}
    two = {"a": torch.tensor([4.0, 5.0]), "b": torch.tensor([[3.0]]), "n": torch.tensor(5)}
    whole, rows = overlap(one, two, base)
    assert [(row.name, row.first, row.second) for row in rows] == [("a", 0.2, pytest.approx(2**0.5 / 5)), ("b", 0.0, 2.0)]
    assert [row.cosine for row in rows] == [pytest.approx(0.5**0.5), 0.0]
    assert whole.first == pytest.approx(1 / 26**0.5) and whole.cosine == pytest.approx(1 / 6**0.5)
    assert overlap(one, one, base)[0].cosine == pytest.approx(1)


def test_the_overlap_tells_it_from_its_mutant() -> None:
    base = draw(0)
    one, two = draw(1, base, 0.1), draw(2, base, 0.1)
    assert abs(overlap(one, two, base)[0].cosine) < 0.2
    assert mutated(catalog.get("delta_overlap"))(one, two, base)[0].cosine > 0.4


def test_bad_input_is_refused() -> None:
    base, models = family(3)
    with pytest.raises(ValueError, match="takes two models, these are 3"):
        merge_tensors(delta_space, models, base)
    with pytest.raises(ValueError, match=r"A is \(2, 5\) and B \(3, 2\)"):
        concatenate([LoRA(random(0, 2, 4), random(1, 3, 2)), LoRA(random(0, 2, 5), random(1, 3, 2))])
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])
