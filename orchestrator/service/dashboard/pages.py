"""The pages of the dashboard: each reads what it shows from where the API reads it, and renders.

Refuses what the API refuses, with the same words: a run of another owner does not exist here either.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from orchestrator import heatmap, timeline
from orchestrator.service import confined, manifests, run_logs
from orchestrator.service.dashboard import recipes
from orchestrator.service.dashboard.checkpoints import entry
from orchestrator.service.dashboard.comparison import MOST, asked_for, columns, differences
from orchestrator.service.dashboard.curves import COMPARED, drawn
from orchestrator.service.dashboard.heading import figures, heading
from orchestrator.service.dashboard.ladders import card
from orchestrator.service.dashboard.rows import GROUPS, filters, row
from orchestrator.service.dashboard.viewing import PageRoute, View, Viewing
from orchestrator.service.dashboard.words import moment
from orchestrator.service.principals import Scope
from orchestrator.service.routes.asking import Writer
from orchestrator.service.runs import Event, Run, config_resource
from orchestrator.service.samples import samples_of
from orchestrator.service.store.pages import Page
from orchestrator.service.toml import dump_toml
from potstill.errors import ServiceError
from potstill.metrics import number

ROWS, TEACHERS_SHOWN, FILES_SHOWN, SAMPLES_SHOWN, LOG_LINES = 50, 100, 20, 12, 400
EVENTS_SHOWN, EVENTS_A_PAGE, EVALUATIONS = 12, 200, 1000
REPORT, MAX_REPORT_BYTES = "report.html", 16 << 20
LATELY = 100  # events among which a run's last steps are

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/")
def runs(
    view: Viewing,
    show: str = "all",
    named: Annotated[str, Query(max_length=63)] = "",
    after: Annotated[str | None, Query(max_length=100)] = None,
) -> Response:
    """The table of runs. `show` is a filter of rows.GROUPS, `after` the last run of the page before."""
    if show not in GROUPS:
        raise ServiceError(f"the filters are {', '.join(GROUPS)}", 400, "bad_filter")
    found, more = view.state.store.runs.page(
        view.who, Page(limit=ROWS, after=after or None), states=GROUPS[show], named=named.strip()
    )
    return view.page(
        "runs.html.j2",
        rows=[row(run, view.now) for run in found],
        last=found[-1].id if more else None,
        after=after,
        show=show,
        named=named,
        filters=filters(show),
        may_write=view.may_write,
    )


@router.get("/runs/{run_id}")
def overview(run_id: str, view: Viewing) -> Response:
    run = view.state.store.runs.get(run_id, view.who)
    evaluations = _evaluations(view, run)
    return _of_run(
        view,
        run,
        "overview.html.j2",
        figures=figures(run, evaluations, view.now),
        curves=drawn(_measured(view, run), own_text=run.config["rollout"]["source"] == "student"),
        held_out=[_held_out(evaluations)],
        events=_events(view, view.state.store.events.told(run_id, limit=EVENTS_SHOWN)),
    )


@router.get("/runs/{run_id}/events")
def events(run_id: str, view: Viewing, before: Annotated[int | None, Query(ge=1, lt=2**53)] = None) -> Response:
    run = view.state.store.runs.get(run_id, view.who)
    found = view.state.store.events.told(run_id, before=before, limit=EVENTS_A_PAGE)
    earlier = found[-1].seq if len(found) == EVENTS_A_PAGE else None
    return _of_run(view, run, "events.html.j2", events=_events(view, found), earlier=earlier, before=before)


@router.get("/runs/{run_id}/timeline")
def run_timeline(
    run_id: str,
    view: Viewing,
    begin: Annotated[float | None, Query(alias="from", ge=0)] = None,
    end: Annotated[float | None, Query(alias="to", ge=0)] = None,
) -> Response:
    run = view.state.store.runs.get(run_id, view.who)
    whole = f"/runs/{run_id}/timeline?from=0"
    picture = timeline.picture(view.state.runs / run.id, after=begin, until=end, whole_page=whole)
    return _of_run(view, run, "run_timeline.html.j2", picture=picture, **(picture or {}))


@router.get("/runs/{run_id}/samples")
def samples(run_id: str, view: Viewing, step: Annotated[int | None, Query(ge=0)] = None) -> Response:
    """Rollouts token by token, of one step: the last that has any, or the one asked for."""
    run = view.state.store.runs.get(run_id, view.who)
    privileged = view.who.may(Scope.SAMPLES_PRIVILEGED)
    found = samples_of(view.state.runs, run_id, privileged=privileged)
    steps = sorted({record["step"] for record in found})
    chosen = step if step is not None else (steps[-1] if steps else None)
    shown = [record for record in found if record["step"] == chosen][:SAMPLES_SHOWN]
    return _of_run(
        view,
        run,
        "samples.html.j2",
        samples=[heatmap.read_sample(record) for record in shown],
        steps=steps,
        chosen=chosen,
        legend=heatmap.legend(),
        privileged=privileged,
    )


@router.get("/runs/{run_id}/checkpoints")
def checkpoints(run_id: str, view: Viewing) -> Response:
    run = view.state.store.runs.get(run_id, view.who)
    keeping = view.state.store.checkpoints.of_run(run_id)
    found = manifests.checkpoints_of(view.state.runs, run_id)
    entries = [entry(checkpoint, keeping.get(checkpoint.name), view.now) for checkpoint in reversed(found)]
    return _of_run(view, run, "checkpoints.html.j2", checkpoints=entries)


@router.get("/runs/{run_id}/config")
def config(run_id: str, view: Viewing) -> Response:
    run = view.state.store.runs.get(run_id, view.who)
    return _of_run(view, run, "config.html.j2", toml=dump_toml(config_resource(run)))


@router.get("/runs/{run_id}/logs")
def logs(
    run_id: str,
    view: Viewing,
    role: Annotated[str | None, Query(max_length=20)] = None,
    rank: Annotated[int, Query(ge=0)] = 0,
) -> Response:
    """The last lines of one of the run's logs."""
    run = view.state.store.runs.get(run_id, view.who)
    found = run_logs.logs_of(view.state.runs, run)
    chosen = (role, rank) if role is not None else (found[0].role, found[0].rank) if found else None
    text = None
    if chosen is not None:
        file = run_logs.open_log(view.state.runs, run, *chosen)
        text = b"".join(run_logs.neutral_pieces(file, run_logs.last_lines(file, LOG_LINES))).decode()
    return _of_run(view, run, "logs.html.j2", logs=found, chosen=chosen, text=text, lines=LOG_LINES)


