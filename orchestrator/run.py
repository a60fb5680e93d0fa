"""One run from its config to its report: attempts, until one comes to the end.

`potstill run`, a submitted run and every phase of the quickstart come through `execute`. What a run leaves behind is
true at any moment: status.json says where it stands, and a run that ended badly says why.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.attempt import Attempt
from orchestrator.buffer import Closed
from orchestrator.chores import Chores
from orchestrator.exposition import exposed
from orchestrator.footprint import Footprint
from orchestrator.launch import ACTOR_ENV, Site
from orchestrator.memory import KERNEL
from orchestrator.pulse import ray_pulse
from orchestrator.recorder import Recorder
from orchestrator.stopping import unless_asked
from orchestrator.tasks import until
from orchestrator.teachers import Faculty, teachers
from potstill.config import RunConfig
from potstill.errors import ChunkLost, NonFinite, PotstillError, RunError, WorkerLost
from potstill.fencing import hold
from potstill.journal import Journal, Status, checkpoints, write_json
from potstill.planner import plan

KL_WINDOW_SHARE = 20  # reverse_kl_first and _last are means over this share of the steps: one step is noisy


async def execute(
    config: RunConfig, site: Site, journal: Journal, stopping: asyncio.Event | None = None
) -> dict[str, Any]:
    """Run `config` on the processes of `site`, writing through `journal`. Returns report.json's content.

    A folder that holds checkpoints and scored rollouts goes on from them; setting `stopping` has the run leave a
    checkpoint of its steps and end. Raises what ended it, after status.json says so: PotstillError (failed), Closed and
    CancelledError (cancelled).
    """
    try:
        with hold(journal.folder), exposed(journal, config):
            report = await until(
                _executed(config, site, journal, stopping or asyncio.Event()), ray_pulse(), KERNEL.watch()
            )
    except Closed:
        journal.event("run.stopped", "the run was asked to stop; go on with --resume")
        journal.status(Status.CANCELLED)
        raise
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


async def _executed(config: RunConfig, site: Site, journal: Journal, stopping: asyncio.Event) -> dict[str, Any]:
    journal.status(Status.STARTING)
    write_json(journal.folder / "config.json", config.model_dump(mode="json"))
    write_json(journal.folder / "plan.json", plan(config).as_dict())
    with Footprint() as footprint:
        attempt = await _attempts(config, site, journal, stopping)
    report = _report(config, attempt.recorder, attempt.chores, attempt.spent, peak=footprint.peak_bytes)
    write_json(journal.folder / "report.json", report)
    return report


async def _attempts(config: RunConfig, site: Site, journal: Journal, stopping: asyncio.Event) -> Attempt:
    """Attempt after attempt, each from the newest sound checkpoint, until one comes to the run's end.

    What was lost is begun anew: the learner's processes, or the teachers'. Raises the loss when several come in a row
    without a step between them.
    """
    losses = 0
    async with contextlib.AsyncExitStack() as stack:
        faculty: Faculty | None = None
        while True:
            attempt, steps = Attempt(config, site, journal, stopping), journal.num_steps
            try:
                if faculty is None or not faculty.alive:
                    await stack.aclose()
                    meeting = stack.enter_async_context(teachers(config, journal.folder, ACTOR_ENV))
                    faculty = await unless_asked(stopping, meeting)
                    _introduce(journal, faculty)
                await attempt.run(faculty)
            except (WorkerLost, ChunkLost) as error:
                losses = 1 if journal.num_steps > steps else losses + 1
                if losses > config.loop.restarts:
                    raise
                journal.event("run.recovering", f"{error}; going on from the last checkpoint", level="warn")
                journal.status(Status.RECOVERING)
                await site.dismiss_learners()
            else:
                return attempt


def _introduce(journal: Journal, faculty: Faculty) -> None:
    """What was found of the teachers that were there before the run."""
    for name, found in faculty.probed.items():
        level = "warn" if found.notes else "info"
        journal.event("teacher.met", found.headline, level=level, name=name, **found.as_event())


def _report(
    config: RunConfig,
    recorder: Recorder,
    chores: Chores,
    spent: Mapping[str, Any],
    *,
    peak: int,
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
        "seconds_total": recorder.seconds_total,
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
    with contextlib.suppress(RunError):  # a disk that is full takes no last words; whoever called hears the cause
        journal.event(kind, str(error), level=level, category=error.category)
    with contextlib.suppress(RunError):
        journal.status(Status.FAILED, error=error)


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint's model folder. Raises RunError when the run left none."""
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise RunError(f"{folder} holds no checkpoint")
    return found[-1] / "model"
