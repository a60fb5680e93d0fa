"""The table of runs: which states belong together in a filter, and a run as a row. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.service.dashboard.words import Moment, left, moment
from orchestrator.service.runs import Run, State, progress
from potstill.metrics import METRICS, number

NOTHING = "–"  # in a cell: what was not measured, or does not apply

GROUPS: Mapping[str, tuple[State, ...]] = {
    "all": (),
    "active": tuple(state for state in State if state.active),
    "waiting": (State.QUEUED, State.PAUSED),
    "succeeded": (State.SUCCEEDED,),
    "failed": (State.FAILED,),
    "cancelled": (State.CANCELLED,),
}

_WORDS = {State.WAITING_TEACHER: "waiting for teacher"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run. Numbers are text already; `step` and `steps` are what the progress bar needs."""

    id: str
    state: str
    state_words: str
    method: str
    student: str
    teacher: str
    owner: str
    created: Moment
    step: int
    steps: int
    headway: str
    left: str
    reverse_kl: str
    accuracy: str


def row(run: Run, now: float) -> Row:
    so_far = progress(run)
    created = moment(run.created_at, now)
    assert created is not None  # it has a time
    return Row(
        id=run.id,
        state=run.state.value,
        state_words=state_words(run.state),
        method=run.submitted["method"],
        student=short(student_of(run)),
        teacher=short(teacher_of(run)),
        owner=run.owner,
        created=created,
        step=so_far["step"],
        steps=so_far["max_steps"],
        headway=f"{so_far['step']:,} / {so_far['max_steps']:,}",
        left=time_left(run),
        reverse_kl=METRICS["reverse_kl"].show(number(run.latest, "reverse_kl"), missing=NOTHING),
        accuracy=METRICS["accuracy"].show(number(run.latest, "accuracy"), missing=NOTHING),
    )


def state_words(state: State) -> str:
    return _WORDS.get(state, state.value)


def time_left(run: Run) -> str:
    """An estimate from the steps so far; empty where none can be made."""
    eta = progress(run)["eta_seconds"] if run.state.active else None
    return "" if eta is None else left(eta)


def student_of(run: Run) -> str:
    """As its client named it."""
    return str(run.submitted["student"]["model"])


def teacher_of(run: Run) -> str:
    """The teacher's name where it has one, else its kind."""
    table: Mapping[str, object] = run.submitted["teacher"]
    return str(table.get("name") or table.get("model") or table["kind"])


def short(name: str) -> str:
    """The last part of a name with slashes. Example: short("org/model-7b") == "model-7b"."""
    return name.rstrip("/").rpartition("/")[2] or name


def filters(chosen: str) -> Sequence[tuple[str, bool]]:
    """(name, whether it is the one that was chosen), in order."""
    return [(name, name == chosen) for name in GROUPS]
