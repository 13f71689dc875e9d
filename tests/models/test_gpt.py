"""The small Llama."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from poise.models import GPT, GPTConfig

SMALL: dict[str, Any] = dict(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_attention_heads=3, max_position_embeddings=16
)
# Standard deviations of a trained model's size: at 0.02 attention is nearly uniform and would hide a wrong rotation.
SMALL |= dict(initializer_range=0.3)


@pytest.mark.hf
@pytest.mark.parametrize(
    "other",
    [
        {},
        {"hidden_act": "gelu"},
        {"tie_word_embeddings": True},
        {"rope_theta": 100.0, "rms_norm_eps": 0.1, "num_hidden_layers": 3},
    ],
    ids=str,
)
def test_it_is_transformers_llama_in_names_and_numbers(other: dict) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = GPTConfig(**(SMALL | other))
    torch.manual_seed(0)
    ours, theirs = GPT(config), LlamaForCausalLM(LlamaConfig(**asdict(config)))
    for name, parameter in ours.named_parameters():  # norms too, which start at one and would hide a missing product
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    tokens = torch.randint(50, (2, 16))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)


def test_a_token_changes_nothing_before_it() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    tokens = torch.randint(50, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 6:], before[:, 6:])


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL))
    tokens = torch.randint(50, (1, 10))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :4]), model(tokens)[:, :4])


def test_a_tied_head_is_the_embedding() -> None:
    model = GPT(GPTConfig(**SMALL, tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_attention_says_how_many_heads_it_has() -> None:
    model = GPT(GPTConfig(**SMALL))
    assert {module.num_heads for module in model.modules() if hasattr(module, "num_heads")} == {3}


@pytest.mark.parametrize("seed, equal", [(1, True), (2, False)])
def test_the_global_seed_decides_the_weights(seed: int, equal: bool) -> None:
    torch.manual_seed(1)
    first = GPT(GPTConfig(**SMALL)).lm_head.weight
    torch.manual_seed(seed)
    assert torch.equal(GPT(GPTConfig(**SMALL)).lm_head.weight, first) == equal


@pytest.mark.parametrize("other", [{"hidden_size": 25}, {"hidden_size": 27}, {"hidden_act": "relu"}])
def test_a_model_that_cannot_be_is_refused(other: dict) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(other))}="):
        GPTConfig(**(SMALL | other))


def test_a_sequence_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"length 17.*max_position_embeddings=16"):
        GPT(GPTConfig(**SMALL))(torch.zeros(1, 17, dtype=torch.int64))
