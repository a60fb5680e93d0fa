"""`potstill quickstart`: a recipe is a few runs in a row, on the same processes, each a shipped config.

  opd    scratch teacher ─► teacher (sft) ─┐
         scratch student ─► warm (sft) ────┼─► opd ──► sft_control (from the same warm student, as many tokens)
  opsd   scratch student ─► hint (sft) ────┴─► opsd ─► sft_control (on what the hinted student writes)

Preparations are cached by the content of everything that decides them; the distillation and its control never are.
Each phase is an ordinary run, and `potstill run deploy/recipes/…` runs it alone; one that ends badly leaves its page.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.footprint import Footprint
from orchestrator.foreground import until_done
from orchestrator.launch import Site, site
from orchestrator.report import page_of_a_bad_ending, write_report
from orchestrator.run import execute, last_checkpoint
from potstill import __version__, recipes
from potstill.config import RunConfig, ScratchConfig
from potstill.config_file import load, read_mapping
from potstill.display import Display, make_display
from potstill.environments import open_environment
from potstill.errors import ConfigError
from potstill.journal import Journal, Status, write_json

TOKENIZER_PROMPTS = 512  # training prompts whose text the tokenizer is trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Which shipped configs, in which order. `prepared` maps a config to the scratch model that it starts from."""

    prepared: Mapping[str, str]  # recipe file → table of models.toml
    student: str  # the preparation that the distillation starts from
    teacher: str | None  # the preparation that teaches; None: the student itself
    distil: str
    control: str


RECIPES = {
    "opd": Recipe(
        prepared={"teacher": "teacher", "warm_student": "student"},
        student="warm_student",
        teacher="teacher",
        distil="opd",
        control="sft_control",
    ),
    "opsd": Recipe(
        prepared={"hint_student": "hint_student"},
        student="hint_student",
        teacher=None,
        distil="opsd",
        control="opsd_sft_control",
    ),
}


