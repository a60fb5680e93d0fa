"""`potstill quickstart`: a recipe is a few runs in a row, on the same processes, each a shipped config.

    preparations, in the order of their needs ─► distil ─► control

Preparations are cached by the content of everything that decides them; the distillation and its control never are.
Each phase is an ordinary run, and `potstill run deploy/recipes/…` runs it alone; one that ends badly leaves its page.
Which runs make up a recipe is in recipe_table.py; nothing here knows a recipe by its name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.chat_endpoint import answering
from orchestrator.footprint import Footprint
from orchestrator.foreground import until_done
from orchestrator.launch import ACTOR_ENV, Site, site
from orchestrator.recipe_table import PREPARATIONS, RECIPES, Phase, Recipe
from orchestrator.report import page_of_a_bad_ending, write_report
from orchestrator.run import execute, last_checkpoint
from potstill import __version__, recipes
from potstill.config import RunConfig, ScratchConfig
from potstill.config_file import load, read_mapping
from potstill.display import Display, make_display
from potstill.environments import open_environment
from potstill.errors import ConfigError
from potstill.journal import Journal, Status, write_json
from potstill.metrics import METRICS, number

TOKENIZER_PROMPTS = 512  # training prompts whose text the tokenizer is trained on
UNDECIDED = "unknown"  # in place of what a recipe has yet to make


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What `potstill quickstart` was asked for. Raises ConfigError for a recipe that nobody knows."""

    name: str
    engine: str | None
    seed: int
    runs: Path
    quiet: bool

    def __post_init__(self) -> None:
        if self.name not in RECIPES:
            raise ConfigError(f"recipe {self.name!r} is not known; known: {', '.join(RECIPES)}")

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.name]

    @property
    def folder(self) -> Path:
        return self.runs / ("quickstart" if self.name == "opd" else f"quickstart-{self.name}")


def run(asked: Asked) -> dict[str, Any]:
    """Run the recipe into its folder; an earlier result there is moved aside. Returns report.json."""
    _move_aside(asked.folder)
    with _opened(asked, [*asked.recipe.prepared, *(phase.config for phase in asked.recipe.runs)]) as quickstart:
        report = until_done(quickstart.run)
    report["recipe"] = asked.name
    write_json(asked.folder / "report.json", report)
    write_report(asked.folder)
    return report


def make_models(asked: Asked) -> dict[str, Any]:
    """Make what the recipe begins with and lay it into `<runs>/models`. Returns folder and accuracy of each, by name;
    an accuracy is None where none was measured."""
    with _opened(asked, asked.recipe.prepared) as quickstart:
        return until_done(quickstart.make_models)


@contextlib.contextmanager
def _opened(asked: Asked, phases: Sequence[str]) -> Iterator[Quickstart]:
    title, file = f"potstill quickstart: {asked.name}", sys.stderr if asked.quiet else sys.stdout
    changes = [f"rollout.engine={asked.engine}"] if asked.engine else []
    with make_display(None, title, file=file, phases=dict.fromkeys(phases)) as display:
        yield Quickstart(
            asked.recipe, seed=asked.seed, changes=changes, runs=asked.runs, folder=asked.folder, display=display
        )


def filled(phase: Phase, *, folders: Mapping[str, Path], urls: Mapping[str, str]) -> Iterator[str]:
    """The changes that a phase's config needs, when its preparations left these folders and answer at these URLs."""
    for setting, name in phase.models.items():
        yield f"{setting}={last_checkpoint(folders[name])}"
    for table, name in phase.apis.items():
        yield f"{table}.url={urls[name]}"
        yield f"{table}.answers={folders[name] / 'answers.sqlite'}"  # another model's would be other answers


