"""What the service answers with, as types for editors and checkers. At run time they are plain dicts.

Dicts, not objects: an answer is kept as it was sent, so that fields which a newer service adds are there, printed by
`--json`, and break nothing. A name that ends in _at is a time in RFC 3339, UTC.
"""

from __future__ import annotations

from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

T = TypeVar("T")

Status = Literal[
    "queued",
    "starting",
    "running",
    "waiting_teacher",
    "recovering",
    "pausing",
    "paused",
    "cancelling",
    "succeeded",
    "failed",
    "cancelled",
]
FINAL = frozenset({"succeeded", "failed", "cancelled"})


class Page(TypedDict, Generic[T]):
    """Part of a list. `last_id` is the `after` of the next part."""

    object: Literal["list"]
    data: list[T]
    has_more: bool
    first_id: Any
    last_id: Any


class Progress(TypedDict):
    """How far a run is. `eta_seconds` is None where nothing can be said yet, or any more."""

    step: int
    max_steps: int
    percent: float
    eta_seconds: float | None
    tokens_trained: float | None


class Failure(TypedDict):
    """Why a run failed. `category`: user, system, teacher or capacity."""

    type: str
    category: str
    message: str
    log_tail: str | None


class Usage(TypedDict):
    """What a run has used."""

    gpu_hours: float
    teacher_tokens: int
    teacher_usd: float


class Run(TypedDict):
    """A run. Its `id` is the config's name."""

    id: str
    object: Literal["run"]
    status: Status
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
    usage: Usage
    forked_from: dict[str, str | None] | None
    submission_id: str
    config_sha256: str | None
    code_version: str | None
    error: Failure | None
    links: dict[str, str]


class Plan(TypedDict):
    """What a run would be, without one."""

    object: Literal["run.plan"]
    config: dict[str, Any]
    plan: dict[str, Any]


class Event(TypedDict):
    """Something that happened to a run, numbered from 1 without gaps."""

    object: Literal["run.event"]
    seq: int
    time: str
    type: str
    level: str
    message: str
    data: dict[str, Any]


class Metrics(TypedDict):
    """Columns of equal length; None where a step did not report a number. `keys`: all that the run has."""

    object: Literal["metrics"]
    run: str
    steps: int
    points: int
    keys: list[str]
    columns: dict[str, list[float | None]]


class Samples(Page[dict[str, Any]]):
    """Completions, newest first. `steps`: those that have any."""

    steps: list[int]


class CheckpointFile(TypedDict):
    """A file of a checkpoint, by its path in it."""

    name: str
    bytes: int
    sha256: str


class Checkpoint(TypedDict):
    """A checkpoint of a run, e.g. step-000123."""

    id: str
    object: Literal["checkpoint"]
    run: str
    step: int
    kind: str
    status: str
    bytes: int
    files: list[CheckpointFile]
    created_at: str | None
    expires_at: str | None
    published_as: str | None


class File(TypedDict):
    """An uploaded file. `created_at` is unix seconds, as OpenAI's clients want it."""

    id: str
    object: Literal["file"]
    filename: str
    purpose: str
    format: str
    bytes: int
    sha256: str
    rows: int
    columns: list[str]
    created_at: int


class Teacher(TypedDict):
    """A registered teacher. `teacher` is its [teacher] table, whole for administrators; `probe` what was found."""

    id: str
    object: Literal["teacher"]
    teacher: dict[str, Any]
    probe: dict[str, Any] | None
    probed_at: str | None
    created_at: str
    created_by: str


class Key(TypedDict):
    """An API key, without its secret. `usage` where one key is shown; `key`, the key itself, where it has been made."""

    id: str
    object: Literal["key"]
    owner: str
    label: str
    scopes: list[str]
    limits: dict[str, float]
    created_at: str
    expires_at: str | None
    revoked_at: str | None
    usage: NotRequired[dict[str, Any]]
    key: NotRequired[str]


class Audited(TypedDict):
    """Who changed what."""

    number: int
    time: str
    key_id: str
    owner: str
    action: str
    object: str
    request_id: str
    detail: dict[str, Any]
