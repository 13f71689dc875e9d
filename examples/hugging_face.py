"""A Hugging Face model as a task: a small GPT-2 that learns to read the text of Python's own documentation topics.

    pip install "poise[hf]"
    poise compare examples/hugging_face.py --methods adamw,muon --trials 4 --steps 100 --seeds 3
    poise train examples/hugging_face.py --method muon --steps 500      # then AutoModelForCausalLM.from_pretrained(...)

To fine-tune a checkpoint of your own, let `model` return `AutoModelForCausalLM.from_pretrained(...)` and `batches` what its
tokenizer makes of your text: a batch may be any mapping that the model takes as keyword arguments.
"""

import pydoc_data.topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel

unit = "nats per byte"
LENGTH, BATCH = 64, 8


def tokens(split):
    """The topics' bytes: every tenth topic is for "tune", every tenth for "report"."""
    topics = sorted(pydoc_data.topics.topics)
    parts = {"train": range(2, 10), "tune": [0], "report": [1]}
    chosen = [pydoc_data.topics.topics[topic] for place, topic in enumerate(topics) if place % 10 in parts[split]]
    return torch.tensor(list("\n".join(chosen).encode()))


def model():
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


def batches(split):
    """Rows of `LENGTH` bytes, in a new order in every epoch of "train"."""
    stream = tokens(split)
    rows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[torch.randperm(len(rows))] if split == "train" else rows[:128]
    for some in rows.split(BATCH):
        if len(some) == BATCH:
            yield {"input_ids": some, "labels": some}


def loss(model, batch):
    return model(**batch).loss
