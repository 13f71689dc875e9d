"""How far the outputs of two models are apart: both are built by transformers and given the same inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .errors import CheckpointError

SEQUENCES, LENGTH = 4, 64


@dataclass(frozen=True)
class Divergence:
    """Of B's outputs from A's, over the same inputs.

    Attributes:
        inputs: what they were.
        max_difference: largest |b - a| of any logit; of a model without logits, of its last hidden state.
        relative: `||b - a|| / ||a||`.
        kl: mean over positions of `sum_i p_a(i) log(p_a(i) / p_b(i))`, in nats; None without logits.
        worst_kl: its largest value, at the position `at` of (sequence, token).
        agreement: share of positions where the largest logit is the same; None without logits.
    """

    inputs: str
    max_difference: float
    relative: float
    kl: float | None
    worst_kl: float | None
    agreement: float | None
    at: tuple[int, ...] = ()


def diverge(a: Checkpoint, b: Checkpoint, *, text: Path | None = None, seed: int = 0, device: str = "cpu") -> Divergence:
    """Run both, one after the other, in float32 and in evaluation.

    Language models get `SEQUENCES` sequences of up to `LENGTH` tokens, drawn uniformly from the vocabulary, or read by A's
    tokenizer from the start of a text; models of images get noise.

    Raises:
        ValueError: if one of them is no directory that transformers can build a model from, if transformers is not installed,
            or if their vocabularies differ.
    """
    for checkpoint in (a, b):
        directory(checkpoint)
    inputs, called = inputs_of(a, text, seed)
    left, right = (run(checkpoint, inputs, device) for checkpoint in (a, b))
    if left[0].shape != right[0].shape:
        raise ValueError(f"outputs have the shapes {tuple(left[0].shape)} and {tuple(right[0].shape)}")
    return between(left[0], right[0], logits=left[1] and right[1], inputs=called)


def between(a: Tensor, b: Tensor, *, logits: bool, inputs: str) -> Divergence:
    """Of outputs (..., channels), the last dimension being the distribution."""
    gap = (b.double() - a.double()).abs()
    gap[gap.isnan()] = math.inf
    length = float(torch.linalg.vector_norm(a.double()))
    relative = float(torch.linalg.vector_norm(gap)) / length if length else (0.0 if not gap.any() else math.inf)
    if not logits:
        return Divergence(inputs, float(gap.max()), relative, None, None, None)
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    kl = torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0.0)
    kl = torch.where(kl.isnan(), math.inf, kl)
    flat = int(kl.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), kl.shape))
    agreement = float((a.argmax(-1) == b.argmax(-1)).double().mean())
    return Divergence(inputs, float(gap.max()), relative, float(kl.mean()), float(kl.max()), agreement, at)


def run(checkpoint: Checkpoint, inputs: dict[str, Tensor], device: str) -> tuple[Tensor, bool]:
    """The outputs of a checkpoint's model, and whether they are logits."""
    transformers = hugging_face()
    path = directory(checkpoint)
    names = [name for name in checkpoint.config.get("architectures") or () if hasattr(transformers, name)]
    kind = getattr(transformers, names[0]) if names else transformers.AutoModel
    try:
        with silenced(transformers), torch.no_grad():
            model = kind.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval().to(device)
            given = {name: tensor.to(device) for name, tensor in inputs.items()}
            if getattr(model.config, "is_encoder_decoder", False):
                given["decoder_input_ids"] = given["input_ids"]
            out: Any = model(**given)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"transformers cannot run it: {str(error).strip().splitlines()[0]}", cure="see what config.json asks for", file=path
        ) from error
    logits = next((out[key] for key in ("logits", "prediction_logits") if key in out), None)
    result = out["last_hidden_state"] if logits is None else logits
    return result.detach().float().cpu(), logits is not None


@contextmanager
def silenced(transformers: Any) -> Iterator[None]:
    """Without its warnings and its progress bars."""
    logging = transformers.utils.logging
    said, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(said)
        if shown:
            logging.enable_progress_bar()


def inputs_of(checkpoint: Checkpoint, text: Path | None, seed: int) -> tuple[dict[str, Tensor], str]:
    """What a model is given, and what that is called."""
    config = checkpoint.config
    generator = torch.Generator().manual_seed(seed)
    vocabulary = config.get("vocab_size")
    if isinstance(config.get("image_size"), int) and vocabulary is None:
        size = config["image_size"]
        image = torch.randn(SEQUENCES, config.get("num_channels", 3), size, size, generator=generator)
        return {"pixel_values": image}, f"{SEQUENCES} images of noise, seed {seed}"
    if not isinstance(vocabulary, int):
        where = "" if checkpoint.path is None else f"{checkpoint.path}: "
        raise ValueError(f"{where}config.json names neither vocab_size nor image_size: no input can be made")
    longest = next((v for k in ("max_position_embeddings", "n_positions") if isinstance(v := config.get(k), int)), LENGTH)
    length = min(LENGTH, longest)
    if text is None:
        drawn = torch.randint(0, vocabulary, (SEQUENCES, length), generator=generator)
        return {"input_ids": drawn}, f"{SEQUENCES} sequences of {length} random tokens, seed {seed}"
    tokens = read(checkpoint, text, SEQUENCES * length)
    rows = max(1, len(tokens) // length)
    return {"input_ids": tokens[: rows * length].view(rows, -1)}, f"{rows} sequences of the start of {text.name}"


def read(checkpoint: Checkpoint, text: Path, most: int) -> Tensor:
    """The first tokens of a text."""
    words = text.read_text(encoding="utf-8", errors="replace")[: 64 * most]
    path = directory(checkpoint)
    try:
        tokenizer = hugging_face().AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: no tokenizer to read {text} with") from error
    found = torch.tensor(tokenizer(words, add_special_tokens=False)["input_ids"][:most], dtype=torch.int64)
    if not len(found):
        raise ValueError(f"{text}: holds no text")
    return found


def directory(checkpoint: Checkpoint) -> Path:
    path = checkpoint.path
    if path is None or not path.is_dir() or not checkpoint.config:
        raise ValueError(f"{path or 'weights in memory'}: no directory with a config.json, so no model can be built")
    return path


def hugging_face() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ValueError('transformers is not installed; install it with: pip install "poise[hf]"') from error
    return transformers
