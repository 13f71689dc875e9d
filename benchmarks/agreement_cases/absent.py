"""Methods that are not compared with anything: without published code, or with code that cannot be run here."""

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
    Absent("halo", "IST-DASLab/HALO d8c1dc9b", "its kernels, which are the method, are for CUDA; nothing is compared"),
    Absent(
        "hypernetwork-tuning",
        "lorraine2/hypernet-hypertraining a6d6cb82",
        "for an old Python and autograd; nothing is compared",
    ),
)
