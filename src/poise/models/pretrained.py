"""Writing a model as transformers reads it: `AutoModelForCausalLM.from_pretrained(folder)`, and a tokenizer that reads bytes.

config.json  model.safetensors  tokenizer.json  tokenizer_config.json
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

if TYPE_CHECKING:
    from poise.models.gpt import GPT

BYTES = 256


def save(model: GPT, folder: Path) -> None:
    """Write `model` into `folder` as a Llama: weights in their own dtype, tied ones once.

    With a vocabulary of 256 the tokenizer is written too: token i is byte i.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    # Bytes have no token that begins or ends a text; Llama's defaults would take 1 and 2 for them.
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": None, "eos_token_id": None}
    write(folder / "config.json", {**asdict(model.config), **llama, "dtype": dtype})
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    if model.config.vocab_size == BYTES:
        write(folder / "tokenizer.json", tokenizer())
        write(
            folder / "tokenizer_config.json",
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": model.config.max_position_embeddings,
                "clean_up_tokenization_spaces": False,
            },
        )


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer() -> dict[str, Any]:
    """In the format of the tokenizers library: byte pairs without a pair, over the letters that stand for bytes."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(letters())}, "merges": []},
    }


def letters() -> list[str]:
    """The letter that stands for each byte in GPT-2's byte-level vocabulary, which the ByteLevel tokenizer shares.

    A byte that Latin-1 prints is itself; the others are the letters from 256 on, in order.
    """
    printed = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in printed else next(others)) for byte in range(BYTES)]
