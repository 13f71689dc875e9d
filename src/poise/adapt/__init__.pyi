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
from .methods.altlora import AltLoRA as AltLoRA
from .methods.altlora import AltLoRAPlus as AltLoRAPlus
from .methods.altlora import Factor as Factor
from .methods.altlora import through_the_other as through_the_other
from .methods.dora import DoRA as DoRA
from .methods.dora import WeightDecomposed as WeightDecomposed
from .methods.lora import LoRA as LoRA
from .methods.lora import check as check
from .methods.lora import start as start
from .methods.lora_sb import Cored as Cored
from .methods.lora_sb import LoRASB as LoRASB
from .registry import Pair as Pair
from .registry import pairs as pairs

__all__ = [
    "Adaptation",
    "AltLoRA",
    "AltLoRAPlus",
    "Attached",
    "Cored",
    "DoRA",
    "Factor",
    "LoRA",
    "LoRASB",
    "Pair",
    "WeightDecomposed",
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
    "through_the_other",
    "unfold",
]
