"""Who asks, and what they may: a key's owner, scopes and limits. Pure.

    scope               lets its key
    runs:read           read its owner's runs, files and the teachers there are
    runs:write          create and steer its owner's runs, upload files
    samples:privileged  see what only a teacher was shown
    scores:write        have registered teachers score text
    teachers:admin      register, probe and remove teachers
    admin               all of it, for every owner; make and revoke keys; read the audit log

What belongs to another owner does not exist for a principal: 404, so that nobody learns whether it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from potstill.errors import ConfigError, ServiceError
from potstill.nearest import hint


class Scope(StrEnum):
    RUNS_READ = "runs:read"
    RUNS_WRITE = "runs:write"
    SAMPLES_PRIVILEGED = "samples:privileged"
    SCORES_WRITE = "scores:write"
    TEACHERS_ADMIN = "teachers:admin"
    ADMIN = "admin"


class Limits(BaseModel):
    """What a key may use, counted over all runs that were submitted with it. None: no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    running: Annotated[int | None, Field(ge=0)] = None
    """Runs that have processes at the same time; more wait in the queue."""
    unfinished: Annotated[int | None, Field(ge=0)] = None
    """Runs that are not at their end, the queue included; more are refused."""
    runs: Annotated[int | None, Field(ge=0)] = None
    """Runs ever."""
    gpu_hours: Annotated[float | None, Field(ge=0)] = None
    """GPUs of a run times the hours that its processes lived. A run that crosses it is stopped with a checkpoint."""
    teacher_tokens: Annotated[int | None, Field(ge=0)] = None
    """Tokens that black-box teachers read and wrote for its runs."""
    teacher_usd: Annotated[float | None, Field(ge=0)] = None
    """What these cost, by the prices of the runs' configs."""
    streams: Annotated[int, Field(ge=0)] = 20
    """Event streams open at the same time."""
    stored_bytes: Annotated[int, Field(ge=0)] = 50 << 30
    """Of files that were uploaded with it and not deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The bearer of a valid key."""

    key_id: str
    owner: str
    scopes: frozenset[Scope]
    limits: Limits

    @property
    def sees_all(self) -> bool:
        return Scope.ADMIN in self.scopes

    def may(self, scope: Scope) -> bool:
        return self.sees_all or scope in self.scopes

    def require(self, scope: Scope) -> None:
        """Raises ServiceError (403) naming the scope that is missing."""
        if not self.may(scope):
            raise ServiceError(f"this key lacks the scope {scope.value}", 403, "missing_scope")


def scopes_of(names: Iterable[str]) -> frozenset[Scope]:
    """Raises ConfigError for a name that is no scope."""
    known = [scope.value for scope in Scope]
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ConfigError(f"scopes: {wrong[0]!r} is not known{hint(wrong[0], known)}")
    return frozenset(Scope(name) for name in names)
