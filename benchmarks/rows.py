"""What is measured: one `Row` for each line of the table. A new optimizer or a new peer is one entry of `ROWS`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import Parameter, ParameterList

# Seconds that a user waits for the first step: with nothing compiled, and with kernels found on disk.
COLD, COLD_PER_FURTHER_KERNEL, WARM = 20.0, 6.0, 5.0


@dataclass(frozen=True)
class Row:
    """One optimizer on one list.

    Attributes:
        name, library: the same rule has the same name in every library.
        module, cls: where the optimizer is.
        settings: arguments beside the parameters. Everything else is at its default.
        group: options of its parameter group, where the library asks for a group.
        model: it asks for a model, and gets one that holds nothing but the parameters.
        period: steps timed together, where they are not alike: one in so many does more than the others.
        params: a list of `lists.LISTS`.
        dtype: of parameters and gradients.
        target: of the ratio to torch's fused AdamW, where the project has set one.
        again: bytes per parameter that must be read a second time, because a sum over all of them decides the step.
        of_traffic: target as a multiple of the time that the least traffic of its own would take at fused AdamW's bandwidth.
        iterations: of Newton-Schulz in a step, for matrix rules; a step should take at most `OF_PRODUCTS` times their products.
        beside: further rows on the same list that take turns with this one in the same process.
        exact: the row whose weights this one's should follow: what its state format costs is measured against it.
        slow: not run to warm up: where the CPU has no bfloat16 hardware, one step takes about half a minute.
        note: what a reader must know.
    """

    name: str
    library: str
    module: str
    cls: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    group: Mapping[str, Any] | None = None
    model: bool = False
    period: int = 1
    params: Literal["gpt", "hidden", "one of each", "300 small"] = "gpt"
    dtype: torch.dtype = torch.float32
    target: float | None = None
    again: int = 0
    of_traffic: float | None = None
    iterations: int = 0
    beside: tuple[str, ...] = ()
    exact: str | None = None
    slow: bool = False
    note: str = ""

    @property
    def key(self) -> str:
        return f"{self.library}:{self.name}"

    def load(self) -> type[torch.optim.Optimizer]:
        """The optimizer's class, its library imported."""
        if self.library == "timm":
            for package in ("timm", "timm.optim"):
                bare(package)
        return getattr(importlib.import_module(self.module), self.cls)

    def make(self, params: list[Parameter]) -> torch.optim.Optimizer:
        given: Any = params if self.group is None else [{"params": params, **self.group}]
        if self.model:
            given = ParameterList(params)
        return self.load()(given, **self.settings)


def bare(package: str) -> None:
    """Register a package without running its __init__: timm's imports torchvision, for which its optimizers have no use."""
    if package in sys.modules:
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    module = types.ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations or ())
    module.__spec__ = spec
    sys.modules[package] = module


# Arguments of a row that are its optimizer's, and not the row's own.
SETTINGS = (
    "state", "weights", "backend", "momentum", "form", "variant", "base", "per", "predictor", "method", "grafting", "window",
    "rank", "update_proj_gap", "update_gap", "precondition_frequency", "statistics_every", "roots_every",
)  # fmt: skip


def _poise(name: str, cls: str, **options: Any) -> Row:
    settings = {key: options.pop(key) for key in SETTINGS if key in options}
    return Row(name, "poise", "poise.optim", cls, settings, **options)


def _element(name: str, cls: str, of_traffic: float = 1.3, **options: Any) -> Row:
    """A rule that treats every element alike, held against its own traffic; one that draws random numbers may take 2."""
    return _poise(name, cls, of_traffic=of_traffic, **options)


def _matrix(name: str, cls: str, iterations: int = 5, **options: Any) -> Row:
    """A rule for matrices, on nothing but these."""
    return _poise(name, cls, **{"params": "hidden", "iterations": iterations, **options})


def _small(name: str, cls: str, **options: Any) -> Row:
    """A rule that does much more than multiply matrices, on one of each; no target."""
    return _poise(name, cls, **{"params": "one of each", **options})


OF_PRODUCTS = 1.2
MATRICES = {"use_muon": True}
REFRESH = "mean of 10 steps, one of which refreshes"
FUSED = Row("adamw", "torch", "torch.optim", "AdamW", {"fused": True}, note="null row: against itself")

