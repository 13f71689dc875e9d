"""Two checkpoints side by side."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from poise.checkpoint import StateDict
from poise.checkpoint import difference as differing
from poise.checkpoint.comparing import Bounds, Comparison, verify
from poise.checkpoint.difference import Difference, difference
from poise.checkpoint.outputs import Divergence, between


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(a: Tensor, b: Tensor) -> Difference:
    return difference(StateDict({"w": a}), "w", StateDict({"w": b}), "w")


def compare(a: dict[str, Tensor], b: dict[str, Tensor], **bounds: float) -> Comparison:
    return verify(StateDict(a), StateDict(b), Bounds(**bounds))


@pytest.fixture(autouse=True)
def few_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differing, "TILE_BYTES", 8 * 50)


def test_what_is_the_same_is_equal_and_breaks_nothing() -> None:
    tensors = {"w": drawn(20, 10), "b": drawn(7).bfloat16(), "n": torch.tensor(4), "e": torch.zeros(0, 3)}
    found = compare(tensors, {name: tensor.clone() for name, tensor in tensors.items()}, max_error=0.0)
    assert found.equal and found.broken == [] and all(one.max_error == 0 and one.cosine == 1 for one in found.tensors)


def test_a_single_changed_entry_is_found_with_its_place() -> None:
    a = {"w": drawn(40, 12), "v": drawn(5)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    b["w"][33, 7] += 0.5
    found = compare(a, b, max_error=1e-3)
    assert not found.equal and found.worst is not None
    assert (found.worst.name, found.worst.at) == ("w", (33, 7)) and found.worst.max_error == pytest.approx(0.5, rel=1e-6)
    (broken,) = found.broken
    assert broken.startswith("w: error 0.5 is above max_error 0.001 at [33, 7]: ")
    assert [one.equal for one in found.tensors] == [False, True]
    assert compare(a, b, max_error=0.6).broken == []


def test_the_last_bit_is_seen() -> None:
    a = drawn(30, 4)
    b = a.clone()
    b[29, 3] = torch.nextafter(b[29, 3], torch.tensor(9.0))
    found = pair(a, b)
    assert not found.equal and found.at == (29, 3) and 0 < found.max_error < 1e-6


def test_errors_are_those_of_the_whole_tensors_in_float64() -> None:
    a, b = drawn(33, 11), drawn(33, 11) + 0.1 * drawn(33, 11, seed=1)
    found, x, y = pair(a, b), a.double().flatten(), b.double().flatten()
    assert found.max_error == pytest.approx(float((y - x).abs().max()), rel=1e-12)
    assert found.relative == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-12)
    assert found.cosine == pytest.approx(float(torch.dot(x, y) / x.norm() / y.norm()), rel=1e-12)


def test_another_dtype_is_not_equal_but_no_error_where_numbers_are() -> None:
    a = drawn(9, 9).bfloat16()
    found = pair(a, a.float())
    assert not found.equal and found.max_error == 0 and found.dtypes == ("bfloat16", "float32")


def test_nan_is_equal_to_nan_in_its_place_and_to_nothing_else() -> None:
    a = drawn(9, 9)
    a[2, 2] = math.nan
    assert pair(a, a.clone()).equal
    assert pair(a, a.double()).max_error == 0
    b = a.clone()
    b[5, 1] = math.nan
    found = pair(a, b)
    assert (found.max_error, found.new_bad, found.at) == (math.inf, 1, (5, 1))
    assert "w: an entry is finite in A and not in B, as at [5, 1]" in compare({"w": a}, {"w": b}).broken
    healed = pair(b, a)
    assert healed.max_error == math.inf and healed.new_bad == 0
    assert compare({"w": b}, {"w": a}, max_error=1.0).broken != []


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_is_equal_to_itself_only(sign: int) -> None:
    a, b = torch.tensor([1.0, math.inf]), torch.tensor([2.0, sign * math.inf])
    assert pair(a, b).max_error == (1.0 if sign == 1 else math.inf)


def test_zero_has_no_direction() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    assert pair(zero, zero.double()).cosine == 1 and pair(zero, zero.double()).relative == 0
    assert math.isnan(pair(zero, one).cosine) and pair(zero, one).relative == math.inf
    assert pair(one, zero).relative == 1


def test_names_and_shapes_that_differ_break_every_comparison() -> None:
    found = compare({"a": drawn(3), "b": drawn(4, 2), "c": drawn(2)}, {"b": drawn(2, 4), "c": drawn(2), "d": drawn(1)})
    assert (found.only_a, found.only_b, found.reshaped) == (["a"], ["d"], {"b": ((4, 2), (2, 4))})
    assert found.broken == ["only in A: a", "only in B: d", "b: shape [4, 2] in A, [2, 4] in B"]
    assert [one.name for one in found.tensors] == ["c"]


def test_a_tied_head_is_compared_with_one_that_is_stored() -> None:
    table = drawn(8, 4)
    config = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 8}
    tied = StateDict({"model.embed_tokens.weight": table}, config)
    both = StateDict({"model.embed_tokens.weight": table, "lm_head.weight": table + 1}, config | {"tie_word_embeddings": False})
    for a, b in ((tied, both), (both, tied)):
        found = verify(a, b, Bounds(max_error=0.5))
        assert found.only_a == found.only_b == []
        (broken,) = found.broken
        assert broken.startswith("lm_head.weight: error 1 is above")
    shared = StateDict({"model.embed_tokens.weight": table, "lm_head.weight": table}, config)
    assert shared.ties and verify(shared, tied).equal and len(verify(shared, shared).tensors) == 1
    lost = StateDict({"model.embed_tokens.weight": table}, config | {"tie_word_embeddings": False})
    assert verify(shared, lost).only_a == ["lm_head.weight"]


def test_a_bound_that_could_not_be_measured_is_broken() -> None:
    def cannot(a: object, b: object) -> Divergence:
        raise ValueError("no model can be built")

    one = StateDict({"w": drawn(3)})
    found = verify(one, one, Bounds(max_kl=0.1), outputs=cannot)
    assert found.broken == ["max_kl 0.1: the divergence could not be measured: no model can be built"]
    assert verify(one, one, outputs=cannot).broken == []
    assert "no task was given" in verify(one, one, Bounds(max_loss_increase=1.0)).broken[0]


def test_losses_are_bounded_by_their_rise() -> None:
    a, b = StateDict({"w": torch.tensor([1.0])}), StateDict({"w": torch.tensor([1.5])})
    found = verify(a, b, Bounds(max_loss_increase=0.4), score=lambda checkpoint: float(checkpoint["w"]))
    assert found.losses == (1.0, 1.5) and found.broken[0].startswith("loss: 1 with A, 1.5 with B: +0.5 is above")
    assert verify(a, b, Bounds(max_loss_increase=0.6), score=lambda c: float(c["w"])).broken == []
    assert verify(a, b, Bounds(max_loss_increase=0.6), score=lambda c: math.nan).broken != []


def test_divergence_of_outputs_is_that_of_their_distributions() -> None:
    a, b = drawn(2, 5, 9), drawn(2, 5, 9, seed=1)
    found = between(a, b, logits=True, inputs="x")
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5) and found.worst_kl == pytest.approx(float(kl.max()), rel=1e-5)
    assert float(kl[found.at]) == pytest.approx(float(kl.max()))
    assert found.agreement == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    assert found.max_difference == pytest.approx(float((a - b).abs().max()))
    shifted = between(a, a + 3.0, logits=True, inputs="x")
    assert shifted.kl == pytest.approx(0, abs=1e-9) and shifted.max_difference == pytest.approx(3.0)
    assert between(a, a * math.nan, logits=True, inputs="x").kl == math.inf
    assert between(a, b, logits=False, inputs="x").kl is None


def test_json_has_no_nan_and_no_infinity() -> None:
    found = compare({"w": torch.zeros(3)}, {"w": torch.tensor([1.0, math.nan, 0.0])}, max_error=1.0)
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert json.loads(text)["tensors"][0]["max_error"] is None and json.loads(text)["broken"] == found.broken
