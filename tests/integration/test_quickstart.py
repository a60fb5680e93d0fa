"""Recipes of the quickstart, every phase, two steps each: they prepare, distil, compare and report.

Those that ask a black box are in test_black_box_runs.py.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.foreground import until_done
from orchestrator.quickstart import Quickstart
from orchestrator.recipe_table import RECIPES
from orchestrator.report import write_report
from potstill.display import make_display
from potstill.errors import ConfigError
from potstill.journal import read_jsonl, write_json

SHORT = ["loop.steps=2", "rollout.prompts_per_step=4", "rollout.sampling.max_new_tokens=12", "eval.items=8"]
SHORT += ["optim.warmup_steps=1", "learner.threads=1"]


def quickstart(name: str, runs: Path, *changes: str) -> dict[str, Any]:
    recipe = RECIPES[name]
    phases = dict.fromkeys([*recipe.prepared, *(phase.config for phase in recipe.runs)])
    with make_display(None, name, file=io.StringIO(), phases=phases) as display:
        started = Quickstart(recipe, seed=0, changes=[*SHORT, *changes], runs=runs, folder=runs / name, display=display)
        return until_done(started.run)


CONTROLLED = ["opd", "opsd"]
ALONE = ["cross_tokenizer", "two_teachers"]


@pytest.mark.parametrize("name", CONTROLLED)
def test_a_recipe_runs_every_phase_and_reports_it(name: str, tmp_path: Path):
    report = quickstart(name, tmp_path)
    assert report["steps"] == 2
    assert report["tokens_trained"] > 0
    assert 0 <= report["teacher"] <= 1
    assert report["prepared"].keys() == set(RECIPES[name].prepared)
    assert report["sft_control"]["tokens_trained"] > 0
    control = list(read_jsonl(tmp_path / name / "sft_control" / "metrics.jsonl"))
    assert control[-1]["tokens_trained"] >= report["tokens_trained"] or len(control) == 2
    prepared = {
        path.name.rsplit("-", 1)[0] for path in (tmp_path / "cache").glob("*-*") if (path / "status.json").exists()
    }
    assert prepared == set(RECIPES[name].prepared)
    samples = list(read_jsonl(tmp_path / name / "samples.jsonl"))
    assert all(token["teacher_logprob"] is not None for sample in samples for token in sample["tokens"])
    write_json(tmp_path / name / "report.json", report)
    write_report(tmp_path / name)
    assert "SFT control" in (tmp_path / name / "report.html").read_text()


@pytest.mark.parametrize("name", ALONE)
def test_a_recipe_without_a_control_is_compared_with_the_student_as_it_was(name: str, tmp_path: Path):
    report = quickstart(name, tmp_path)
    assert report["steps"] == 2
    assert "sft_control" not in report
    assert report["teacher"] == report["prepared"][RECIPES[name].teacher]
    write_json(tmp_path / name / "report.json", report)
    write_report(tmp_path / name)
    assert "SFT control" not in (tmp_path / name / "report.html").read_text()


def test_a_second_start_takes_the_preparations_from_the_cache(tmp_path: Path):
    quickstart("opsd", tmp_path)
    (tmp_path / "opsd").rename(tmp_path / "first")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("status.json")}
    quickstart("opsd", tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("status.json")} == before
    assert json.loads((tmp_path / "opsd" / "status.json").read_text())["status"] == "succeeded"


def test_a_phase_that_fails_leaves_its_page(tmp_path: Path):
    with pytest.raises(ConfigError, match="exceed the 13 positions"):
        quickstart("opsd", tmp_path, "rollout.max_prompt_tokens=1")
    (page,) = tmp_path.glob("cache/hint_student-*/report.html")
    assert "<h1>The run failed before its first step: " in page.read_text()
    assert not (tmp_path / "opsd").exists()
