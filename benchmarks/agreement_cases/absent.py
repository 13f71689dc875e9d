"""Methods without a case: without published code, with code that cannot be run here, or compared by hand."""

from __future__ import annotations

from .case import Absent

NONE = "no code of the authors was found; nothing is compared"

ABSENT = (
    Absent("alignment", "none", NONE),
    Absent(
        "gradnormlorp",
        "Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection",
        "its optimizer is not the paper's; nothing is compared",
    ),
    Absent("eco", "none", NONE),
    Absent(
        "ties",
        "prateeky2806/ties-merging 44e7891, arcee-ai/mergekit a6e4028",
        "by hand, three models in float32, shares of 5, 20 and 50%, mean, sum and max: 1.2e-7 without the one entry more that "
        "the authors keep; mergekit with trim_scope='tensor': 2.4e-7",
    ),
    Absent("linear", "arcee-ai/mergekit a6e4028", "by hand, three models in float32: at most 2.4e-7"),
    Absent("task_arithmetic", "arcee-ai/mergekit a6e4028", "by hand, three models in float32: at most 2.4e-7"),
    Absent(
        "dare_ties",
        "arcee-ai/mergekit a6e4028",
        "by hand, three models in float32, the same masks, rescale='l1' and False: at most 2.4e-7",
    ),
    *(
        Absent(name, "none", NONE)
        for name in ("delta_overlap", "delta_space", "fusion_study", "optimised_linear", "warp", "warp_training")
    ),
    Absent(
        "concrete",
        "tanganke/subspace_fusion 67f8450",
        "by hand, its mask and its merge with the same draws in float32: 1.2e-7 and 9.5e-7",
    ),
    *(Absent(name, "none", NONE) for name in ("diffora", "gazal-r1", "lora-limits", "periodic-lora", "queryable-lora")),
    Absent(
        "kappatune",
        "oswaldoludwig/kappaTune 3ce5a7e",
        "by hand, condition numbers of every matrix of a small GPT: 7.3e-7, and the same layers chosen",
    ),
    Absent(
        "lora-ggpo",
        "kohya-ss/sd-scripts",
        "the authors' code could not be had; the form of this port is held to its formula, without the port's missing scale",
    ),
    Absent(
        "pair-customization",
        "PairCustomization/PairCustomization 504ef1b",
        "by hand, its assignment of A with peft's layers, 20 rounds in float32: 2.5e-6",
    ),
    Absent(
        "ecotta",
        "Lily-Le/EcoTTA 85c1122, not of the authors",
        "by hand, through_frozen=True, float64, its two steps joined to one: 7e-16 over 20 steps; as released 0.25",
    ),
    Absent("halo", "IST-DASLab/HALO d8c1dc9b", "its kernels, which are the method, are for CUDA; nothing is compared"),
    Absent(
        "hypernetwork-tuning",
        "lorraine2/hypernet-hypertraining a6d6cb82",
        "for an old Python and autograd; nothing is compared",
    ),
)
