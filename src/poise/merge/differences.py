"""Where models do not agree: the errors, each cause told once, with what it probably is."""

from __future__ import annotations

from collections import Counter

import torch

from poise.checkpoint import CheckpointError

from .parents import WIDTHS, Parent

TOLD = 9  # missing tensors of one pair of models


class Differences:
    """Puts errors into `errors`."""

    def __init__(self, errors: list[ValueError]) -> None:
        self.errors = errors
        self.told: Counter[str] = Counter()
        self.known: set[tuple[str, str]] = set()

    def missing(self, lacking: Parent, having: Parent, name: str) -> None:
        """A tensor that one model has and another has not."""
        if (str(lacking), name) in self.known:
            return
        self.known.add((str(lacking), name))
        pair = f"{lacking} {having}"
        self.told[pair] += 1
        if self.told[pair] > TOLD:
            return
        counts = [max((stack.count for stack in parent.stacks.values()), default=0) for parent in (lacking, having)]
        if having.by_token(name) and lacking.config.get("tie_word_embeddings") is False:
            cure = f"its config.json says tie_word_embeddings: false, yet {name} is not stored; correct the one or the other"
        elif counts[0] != counts[1]:
            cure = f"it has {counts[0]} layers, {having} has {counts[1]}; slices with layer_range merge layers of your choice"
        else:
            cure = "these are different architectures, or one was saved incompletely"
        self.errors.append(CheckpointError(f"is missing, and {having} has it", cure=cure, file=str(lacking), tensor=name))

    def shape(
        self, first: Parent, second: Parent, name: str, want: torch.Size, found: torch.Size, own: str, grown: bool
    ) -> None:
        """A tensor of another shape.

        Args:
            name, own: of the tensor in the result and in `second`.
            grown: whether only the number of tokens differs.
        """
        widths = [(key, first.config.get(key), second.config.get(key)) for key in WIDTHS]
        causes = [f"{key} is {one} and {other}" for key, one, other in widths if one != other and None not in (one, other)]
        kind = f"{first} {second} {'vocabulary' if grown else causes}"
        self.told[kind] += 1
        if self.told[kind] > 1:
            return
        if grown:
            cure = (
                f"the vocabularies differ by {abs(found[0] - want[0])} tokens: tokenizer_source: union (or base) puts rows in"
                " the order of their tokens, --common-rows merges those that both have"
            )
        else:
            said = f": {', '.join(causes)}" if causes else ""
            cure = f"these are models of different sizes{said}; only models of one architecture can be merged"
        problem = f"is {list(found)}, but {list(want)} in {first}"
        self.errors.append(CheckpointError(problem, cure=cure, file=second.file(own), tensor=name))
