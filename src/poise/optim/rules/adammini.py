"""Adam-mini: Adam with one second moment for each block of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Unpack

from torch import Tensor

from poise.catalog import Paper, choice, log_uniform, method

from ..optimizer import Optimizer
from ..options import Options
from ..routing import Params
from ..transform import Context, Param, Slot, State
from ..transforms.adaptive import adam
from ..transforms.blocks import Partition, Spec, in_elements, matches, totals
from ..transforms.step import Decay


class blockwise_adam(adam):
    """Adam's direction with one second moment for each block.

    `m <- b1 m + (1 - b1) u`; for each block b, `v_b <- b2 v_b + (1 - b2) mean over i in b of u_i^2`; result, in block b,
    `(m / (1 - b1^t)) / (sqrt(v_b / (1 - b2^t)) + eps)`.

    Args:
        partition: the blocks; by default by what each parameter is.
        betas: `(b1, b2)`, each in [0, 1). eps: added to the root after bias correction.
    """

    unit = "block"

    def __init__(
        self, partition: Partition | None = None, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        super().__init__(betas, eps)
        self.partition = Partition() if partition is None else partition

    def slots(self, p: Param) -> dict[str, Slot]:
        runs = self.partition(p)
        if runs is None:
            return super().slots(p)
        experts = tuple(p.shape[:-2]) if p.role == "experts" else ()
        return {"exp_avg": Slot(tuple(p.shape)), "exp_avg_sq": Slot((*experts, totals(runs)), kind="nonneg")}

    def blocks(self, p: Param) -> tuple[tuple[int, int], ...] | None:
        return in_elements(self.partition(p), p)

    def update(self, u: Tensor, state: State, x: Tensor, k: Context) -> Tensor:
        m = state["exp_avg"] = k.b1 * state["exp_avg"] + k.c1 * u
        v = state["exp_avg_sq"] = k.b2 * state["exp_avg_sq"] + k.c2 * (u * u).mean(1, keepdim=True)
        return k.debias1 * m / (v.sqrt() * k.debias2 + k.eps)


@method(
    "adam-mini",
    family="optim",
    paper=Paper("Adam-mini: Use Fewer Learning Rates To Gain More", arxiv="2406.16793", year=2024),
    tune={
        "lr": log_uniform(1e-4, 3e-2),
        "weight_decay": log_uniform(1e-3, 1.0),
        "betas": choice((0.9, 0.95), (0.9, 0.99), (0.9, 0.999)),
    },
    mutant=("(u * u).mean(1, keepdim=True)", "u.abs().mean(1, keepdim=True).square()"),
)
class AdamMini(Optimizer):
    """Adam with one second moment for each block of a parameter: half of AdamW's state.

    For each block b of a parameter,

        v_b <- b2 v_b + (1 - b2) mean_b(g^2)
        m   <- b1 m + (1 - b1) g
        x   <- (1 - lr * weight_decay) x - lr * (m / (1 - b1^t)) / ( sqrt(v_b / (1 - b2^t)) + eps )

    A block is a head of the projections to queries and keys; a row (token, class, neuron, output channel) of every other
    matrix, embedding, head and convolution; the whole of a norm or another vector; an element of a bias. What a parameter is,
    and how large heads are, comes from the model; `transforms.blocks.Partition` has the rules and reads names where there is
    no model.

    Args:
        lr: 1e-3. AdamW's learning rate carries over. betas: (0.9, 0.999). eps: 1e-8.
        weight_decay: 0. As in the release, norms, biases and other vectors do not decay, which is `decay_vectors=False`; with
            True they do.
        blocks: other blocks for parameters whose name matches, as in `{"*.mlp.*": "tensor", "re:wq|wk": 16}`: "element",
            "tensor", "head", "row", or the number of equal blocks that the rows are cut into, for a glob or "re:...". The first
            that matches counts.
        value: "tensor" gives the projection to values one block in all, which the authors suggest for runs under some 10,000
            steps.
        head_dim: rows of one head, where no model says it because only names are given; without it queries and keys go by rows.
        options: see `Optimizer`.

    State: 1 value per element and 1 for each block. Source: "Adam-mini: Use Fewer Learning Rates To Gain More" (arXiv
    2406.16793), release 1.1.1. Unlike the release: a matrix whose name it does not know goes by rows, not as one block, which
    it warns is unstable; in a fused projection q and k go by heads; vectors never fail.

    Raises:
        ValueError: also for a pattern of `blocks` that matches no parameter.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        blocks: Mapping[str, Spec] | None = None,
        value: Literal["row", "tensor"] = "row",
        head_dim: int | None = None,
        decay: Decay = "coupled",
        **options: Unpack[Options],
    ) -> None:
        partition = Partition(tuple((blocks or {}).items()), head_dim, value)
        options.setdefault("decay_vectors", False)
        super().__init__(params, blockwise_adam(partition, betas, eps), lr, weight_decay, decay, **options)
        names = [name for group in self.param_groups for name in group["param_names"]]
        for pattern in blocks or {}:
            if not any(matches(pattern, name) for name in names):
                raise ValueError(f"blocks: {pattern!r} matches no parameter; the first is called {names[0]!r}")

    def blocks(self) -> dict[str, Any]:
        """By parameter name its blocks as runs `((count, rows), ...)`, None for one an element."""
        rule = self._roster.rules[self.param_groups[0]["rule"]].links[0]
        assert isinstance(rule, blockwise_adam)
        return {p.name: rule.partition(p) for described in self._roster.described for p in described}
