"""The scale: every method under the same budget, on the same seeds, to the end of its schedule, with how sure the answer is.

    from pathlib import Path
    from poise import catalog
    from poise.compare import Journal, Settings, compare, tasks
    methods = {name: catalog.get(name) for name in ("adamw", "lion", "muon")}
    results = compare(tasks.load("code-lm"), methods, Settings(trials=6, seeds=5), Journal(Path("study.db")))
    print(results.verdict.sentence)

Needs `pip install "poise[compare]"`.
"""

from __future__ import annotations

from poise.compare.entries import Entry
from poise.compare.journal import Journal
from poise.compare.results import Results, Settings
from poise.compare.study import compare

__all__ = ["Entry", "Journal", "Results", "Settings", "compare"]
