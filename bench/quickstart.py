"""The quickstart over seeds: does on-policy beat off-policy by more than the noise, and how long does it take?

    python -m bench.quickstart [--recipe opd] [--seeds 3] [--runs DIR]

Each seed warms its own student and distils it; the teacher is made once. Accuracies are on held-out items; the
margin is student minus SFT control, paired by seed, and its standard deviation is that of the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator import quickstart
from orchestrator.quickstart import Asked
from orchestrator.recipe_table import RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    compared = sorted(name for name, recipe in RECIPES.items() if recipe.control is not None)
    parser.add_argument("--recipe", default="opd", choices=compared)
    parser.add_argument("--engine", default=None, choices=["transformers", "vllm"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=None, help="where to keep the runs; default: nowhere")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        reports = []
        for seed in range(options.seeds):
            asked = Asked(name=options.recipe, engine=options.engine, seed=seed, runs=runs, quiet=True)
            reports.append(quickstart.run(asked))
            print(json.dumps(row(reports[-1])), file=sys.stderr)
    print(json.dumps(figures(options.recipe, reports), indent=2))


def figures(recipe: str, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    margins = [report["student_after"] - report["sft_control"]["student_after"] for report in reports]
    return {
        "recipe": recipe,
        "seeds": [row(report) for report in reports],
        "margin_mean": statistics.fmean(margins),
        "margin_sd": statistics.stdev(margins) if len(margins) > 1 else None,
        "rise_mean": statistics.fmean(report["student_after"] - report["student_before"] for report in reports),
        "share_of_teacher_min": min(report["student_after"] / report["teacher"] for report in reports),
        "peak_bytes_max": max(report["peak_rss_bytes"] for report in reports),
    }


def row(report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "seed": report["seed"],
        "student_before": report["student_before"],
        "student_after": report["student_after"],
        "sft_control": report["sft_control"]["student_after"],
        "teacher": report["teacher"],
        "tokens_trained": report["tokens_trained"],
        "sft_tokens_trained": report["sft_control"]["tokens_trained"],
        "reverse_kl": [report["reverse_kl_first"], report["reverse_kl_last"]],
        "seconds_distil": report["seconds_total"],
        "seconds_recipe": report["seconds_recipe"],
    }


if __name__ == "__main__":
    main()
