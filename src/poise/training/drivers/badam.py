"""BAdam: one block of layers after another is trained, and only that one has optimizer state."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from poise.catalog import Paper, choice, method
from poise.optim import Optimizer

from .. import keeping
from ..driver import Driver

Order = Literal["random", "ascending", "descending", "fixed"]
Rest = Literal["frozen", "block"]
WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")  # up to the first number in a name: model.layers.3, transformer.h.3, 3


@method(
    "badam",
    family="training",
    kind="driver",
    paper=Paper("A Memory Efficient Full Parameter Optimization Method for LLMs", arxiv="2404.02827", year=2024),
    tune={"switch_every": choice(10, 25, 50, 100), "order": choice("random", "ascending", "descending")},
    mutant=('self.own["step"] % self.switch_every', '(self.own["step"] + 1) % self.switch_every'),
)
class BAdam(Driver):
    """Block coordinate descent: the inner optimizer on one block of parameters for K steps, then on the next.

        for each block, in the order of its round:
            the inner optimizer's state begins anew;  only the block's parameters require a gradient
            K steps of the inner optimizer

    Gradients of the other blocks are not computed, though the backward pass runs down to the block. The state of a poise
    optimizer is that of one block: with D equal blocks, AdamW keeps 8 bytes for each parameter of a block and none for others.

        opt = BAdam(AdamW(model, lr=1e-5), model)

    Weights in bfloat16 are written as the inner optimizer of poise writes them: by stochastic rounding, which loses nothing on
    average when a block is left and taken up again, or with weights="split" as exact float32 weights, whose lower 16 bits stay
    with all blocks. An optimizer of torch computes in the weights' own dtype. Clip gradients if you like: of the inactive
    parameters there are none, so their norm is that of the block.

    Args:
        opt: the inner optimizer; AdamW in the paper. Schedules run on the steps of all blocks together.
        model: its parameters' names say to which block they belong. `requires_grad` of those that require a gradient when they
            come to the driver is its business from then on.
        blocks: globs for whole names, one for each block, as in ["model.layers.0.*", "model.layers.1.*"]; a parameter is in the
            first that matches. None: the name up to its first number, which is the layer of a transformer or of a Sequential.
        active: globs of parameters that are in every block, such as a new head's.
        rest: what becomes of parameters in none: "frozen", as in the authors' code, or one more "block", the last.
        switch_every: K, 50. The authors advise samples / (batch size * D), but no less than 50 and no more than 100.
        order: of a round: "random", a fresh permutation, which the paper recommends; "ascending"; "descending"; "fixed" stays
            with the first.
        seed: of permutations.

    Raises:
        ValueError: an unknown setting, a parameter that is not the model's, a glob that matches none, or no block at all.

    State: two counts and the block's name. Source: "A Memory Efficient Full Parameter Optimization Method for LLMs"
    (arXiv 2404.02827) and its code, which gives the first block one step less, and goes by parts of names, so that layer 1 may
    contain layer 10: here each block has its K steps, and globs match whole names.
    """

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        model: nn.Module,
        blocks: Sequence[str] | None = None,
        active: Sequence[str] = (),
        *,
        rest: Rest = "frozen",
        switch_every: int = 50,
        order: Order = "random",
        seed: int = 0,
    ) -> None:
        if switch_every < 1:
            raise ValueError(f"switch_every={switch_every}: must be at least 1")
        if order not in get_args(Order):
            raise ValueError(f"order={order!r}: must be one of {', '.join(get_args(Order))}")
        if rest not in get_args(Rest):
            raise ValueError(f"rest={rest!r}: must be 'frozen' or 'block'")
        self.switch_every, self.order, self.seed = switch_every, order, seed
        self.names: dict[Tensor, str] = {p: WRAPPER.sub("", name) for name, p in model.named_parameters()}
        for glob in (*(blocks or ()), *active):
            if not any(fnmatchcase(name, glob) for name in self.names.values()):
                raise ValueError(f"blocks, active: no parameter of the model is called {glob!r}")
        self.always = [p for p, name in self.names.items() if any(fnmatchcase(name, glob) for glob in active)]
        self.blocks = self._cut(blocks, rest)
        self.trained: list[Tensor] = []  # those whose requires_grad is the driver's business
        super().__init__(opt, own={"step": 0, "visit": 0, "block": ""})

    def adopt(self, params: Sequence[Tensor]) -> None:
        for p in params:
            if p not in self.names:
                raise ValueError(f"opt: holds a parameter of shape {tuple(p.shape)} that is not the model's")
        self.trained += [p for p in params if p.requires_grad]
        if not self.rounds():
            raise ValueError(f"blocks: none of {', '.join(self.blocks) or 'them'} holds a parameter that opt trains")
        self.own["block"] = self.own["block"] or self.block(0)
        self._enter(self.own["block"])

    def drive(self, closure: Callable[[], Any] | None) -> Any:
        loss = self.inner_step(closure)
        self.own["step"] += 1
        if self.own["step"] % self.switch_every == 0:
            self.own["visit"] += 1
            self.own["block"] = self.block(self.own["visit"])
            self._enter(self.own["block"])
            keeping.begin_anew(self.base)
        return loss

    def rounds(self) -> list[str]:
        """Names of the blocks that hold trained parameters, in ascending order."""
        held = set(self.trained)
        return [name for name, params in self.blocks.items() if held.intersection(params)]

    def block(self, visit: int) -> str:
        """The block that is trained after so many switches."""
        names = self.rounds()
        turn, place = divmod(visit, len(names))
        if self.order == "fixed":
            return names[0]
        if self.order == "descending":
            names.reverse()
        if self.order == "random":
            random.Random(f"{self.seed}:{turn}").shuffle(names)
        return names[place]

    def before_loading(self, own: Mapping[str, Any]) -> None:
        if own["block"] not in self.rounds():
            raise ValueError(f"BAdam: 'block' is {own['block']!r} in the state_dict; here are {', '.join(self.rounds())}")
        self._enter(own["block"])

    @torch.no_grad()
    def restore(self, snapshot: Mapping[str, Any]) -> None:
        super().restore(snapshot)
        if snapshot["own"] is not None:
            self._enter(self.own["block"])

    def _cut(self, blocks: Sequence[str] | None, rest: Rest) -> dict[str, list[Tensor]]:
        """Blocks by name, in the order of `blocks`, or of the model's parameters."""
        found: dict[str, list[Tensor]] = {glob: [] for glob in blocks or ()}
        over: list[Tensor] = []
        for p, name in self.names.items():
            layer = LAYER.match(name) if blocks is None else None
            label = layer.group() if layer else next((glob for glob in blocks or () if fnmatchcase(name, glob)), None)
            (over if label is None else found.setdefault(label, [])).append(p)
        return found | ({"rest": over} if rest == "block" else {})

    def _enter(self, block: str) -> None:
        """Let the block, and nothing else, require gradients and have state."""
        held = {*self.blocks[block], *self.always}.intersection(self.trained)
        for p in self.trained:
            p.requires_grad_(p in held)
            if p not in held:
                p.grad = None
        if isinstance(self.base, Optimizer):
            self.base.keep_only(held)
        else:
            for p in set(self.trained) - held:
                self.base.state.pop(p, None)
