"""What the routes answer with, as the OpenAPI document tells it. Pure; nothing here runs when a request is answered.

A resource has these fields and no others: the tests hold every answer to it. Times are RFC 3339 in UTC, on the OpenAI
routes whole unix seconds. What is not known is null.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, RootModel

from orchestrator.service.principals import Limits, Scope
from orchestrator.service.runs import State

Item = TypeVar("Item")
Level = Literal["debug", "info", "warn", "error"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Page(Answer, Generic[Item]):
    """A part of a list. `after` of the next part is `last_id`."""

    object: Literal["list"]
    data: list[Item]
    has_more: bool
    first_id: str | int | None
    last_id: str | int | None


# ------------------------------------------------------------------------------------------------ what goes wrong


class Mistake(Answer):
    """`loc`: a JSON pointer into the body, or a parameter's name; `wanted`: the number that a report begins with."""

    loc: str | None
    message: str
    wanted: int | None = None


class Error(Answer):
    message: str
    type: Literal[
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "conflict_error",
        "rate_limit_error",
        "overloaded_error",
        "teacher_error",
        "internal_error",
    ]
    code: str
    """Stable, for programs."""
    param: str | None
    details: list[Mistake] | None
    retryable: bool
    request_id: str


class Refusal(Answer):
    """Every answer but a good one."""

    error: Error


# ------------------------------------------------------------------------------------------------------------ runs


class Progress(Answer):
    step: int
    max_steps: int
    percent: float
    eta_seconds: float | None
    tokens_trained: float | None


class RunUsage(Answer):
    gpu_hours: float
    teacher_tokens: int
    teacher_usd: float


class Origin(Answer):
    run: str
    checkpoint: str | None


class Failure(Answer):
    type: str
    category: Literal["user", "system", "teacher", "capacity"]
    message: str
    log_tail: str | None


class Run(Answer):
    id: str
    object: Literal["run"]
    status: State
    status_since: str
    status_message: str
    attempt: int
    created_at: str
    started_at: str | None
    finished_at: str | None
    heartbeat_at: str | None
    created_by: str
    owner: str
    priority: int
    metadata: dict[str, str]
    notes: str
    method: str
    student: str
    teacher: str
    progress: Progress
    latest_metrics: dict[str, float | None]
    usage: RunUsage
    forked_from: Origin | None
    submission_id: str
    config_sha256: str | None
    code_version: str | None
    error: Failure | None
    links: dict[str, str]


class RunPlan(Answer):
    """Of a dry run."""

    object: Literal["run.plan"]
    config: dict[str, Any]
    plan: dict[str, Any]


class RunOrPlan(RootModel[Run | RunPlan]):
    """A run that the same request had made before; of a dry run its plan."""


class Event(Answer):
    object: Literal["run.event"]
    seq: int
    time: str
    type: str
    level: str
    message: str
    data: dict[str, Any]


class Held(Answer):
    """The last number that the service has of each of a run's logs."""

    events: int
    metrics: int


class Metrics(Answer):
    object: Literal["metrics"]
    run: str
    steps: int
    points: int
    keys: list[str]
    columns: dict[str, list[float | None]]


class Sample(BaseModel):
    """A rollout. What else it holds depends on the run."""

    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["run.sample"]
    step: int


class Samples(Page[Sample]):
    steps: list[int]


class StoredFile(Answer):
    name: str
    bytes: int
    sha256: str


class Checkpoint(Answer):
    id: str
    object: Literal["checkpoint"]
    run: str
    step: int
    kind: Literal["full", "adapter"]
    status: Literal["ready", "damaged"]
    bytes: int
    files: list[StoredFile]
    created_at: str
    expires_at: str | None
    published_as: str | None


# ------------------------------------------------------------------------------------------- what runs are made of


class File(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    format: Literal["jsonl", "parquet"]
    sha256: str
    rows: int
    columns: list[str]


class DeletedFile(Answer):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class Teacher(Answer):
    id: str
    object: Literal["teacher"]
    created_at: str
    created_by: str
    teacher: dict[str, Any]
    probe: dict[str, Any] | None
    probed_at: str | None


class Offered(Answer):
    id: str
    kind: str
    tier: str | None


class KnownMethod(Answer):
    name: str
    tier: str
    phrase: str


class Capabilities(Answer):
    object: Literal["capabilities"]
    version: str
    models: list[str]
    datasets: list[str]
    teachers: list[Offered]
    methods: list[KnownMethod]
    limits: dict[str, float]


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(Answer):
    object: Literal["list"]
    data: list[Model]


# ------------------------------------------------------------------------------------------------------------ keys


class Key(Answer):
    id: str
    object: Literal["key"]
    owner: str
    label: str
    scopes: list[Scope]
    limits: Limits
    created_at: str
    expires_at: str | None
    revoked_at: str | None


class MadeKey(Key):
    key: str
    """The key itself, here and nowhere else."""


class KeyUsage(Answer):
    runs: int
    unfinished: int
    running: int
    gpu_hours: float
    teacher_tokens: int
    teacher_usd: float


class UsedKey(Key):
    usage: KeyUsage


class AuditRecord(Answer):
    number: int
    object_type: Literal["audit"]
    time: str
    key_id: str
    owner: str
    action: str
    object: str
    request_id: str
    detail: dict[str, Any]


# ---------------------------------------------------------------------------------------------------- OpenAI's own


class JobError(Answer):
    code: str
    message: str
    param: str | None


class JobMethod(Answer):
    type: Literal["distillation"]
    distillation: dict[str, Any]


class Job(Answer):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
    model: str
    fine_tuned_model: str | None
    trained_tokens: int | None
    error: JobError | None
    organization_id: str
    training_file: str
    validation_file: None
    result_files: list[str]
    hyperparameters: dict[str, Any]
    integrations: list[Any]
    seed: int
    metadata: dict[str, str]
    method: JobMethod


class JobEvent(Answer):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class JobMetrics(Answer):
    step: int
    train_loss: float | None


class JobCheckpoint(Answer):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: JobMetrics


# ---------------------------------------------------------------------------------------------------------- health


class Health(Answer):
    status: Literal["ok"]


class Version(Answer):
    version: str
