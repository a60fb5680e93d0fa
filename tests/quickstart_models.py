"""The quickstart's recipes, and the models that it prepares for `opd`, as a service is given them."""

from __future__ import annotations

import io
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.foreground import until_done
from orchestrator.quickstart import Quickstart
from orchestrator.recipe_table import RECIPES
from potstill import recipes
from potstill.display import make_display
from potstill.processes import end_with_parent

SHORT = ["loop.steps=2", "rollout.prompts_per_step=4", "rollout.sampling.max_new_tokens=12", "eval.items=8"]
SHORT += ["optim.warmup_steps=1", "learner.threads=1"]
OPD = recipes.folder() / "opd.toml"
STUDENT = "student.model=warm-student"  # of OPD, as a service of these models knows it
TEACHER = "teacher.model=teacher"
CHECKOUT = Path("runs")  # where `make quickstart` prepares, and what it has prepared is found


@contextmanager
def quickstart(name: str, runs: Path, *changes: str) -> Iterator[Quickstart]:
    recipe = RECIPES[name]
    phases = dict.fromkeys([*recipe.prepared, *(phase.config for phase in recipe.runs)])
    with make_display(None, name, file=io.StringIO(), phases=phases) as display:
        yield Quickstart(recipe, seed=0, changes=[*changes], runs=runs, folder=runs / name, display=display)


def shelf(runs: Path, *changes: str) -> Path:
    """The folder of the models with which OPD begins, prepared by the quickstart's own runs."""
    process = multiprocessing.get_context("spawn").Process(target=_prepare, args=(runs, *changes))
    process.start()
    process.join()
    assert process.exitcode == 0
    return runs / "models"


def _prepare(runs: Path, *changes: str) -> None:
    """In a process of its own, with which its Ray ends."""
    end_with_parent(os.getppid())

    with quickstart("opd", runs, *changes) as recipe:
        until_done(recipe.make_models)