class Quickstart:
    """One start of one recipe."""

    def __init__(
        self, recipe: Recipe, *, seed: int, changes: list[str], runs: Path, folder: Path, display: Display
    ) -> None:
        self._recipe = recipe
        self._seed = seed
        self._folder = folder
        self._cache = runs / "cache"
        self._shelf = runs / "models"  # what was prepared, under plain names: `potstill serve --models`
        self._display = display
        self._changes = changes  # to every phase alike
        self._folders: dict[str, Path] = {}  # of the preparations that are made
        self._urls: dict[str, str] = {}  # of those that answer
        self._answering = contextlib.AsyncExitStack()

    async def run(self) -> dict[str, Any]:
        """All phases, on processes of its own, which end with it."""
        started = time.perf_counter()
        async with site(self._undecided(self._recipe.distil)) as opened:
            report = await self.run_on(opened)
        return {**report, "seconds_recipe": time.perf_counter() - started}

    async def run_on(self, opened: Site) -> dict[str, Any]:
        """All phases; the report of the distillation with those of its preparations and control folded in."""
        with Footprint() as footprint:
            async with self._answering:
                await self.prepare(opened)
                report = await self._distil(opened)
        report["peak_rss_bytes"] = footprint.peak_bytes
        return report

    async def make_models(self) -> dict[str, Any]:
        """The preparations alone, on processes of their own. Folder and accuracy of each model, by the name it has."""
        async with site(self._undecided(self._recipe.distil)) as opened, self._answering:
            await self.prepare(opened)
        return {
            self._place(name).name: {"folder": str(self._place(name)), "accuracy": _accuracy(folder)}
            for name, folder in self._folders.items()
        }

    async def prepare(self, opened: Site) -> None:
        """Make what the recipe needs, where the cache has it not, and lay a copy of each model on the shelf."""
        for name in self._recipe.prepared:
            self._folders[name] = await self._prepare(opened, name)
            _copy(last_checkpoint(self._folders[name]), self._place(name))

    def _place(self, name: str) -> Path:
        """Where the model of a preparation is laid: `potstill serve --models` knows it by this folder's name."""
        return self._shelf / name.replace("_", "-")

    async def _distil(self, opened: Site) -> dict[str, Any]:
        recipe = self._recipe
        where = [f"name={self._folder.name}", f"runs={self._folder.parent}"]
        report = await self._phase(opened, recipe.distil.config, recipe.distil, where)
        report["prepared"] = {name: _accuracy(folder) for name, folder in self._folders.items()}
        if recipe.teacher is not None:
            report["teacher"] = report["prepared"][recipe.teacher]
        if recipe.control is not None:
            budget = f"loop.max_train_tokens={report['tokens_trained']}"
            with page_of_a_bad_ending(self._folder):  # the distillation stands without its control
                where = [budget, "name=sft_control", f"runs={self._folder}"]
                against = await self._phase(opened, recipe.control.config, recipe.control, where)
            report["sft_control"] = {
                key: against[key] for key in ("student_after", "tokens_trained", "steps", "seconds_total")
            }
            report["teacher"] = against["teacher"] if recipe.teacher is None else report["teacher"]
        return report

    async def _prepare(self, opened: Site, name: str) -> Path:
        """The folder of the run that makes it, from the cache when everything that decides it is the same."""
        phase, key = PREPARATIONS[name], self._key(name)
        folder = self._cache / f"{name}-{key}"
        if not _succeeded(folder):
            shutil.rmtree(folder, ignore_errors=True)
            where = [f"name={folder.name}", f"runs={self._cache}"]
            if phase.scratch is not None:
                start, undecided = self._cache / f"scratch-{key}", self._undecided(phase)
                texts = _texts(undecided)
                await opened.create(start, _architecture(phase.scratch), texts=texts, seed=undecided.seed)
                where.append(f"student.model={start}")
            await self._phase(opened, name, phase, where)
        return folder

    async def _phase(self, opened: Site, title: str, phase: Phase, where: Sequence[str]) -> dict[str, Any]:
        for name in phase.apis.values():
            if name not in self._urls:
                self._urls[name] = await self._answer(self._folders[name])
        config = self._config(phase, [*filled(phase, folders=self._folders, urls=self._urls), *where])
        self._display.begin(title, config.loop.steps)
        journal = Journal(Path(config.runs) / config.name)
        with page_of_a_bad_ending(journal.folder), contextlib.closing(journal):
            journal.listen(self._display)
            return await execute(config, opened, journal)

    async def _answer(self, folder: Path) -> str:
        """The URL at which the model of a preparation answers until this recipe ends."""
        endpoint = answering(last_checkpoint(folder), log=folder / "answering.log", environment=ACTOR_ENV)
        return await self._answering.enter_async_context(endpoint)

    def _key(self, name: str) -> str:
        phase = PREPARATIONS[name]
        undecided = self._undecided(phase).model_copy(update={"runs": str(self._cache)})
        made_from = "" if phase.scratch is None else _architecture(phase.scratch).model_dump_json()
        return _digest(made_from, undecided.model_dump_json(), *map(self._key, phase.needs))

    def _undecided(self, phase: Phase) -> RunConfig:
        """With everything but what other phases bring."""
        settings = ["student.model", *phase.models, *(f"{table}.url" for table in phase.apis)]
        return self._config(phase, [f"{setting}={UNDECIDED}" for setting in settings])

    def _config(self, phase: Phase, changes: Sequence[str]) -> RunConfig:
        seed = self._seed if phase.seed is None else phase.seed
        changes = [f"seed={seed}", *phase.changes, *self._changes, *changes]
        return load(recipes.folder() / f"{phase.config}.toml", changes)


