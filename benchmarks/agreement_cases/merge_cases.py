"""Against the authors' repositories: merges. The weights stand at the base at first, then where the merge puts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from poise.merge import merge_tensors
from poise.merge.methods.dare import dare_linear, kept
from poise.merge.methods.ota import ota
from poise.merge.methods.slerp import slerp
from poise.merge.protocol import Place

from .case import Case, Problem, Side, Trajectory, copies

State = dict[str, Tensor]
Merge = Callable[[State, list[State], list[State]], State]
PROBLEM = Problem(steps=1, dtype=torch.float32)


def merging(merge: Merge) -> Side:
    """Three models a little away from the start, with second moments of many sizes, merged."""

    def run(problem: Problem, _: Any) -> Trajectory:
        return [copies(problem.start()), copies(list(merge(*given(problem)).values()))]

    return run


def merging_by_authors(merge: Callable[[Any, State, list[State], list[State]], State]) -> Side:
    def run(problem: Problem, module: Any) -> Trajectory:
        return [copies(problem.start()), copies(list(merge(module, *given(problem)).values()))]

    return run


def given(problem: Problem) -> tuple[State, list[State], list[State]]:
    base = {f"w{i}": w.detach() for i, w in enumerate(problem.start())}
    drawn = [problem._draw(10 + number) for number in range(6)]
    models = [{n: w + 0.1 * d for (n, w), d in zip(base.items(), some, strict=True)} for some in drawn[:3]]
    moments = [{n: (2 * d).exp() * 1e-8 for n, d in zip(base, some, strict=True)} for some in drawn[3:]]
    return base, models, moments


def grafted(**settings: Any) -> Merge:
    return lambda base, models, moments: merge_tensors(ota, models, base, moments=moments, **settings)


def grafted_by_authors(own: dict[str, Any] | None = None, **settings: Any) -> Side:
    def merge(module: Any, base: State, models: list[State], moments: list[State]) -> State:
        found = {}
        for name, root in base.items():
            task = module.OTAMergeTask()
            task.weight_info = mock.Mock(is_embed=False)
            task.weight_info.name = name
            told = {
                "precond_power": 0.5,
                "epsilon": 1e-26,
                "normalise_mode": "none",
                "fallback_to_base": True,
                "base_model_ref": "base",
                **settings,
            }
            task.tensor_parameters = {i: {"preconditioner_path": "-", **(own or {})} for i in range(3)}
            task.__dict__.update(told)
            task.model_post_init(None)
            task._load_preconditioner = lambda model, _, path, name=name: moments[model][name]
            found[name] = task.execute({"base": root, **{i: m[name] for i, m in enumerate(models)}})
        return found

    return merging_by_authors(merge)


def dropped(base: State, models: list[State], moments: list[State]) -> State:
    return merge_tensors(dare_linear, models, base, density=0.4)


def dropped_by_authors(module: Any, base: State, models: list[State], moments: list[State]) -> State:
    found = {}
    for name, root in base.items():
        total = root.clone()
        for number, model in enumerate(models):
            stays = kept(Place(name, root.shape), root.numel(), 0, number, 0.4).view(root.shape)
            with mock.patch.object(torch, "bernoulli", lambda _, stays=stays: (~stays).float()):
                total += module.mask_input_with_mask_rate(model[name] - root, 0.6, True, "random")
        found[name] = total
    return found


def turned(base: State, models: list[State], moments: list[State]) -> State:
    return merge_tensors(slerp, [models[0], moments[0]], t=0.3, vectors="slerp")


def turned_by_authors(module: Any, base: State, models: list[State], moments: list[State]) -> State:
    return {n: module.slerp(0.3, models[0][n], moments[0][n]) for n in base}


def ota_case(settings: str, ours: dict[str, Any], theirs: dict[str, Any], note: str = "rounding") -> Case:
    return Case(
        "ota",
        "pmahdavi/ota-merge",
        "OTAMergeTask",
        merging(grafted(**ours)),
        grafted_by_authors(**theirs),
        2e-5,
        settings,
        note,
        problem=PROBLEM,
    )


FIXED = {"precond_threshold": 1e-10}
CASES: tuple[Case, ...] = (
    ota_case("eps 1e-26", {}, {}),
    ota_case("threshold 1e-10", {"threshold": 1e-10}, FIXED),
    ota_case("threshold 1e-10, rank 1", {"threshold": 1e-10, "compress": "rank1"}, {**FIXED, "own": {"rank1_approx": True}}),
    ota_case(
        "power 1, divided by the mean",
        {"power": 1.0, "divide_by_mean": True},
        {"precond_power": 1.0, "normalise_mode": "global"},
    ),
    Case(
        "dare_linear",
        "yule-BUAA/MergeLM",
        "mask_input_with_mask_rate",
        merging(dropped),
        merging_by_authors(dropped_by_authors),
        1e-5,
        "drop rate 0.6",
        "rounding; the masks are poise's in both",
        problem=PROBLEM,
    ),
    Case(
        "slerp",
        "arcee-ai/mergekit",
        "slerp",
        merging(turned),
        merging_by_authors(turned_by_authors),
        1e-5,
        "t 0.3",
        "rounding; of a zero tensor theirs takes the sine of t pi / 2, poise t",
        problem=PROBLEM,
    ),
)