ROWS: dict[str, Row] = {
    row.key: row
    for row in (
        FUSED,
        _poise("adamw", "AdamW", target=1.0),
        _poise("adamw-int8", "AdamW", state="int8", target=1.8, exact="poise:adamw"),
        _poise("adamw-int4", "AdamW", state="int4", target=2.8, exact="poise:adamw"),
        _poise("adamw-bf16state", "AdamW", state="bf16", exact="poise:adamw"),
        _poise("adamw-bf16params", "AdamW", dtype=torch.bfloat16, target=1.0, note="bfloat16 parameters; torch's stay float32"),
        _poise("lion", "Lion", target=0.8),
        _poise("sgd", "SGD", momentum=0.9, note="momentum 0.9"),
        _poise("adamw-no-compiler", "AdamW", backend="chunks", target=4.0, note="what runs where there is no C++ compiler"),
        _poise("lion-no-compiler", "Lion", backend="chunks", target=4.0, note="what runs where there is no C++ compiler"),
        _poise("adamw-small", "AdamW", params="300 small", target=0.8),
        _element("signum", "Signum"),
        _element("stosignsgd", "StoSignSGD", 2.0, note="draws random numbers"),
        _element("adam-mini", "AdamMini"),
        _element("braked-sgd", "BrakedSGD", again=8, note="gradient and momentum are read twice: first for their cosine"),
        _element("braked-sgd-filter", "BrakedSGD", per="filter", note="a cosine for each row"),
        _element("induced-metric", "InducedMetric", again=4, note="the gradient is read twice: first for its length"),
        _element("induced-metric-rms", "InducedMetric", variant="rms", again=8, note="gradient and r are read twice"),
        _element("adaptive-memory", "ExperimentalAdaptiveMemory", again=8, note="gradient and memory are read twice"),
        _element(
            "adaptive-memory-adamw", "ExperimentalAdaptiveMemory", base="adamw", again=12, note="all but weights read twice"
        ),
        _element("opt-amsgrad", "OptAMSGrad", again=24, note="gradient and history are read twice"),
        _element("opt-amsgrad-last", "OptAMSGrad", predictor="last", note="the last gradient is the prediction"),
        _matrix("muon", "Muon"),
        _matrix("turbo-muon", "TurboMuon", 4),
        _matrix("namo", "NAMO"),
        _matrix("namo-d", "NAMOD"),
        _matrix("lanton", "LANTON", 10, note="orthogonalizes twice"),
        _matrix("hybrid-auon", "HybridAuON"),
        _matrix("trust-region", "TrustRegion"),
        _matrix("lion-k", "LionK"),
        _matrix("polargrad", "PolarGrad", 0, params="one of each", note="exact polar factors, by QDWH"),
        _matrix("polargrad-express", "PolarGrad", method="polar_express"),
        _matrix("auon", "AuON", 0, note="multiplies no matrices"),
        _element("sophia", "Sophia", note="without a new estimate of the Hessian, which is a pass of the model's"),
        _poise("eco-int8", "ECO", weights="int8", note="weights on a grid of int8"),
        _poise("micro-adam", "MicroAdam", note="the largest 1% of each gradient, and errors of 4 bits"),
        _poise(
            "frugal", "FRUGAL", update_gap=20, period=20, note="whole tensors in turn; mean of 20 steps, one of which chooses"
        ),
        _small("galore", "GaLore", update_proj_gap=20, period=20, note="mean of 20 steps, one of which takes SVDs"),
        _small(
            "natural-galore", "NaturalGaLore", update_proj_gap=20, period=20, note="mean of 20 steps, one of which takes SVDs"
        ),
        _small("shampoo", "Shampoo", grafting="adam", precondition_frequency=10, period=10, note=REFRESH),
        _small("shampoo-4bit", "Shampoo4Bit", statistics_every=10, roots_every=20, period=20, note="mean of 20 steps"),
        _small("m-fac", "MFAC", window=32, note="a window of 32 gradients"),
        _small("efcp", "EFCP", window=32, note="a window of 32 gradients, 1% of each"),
        _poise("muon-one-of-each", "Muon", params="one of each", beside=("torch:muon",)),
        _poise("soap", "SOAP", params="one of each", period=10, note=REFRESH),
        _poise("soap-full", "SOAP", form="full", params="one of each", period=10, note=f"the published form; {REFRESH}"),
        Row("sgd", "torch", "torch.optim", "SGD", {"momentum": 0.9, "fused": True}, note="fused, momentum 0.9"),
        Row("muon", "torch", "torch.optim", "Muon", params="one of each", slow=True),
        Row("adamw", "pytorch_optimizer", "pytorch_optimizer", "AdamW", note="torch's own AdamW class"),
        Row("lion", "pytorch_optimizer", "pytorch_optimizer", "Lion"),
        Row("muon", "pytorch_optimizer", "pytorch_optimizer", "Muon", group=MATRICES, params="one of each", slow=True),
        Row("soap-full", "pytorch_optimizer", "pytorch_optimizer", "SOAP", params="one of each", period=10, note=REFRESH),
        Row(
            "adam-mini",
            "pytorch_optimizer",
            "pytorch_optimizer",
            "AdamMini",
            model=True,
            note="one block a tensor, by its names",
        ),
        Row("adamw", "heavyball", "heavyball", "AdamW"),
        Row("sgd", "heavyball", "heavyball", "SGD", note="momentum 0.9, its default"),
        Row("muon", "heavyball", "heavyball", "Muon", params="one of each"),
        Row(
            "soap-full",
            "heavyball",
            "heavyball",
            "SOAP",
            {"precondition_frequency": 10},
            params="one of each",
            period=10,
            note=f"longer sides than 2048 merged or cut, its default; {REFRESH}",
        ),
        Row("adamw", "timm", "timm.optim.adamw", "AdamWLegacy", note="its own AdamW; what it calls adamw is torch's"),
        Row("lion", "timm", "timm.optim.lion", "Lion"),
        Row("adamw-int8", "torchao", "torchao.optim", "AdamW8bit", exact="torch:adamw"),
        Row("adamw-int4", "torchao", "torchao.optim", "AdamW4bit", exact="torch:adamw"),
    )
}

PEERS = tuple(dict.fromkeys(row.library for row in ROWS.values() if row.library not in ("poise", "torch")))
