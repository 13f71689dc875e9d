"""Which layers are meant by targets, and which cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt.cases import Conv1D, Mixed, gpt
from torch import nn

from poise.adapt import attach, attached
from poise.adapt.targets import places

HIDDEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def named(model: nn.Module, targets: Any) -> list[str]:
    return [place.path for place in places(model, targets)]


def test_by_default_all_hidden_linear_layers_and_neither_words_nor_head() -> None:
    found = named(gpt(), None)
    assert len(found) == 14
    assert {path.rpartition(".")[2] for path in found} == set(HIDDEN)
    assert found == named(gpt(), "linear") == named(gpt(), "all")


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("linear", ["blocks.0.0", "blocks.0.2", "twice"]),
        ("conv", ["mix"]),
        ("all", ["blocks.0.0", "blocks.0.2", "mix", "twice"]),
        ("embedding", ["words"]),
        ("head", ["out"]),
        (["head", "embedding"], ["words", "out"]),
        ("out", ["out"]),
        ("0.2", ["blocks.0.2"]),
        ("blocks.0.2", ["blocks.0.2"]),
        ("blocks.*", ["blocks.0.0", "blocks.0.2"]),
        ("*.[02]", ["blocks.0.0", "blocks.0.2"]),
        (r"re:.*\.2|mix", ["blocks.0.2", "mix"]),
        (nn.Linear, ["blocks.0.2", "twice", "out"]),
        ([Conv1D, nn.Conv1d], ["blocks.0.0", "mix"]),
        (lambda path, layer: getattr(layer, "out_features", 0) == 5, ["out"]),
        (("twice", "blocks.0.*", "twice"), ["blocks.0.0", "blocks.0.2", "twice"]),
    ],
)
def test_roles_names_patterns_classes_and_functions(targets: Any, wanted: list[str]) -> None:
    assert named(Mixed(), targets) == wanted


@pytest.mark.parametrize("path", ["wice", "blocks", "linear2", "ut", "re:mi", "TWICE", "blocks.0"])
def test_what_means_nothing_is_named_beside_what_there_is(path: str) -> None:
    with pytest.raises(ValueError, match=r"words \(Embedding\), .*mix \(Conv1d\)|is no linear layer|no floating-point weight"):
        named(Mixed(), path)


def test_every_target_must_mean_something() -> None:
    with pytest.raises(ValueError, match="'nowhere' means no layer"):
        named(Mixed(), ["twice", "nowhere"])


@pytest.mark.parametrize("target", [3, [None], [["twice"]]])
def test_other_types_are_refused(target: Any) -> None:
    with pytest.raises(TypeError):
        named(Mixed(), target)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), r"'0' \(Conv2d\) has 2 groups"),
        (nn.ConvTranspose1d(4, 4, 3), r"'0' \(ConvTranspose1d\) is a transposed convolution"),
        (nn.Embedding(4, 4, max_norm=1.0), r"'0' \(Embedding\) shortens its rows \(max_norm\)"),
        (nn.Bilinear(4, 4, 4), r"'0' \(Bilinear\) is no linear layer, convolution or embedding"),
        (nn.LayerNorm(4), r"'0' \(LayerNorm\) is no linear layer"),
        (nn.EmbeddingBag(4, 4), r"'0' \(EmbeddingBag\) is no linear layer"),
        (nn.ReLU(), r"'0' \(ReLU\) has no floating-point weight"),
        (torch.ao.nn.quantized.Linear(4, 4), r"'0' \(Linear\) has no floating-point weight"),
    ],
)
def test_layers_that_nothing_can_stand_beside_are_refused_with_the_reason(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(layer, nn.Linear(4, 4))
    kind = type(model[0])
    with pytest.raises(ValueError, match=message + ".*leave it out"):
        attach(model, "lora", "0")
    assert attached(model) is None
    assert type(model[0]) is kind


def test_attention_of_torch_reads_its_weights_and_is_refused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=r"'self_attn\.out_proj' .*belongs to nn\.MultiheadAttention.*leave it out"):
        attach(model, "lora")
    attach(model, "lora", "re:linear[12]")
    model(torch.randn(2, 3, 8))


def test_a_weight_tied_to_one_left_out_is_refused_by_name() -> None:
    model = gpt(tied=True)
    for targets in ("lm_head", "embedding", nn.Linear):
        with pytest.raises(
            ValueError, match=r"tied to '(model\.embed_tokens|lm_head)\.weight', which is not among the targets"
        ):
            attach(model, "lora", targets)
    with pytest.raises(ValueError, match="which reads it the other way round"):
        attach(model, "lora", ["embedding", "head"])
    assert len(attach(model, "lora").layers) == 14


def test_tied_layers_that_are_both_meant_are_one_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    found = places(model, nn.Linear)
    assert [(place.path, place.tied) for place in found] == [("0", ("2",)), ("1", ())]


def test_a_module_that_stands_twice_is_one_place() -> None:
    one = nn.Linear(4, 4)
    assert named(nn.Sequential(one, nn.ReLU(), one), nn.Linear) == ["0"]


def test_layouts_say_outputs_and_inputs_however_the_weight_is_stored() -> None:
    found = {place.path: (place.layout.kind, place.layout.outputs, place.layout.inputs) for place in places(Mixed(), [
        "all", "embedding", "head"])}  # fmt: skip
    assert found == {
        "words": ("embedding", 16, 20),
        "blocks.0.0": ("linear", 24, 16),
        "blocks.0.2": ("linear", 16, 24),
        "mix": ("conv", 16, 48),
        "twice": ("linear", 16, 16),
        "out": ("linear", 5, 16),
    }
