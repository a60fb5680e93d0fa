"""Recipes of the quickstart, one after another: how far each takes its student, beside the student as it was.

    python -m bench.recipes seqkd soda [--seed 0] [--runs DIR]

One JSON object on stdout, by recipe. Accuracies are of held-out items; `prepared` has those of everything that was made
first, `sft_control` that of plain supervised training from the same student where the recipe has one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import quickstart
from orchestrator.quickstart import Asked
from orchestrator.recipe_table import RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=None, help="where to keep the runs; default: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for name in options.recipes:
            runs = options.runs or Path(scratch)
            asked = Asked(name=name, engine=None, seed=options.seed, runs=runs, quiet=True)
            found[name] = row(quickstart.run(asked))
            print(json.dumps({name: found[name]}), file=sys.stderr)
    print(json.dumps(found, indent=2))


def row(report: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("seed", "student_before", "student_after", "teacher", "tokens_trained", "prepared", "seconds_total")
    return {
        **{key: report[key] for key in kept},
        "sft_control": report.get("sft_control"),
        "teacher_spent": report.get("teacher_spent"),
    }


if __name__ == "__main__":
    main()
