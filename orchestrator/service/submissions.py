"""From the body of a request to a run that can be stored: its config resolved and planned, its notes checked.

What a client may say of a run beyond its config (priority, metadata, notes) has one shape here, for creation, change
and fork. Refuses a config that the planner refuses, before anything is stored or paid for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.service.catalog import Catalog
from orchestrator.service.principals import Principal
from orchestrator.service.store.runs import NewRun
from potstill.config import RunConfig
from potstill.config_file import apply_override
from potstill.errors import ConfigError

_TEXT = r"^[^\x00]*$"  # PostgreSQL keeps no null characters
Label = Annotated[str, Field(max_length=512, pattern=_TEXT)]
LabelName = Annotated[str, Field(min_length=1, max_length=64, pattern=_TEXT)]
Priority = Annotated[int, Field(ge=-100, le=100)]
Notes = Annotated[str, Field(max_length=4096, pattern=_TEXT)]
Metadata = Annotated[dict[LabelName, Label], Field(max_length=16)]


class Remarks(BaseModel):
    """What a client says of a run that does not decide its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    priority: Priority = 0
    """Of those that wait, the highest starts first."""
    metadata: Metadata = {}
    """Up to 16 pairs of text, for the client's own use."""
    notes: Notes = ""


# Of a body of POST /v1/runs. Its settings are described in docs/config.md, and by `potstill check`.
_TABLES = ("student", "teacher", "data", "rollout", "optim", "loop")
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "required": ["name", "method", *_TABLES],
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9][a-z0-9_-]{0,62}$"},
        "method": {"type": "string"},
        "seed": {"type": "integer"},
        **{key: {"type": "object"} for key in _TABLES},
        **Remarks.model_json_schema()["properties"],
    },
}


class Changes(BaseModel):
    """Of PATCH: what is left out stays."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    priority: Priority | None = None
    metadata: Metadata | None = None
    notes: Notes | None = None


class Fork(Remarks):
    """A new run that begins with another one's config and, if it is named, one of its checkpoints' weights."""

    name: str
    from_checkpoint: Annotated[str, Field(pattern=r"^step-\d{1,12}$")] | None = None
    overrides: dict[str, Any] = {}
    """Settings to change, by dotted key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A checked submission."""

    named: Mapping[str, Any]  # as the client wrote it: models, files and teachers by name
    config: RunConfig
    remarks: Remarks
    plan: Mapping[str, Any]

    def new_run(self, who: Principal, **origin: str | None) -> NewRun:
        return NewRun(
            id=self.config.name,
            submitted=self.named,
            config=self.config.model_dump(mode="json"),
            owner=who.owner,
            gpus=gpus(self.config),
            **self.remarks.model_dump(include=set(Remarks.model_fields)),
            **origin,  # type: ignore[arg-type]
        )


def read(body: Mapping[str, Any], who: Principal, catalog: Catalog) -> Submission:
    """Check a body of POST /v1/runs. Raises ConfigError, a line a mistake, each beginning with the dotted key."""
    said = {name: body[name] for name in Remarks.model_fields if name in body}
    remarks = _remarks(said)
    named = {name: value for name, value in body.items() if name not in said}
    config = catalog.resolve(named, who)
    return Submission(named=named, config=config, remarks=remarks, plan=catalog.check(config))


def fork_of(submitted: Mapping[str, Any], fork: Fork, model: str | None) -> dict[str, Any]:
    """The body that a fork submits. `submitted`: what the other run's client sent; `model`: where its weights are."""
    body = {**copy.deepcopy(dict(submitted)), **fork.model_dump(include=set(Remarks.model_fields)), "name": fork.name}
    if model is not None:
        body["student"] = {**body["student"], "model": model}
    for key, value in fork.overrides.items():
        apply_override(body, key, value)
    return body


def gpus(config: RunConfig) -> float:
    """What a run holds of the cluster's GPUs while it has processes."""
    asked = config.resources
    return asked.learner.gpus * config.learner.ranks + asked.rollout.gpus * config.rollout.workers


def _remarks(said: Mapping[str, Any]) -> Remarks:
    try:
        return Remarks.model_validate(dict(said))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()]
        raise ConfigError("\n".join(lines)) from None
