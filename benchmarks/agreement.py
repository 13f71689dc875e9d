"""How far poise's rules are from reference code on the same weights and gradients, as a table with the reasons.

    python benchmarks/agreement.py [--official DIR] [--rows adamw,lion] [--json] [--out FILE] [--page FILE]

README.md in this folder says what is compared and where to get the authors' repositories.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from agreement_cases import ABSENT, CASES
from agreement_cases.case import Absent, Case, difference
from agreement_cases.page import page, text
from agreement_cases.sources import Missing, reference

Entry = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    warnings.filterwarnings("ignore")  # what references say of torch's newer names
    logging.disable(logging.WARNING)
    entries: list[Entry] = []
    for case in CASES:
        if args.rows is None or case.rule in args.rows:
            started = time.perf_counter()
            entries.append(compare(case, args.official, args.backend))
            said = f"{case.rule} and {case.source}: {entries[-1]['difference']} {entries[-1]['failed'] or ''}"
            print(f"{said.rstrip()} ({time.perf_counter() - started:.0f} s)", file=sys.stderr)
    absent = [absence(one) for one in ABSENT if args.rows is None or one.rule in args.rows]
    whole = {"torch": torch.__version__, "backend": args.backend, "rows": entries, "absent": absent}
    if args.out is not None:
        args.out.write_text(json.dumps(whole, indent=2) + "\n")
    if args.page is not None:
        args.page.write_text(page(whole))
    print(json.dumps(whole, indent=2) if args.json else text(whole))
    return 1 if any(entry["status"] in ("broken", "failed") for entry in entries) else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Largest differences between poise's rules and reference code.")
    names = sorted({case.rule for case in CASES})
    parser.add_argument("--official", type=Path, metavar="DIR", help="checkouts of the authors' repositories, as owner+name")
    parser.add_argument("--rows", metavar="NAMES", help=f"only these methods, with commas: {', '.join(names)}")
    parser.add_argument("--backend", default="auto", help="of poise's optimizers; auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object in place of the table")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write that JSON object to FILE")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of the documentation to FILE")
    args = parser.parse_args(argv)
    if args.official is not None and not args.official.is_dir():
        parser.error(f"--official {args.official}: there is no such folder")
    args.rows = None if args.rows is None else [name.strip() for name in args.rows.split(",")]
    if strange := set(args.rows or ()) - {*names, *(one.rule for one in ABSENT)}:
        parser.error(f"--rows: unknown {', '.join(sorted(strange))}; known: {', '.join(names)}")
    return args


def compare(case: Case, official: Path | None = None, backend: str = "auto") -> Entry:
    """What was found.

    The status is "agrees", "broken" (the bound), "differs" (on purpose), "missing" (the reference) or "failed" (it, or poise).
    """
    problem = case.problem
    entry: Entry = {
        "rule": case.rule,
        "source": case.source,
        "reference": case.reference,
        "settings": case.settings,
        "version": None,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "steps": problem.steps,
        "difference": None,
        "sensitivity": None,
        "bound": case.bound,
        "status": "missing",
        "failed": None,
        "note": case.note,
    }
    try:
        with reference(case.source, official) as (module, entry["version"]):
            theirs = case.theirs(problem, module)
            if case.nudge:
                nudged = case.theirs(dataclasses.replace(problem, nudge=case.nudge), module)
                entry["sensitivity"] = {"nudge": case.nudge, "difference": difference(nudged, theirs)}
        entry["difference"] = difference(case.ours(problem, {"backend": backend}), theirs)
        if case.bound is None:
            entry["status"] = "differs"
        else:
            entry["status"] = "agrees" if entry["difference"] <= case.bound else "broken"
    except Missing as missing:
        entry["failed"] = str(missing)
    except Exception as error:  # of code that is not ours; the other rows are still to come
        said = (str(error).strip().splitlines() or [""])[0]
        entry |= {"status": "failed", "failed": f"{type(error).__name__}: {said}"}
    return entry


def absence(one: Absent) -> Entry:
    return {"rule": one.rule, "source": one.source, "why": one.why}


if __name__ == "__main__":
    sys.exit(main())
