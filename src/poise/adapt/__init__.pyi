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
from .methods.gazal_r1 import Course as Course
from .methods.gazal_r1 import Group as Group
from .methods.gazal_r1 import Reward as Reward
from .methods.gazal_r1 import gazal_r1 as gazal_r1
from .methods.gazal_r1 import grpo_loss as grpo_loss
from .methods.kappatune import Condition as Condition
from .methods.kappatune import KappaTune as KappaTune
from .methods.kappatune import condition as condition
from .methods.kappatune import conditions as conditions
from .methods.kappatune import kappa_tune as kappa_tune
from .methods.lora import LoRA as LoRA
from .methods.lora import check as check
from .methods.lora import start as start
from .methods.lora_ggpo import LoRAGGPO as LoRAGGPO
from .methods.lora_ggpo import Perturbed as Perturbed
from .methods.lora_limits import Logits as Logits
from .methods.lora_limits import lora_limits as lora_limits
from .methods.periodic_lora import PeriodicLoRA as PeriodicLoRA
from .registry import Pair as Pair
from .registry import pairs as pairs

__all__ = [
    "Adaptation",
    "Attached",
    "Condition",
    "Course",
    "DoRA",
    "Group",
    "KappaTune",
    "LoRA",
    "LoRAGGPO",
    "Logits",
    "Pair",
    "PeriodicLoRA",
    "Perturbed",
    "Reward",
    "WeightDecomposed",
    "adapters",
    "attach",
    "attached",
    "check",
    "condition",
    "conditions",
    "detach",
    "disabled",
    "export",
    "fold",
    "gazal_r1",
    "grpo_loss",
    "kappa_tune",
    "load",
    "lora_limits",
    "pairs",
    "start",
    "unfold",
]
