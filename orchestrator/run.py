"""One run from its config to its report: open, evaluate, distil, evaluate, save, tell.

`potstill run`, a submitted run and every phase of the quickstart come through `execute`. What a run leaves behind is
true at any moment: status.json says where it stands, and a run that ended badly says why.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.buffer import Buffer
from orchestrator.chores import Chores
from orchestrator.footprint import Footprint
from orchestrator.launch import ACTOR_ENV, Site
from orchestrator.loop import distil
from orchestrator.offpolicy import OffPolicy
from orchestrator.prompts import PromptStream
from orchestrator.recorder import Recorder
from orchestrator.spending import in_all
from orchestrator.teachers import Faculty, teachers
from potstill.config import RunConfig
from potstill.environments import open_environment
from potstill.errors import NonFinite, PotstillError, RunError
from potstill.journal import Journal, Status, checkpoints, write_json
from potstill.planner import plan

KL_WINDOW_SHARE = 20  # reverse_kl_first and _last are means over this share of the steps: one step is noisy


async def execute(config: RunConfig, site: Site, journal: Journal) -> dict[str, Any]:
    """Run `config` on the processes of `site`, writing through `journal`. Returns report.json's content.

    Raises what ended it, after status.json says so: PotstillError (failed), CancelledError (cancelled).
    """
    try:
        report = await _executed(config, site, journal)
    except asyncio.CancelledError:
        journal.event("run.cancelled", "the run was stopped from outside", level="warn")
        journal.status(Status.CANCELLED)
        raise
    except PotstillError as error:
        _failed(journal, error)
        raise
    except Exception as error:
        _failed(journal, RunError(f"{type(error).__name__}: {error}"))
        raise
    journal.event("run.finished", "the run is complete", **_headline(report))
    journal.status(Status.SUCCEEDED)
    return report


async def _executed(config: RunConfig, site: Site, journal: Journal) -> dict[str, Any]:
    started = time.perf_counter()
    journal.status(Status.STARTING)
    write_json(journal.folder / "config.json", config.model_dump(mode="json"))
    write_json(journal.folder / "plan.json", plan(config).as_dict())
    environment = open_environment(config.data)
    with Footprint() as footprint:
        async with teachers(config, journal.folder, ACTOR_ENV) as faculty:
            _introduce(journal, faculty)
            crew = await site.open(config, faculty)
            journal.status(Status.RUNNING)
            journal.event("run.started", f"{config.method} on {config.data.kind}", steps=config.loop.steps)
            recorder = Recorder(journal=journal, config=config.loop)
            offpolicy = OffPolicy.of(config)
            chores = Chores(
                config, crew=crew, journal=journal, recorder=recorder, data=environment, offpolicy=offpolicy
            )
            prompts = PromptStream(
                environment,
                seed=config.seed,
                prompts_per_step=config.rollout.prompts_per_step,
                offpolicy=offpolicy,
            )
            await chores.before()
            await distil(crew, prompts, _buffer(config), recorder, chores)
            await chores.after()
            spent = in_all(await crew.spent())
    seconds = time.perf_counter() - started
    report = _report(config, recorder, chores, spent, peak=footprint.peak_bytes, seconds=seconds)
    write_json(journal.folder / "report.json", report)
    return report


def _introduce(journal: Journal, faculty: Faculty) -> None:
    """What was found of the teachers that were there before the run."""
    for name, found in faculty.probed.items():
        level = "warn" if found.notes else "info"
        journal.event("teacher.met", found.headline, level=level, name=name, **found.as_event())


def _buffer(config: RunConfig) -> Buffer:
    return Buffer(
        prompts_per_step=config.rollout.prompts_per_step,
        steps=config.loop.steps,
        max_staleness=config.loop.max_staleness,
        max_unscored_fraction=config.loop.max_unscored_fraction,
        version=0,
    )


def _report(
    config: RunConfig,
    recorder: Recorder,
    chores: Chores,
    spent: Mapping[str, Any],
    *,
    peak: int,
    seconds: float,
) -> dict[str, Any]:
    """DESIGN §8. What was not measured is NaN here and null on disk."""
    stages = dict(recorder.seconds)
    window = max(1, len(recorder.reverse_kl) // KL_WINDOW_SHARE)
    return {
        "run_id": config.name,
        "method": config.method,
        "engine": config.rollout.engine,
        "seed": config.seed,
        "steps": recorder.steps_done,
        "seconds_total": seconds,
        "seconds_by_stage": stages,
        "tokens_trained": recorder.tokens_trained,
        "tokens_per_second": recorder.tokens_trained / sum(stages.values()) if stages else math.nan,
        "student_before": chores.accuracy.get("before", math.nan),
        "student_after": chores.accuracy.get("after", math.nan),
        "teacher": chores.accuracy.get("teacher", math.nan),
        "metric": "held-out accuracy",
        "reverse_kl_first": statistics.fmean(recorder.reverse_kl[:window] or [math.nan]),
        "reverse_kl_last": statistics.fmean(recorder.reverse_kl[-window:] or [math.nan]),
        "weights_version": recorder.steps_done,
        "peak_rss_bytes": peak,
        **({"teacher_spent": dict(spent)} if spent else {}),
    }


def _headline(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("student_before", "student_after", "tokens_trained", "seconds_total")}


def _failed(journal: Journal, error: PotstillError) -> None:
    level = "error"
    kind = "run.diverged" if isinstance(error, NonFinite) else "run.failed"
    journal.event(kind, str(error), level=level, category=error.category)
    journal.status(Status.FAILED, error=error)


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint's model folder. Raises RunError when the run left none."""
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise RunError(f"{folder} holds no checkpoint")
    return found[-1] / "model"
