"""Against the authors' repositories and packages: rules in subspaces and blocks, whose state is small."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from poise.optim import FRUGAL, GaLore, NaturalGaLore

from .case import Case, Problem, Side, Trajectory, stepping
from .torch_cases import in_one_dtype

SUBSPACE = Problem(((24, 16), (16, 24), (20, 20), (7,)))
SIGNS = "each new singular vector there, too, is turned to the side of the one before it, which the reference leaves to LAPACK"


def galore(gap: int, **more: Any) -> dict[str, Any]:
    return {"rank": 4, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std", **more}


def parted(params: Any, **settings: Any) -> list[dict[str, Any]]:
    """Groups of vectors and, with settings of their own, of matrices."""
    return [{"params": [p for p in params if p.ndim < 2]}, {"params": [p for p in params if p.ndim > 1], **settings}]


def fitting(run: Side) -> Side:
    """The same run, each new singular vector there turned, as here, to the side of the one before it."""

    def turned(new: Tensor, old: Tensor, over: int) -> Tensor:
        return new * (new * old).sum(over, keepdim=True).sign()

    def side(problem: Problem, module: Any) -> Trajectory:
        matrices = hasattr(module, "GaLoreProjector")
        projector = module.GaLoreProjector if matrices else module.GaLoreProjectorTensor
        found = projector.get_orthogonal_matrix

        def decompose(self: Any, *args: Any, **side: Any) -> Any:
            new = found(self, *args, **side)
            if matrices:
                old = self.ortho_matrix
                return new if old is None else turned(new, old, 1 if side["type"] == "right" else 0)
            if self.factors is None:
                return new
            return new[0], [turned(a, b, 0) for a, b in zip(new[1], self.factors, strict=True)]

        with mock.patch.object(projector, "get_orthogonal_matrix", decompose):
            return run(problem, module)

    return side


def galore_by_authors(gap: int) -> Side:
    def make(params: Any, module: Any) -> Any:
        return module.AdamW(parted(params, **galore(gap)), lr=0.01, weight_decay=0.1, no_deprecation_warning=True)

    return in_one_dtype(stepping(make))


def ours_galore(gap: int) -> Side:
    return stepping(lambda p, o: GaLore(p, 0.01, rank=4, update_proj_gap=gap, weight_decay=0.1, **o))


def frugal(reference: str, settings: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Case:
    shared = {"lr": 0.01, "weight_decay": 0.1, "update_gap": 10}

    def make(params: Any, module: Any) -> Any:
        groups = parted(params, is_proj_params=True)
        return getattr(module, reference)(groups, no_deprecation_warning=True, **shared, **theirs)

    return Case(
        "frugal",
        "fzmushko/FRUGAL",
        reference,
        stepping(lambda p, o: FRUGAL(p, **shared, **ours, **o)),
        in_one_dtype(stepping(make)),
        1e-12,
        settings,
        "rounding; the reference's casts to float32 are left out",
        SUBSPACE,
    )


def natural(gap: int, settings: str, note: str, **more: Any) -> Case:
    def make(params: Any, module: Any) -> Any:
        groups = parted(params, **galore(gap, proj_type="natural_galore"))
        return module.SubSpaceAdamW(groups, lr=0.01, weight_decay=0.1, natural_history=6)

    ours = {"rank": 4, "history": 6, "update_proj_gap": gap, "side": "both", "weight_decay": 0.1, **more}
    return Case(
        "natural-galore",
        "selfsupervised-ai/Natural-GaLore",
        "SubSpaceAdamW",
        stepping(lambda p, o: NaturalGaLore(p, 0.01, **ours, **o)),
        fitting(in_one_dtype(stepping(make))),
        1e-9,
        f"side='both', rank=4, history=6, {settings}",
        note,
        SUBSPACE,
    )


CASES = (
    Case(
        "galore",
        "jiaweizzhao/GaLore",
        "AdamW",
        ours_galore(200),
        galore_by_authors(200),
        1e-12,
        "rank=4, one period",
        "rounding; the reference's cast to float32 before the decomposition is left out",
        SUBSPACE,
    ),
    Case(
        "galore",
        "jiaweizzhao/GaLore",
        "AdamW",
        ours_galore(10),
        fitting(galore_by_authors(10)),
        1e-12,
        "rank=4, update_proj_gap=10",
        f"rounding; {SIGNS}",
        SUBSPACE,
    ),
    Case(
        "galore",
        "jiaweizzhao/GaLore",
        "AdamW",
        ours_galore(10),
        galore_by_authors(10),
        None,
        "rank=4, update_proj_gap=10",
        "singular vectors have the signs that LAPACK gives them there, and averages of the opposite sign go on in their place; "
        "here each is turned to the side of the one before it",
        SUBSPACE,
    ),
    Case(
        "galore",
        "pytorch_optimizer",
        "GaLore",
        ours_galore(200),
        in_one_dtype(
            stepping(
                lambda p, m: m.GaLore(
                    parted(p, rank=4, update_proj_gap=200, scale=0.25, projection_type="std"), lr=0.01, weight_decay=0.1
                )
            )
        ),
        1e-12,
        "rank=4, one period",
        "rounding; later periods begin one step earlier there, since it counts from 1",
        SUBSPACE,
    ),
    frugal("GaloreAdamW", "projection='svd', update_gap=10", {"projection": "svd"}, {}),
    *(
        frugal(
            "BlockAdamW",
            f"density=0.34, order={order!r}, update_gap=10",
            {"density": 0.34, "order": order, "inactive_scale": 0.1},
            {"density": 0.34, "block_order": order, "inactive_lr_scale": 0.1},
        )
        for order in ("ascending", "descending")
    ),
    natural(200, "one period", "rounding, of gradients over a small damping; the reference's decomposition is of tensors"),
    natural(10, "update_proj_gap=10, clear_history=False", f"rounding; {SIGNS}", clear_history=False),
)
