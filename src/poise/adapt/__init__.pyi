# Written by tools/lazy_stubs.py from the sources (make stubs). Do not edit, do not commit.

from .adaptation import Adaptation as Adaptation
from .attaching import Attached as Attached
from .attaching import adapters as adapters
from .attaching import attach as attach
from .attaching import attached as attached
from .attaching import detach as detach
from .attaching import disabled as disabled
from .attaching import fold as fold
from .attaching import unfold as unfold
from .exporting import export as export
from .loading import load as load
from .methods.dora import DoRA as DoRA
from .methods.dora import WeightDecomposed as WeightDecomposed
from .methods.goat import Experts as Experts
from .methods.goat import GOAT as GOAT
from .methods.goat import segments as segments
from .methods.lora import LoRA as LoRA
from .methods.lora import check as check
from .methods.lora import start as start
from .methods.queryable_lora import Queryable as Queryable
from .methods.queryable_lora import QueryableLoRA as QueryableLoRA
from .methods.queryable_lora import instruct as instruct
from .methods.queryable_lora import prior_of as prior_of
from .registry import Pair as Pair
from .registry import pairs as pairs

__all__ = [
    "Adaptation",
    "Attached",
    "DoRA",
    "Experts",
    "GOAT",
    "LoRA",
    "Pair",
    "Queryable",
    "QueryableLoRA",
    "WeightDecomposed",
    "adapters",
    "attach",
    "attached",
    "check",
    "detach",
    "disabled",
    "export",
    "fold",
    "instruct",
    "load",
    "pairs",
    "prior_of",
    "segments",
    "start",
    "unfold",
]
