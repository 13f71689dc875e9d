"""A folder that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from poise.models import GPT, GPTConfig

SMALL: dict[str, Any] = dict(hidden_size=24, intermediate_size=40, num_attention_heads=3, max_position_embeddings=32)
SMALL |= dict(initializer_range=0.3)


def made(**other: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**(SMALL | other)))


@pytest.mark.hf
@pytest.mark.parametrize("other", [{}, {"tie_word_embeddings": True}, {"hidden_act": "gelu", "rope_theta": 500.0}], ids=str)
def test_transformers_loads_it_with_the_same_logits(tmp_path: Path, other: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    model = made(**other)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(256, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=0, atol=1e-5)


@pytest.mark.hf
def test_it_generates_text_from_text(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made().save_pretrained(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = tokenizer("def f(x):\n", return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert out.shape == (1, 10 + 8)
    assert tokenizer.decode(out[0]).startswith("def f(x):\n")


@pytest.mark.hf
def test_a_token_is_a_byte(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("plain\ttext\n  \r\n", "naïve façade — 漢字 🙂", "\x00\x01\x7f"):
        ids = tokenizer(text)["input_ids"]
        assert bytes(ids) == text.encode()
        assert tokenizer.decode(ids) == text


def test_tied_weights_stand_in_the_file_once(tmp_path: Path) -> None:
    made(tie_word_embeddings=True).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys() and "model.embed_tokens.weight" in file.keys()  # noqa: SIM118
        assert file.metadata() == {"format": "pt"}


def test_the_weights_dtype_is_kept_and_named(tmp_path: Path) -> None:
    made().bfloat16().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.get_tensor("lm_head.weight").dtype == torch.bfloat16


def test_only_a_vocabulary_of_bytes_gets_a_tokenizer(tmp_path: Path) -> None:
    made(vocab_size=50).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
