"""What stands above every page of one run: its state in words, how far it is, what can be done with it now. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.gantt import duration
from orchestrator.service.dashboard.rows import NOTHING, Row, row
from orchestrator.service.dashboard.words import Moment, moment
from orchestrator.service.runs import MOVES, RETRIED, Event, Failure, Run, State
from potstill.metrics import METRICS, number

_PROBLEM_OF = {
    "user": "Its config is the problem: mend the setting, then fork the run or submit it again.",
    "teacher": "Its teacher is the problem: see that it answers, then retry the run.",
    "capacity": "The cluster had too little room: ask for less, or retry the run when there is more.",
    "system": "The system is the problem: a retry goes on from the last checkpoint.",
}
_WAITING = {
    State.QUEUED: "It waits for its turn.",
    State.WAITING_TEACHER: "Its teacher does not answer. The run goes on by itself when it does.",
    State.RECOVERING: "It lost a process and goes on from its last checkpoint.",
    State.PAUSING: "It finishes its step, leaves a checkpoint and gives its processes back.",
    State.PAUSED: "It goes on from its last checkpoint when it is resumed.",
    State.CANCELLING: "It is being ended.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heading:
    """Everything above the tabs. `actions`: what may be done with it now."""

    row: Row
    final: bool
    attempt: int
    waiting: str
    failure: Failure | None
    remedy: str
    lasted: str
    began: Moment | None
    ended: Moment | None
    heard: Moment | None
    forked_from: str | None
    forked_checkpoint: str | None
    revision: int
    priority: int
    notes: str
    metadata: Mapping[str, str]
    actions: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number as it is now. Example: Figure(label="Reverse KL", value="0.093", unit="nats/token")."""

    label: str
    value: str
    unit: str


def heading(run: Run, now: float, *, may_write: bool) -> Heading:
    return Heading(
        row=row(run, now),
        final=run.state.final,
        attempt=run.attempt,
        waiting=_WAITING.get(run.state, ""),
        failure=run.error,
        remedy=_PROBLEM_OF.get(run.error.category, _PROBLEM_OF["system"]) if run.error else "",
        lasted=_lasted(run, now),
        began=moment(run.started_at, now),
        ended=moment(run.finished_at, now),
        heard=moment(run.heartbeat_at, now),
        forked_from=run.forked_from,
        forked_checkpoint=run.forked_checkpoint,
        revision=run.revision,
        priority=run.priority,
        notes=run.notes,
        metadata=run.metadata,
        actions=actions(run.state) if may_write else (),
    )


def actions(state: State) -> list[str]:
    """What the routes accept of a run in this state."""
    allowed = {
        "pause": State.PAUSING in MOVES[state],
        "resume": state is State.PAUSED,
        "retry": state in RETRIED,
        "cancel": State.CANCELLING in MOVES[state],
        "fork": True,
        "delete": state.final,
    }
    return [name for name, is_so in allowed.items() if is_so]


def figures(run: Run, evaluations: Sequence[Event], now: float) -> list[Figure]:
    """The numbers of the last step, of the last evaluation, and what the run has used; those that exist."""
    found = [_of_step(run, name, label) for name, label in _OF_STEP]
    held_out = [value for event in evaluations if (value := number(event.data, "accuracy")) is not None]
    if held_out:
        found.insert(1, Figure(label="Held-out accuracy", value=METRICS["accuracy"].show(held_out[-1]), unit=""))
    if run.gpus:
        found.append(Figure(label="GPU time", value=f"{_gpu_hours(run, now):,.2f}", unit="GPU hours"))
    if run.teacher_tokens:
        found.append(Figure(label="Teacher’s tokens", value=f"{run.teacher_tokens:,}", unit=""))
    if run.teacher_usd:
        found.append(Figure(label="Teacher’s cost", value=f"{run.teacher_usd:,.4g}", unit="USD"))
    return [figure for figure in found if figure is not None and figure.value != NOTHING]


_OF_STEP = (
    ("reverse_kl", "Reverse KL"),
    ("accuracy", "Accuracy of rollouts"),
    ("entropy", "Entropy"),
    ("completion_tokens", "Completion"),
    ("tokens_per_second", "Throughput"),
    ("tokens_trained", "Trained on"),
)


def _of_step(run: Run, name: str, label: str) -> Figure:
    metric = METRICS[name]
    return Figure(label=label, value=metric.show(number(run.latest, name), missing=NOTHING), unit=metric.unit)


def _gpu_hours(run: Run, now: float) -> float:
    present = 0.0 if run.launched_at is None else max(0.0, now - run.launched_at)
    return run.gpus * (run.busy_s + present) / 3600.0


def _lasted(run: Run, now: float) -> str:
    if run.started_at is None:
        return ""
    until = run.finished_at if run.finished_at is not None else now
    return duration(max(1.0, round(until - run.started_at)))
