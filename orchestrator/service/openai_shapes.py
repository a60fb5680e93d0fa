"""OpenAI's fine-tuning objects over the service's own: its clients send what means a submission and read Runs.

    of a job's body                                         in the submission
    model                                                   student.model
    training_file                                           data.path, of kind jsonl
    method {"type": "distillation", "distillation": {…}}    every other table and key of a RunConfig
    seed, metadata                                          seed, metadata
    suffix                                                  name; without one the name is `ftjob-…`

Pure. Refuses what it would otherwise have to ignore (a validation file, integrations, hyperparameters) with what to
write instead, and a setting that is given twice. Times are whole unix seconds.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from orchestrator.service.manifests import Checkpoint
from orchestrator.service.runs import Event, Run, State, progress
from orchestrator.service.store.checkpoints import Keeping
from orchestrator.service.submissions import Metadata
from potstill.config import RunConfig
from potstill.errors import ConfigError, ServiceError

STATUSES: Mapping[State, str] = {
    State.QUEUED: "queued",
    State.STARTING: "running",
    State.RUNNING: "running",
    State.WAITING_TEACHER: "running",
    State.RECOVERING: "running",
    State.PAUSING: "pausing",
    State.PAUSED: "paused",
    State.CANCELLING: "running",
    State.SUCCEEDED: "succeeded",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
_LEVELS = {"debug": "info", "info": "info", "warn": "warn", "error": "error"}
_METHOD = "method.distillation"

# Settings of a submission that a job says in fields of its own. The longest key first.
_FIELDS = {
    "student.model": "model",
    "data.path": "training_file",
    "data.kind": "training_file",
    "name": "suffix",
    "seed": "seed",
    "metadata": "metadata",
}
_INSTEAD = {
    "validation_file": f"a run is evaluated on the last lines of its training_file: set {_METHOD}.data.holdout",
    "integrations": "a run's numbers are at /v1/runs/{id}/metrics; where else they go is set by the operator",
    "hyperparameters": f"settings go into {_METHOD}",
}


class Method(BaseModel):
    """How a job learns. `distillation` holds what of a RunConfig the job's own fields do not say."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    type: Literal["distillation"]
    distillation: dict[str, Any]


class NewJob(BaseModel):
    """Of a job that shall be created, as OpenAI's clients send it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str
    """A model that the service offers: see /v1/models."""
    training_file: str
    """Id of an uploaded JSON Lines file, or the name of one that the service offers."""
    method: Method
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = None
    suffix: str | None = None
    """The job's id, as a run's name is written. Without one the service makes an id."""
    metadata: Metadata | None = None
    validation_file: None = None
    integrations: None = None
    hyperparameters: None = None

    @field_validator(*_INSTEAD, mode="before")
    @classmethod
    def _refuse(cls, value: Any, info: ValidationInfo) -> None:
        if value:
            raise ValueError(_INSTEAD[str(info.field_name)])


def submission_of(job: NewJob) -> dict[str, Any]:
    """The body for POST /v1/runs that a job means. Raises ConfigError for a setting that the job says elsewhere."""
    body = copy.deepcopy(job.method.distillation)
    twice = [(key, field) for key, field in _FIELDS.items() if _holds(body, key)]
    if twice:
        raise ConfigError("\n".join(f"{_METHOD}.{key}: say it in the job's {field}" for key, field in twice))
    body["name"] = job.suffix if job.suffix is not None else f"ftjob-{secrets.token_hex(8)}"
    body["student"] = _table(body, "student") | {"model": job.model}
    body["data"] = _table(body, "data") | {"kind": "jsonl", "path": job.training_file}
    for key in ("seed", "metadata"):
        if getattr(job, key) is not None:
            body[key] = getattr(job, key)
    return body


@contextmanager
def said_of_the_job() -> Iterator[None]:
    """A ConfigError about the submission becomes one about the job: its lines name the job's own fields."""
    try:
        yield
    except ConfigError as error:
        raise type(error)("\n".join(_of_job(line) for line in str(error).splitlines())) from None


