"""Rows of embeddings and heads, put in the order of another vocabulary.

Every model gets a row for every token of the result. Its own, where it has the token; else, as with mergekit: that of the only
model which has it; the base's; the mean over all models which have it; zeros where none has. A recipe may say otherwise of
single tokens. Rows beyond the last token are the mean of all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from poise.checkpoint import CheckpointError, count_rows

from .parents import Parent
from .recipe import Reference, Token
from .tokenizers import Target, Vocabulary

NONE = -1
GAP = 64  # rows that are read along rather than reading twice
AT_ONCE = 4096


@dataclass
class RowMap:
    """Where the rows of one model's embedding come from.

    Attributes:
        own: row of the model's own embedding for every row of the result; -1: not its own.
        lent: row of the result -> (model, row) whose mean it is; of none: zeros.
        tokens: rows from here on belong to no token.
        padding: what these are, by name of the tensor, once it is known.
    """

    own: Tensor
    lent: Mapping[int, tuple[tuple[int, int], ...]]
    tokens: int
    padding: dict[str, Tensor] = field(default_factory=dict)

    @property
    def identity(self) -> bool:
        return not self.lent and bool(torch.equal(self.own, torch.arange(len(self.own))))


def row_maps(
    target: Target, known: Sequence[Vocabulary | None], parents: Sequence[Parent], base: int | None, tokens: Mapping[str, Token]
) -> list[RowMap]:
    """The maps of all models.

    Raises:
        CheckpointError: for a model without a tokenizer whose vocabulary is not as large as the base's.
        ValueError: for a token that the model named for it does not have.
    """
    fallback = known[target.owner if base is None else base] or target.vocabulary
    ids: list[Mapping[str, int]] = []
    for parent, vocabulary in zip(parents, known, strict=True):
        if vocabulary is None and parent.vocabulary != max(fallback.ids.values()) + 1:
            problem = (
                f"has no tokenizer, and {parent.vocabulary} rows where the base has {max(fallback.ids.values()) + 1} tokens"
            )
            raise CheckpointError(problem, cure="put the model's tokenizer.json into its folder", file=str(parent))
        ids.append((vocabulary or fallback).ids)
    numbers = {parent.reference: i for i, parent in enumerate(parents)}
    said = {text: lender(text, token, numbers, ids, parents) for text, token in tokens.items()}
    owns = torch.full((len(parents), target.rows), NONE, dtype=torch.int64)
    lent: dict[int, tuple[tuple[int, int], ...]] = {}
    for text, row in target.ids.items():
        having = [(i, found[text]) for i, found in enumerate(ids) if text in found]
        for i, number in having:
            if not (text in tokens and tokens[text].force):
                owns[i, row] = number
        if text in said:
            lent[row] = said[text]
        elif len(having) < len(parents):
            bases = [(i, number) for i, number in having if i == base]
            lent[row] = tuple(bases or having)
    last = max(target.ids.values(), default=-1) + 1
    return [RowMap(own, {row: lenders for row, lenders in lent.items() if own[row] == NONE}, last) for own in owns.unbind()]


def lender(
    text: str, token: Token, numbers: Mapping[Reference, int], ids: Sequence[Mapping[str, int]], parents: Sequence[Parent]
) -> tuple[tuple[int, int], ...]:
    """Where a recipe says that a token's row comes from."""
    if token.model is None:
        return ()
    model = numbers[token.model]
    wanted = text if token.token is None else token.token
    row = ids[model].get(wanted) if isinstance(wanted, str) else wanted
    if row is None:
        raise ValueError(f"tokenizer.tokens.{text}: {token.model} has no token {wanted!r}")
    if not 0 <= row < (parents[model].vocabulary or 0):
        raise ValueError(
            f"tokenizer.tokens.{text}: {token.model} has rows 0 to {(parents[model].vocabulary or 0) - 1}, not {row}"
        )
    return ((model, row),)


def mapped_rows(parents: Sequence[Parent], model: int, name: str, rows: RowMap, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a model's tensor in the order of the result's vocabulary."""
    parent = parents[model]
    own = rows.own[start:stop]
    out = parent.rows(name, 0, 0).new_zeros((stop - start, *parent.shape(name)[1:]))
    mine = own != NONE
    if bool(mine.any()):
        out[mine] = gather(parent, name, own[mine]).to(out.dtype)
    wanted = [row for row in range(start, stop) if row in rows.lent]
    lenders = {lender for row in wanted for lender in rows.lent[row]}
    for other in sorted({other for other, _ in lenders}):
        numbers = sorted(number for who, number in lenders if who == other)
        place = {number: i for i, number in enumerate(numbers)}
        read = gather(parents[other], name, torch.tensor(numbers)).to(out.dtype)
        for row in wanted:
            for who, number in rows.lent[row]:
                if who == other:
                    out[row - start] += read[place[number]] / len(rows.lent[row])
    if stop > rows.tokens:
        if name not in rows.padding:
            rows.padding[name] = mean(parents, model, name, rows)
        out[max(rows.tokens - start, 0) :] = rows.padding[name].to(out.dtype)
    return out


def mean(parents: Sequence[Parent], model: int, name: str, rows: RowMap) -> Tensor:
    """Of the rows of all tokens."""
    total = 0
    for start in range(0, rows.tokens, AT_ONCE):
        stop = min(start + AT_ONCE, rows.tokens)
        total = total + mapped_rows(parents, model, name, rows, start, stop).double().sum(0)
    assert isinstance(total, Tensor)
    return total / rows.tokens


def gather(parent: Parent, name: str, numbers: Tensor) -> Tensor:
    """Rows by their numbers, read in runs."""
    if name not in parent.names:
        raise CheckpointError(
            "is missing", cure="leave the model out, or give it a head of its own", file=str(parent), tensor=name
        )
    wanted, back = numbers.unique(return_inverse=True)
    if int(wanted[-1]) >= count_rows(parent.shape(name)):
        problem = f"has {count_rows(parent.shape(name))} rows, and the tokenizer a token of number {int(wanted[-1])}"
        raise CheckpointError(problem, cure="the tokenizer is another model's", file=parent.file(name), tensor=name)
    cuts = (wanted.diff() > GAP).nonzero().flatten().add(1).tolist()
    runs = []
    for begin, end in zip([0, *cuts], [*cuts, len(wanted)], strict=True):
        first, last = int(wanted[begin]), int(wanted[end - 1])
        runs.append(parent.rows(name, first, last + 1)[wanted[begin:end] - first])
    return torch.cat(runs)[back]
