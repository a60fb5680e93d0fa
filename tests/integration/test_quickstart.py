"""Recipes of the quickstart, every phase, two steps each: they prepare, distil, compare and report.

Most share their processes and a cache, as the phases of a recipe do. Those that ask a black box are in
test_black_box_runs.py.
"""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from orchestrator.foreground import until_done
from orchestrator.launch import Site
from orchestrator.recipe_table import RECIPES
from orchestrator.report import write_report
from potstill.errors import ConfigError
from potstill.journal import read_jsonl, write_json
from tests.quickstart_models import SHORT, quickstart

SHARED = pytest.mark.asyncio(loop_scope="session")
ENDS_S = 300.0  # a hundred beside other whole runs on two cores


def fail(runs: Path) -> None:
    starting = quickstart("opsd", runs, *SHORT, "rollout.max_prompt_tokens=1")
    with starting as started, pytest.raises(ConfigError, match="exceed the 13 positions"):
        until_done(started.run)


def test_a_phase_that_fails_leaves_its_page(tmp_path: Path):
    """As the command runs it: in a process of its own, which starts and ends all others."""
    process = multiprocessing.get_context("spawn").Process(target=fail, args=(tmp_path,))
    process.start()
    process.join(ENDS_S)
    assert process.exitcode == 0
    (page,) = tmp_path.glob("cache/hint_student-*/report.html")
    assert "<h1>The run failed before its first step: " in page.read_text()
    assert not (tmp_path / "opsd").exists()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


async def run(name: str, runs: Path, opened: Site) -> dict[str, Any]:
    with quickstart(name, runs, *SHORT) as started:
        return await started.run_on(opened)


def check_every_phase(name: str, runs: Path, report: dict[str, Any]) -> None:
    assert report["steps"] == 2
    assert report["tokens_trained"] > 0
    assert 0 <= report["teacher"] <= 1
    assert report["prepared"].keys() == set(RECIPES[name].prepared)
    assert report["sft_control"]["tokens_trained"] > 0
    control = list(read_jsonl(runs / name / "sft_control" / "metrics.jsonl"))
    assert control[-1]["tokens_trained"] >= report["tokens_trained"] or len(control) == 2
    samples = list(read_jsonl(runs / name / "samples.jsonl"))
    assert all(token["teacher_logprob"] is not None for sample in samples for token in sample["tokens"])
    write_json(runs / name / "report.json", report)
    write_report(runs / name)
    assert "SFT control" in (runs / name / "report.html").read_text()


def cached(runs: Path) -> dict[Path, int]:
    """When each preparation was done."""
    return {path.parent: path.stat().st_mtime_ns for path in (runs / "cache").rglob("status.json")}


def check_prepared(name: str, runs: Path) -> None:
    assert {path.name.rsplit("-", 1)[0] for path in cached(runs)} == set(RECIPES[name].prepared)


@SHARED
async def test_a_recipe_runs_every_phase_and_reports_it(runs: Path, opened: Site):
    report = await run("opd", runs, opened)
    check_every_phase("opd", runs, report)
    check_prepared("opd", runs)


@SHARED
async def test_a_second_start_takes_the_preparations_from_the_cache(opened: Site, tmp_path: Path):
    check_every_phase("opsd", tmp_path, await run("opsd", tmp_path, opened))
    check_prepared("opsd", tmp_path)
    (tmp_path / "opsd").rename(tmp_path / "first")
    before = cached(tmp_path)
    await run("opsd", tmp_path, opened)
    assert cached(tmp_path) == before
    assert json.loads((tmp_path / "opsd" / "status.json").read_text())["status"] == "succeeded"


@SHARED
@pytest.mark.parametrize("name", ["cross_tokenizer", pytest.param("two_teachers", marks=pytest.mark.long)])
async def test_a_recipe_without_a_control_is_compared_with_the_student_as_it_was(name: str, runs: Path, opened: Site):
    report = await run(name, runs, opened)
    assert report["steps"] == 2
    assert "sft_control" not in report
    assert report["teacher"] == report["prepared"][RECIPES[name].teacher]
    write_json(runs / name / "report.json", report)
    write_report(runs / name)
    assert "SFT control" not in (runs / name / "report.html").read_text()
