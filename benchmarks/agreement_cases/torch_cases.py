"""Against what torch itself has: its optimizers, its averaged model, its weight norm."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from poise.optim import SGD, AdamW, BrakedSGD, Muon, Optimizer, chain, clip, momentum
from poise.training import EMA, WeightNorm, reparameterize

from .case import MATRICES, Case, Problem, Side, Trajectory, copies, stepping

ADAM = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
SHORT = Problem(MATRICES, steps=20, dtype=torch.float32)
IN_BFLOAT16 = (
    "the reference iterates Newton-Schulz in bfloat16; poise in float32, or where the processor multiplies bfloat16, in that "
    "with other roundings"
)


def widened(side: Side) -> Side:
    """The same run without its casts to bfloat16."""

    def run(problem: Problem, module: Any) -> Trajectory:
        with mock.patch.object(Tensor, "bfloat16", lambda self: self):
            return side(problem, module)

    return run


def in_one_dtype(side: Side) -> Side:
    """The same run without its casts to float32."""

    def run(problem: Problem, module: Any) -> Trajectory:
        before = torch.get_default_dtype()
        torch.set_default_dtype(problem.dtype)
        try:
            with (
                mock.patch.object(Tensor, "float", lambda self: self.to(problem.dtype)),
                mock.patch.object(torch, "float", problem.dtype),
            ):
                return side(problem, module)
        finally:
            torch.set_default_dtype(before)

    return run


def sgd(label: str, **settings: Any) -> Case:
    return Case(
        "sgd",
        "torch",
        "optim.SGD",
        stepping(lambda p, o: SGD(p, lr=0.05, **settings, **o)),
        stepping(lambda p, m: m.optim.SGD(p, lr=0.05, **settings)),
        1e-13,
        label,
    )


def clipped_by_torch(problem: Problem, module: Any) -> Trajectory:
    class Clipping(module.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            module.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 42.0)
            return super().step(closure)

    return stepping(lambda p, _: Clipping(p, lr=0.05, momentum=0.9))(problem, module)


def averaged(problem: Problem, options: Any) -> Trajectory:
    """The shadow of poise's EMA."""
    model = nn.ParameterList(problem.start())
    opt = EMA(SGD(model.parameters(), lr=0.05, **options), model, p=0.1)
    found = [copies(list(model))]
    for t in range(problem.steps):
        problem.set_gradients(t, list(model))
        opt.step()
        with opt.evaluating():
            found.append(copies(list(model)))
    return found


def averaged_by_torch(problem: Problem, module: Any) -> Trajectory:
    utils = module.optim.swa_utils
    model = nn.ParameterList(problem.start())
    opt = module.optim.SGD(model.parameters(), lr=0.05)
    shadow = utils.AveragedModel(model, multi_avg_fn=utils.get_ema_multi_avg_fn(0.9))
    shadow.update_parameters(model)  # the first call copies
    found = [copies(list(shadow.parameters()))]
    for t in range(problem.steps):
        problem.set_gradients(t, list(model))
        opt.step()
        shadow.update_parameters(model)
        found.append(copies(list(shadow.parameters())))
    return found


def normed(problem: Problem, normalize: Any) -> Trajectory:
    """Plain SGD on the stored parameters of two normalized layers; what is compared are the weights that the layers use."""
    layers = nn.ModuleList([nn.Linear(8, 12), nn.Conv2d(4, 6, 3)]).to(problem.dtype)
    with torch.no_grad():
        for layer, w in zip(layers, problem.start(), strict=True):
            layer.get_parameter("weight").copy_(w)
    normalize(layers)
    stored = [p for layer in layers for name, p in layer.named_parameters() if name != "bias"]

    def used() -> list[Tensor]:
        return [layer.get_submodule("parametrizations.weight")() for layer in layers]

    found = [copies(used())]
    for t in range(problem.steps):
        now = used()
        slopes = torch.autograd.grad(now, stored, problem.gradients(t, now))
        with torch.no_grad():
            for p, slope in zip(stored, slopes, strict=True):
                p -= 0.05 * slope
        found.append(copies(used()))
    return found


