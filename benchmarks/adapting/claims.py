"""What papers say of their adapters, each with the comparison that would show it."""

from __future__ import annotations

from league.claims import Claim
from league.judging import Finding, Judge, level, lower

from poise.compare.digits import spread
from poise.compare.results import Results
from poise.compare.statistics import paired

from .forgetting import Losses, forgotten
from .studies import PROSE


def forgets_less(ours: str, theirs: str, losses: Losses) -> Judge:
    """The loss on what was read before rises less."""

    def judge(_: Results) -> Finding:
        found = paired(forgotten(losses, ours), forgotten(losses, theirs))
        if found is None or found.low is None or found.high is None:
            return Finding("not judged", "one of the two diverged on a seed")
        outcome = "held" if found.high < 0 else "contradicted" if found.low > 0 else "not seen"
        return Finding(outcome, f"what {ours} forgets minus what {theirs} does: {spread(found, sign='+')}")

    return judge


def claims(losses: Losses) -> tuple[Claim, ...]:
    """All of them; `losses` are those on Python of a model that has read prose since; empty where they are not known."""
    less, why = (forgets_less("kappatune", "lora", losses), "") if losses else (None, "what is forgotten was not measured")
    return (*CLAIMS, Claim("kappatune", "forgets less than LoRA beside every layer", less, why, (PROSE.task,)))


CLAIMS = (
    Claim("lora", "on a par with full fine-tuning, or better", level("lora", "adamw")),
    Claim("lora", "with the scale of rsLoRA, no worse than with LoRA's", level("rslora", "lora")),
    Claim("dora", "better than LoRA", lower("dora", "lora")),
    Claim("altlora", "better than LoRA trained by AdamW", lower("altlora", "lora")),
    Claim("altlora", "the same, both factors in each step as its code has it", lower("altlora-joint", "lora")),
    Claim("altlora-plus", "better than LoRA trained by AdamW", lower("altlora-plus", "lora")),
    Claim("altlora-plus", "the same, both factors in each step as its code has it", lower("altlora-plus-joint", "lora")),
    Claim("lora-sb", "better than LoRA with 27 to 90 times fewer parameters", lower("lora-sb-small", "lora")),
    Claim("goat", "better than LoRA", lower("goat", "lora")),
    Claim("goat", "closes the gap to full fine-tuning", level("goat", "adamw")),
    Claim("periodic-lora", "learns more than LoRA in the same memory", lower("periodic-lora", "lora")),
    Claim("compacter", "on a par with full fine-tuning, or better", level("compacter", "adamw")),
    Claim("lora-ggpo", "better than LoRA", lower("lora-ggpo", "lora")),
    Claim("queryable-lora", "better than LoRA with about as many parameters", lower("queryable-lora", "lora")),
    Claim("diffora", "better than LoRA beside every layer", lower("diffora", "lora")),
    Claim(
        "pair-customization",
        "separates style from content",
        why="its two spaces train as one here, since no task comes in pairs; its tests plant such a pair",
    ),
    Claim("ecotta", "adapts to what it meets, without labels", why="nothing here meets a change without labels; its tests do"),
    Claim("gazal-r1", "two stages beat larger models on medical questions", why="a recipe for 32 billion parameters"),
    Claim("lora-limits", "large norms of adapters make faster algorithms impossible", why="a theorem, not a comparison"),
)
