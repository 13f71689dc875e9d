"""What papers say of their methods, each with the comparison that would show it."""

from __future__ import annotations

from dataclasses import dataclass

from .judging import Judge, cheaper_step, early_ranking_misleads, less_state, level, lower, sooner


@dataclass(frozen=True)
class Claim:
    """A published statement.

    Attributes:
        method: of the catalog, whose paper says it.
        says: in our words.
        judge: None where no small model can tell; `why` then says the reason.
        tasks: that it is about; empty: all.
    """

    method: str
    says: str
    judge: Judge | None = None
    why: str = ""
    tasks: tuple[str, ...] = ()


LM = ("code-lm",)

CLAIMS = (
    Claim("adamw", "with decoupled decay, Adam competes with SGD on images", level("adamw", "sgd"), tasks=("digits",)),
    Claim("muon", "reaches a lower loss than AdamW in as many steps", lower("muon", "adamw")),
    Claim("lion", "reaches a lower loss than AdamW", lower("lion", "adamw")),
    Claim("lion", "keeps half of AdamW's state", less_state("lion", "adamw", 0.51)),
    Claim("adam-mini", "as good as AdamW", level("adam-mini", "adamw")),
    Claim("adam-mini", "keeps half of AdamW's state", less_state("adam-mini", "adamw", 0.55)),
    Claim("soap", "needs fewer steps than AdamW", lower("soap", "adamw")),
    Claim("turbo-muon", "as good as Muon with one iteration less", level("turbo-muon", "muon")),
    Claim("turbo-muon", "a cheaper update than Muon's", cheaper_step("turbo-muon", "muon")),
    Claim("polargrad", "better than Adam", lower("polargrad", "adamw")),
    Claim("polargrad", "better than Muon", lower("polargrad", "muon")),
    Claim("namo", "better than AdamW", lower("namo", "adamw")),
    Claim("namo", "better than Muon", lower("namo", "muon")),
    Claim("namo-d", "better than NAMO", lower("namo-d", "namo")),
    Claim("auon", "as good as Muon without orthogonalizing", level("auon", "muon")),
    Claim("auon", "a cheaper update than Muon's", cheaper_step("auon", "muon")),
    Claim("hybrid-auon", "as good as Muon", level("hybrid-auon", "muon")),
    Claim("lanton", "faster than a Muon without layers' own learning rates", lower("lanton", "muon")),
    Claim("stosignsgd", "better than SGD by signs", lower("stosignsgd", "signum")),
    Claim(
        "stosignsgd",
        "1.44 to 2.14 times as fast as AdamW in pre-training in FP8",
        why="weights are float32 here, and the claim is about formats in which AdamW fails",
    ),
    Claim("opt-amsgrad", "faster than AMSGrad", lower("opt-amsgrad", "amsgrad")),
    Claim(
        "experimental-adaptive-memory",
        "better than SGD with a constant momentum",
        lower("experimental-adaptive-memory", "sgd"),
    ),
    Claim("experimental-adaptive-memory", "better than AdamW with its own metric", lower("adaptive-memory-adamw", "adamw")),
    Claim("induced-metric", "about as good as AdamW", level("induced-metric", "adamw")),
    Claim("sophia", "reaches a lower loss than AdamW", lower("sophia", "adamw"), tasks=LM),
    Claim("shampoo", "needs fewer steps than methods that precondition by the diagonal", lower("shampoo", "adamw")),
    Claim("shampoo-4bit", "as good as with preconditioners of 32 bits", level("shampoo-4bit", "shampoo-32bit")),
    Claim("shampoo-4bit", "less state than with preconditioners of 32 bits", less_state("shampoo-4bit", "shampoo-32bit", 0.6)),
    Claim("shampoo-4bit", "better than the AdamW behind it", lower("shampoo-4bit", "adamw")),
    Claim("galore", "as good as Adam of full rank", level("galore", "adamw")),
    Claim("galore", "less state than Adam", less_state("galore", "adamw", 0.5)),
    Claim("natural-galore", "reaches a lower loss than GaLore", lower("natural-galore", "galore")),
    Claim("frugal", "better than GaLore", lower("frugal", "galore")),
    Claim("frugal", "as good as AdamW with a share of its state", level("frugal", "adamw")),
    Claim("frugal", "less than half of AdamW's state", less_state("frugal", "adamw", 0.5)),
    Claim("micro-adam", "as good as Adam", level("micro-adam", "adamw")),
    Claim("micro-adam", "less than half of the state of Adam in 8 bits", less_state("micro-adam", "adamw", 0.125)),
    Claim("m-fac", "better than SGD with momentum", lower("m-fac", "sgd")),
    Claim("efcp", "as good as M-FAC with a window that is not compressed", level("efcp", "m-fac")),
    Claim("efcp", "a tenth of M-FAC's state", less_state("efcp", "m-fac", 0.1)),
    Claim("mkor", "converges in fewer steps than first-order methods", lower("mkor", "sgd")),
    Claim("mkor", "converges in less time than first-order methods", sooner("mkor", "sgd")),
    Claim("eco", "as good as with a master copy of the weights", level("eco", "adamw")),
    Claim("badam", "as good as Adam on all parameters at once", level("badam", "adamw")),
    Claim("switch-ema", "better than the optimizer alone", lower("switch-ema", "adamw")),
    Claim("switch-ema", "better than an average beside the training", lower("switch-ema", "ema")),
    Claim(
        "sam",
        "generalizes better",
        lower("sam", "adamw"),
        why="held here to as many passes, where the paper gives it as many epochs, which cost twice as much",
    ),
    Claim("drop-muon", "faster than Muon in seconds", sooner("drop-muon", "muon")),
    Claim("across-scales", "a ranking in the middle of the runs misleads", early_ranking_misleads),
    Claim(
        "across-scales",
        "speed-ups of matrix rules over a tuned AdamW are at most 1.4 at 0.1B parameters and fall to 1.1 at 1.2B",
        why="no model here comes near these sizes",
    ),
    Claim(
        "braked-sgd",
        "keeps training with delayed gradients stable",
        why="no gradient is late here; `poise.training.Delayed` makes them so",
    ),
    Claim("trust-region", "converges at rates that its theorems give", why="a bound, not a comparison"),
    Claim("lion-k", "solves a problem with a bound on the weights", why="its tests show it; a loss does not"),
)