def run(name: str, *, engine: str | None, seed: int, runs: Path, quiet: bool) -> dict[str, Any]:
    """Run the recipe `name` into `<runs>/quickstart`; an earlier result there is moved aside. Returns report.json."""
    if name not in RECIPES:
        raise ConfigError(f"recipe {name!r} is not known; known: {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    folder = runs / ("quickstart" if name == "opd" else f"quickstart-{name}")
    _move_aside(folder)
    phases = dict.fromkeys([*recipe.prepared, recipe.distil, recipe.control])
    with make_display(
        None, f"potstill quickstart: {name}", file=sys.stderr if quiet else sys.stdout, phases=phases
    ) as display:
        changes = [f"rollout.engine={engine}"] if engine else []
        quickstart = Quickstart(recipe, seed=seed, changes=changes, runs=runs, folder=folder, display=display)
        report = until_done(quickstart.run)
    report["recipe"] = name
    write_json(folder / "report.json", report)
    write_report(folder)
    return report


class Quickstart:
    """One start of one recipe."""

    def __init__(
        self, recipe: Recipe, *, seed: int, changes: list[str], runs: Path, folder: Path, display: Display
    ) -> None:
        self._recipe = recipe
        self._seed = seed
        self._folder = folder
        self._cache = runs / "cache"
        self._display = display
        self._changes = changes  # to every phase alike

    async def run(self) -> dict[str, Any]:
        """All phases; the report of the distillation with those of its preparations and control folded in."""
        started = time.perf_counter()
        first = self._config(self._recipe.distil, ["student.model=unknown", *self._teacher("unknown")])
        with Footprint() as footprint:
            async with site(first) as opened:
                models = {}
                for phase, scratch in self._recipe.prepared.items():
                    models[phase] = await self._prepare(opened, phase, scratch)
                report = await self._distil(opened, models)
        report["peak_rss_bytes"] = footprint.peak_bytes
        report["seconds_recipe"] = time.perf_counter() - started
        return report

    async def _distil(self, opened: Site, models: Mapping[str, Path]) -> dict[str, Any]:
        recipe = self._recipe
        where = [f"student.model={models[recipe.student]}"]
        where += self._teacher(str(models[recipe.teacher])) if recipe.teacher else []
        main = self._config(recipe.distil, [*where, f"name={self._folder.name}", f"runs={self._folder.parent}"])
        report = await self._phase(opened, recipe.distil, main)
        budget = f"loop.max_train_tokens={report['tokens_trained']}"
        control = self._config(recipe.control, [*where, budget, "name=sft_control", f"runs={self._folder}"])
        with page_of_a_bad_ending(self._folder):  # the distillation stands without its control
            against = await self._phase(opened, recipe.control, control)
        report["sft_control"] = {
            key: against[key] for key in ("student_after", "tokens_trained", "steps", "seconds_total")
        }
        report["teacher"] = against["teacher"]
        return report

    async def _prepare(self, opened: Site, phase: str, scratch: str) -> Path:
        """The model folder that the phase makes, from the cache when everything that decides it is the same."""
        architecture = ScratchConfig.model_validate(read_mapping(recipes.folder() / "models.toml")[scratch])
        undecided = self._config(phase, ["student.model=unknown", f"runs={self._cache}"])
        key = _key(architecture.model_dump_json(), undecided.model_dump_json())
        folder = self._cache / f"{phase}-{key}"
        if not _succeeded(folder):
            start = self._cache / f"scratch-{key}"
            shutil.rmtree(folder, ignore_errors=True)
            await opened.create(start, architecture, texts=_texts(undecided), seed=undecided.seed)
            changes = [f"student.model={start}", f"name={folder.name}", f"runs={self._cache}"]
            await self._phase(opened, phase, self._config(phase, changes))
        return last_checkpoint(folder)

    async def _phase(self, opened: Site, phase: str, config: RunConfig) -> dict[str, Any]:
        self._display.begin(phase, config.loop.steps)
        journal = Journal(Path(config.runs) / config.name)
        with page_of_a_bad_ending(journal.folder), contextlib.closing(journal):
            journal.listen(self._display)
            return await execute(config, opened, journal)

    def _config(self, recipe: str, changes: list[str]) -> RunConfig:
        seed = [] if recipe == self._recipe.teacher else [f"seed={self._seed}"]
        return load(recipes.folder() / f"{recipe}.toml", [*seed, *self._changes, *changes])

    def _teacher(self, model: str) -> list[str]:
        return [f"teacher.model={model}"] if self._recipe.teacher else []


def summary(report: Mapping[str, Any], runs: Path) -> str:
    """Three lines for the terminal."""
    control = report["sft_control"]
    return (
        f"student {report['student_before']:.1%} -> {report['student_after']:.1%}"
        f"   sft control {control['student_after']:.1%}   teacher {report['teacher']:.1%}\n"
        f"{report['tokens_trained']:,} tokens trained in {report['seconds_total']:.0f} s; everything took"
        f" {report['seconds_recipe']:.0f} s and at most {report['peak_rss_bytes'] / 2**30:.1f} GiB\n"
        f"report: {runs / report['run_id'] / 'report.html'}"
    )


def _texts(config: RunConfig) -> list[str]:
    """What the tokenizer is trained on: questions and the roles' names. Solutions are written in the same bytes."""
    environment = open_environment(config.data)
    prompts = [environment.train(index) for index in range(TOKENIZER_PROMPTS)]
    return [f"user\n{message.content}\nassistant\n" for prompt in prompts for message in prompt.messages]


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join([__version__, *parts]).encode()).hexdigest()[:12]


def _succeeded(folder: Path) -> bool:
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["status"] == Status.SUCCEEDED.value


def _move_aside(folder: Path) -> None:
    """An earlier run keeps everything it has, under its name and the time it was begun."""
    if folder.exists():
        begun = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
        folder.rename(folder.with_name(f"{folder.name}-{begun}"))