def normed_by_torch(problem: Problem, module: Any) -> Trajectory:
    weight_norm = module.nn.utils.parametrizations.weight_norm
    return normed(problem, lambda layers: [weight_norm(layer) for layer in layers])


CASES = (
    Case(
        "adamw",
        "torch",
        "optim.AdamW",
        stepping(lambda p, o: AdamW(p, **ADAM, **o)),
        stepping(lambda p, m: m.optim.AdamW(p, **ADAM)),
        1e-13,
        "decay='coupled'",
    ),
    Case(
        "adamw",
        "torch",
        "optim.Adam",
        stepping(lambda p, o: AdamW(p, decay="l2", **ADAM, **o)),
        stepping(lambda p, m: m.optim.Adam(p, **ADAM)),
        1e-13,
        "decay='l2'",
    ),
    Case(
        "adamw",
        "torch",
        "optim.AdamW",
        stepping(lambda p, o: AdamW(p, decay="independent", **{**ADAM, "weight_decay": 1e-3}, **o), schedule=True),
        stepping(lambda p, m: m.optim.AdamW(p, **ADAM), schedule=True),
        1e-13,
        "decay='independent', linear schedule",
        "rounding; the paper's decay 0.001 is torch's 0.1 at lr 0.01",
    ),
    sgd("plain, l2 decay", weight_decay=0.1),
    sgd("momentum", momentum=0.9, weight_decay=0.1),
    sgd("momentum, nesterov", momentum=0.9, weight_decay=0.1, nesterov=True),
    sgd("momentum, dampening", momentum=0.9, weight_decay=0.1, dampening=0.5),
    Case(
        "braked-sgd",
        "torch",
        "optim.SGD",
        stepping(lambda p, o: BrakedSGD(p, lr=0.05, rho=0.0, **o)),
        stepping(lambda p, m: m.optim.SGD(p, lr=0.05, momentum=0.9)),
        1e-13,
        "rho=0",
        "rounding; the special case without brake, since no code of the authors was found",
    ),
    Case(
        "muon",
        "torch",
        "optim.Muon",
        stepping(lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", **o)),
        stepping(lambda p, m: m.optim.Muon(p, lr=0.02, weight_decay=0.1)),
        3e-2,
        "method='ns5'",
        IN_BFLOAT16,
        SHORT,
    ),
    Case(
        "muon",
        "torch",
        "optim.Muon",
        stepping(lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", **o)),
        widened(stepping(lambda p, m: m.optim.Muon(p, lr=0.02, weight_decay=0.1))),
        1e-13,
        "method='ns5'; bfloat16 there replaced by float64",
        problem=Problem(MATRICES),
    ),
    Case(
        "muon",
        "torch",
        "optim.Muon",
        stepping(lambda p, o: Muon(p, lr=0.02, weight_decay=0.1, method="ns5", scale_rule="match_rms", **o)),
        stepping(lambda p, m: m.optim.Muon(p, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")),
        3e-2,
        "method='ns5', scale_rule='match_rms'",
        IN_BFLOAT16,
        SHORT,
    ),
    Case(
        "clip",
        "torch",
        "nn.utils.clip_grad_norm_",
        stepping(lambda p, o: Optimizer(p, chain(clip(42.0), momentum(0.9)), lr=0.05, **o)),
        clipped_by_torch,
        1e-13,
        "at 42, over SGD with momentum",
        "rounding; about half of the gradients are longer",
    ),
    Case("ema", "torch", "optim.swa_utils.AveragedModel", averaged, averaged_by_torch, 1e-13, "p=0.1, over SGD"),
    Case(
        "weight-norm",
        "torch",
        "nn.utils.parametrizations.weight_norm",
        lambda problem, _: normed(problem, lambda layers: reparameterize(layers, WeightNorm)),
        normed_by_torch,
        1e-13,
        "SGD on lengths and directions",
        problem=Problem(((12, 8), (6, 4, 3, 3))),
    ),
)