def summary(report: Mapping[str, Any], runs: Path) -> str:
    """Three lines for the terminal."""
    control = number(report.get("sft_control") or {}, "student_after")
    against = "" if control is None else f"   sft control {control:.1%}"
    return (
        f"student {report['student_before']:.1%} -> {report['student_after']:.1%}"
        f"{against}   teacher {METRICS['accuracy'].show(number(report, 'teacher'))}\n"
        f"{report['tokens_trained']:,} tokens trained in {report['seconds_total']:.0f} s; everything took"
        f" {report['seconds_recipe']:.0f} s and at most {report['peak_rss_bytes'] / 2**30:.1f} GiB\n"
        f"report: {runs / report['run_id'] / 'report.html'}"
    )


def shelf_summary(made: Mapping[str, Any]) -> str:
    """A line for each model that was made."""
    return "\n".join(f"{METRICS['accuracy'].show(one['accuracy'])}   {one['folder']}" for one in made.values())


def _architecture(table: str) -> ScratchConfig:
    return ScratchConfig.model_validate(read_mapping(recipes.folder() / "models.toml")[table])


def _texts(config: RunConfig) -> list[str]:
    """What the tokenizer is trained on: questions and the roles' names. Solutions are written in the same bytes."""
    environment = open_environment(config.data)
    prompts = [environment.train(index) for index in range(TOKENIZER_PROMPTS)]
    return [f"user\n{message.content}\nassistant\n" for prompt in prompts for message in prompt.messages]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join([__version__, *parts]).encode()).hexdigest()[:12]


def _succeeded(folder: Path) -> bool:
    status = folder / "status.json"
    return status.exists() and json.loads(status.read_text())["status"] == Status.SUCCEEDED.value


def _copy(model: Path, place: Path) -> None:
    """Put a copy of a model folder in the place of an earlier one."""
    fresh = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.copytree(model, fresh)
    shutil.rmtree(place, ignore_errors=True)
    fresh.rename(place)


def _accuracy(folder: Path) -> float | None:
    """Of what a run made, where it was measured."""
    return number(json.loads((folder / "report.json").read_text()), "student_after")


def _move_aside(folder: Path) -> None:
    """An earlier run keeps everything it has, under its name and the time it was begun."""
    if folder.exists():
        begun = time.strftime("%Y%m%d-%H%M%S", time.localtime(folder.stat().st_mtime))
        folder.rename(folder.with_name(f"{folder.name}-{begun}"))
