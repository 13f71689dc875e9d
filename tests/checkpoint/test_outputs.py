"""Outputs of two models that transformers builds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from poise.checkpoint import StateDict, open_checkpoint
from poise.checkpoint.outputs import diverge
from poise.models import GPT, GPTConfig

from .layouts import build, save

pytestmark = pytest.mark.hf


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A byte-level model, and the same with one layer's output twice as large."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(hidden_size=32, intermediate_size=48, max_position_embeddings=24))
    model.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(2)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    model.save_pretrained(tmp_path / "b")
    return tmp_path / "a", tmp_path / "b"


def test_a_model_diverges_from_itself_by_nothing(two: tuple[Path, Path]) -> None:
    a = open_checkpoint(two[0])
    found = diverge(a, a)
    assert (found.max_difference, found.kl, found.agreement) == (0, 0, 1)
    assert found.inputs == "4 sequences of 24 random tokens, seed 0"


def test_logits_are_those_of_the_models_on_the_same_tokens(two: tuple[Path, Path]) -> None:
    found = diverge(*(open_checkpoint(path) for path in two), seed=5)
    tokens = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(5))
    logits = []
    for path in two:
        model = GPT(GPTConfig(hidden_size=32, intermediate_size=48, max_position_embeddings=24))
        model.load_state_dict(load_file(path / "model.safetensors"))
        logits.append(model(tokens).detach())
    p, q = (x.log_softmax(-1) for x in logits)
    assert found.max_difference == pytest.approx(float((logits[1] - logits[0]).abs().max()), rel=1e-3)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-2)
    assert found.agreement is not None and 0 < found.agreement < 1


def test_a_text_is_read_by_the_models_own_tokenizer(two: tuple[Path, Path], tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("def f(x):\n    return x\n" * 3)
    a, b = (open_checkpoint(path) for path in two)
    found = diverge(a, b, text=text)
    assert found.inputs == "2 sequences of the start of some.txt" and found.kl is not None and found.kl > 0
    text.write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        diverge(a, b, text=text)
    (two[0] / "tokenizer.json").unlink()
    (two[0] / "tokenizer_config.json").unlink()
    text.write_text("def")
    with pytest.raises(ValueError, match="no tokenizer to read"):
        diverge(a, b, text=text)


def test_a_model_of_images_is_given_noise_and_one_without_logits_its_hidden_state(tmp_path: Path) -> None:
    vit = open_checkpoint(save("vit", tmp_path / "vit"))
    found = diverge(vit, vit)
    assert found.max_difference == 0 and found.inputs.startswith("4 images of noise")
    build("bert").bert.save_pretrained(tmp_path / "bert")
    bert = open_checkpoint(tmp_path / "bert")
    found = diverge(bert, bert)
    assert found.kl is None and found.agreement is None and found.max_difference == 0


def test_encoder_and_decoder_are_given_the_same(tmp_path: Path) -> None:
    one = open_checkpoint(save("t5", tmp_path))
    assert diverge(one, one).kl == 0


def test_what_cannot_be_run_says_why(two: tuple[Path, Path], tmp_path: Path) -> None:
    a = open_checkpoint(two[0])
    with pytest.raises(ValueError, match=r"weights in memory: no directory with a config\.json"):
        diverge(a, StateDict({"w": torch.zeros(2)}))
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"w\.safetensors: no directory with a config\.json"):
        diverge(a, open_checkpoint(tmp_path / "w.safetensors"))
    config = json.loads((two[1] / "config.json").read_text())
    bare = {key: value for key, value in config.items() if key != "vocab_size"}
    (two[1] / "config.json").write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="neither vocab_size nor image_size"):
        diverge(open_checkpoint(two[1]), a)
    (two[1] / "config.json").write_text(json.dumps(config | {"hidden_act": "nonsense"}))
    with pytest.raises(ValueError, match="transformers cannot run it"):
        diverge(a, open_checkpoint(two[1]))
