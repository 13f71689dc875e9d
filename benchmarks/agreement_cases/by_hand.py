"""Methods whose published code was run beside poise by hand, or cannot be run here: what came out, or why not."""

from __future__ import annotations

from .case import Absent

NONE = "no code of the authors was found"
CUDA = "its kernels are for CUDA; nothing is compared"

ABSENT = (
    Absent(
        "shampoo",
        "facebookresearch/optimizers f606606",
        "by hand, 14 float32 steps, roots every 3, with and without Adam grafting: 2.4e-7",
    ),
    Absent(
        "shampoo-4bit",
        "Sike-Wang/low-bit-Shampoo fc46867b",
        "by hand, its CUDA quantizers replaced by poise's, 14 float64 steps: 1.5e-10 stored in 32 bits, 6.9e-10 in 4",
    ),
    Absent(
        "mkor",
        "Mohammad-Mozaffari/mkor 3a0e3bb2",
        "by hand, 14 float32 steps of linear layers and convolutions: 1.0e-7 of 0.34 moved",
    ),
    Absent(
        "galore", "jiaweizzhao/GaLore 2cc66f8", "by hand, 30 float32 steps at rank 8: 1.4e-6 within a period, 2.3e-6 over three"
    ),
    Absent("frugal", "fzmushko/FRUGAL c7ebe4c2", "by hand, singular vectors and blocks in both orders, period 10: 3.3e-6"),
    Absent("natural-galore", "selfsupervised-ai/Natural-GaLore e23336d7", "needs tensorly; nothing is compared"),
    Absent(
        "sophia",
        "Liuhong99/Sophia a7e15722",
        "by hand, 60 steps of SophiaG, an estimate every 10: 4.0e-15 in float64, 2.4e-6 in float32",
    ),
    Absent("badam", "Ledzy/BAdam bf989dc", "gives the first block one step less; nothing is compared"),
    Absent("alignment", "none", f"{NONE}; nothing is compared"),
    Absent(
        "gradnormlorp",
        "Jhhuangkay/Gradient-Weight-normalized-Low-rank-Projection",
        "its optimizer is not the paper's; nothing is compared",
    ),
    Absent(
        "m-fac",
        "IST-DASLab/M-FAC 8116367f",
        "for CUDA; its factorization written out by hand, 30 steps: 2.7e-15 in float64, 1.7e-6 in float32",
    ),
    Absent("m-fac-pruner", "IST-DASLab/M-FAC 8116367f", "for CUDA; nothing is compared"),
    Absent("micro-adam", "IST-DASLab/ISTA-DASLab-Optimizers 4c98e6e7", CUDA),
    Absent("efcp", "IST-DASLab/EFCP a33a3a57", "its buffers are for CUDA; nothing is compared"),
    Absent("eco", "none", f"{NONE}; nothing is compared"),
    Absent(
        "compact",
        "NitzanHod/compact a2871301",
        "by hand, layer and optimizer, 20 float64 steps at rank 0.5, a new projection every 4: 3.3e-16",
    ),
    Absent("halo", "IST-DASLab/HALO d8c1dc9b", CUDA),
    Absent("implicit-differentiation", "google/jaxopt 2de13bf0", "for JAX; nothing is compared"),
    Absent(
        "hypernetwork-tuning",
        "lorraine2/hypernet-hypertraining a6d6cb82",
        "for an old Python and autograd; nothing is compared",
    ),
)