@router.get("/runs/{run_id}/report")
def report(run_id: str, view: Viewing) -> Response:
    """The report that the run left behind: a page of its own, which may neither run anything nor ask for anything."""
    view.state.store.runs.get(run_id, view.who)
    try:
        with confined.open_file(view.state.runs, run_id, REPORT) as file:
            content = file.read(MAX_REPORT_BYTES)
    except FileNotFoundError:
        raise ServiceError("the run has left no report, or not yet", 404, "report_not_found") from None
    policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
    return HTMLResponse(content, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})


@router.get("/compare")
def compare(view: Viewing, runs: Annotated[list[str] | None, Query(max_length=100)] = None) -> Response:
    names = asked_for(runs or [])
    found = [view.state.store.runs.get(name, view.who) for name in names]
    evaluated = {run.id: _evaluations(view, run) for run in found}
    unlike, num_alike = differences([config_resource(run) for run in found])
    measured = set().union(*(_measured(view, run) for run in found))
    return view.page(
        "compare.html.j2",
        rows=[row(run, view.now) for run in found],
        columns=columns([figures(run, evaluated[run.id], view.now) for run in found]),
        held_out=[_held_out(evaluated[run.id]) for run in found],
        differences=unlike,
        num_alike=num_alike,
        curves=drawn(measured, COMPARED),
        most=MOST,
    )


@router.get("/teachers")
def teachers(view: Viewing, after: Annotated[str | None, Query(max_length=100)] = None) -> Response:
    found, more = view.state.store.teachers.page(Page(limit=TEACHERS_SHOWN, after=after))
    return view.page(
        "teachers.html.j2",
        cards=[card(teacher, view.now) for teacher in found],
        last=found[-1].id if more else None,
        may_probe=view.who.may(Scope.TEACHERS_ADMIN),
    )


@router.get("/submit")
def submit(view: Viewing, recipe: Annotated[str, Query(max_length=63)] = recipes.FIRST) -> Response:
    """A form for a new run. `recipe`: which of the shipped ones is in its field."""
    return view.page(
        "submit.html.j2",
        recipes=recipes.names(),
        recipe=recipe,
        text=recipes.text(recipe),
        about=next(one.about for one in recipes.names() if one.name == recipe),
        models=view.state.catalog.models(),
        datasets=view.state.catalog.datasets(),
        files=view.state.store.files.page(view.who, Page(limit=FILES_SHOWN))[0],
        teachers=view.state.store.teachers.page(Page(limit=TEACHERS_SHOWN, ascending=True))[0],
        may_write=view.may_write,
    )


class Pasted(BaseModel):
    model_config = ConfigDict(extra="forbid")
    toml: Annotated[str, Field(max_length=1 << 20)]


@router.post("/submit/read")
def read_pasted(body: Pasted, who: Writer) -> JSONResponse:
    """A TOML text as the JSON that POST /v1/runs takes. Raises ServiceError (400) with the line that is no TOML."""
    try:
        table = tomllib.loads(body.toml)
    except tomllib.TOMLDecodeError as error:
        raise ServiceError(f"this is no TOML: {error}", 400, "invalid_toml") from None
    try:
        return JSONResponse(table)
    except (TypeError, ValueError):  # a date, or a number that is none
        raise ServiceError("a config holds no dates, and no nan or inf", 400, "invalid_toml") from None


def _of_run(view: View, run: Run, template: str, **content: Any) -> Response:
    return view.page(
        template,
        run=heading(run, view.now, may_write=view.may_write),
        last_seq=view.state.store.events.last(run.id),
        reported=REPORT in confined.names(view.state.runs, run.id),
        may_write=view.may_write,
        **content,
    )


def _evaluations(view: View, run: Run) -> list[Event]:
    return view.state.store.events.list(run.id, after=0, limit=EVALUATIONS, type="eval.finished")


def _measured(view: View, run: Run) -> set[str]:
    """The numbers that one of its last steps has."""
    first = max(0, view.state.store.events.last(run.id) - LATELY)
    steps = view.state.store.events.list(run.id, after=first, limit=LATELY, type="metrics")
    return {key for event in steps for key, value in event.data.items() if value is not None}


def _held_out(evaluations: list[Event]) -> list[list[float]]:
    """[step, accuracy] of the student's own evaluations. What a run reports may be anything."""
    data = (event.data for event in evaluations if event.data.get("stage") != "teacher")
    pairs = ((number(one, "step"), number(one, "accuracy")) for one in data)
    return [[step, accuracy] for step, accuracy in pairs if step is not None and accuracy is not None]


def _events(view: View, found: Sequence[Event]) -> list[tuple[Event, Any]]:
    return [(event, moment(event.time, view.now)) for event in found]