def job_resource(run: Run, model: str | None) -> dict[str, Any]:
    """A run as a fine_tuning.job. `model` names what it made, for another run to begin with; None before its end."""
    data = run.submitted["data"]
    tokens = progress(run)["tokens_trained"]
    return {
        "id": run.id,
        "object": "fine_tuning.job",
        "created_at": int(run.created_at),
        "finished_at": _seconds(run.finished_at),
        "estimated_finish": _estimated_finish(run),
        "status": STATUSES[run.state],
        "model": run.submitted["student"]["model"],
        "fine_tuned_model": model,
        "trained_tokens": None if tokens is None or not run.state.final else int(tokens),
        "error": None if run.error is None else {"code": run.error.type, "message": run.error.message, "param": None},
        "organization_id": run.owner,
        "training_file": data["path"] if data.get("kind") == "jsonl" else data["dataset"],
        "validation_file": None,
        "result_files": [],
        "hyperparameters": {},
        "integrations": [],
        "seed": run.submitted.get("seed", RunConfig.model_fields["seed"].default),
        "metadata": dict(run.metadata),
        "method": {"type": "distillation", "distillation": _rest(run.submitted)},
    }


def job_event_resource(run_id: str, event: Event) -> dict[str, Any]:
    """An event as a fine_tuning.job.event."""
    return {
        "id": f"ftevent-{run_id}-{event.seq}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.time),
        "level": _LEVELS.get(event.level, "info"),
        "message": event.message,
        "type": "metrics" if event.type == "metrics" else "message",
        "data": dict(event.data),
    }


def job_checkpoint_resource(checkpoint: Checkpoint, keeping: Keeping, loss: float | None) -> dict[str, Any]:
    """A checkpoint as a fine_tuning.job.checkpoint."""
    return {
        "id": f"ftckpt-{checkpoint.run}-{checkpoint.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuning_job_id": checkpoint.run,
        "fine_tuned_model_checkpoint": model_name(checkpoint.run, checkpoint.name, keeping),
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, "train_loss": loss},
    }


def model_name(run_id: str, checkpoint: str, keeping: Keeping) -> str:
    """How a checkpoint is named as the model of another run: as it was published, else as one's own run's."""
    return keeping.published_as or f"run/{run_id}/{checkpoint}"


def event_number(run_id: str, event_id: str) -> int:
    """The number in an event's id. Raises ServiceError (400, bad_cursor) for an id that no event of this run has."""
    found = re.fullmatch(rf"ftevent-{re.escape(run_id)}-(\d{{1,15}})", event_id)
    if found is None:
        raise ServiceError("`after` names no event of this job", 400, "bad_cursor")
    return int(found[1])


def _holds(body: Mapping[str, Any], key: str) -> bool:
    """Whether a dotted key is set."""
    table, _, inner = key.partition(".")
    value = body.get(table)
    return inner in value if inner and isinstance(value, Mapping) else not inner and table in body


def _table(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = body.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{_METHOD}.{key}: a table of settings, not a {type(value).__name__}")
    return dict(value)


def _of_job(line: str) -> str:
    """A line of a ConfigError about a submission, which begins with a dotted key, as one about the job."""
    key, colon, message = line.partition(": ")
    if not colon or not re.fullmatch(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        return line
    for ours, theirs in _FIELDS.items():
        if key == ours or key.startswith(f"{ours}."):
            return f"{theirs}{key.removeprefix(ours)}: {message}"
    return f"{_METHOD}.{line}"


def _rest(submitted: Mapping[str, Any]) -> dict[str, Any]:
    """What of a submission a job says in its method: submission_of's other way."""
    rest: dict[str, Any] = {}
    for name, value in submitted.items():
        if isinstance(value, Mapping):
            kept = {key: inner for key, inner in value.items() if f"{name}.{key}" not in _FIELDS}
            rest |= {name: kept} if kept else {}
        elif name not in _FIELDS:
            rest[name] = value
    return rest


def _estimated_finish(run: Run) -> int | None:
    eta = progress(run)["eta_seconds"]
    return None if eta is None or run.heartbeat_at is None else int(run.heartbeat_at + eta)


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
