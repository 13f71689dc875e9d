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
from .methods.compacter import Bottleneck as Bottleneck
from .methods.compacter import Compacter as Compacter
from .methods.compacter import Mixing as Mixing
from .methods.compacter import PHMLinear as PHMLinear
from .methods.dora import DoRA as DoRA
from .methods.dora import WeightDecomposed as WeightDecomposed
from .methods.ecotta import Adapted as Adapted
from .methods.ecotta import EcoTTA as EcoTTA
from .methods.ecotta import Side as Side
from .methods.lora import LoRA as LoRA
from .methods.lora import check as check
from .methods.lora import start as start
from .methods.pair_customization import ContentAndStyle as ContentAndStyle
from .methods.pair_customization import PairCustomization as PairCustomization
from .methods.pair_customization import Part as Part
from .methods.pair_customization import style_guidance as style_guidance
from .parts import acting as acting
from .registry import Pair as Pair
from .registry import pairs as pairs

__all__ = [
    "Adaptation",
    "Adapted",
    "Attached",
    "Bottleneck",
    "Compacter",
    "ContentAndStyle",
    "DoRA",
    "EcoTTA",
    "LoRA",
    "Mixing",
    "PHMLinear",
    "Pair",
    "PairCustomization",
    "Part",
    "Side",
    "WeightDecomposed",
    "acting",
    "adapters",
    "attach",
    "attached",
    "check",
    "detach",
    "disabled",
    "export",
    "fold",
    "load",
    "pairs",
    "start",
    "style_guidance",
    "unfold",
]
