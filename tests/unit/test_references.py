"""The config's own types say what its settings stand for; a setting that names a place cannot be forgotten."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from potstill.config import RunConfig
from potstill.references import Stands, stands_for
from potstill.section import models_in

SUGGESTIVE = re.compile(
    r"(?i)\b(url|uri|path|file|folder|directory|https?|port|socket|host name)s?\b|[_/](ref|uri|url)$"
)
TEXTS = {  # texts and names that stand for nothing on a disk or in a network; a new one is put here, or marked
    "RunConfig.name",  # by its pattern, one part of a path
    "RunConfig.method",
    "LoraConfig.target_modules",
    "Objective.auxiliaries",
    "PerDomain.weights",
    "PerTeacher.weights",
    "EndpointTeacher.revision",
    "LocalModel.domains",
    "Member.domains",
    "SeveralTeachers.members",
    "ProcessConfig.custom",
    "Reading.privileged_template",
    "RemoteWriter.instruction",
    "OpenAITeacher.ranking",
    "ReasoningGymData.dataset",
    "WandbConfig.project",
    "WandbConfig.entity",
    "MlflowConfig.experiment",
    "TrackioConfig.project",
}
READ = {"RunConfig.name", "LoopConfig.metrics_port"}  # whose docstrings speak of folders and ports, and were read


def sections(model: type[BaseModel], seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    if model not in seen:
        seen.add(model)
        for field in model.model_fields.values():
            for inner in models_in(field.annotation):
                sections(inner, seen)
    return seen


def is_text(annotation: Any) -> bool:
    """Whether a client can put text of its own into the field."""
    if annotation is str or get_origin(annotation) is Literal:
        return annotation is str
    return any(is_text(argument) for argument in get_args(annotation))


def defined_in(model: type[BaseModel], name: str) -> str:
    owner = next(base for base in reversed(model.__mro__) if name in getattr(base, "model_fields", {}))
    return f"{owner.__name__}.{name}"


def test_every_setting_that_takes_text_is_marked_or_known_to_stand_for_nothing() -> None:
    found = {
        defined_in(model, name)
        for model in sections(RunConfig, set())
        for name, field in model.model_fields.items()
        if is_text(field.annotation) and stands_for(field) is None
    }
    assert found == TEXTS


def test_no_setting_whose_name_or_docstring_suggests_a_place_is_unmarked() -> None:
    found = {
        defined_in(model, name)
        for model in sections(RunConfig, set())
        for name, field in model.model_fields.items()
        if (is_text(field.annotation) or "port" in name.split("_")) and stands_for(field) is None
        if SUGGESTIVE.search(name.replace("_", " ")) or SUGGESTIVE.search(field.description or "")
    }
    assert found <= READ


def test_a_mark_is_found_behind_options_and_lists_of_them() -> None:
    kinds = {stands for model in sections(RunConfig, set()) for stands in map(stands_for, model.model_fields.values())}
    assert kinds - {None} == set(Stands)
