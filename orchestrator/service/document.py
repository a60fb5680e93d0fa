"""/openapi.json: what FastAPI finds in the routes, and what it cannot see there.

FastAPI sees arguments and bodies. It does not see what an answer holds (routes answer with plain objects, answers.py
says how they look), what a refusal looks like, who may ask (the gate asks), and parameters with names like
`metadata[team]`. A route that is missing here is described without its answer; a test finds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.dependencies.models import Dependant
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from orchestrator.service import answers as a
from orchestrator.service.authentication import COOKIE
from orchestrator.service.routes.asking import Required

SCHEMAS = "#/components/schemas/"
JSON = "application/json"

ANSWERS: Mapping[str, Mapping[int, type[BaseModel]]] = {
    "live": {200: a.Health},
    "ready": {200: a.Health},
    "version": {200: a.Version},
    "create_run": {201: a.Run, 200: a.RunOrPlan},
    "list_runs": {200: a.Page[a.Run]},
    "get_run": {200: a.Run},
    "update_run": {200: a.Run},
    "delete_run": {},
    "get_run_config": {},
    "cancel_run": {202: a.Run, 200: a.Run},
    "pause_run": {202: a.Run, 200: a.Run},
    "resume_run": {202: a.Run},
    "retry_run": {202: a.Run},
    "fork_run": {201: a.Run, 200: a.Run},
    "list_events": {200: a.Page[a.Event]},
    "report_events": {200: a.Held},
    "get_metrics": {200: a.Metrics},
    "get_logs": {},
    "list_samples": {200: a.Samples},
    "list_checkpoints": {200: a.Page[a.Checkpoint]},
    "get_checkpoint": {200: a.Checkpoint},
    "delete_checkpoint": {},
    "download_checkpoint_file": {},
    "set_checkpoint_ttl": {200: a.Checkpoint},
    "publish_checkpoint": {201: a.Checkpoint, 200: a.Checkpoint},
    "withdraw_checkpoint": {},
    "upload_file": {201: a.File, 200: a.File},
    "list_files": {200: a.Page[a.File]},
    "get_file": {200: a.File},
    "delete_file": {200: a.DeletedFile},
    "get_file_content": {},
    "register_teacher": {201: a.Teacher, 200: a.Teacher},
    "list_teachers": {200: a.Page[a.Teacher]},
    "get_teacher": {200: a.Teacher},
    "update_teacher": {200: a.Teacher},
    "delete_teacher": {},
    "probe_teacher": {200: a.Teacher},
    "score_text": {},
    "get_capabilities": {200: a.Capabilities},
    "list_models": {200: a.Models},
    "who_am_i": {200: a.UsedKey},
    "list_keys": {200: a.Page[a.Key]},
    "create_key": {201: a.MadeKey},
    "get_key": {200: a.UsedKey},
    "update_key": {200: a.Key},
    "revoke_key": {200: a.Key},
    "rotate_key": {200: a.MadeKey},
    "list_audit": {200: a.Page[a.AuditRecord]},
    "create_fine_tuning_job": {200: a.Job},
    "list_fine_tuning_jobs": {200: a.Page[a.Job]},
    "get_fine_tuning_job": {200: a.Job},
    "cancel_fine_tuning_job": {200: a.Job},
    "pause_fine_tuning_job": {200: a.Job},
    "resume_fine_tuning_job": {200: a.Job},
    "list_fine_tuning_events": {200: a.Page[a.JobEvent]},
    "list_fine_tuning_checkpoints": {200: a.Page[a.JobCheckpoint]},
}
_FILTERED = {"list_runs", "list_fine_tuning_jobs"}
_SHARED = {"Limits", "Scope", "State"}  # what requests and answers say alike
_OF_A_RUN = {"report_events"}  # with the token of its present job, not with a key
_SECURITY = {
    "key": {"type": "http", "scheme": "bearer", "description": "A key of this service."},
    "session": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "Of a browser that has signed in."},
    "run": {"type": "http", "scheme": "bearer", "description": "The token of a run's present job."},
}
_METADATA = {
    "name": "metadata",
    "in": "query",
    "required": False,
    "style": "deepObject",
    "explode": True,
    "schema": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 16},
    "description": "`metadata[name]=value` keeps those that carry the pair.",
}


def install(app: FastAPI) -> None:
    """Have the app describe itself in full; made once, when it is asked for."""

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            app.openapi_schema = _completed(found, [route for route in app.routes if isinstance(route, APIRoute)])
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]


def _completed(document: dict[str, Any], routes: Iterable[APIRoute]) -> dict[str, Any]:
    models = {model for answers in ANSWERS.values() for model in answers.values()} | {a.Refusal}
    names, schemas = models_json_schema(
        [(model, "serialization") for model in sorted(models, key=lambda model: model.__name__)],
        ref_template=SCHEMAS + "{model}",
    )
    components = document["components"]
    taken = components["schemas"].keys() & schemas["$defs"].keys() - _SHARED
    assert not taken, f"two things of one name: {taken}"
    components["schemas"].update(schemas["$defs"])
    components["securitySchemes"] = _SECURITY
    by_name = {route.operation_id: route for route in routes}
    for inner in document["paths"].values():
        for operation in inner.values():
            _complete(
                operation, by_name[operation["operationId"]], {model: names[model, "serialization"] for model in models}
            )
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own refusal, which the gate has replaced
        components["schemas"].pop(unused, None)
    return document


def _complete(operation: dict[str, Any], route: APIRoute, schemas: Mapping[type[BaseModel], Mapping[str, Any]]) -> None:
    name, answers = operation["operationId"], operation["responses"]
    answers.pop("422", None)
    for status, model in ANSWERS.get(name, {}).items():
        answer = answers.setdefault(str(status), {"description": "It is so already"})
        answer.setdefault("content", {})[JSON] = {"schema": schemas[model]}
    refusal = {JSON: {"schema": schemas[a.Refusal]}}
    answers["4XX"] = {"description": "The request is refused, for good or for now", "content": refusal}
    answers["5XX"] = {"description": "The service, or a teacher, cannot answer", "content": refusal}
    if name in _FILTERED:
        operation["parameters"].append(_METADATA)
    if name in _OF_A_RUN:
        operation["security"] = [{"run": []}]
    elif route.path.startswith("/v1/"):
        scopes = [scope.value for scope in _scopes(route.dependant)]
        operation["security"] = [{"key": scopes}, {"session": scopes}]


def _scopes(dependant: Dependant) -> Iterator[Any]:
    for inner in dependant.dependencies:
        if isinstance(inner.call, Required):
            yield inner.call.scope
        yield from _scopes(inner)
