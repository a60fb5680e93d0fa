"""The service against its own OpenAPI document: requests that the document allows and that it does not, one by one and
in sequences that go on with what was made. No answer is a 5xx, and every answer is one that the document has.

POTSTILL_FUZZ multiplies how much is tried: 1 takes about a minute.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Flaky
from schemathesis import Case
from schemathesis.core.failures import FailureGroup
from schemathesis.core.transport import Response
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi import checks

from orchestrator.service.document import ANSWERS
from tests.databases import server
from tests.launchers import EndlessLauncher
from tests.postgres import Postgres
from tests.run_folders import make_checkpoint
from tests.service_configs import submitted
from tests.services import Service, serving
from tests.teacher_tables import OPENAI

__all__ = ["server"]  # a fixture

HARDER = int(os.environ.get("POTSTILL_FUZZ", "1"))
BOUNDS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": HARDER == 1,  # the same requests every time, unless somebody looks for more
    "suppress_health_check": list(HealthCheck),
}
JOB = {
    "model": "none",
    "training_file": "none.jsonl",
    "method": {
        "type": "distillation",
        "distillation": {key: submitted()[key] for key in ("method", "teacher", "rollout", "optim", "loop")},
    },
}
NO_HTTP = b"Invalid HTTP request received."  # says uvicorn of a header that HTTP does not allow
SAID = ("priority", "metadata", "notes")  # what stays of a generated run when the rest is made valid


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A service, what it says of itself, and names of things that it has."""

    service: Service
    document: BaseSchema
    names: dict[str, str]
    numbers: Iterator[int] = field(default_factory=itertools.count)
    problems: list[str] = field(default_factory=list)

    def prepare(self, case: Case) -> None:
        """The document does not say which names there are and what a valid config is: every other case is made one."""
        path = case.path_parameters
        if path.get("key_id") == self.names["own_key"]:
            path["key_id"] = self.names["key_id"]  # nobody locks himself out
        if next(self.numbers) % 2:
            return
        path.update({name: self.names[name] for name in path})
        name = f"run-{next(self.numbers)}"
        if name_of(case) == "create_run" and isinstance(case.body, dict):
            case.body = submitted(name=name) | {key: case.body[key] for key in SAID if key in case.body}
        if name_of(case) == "create_fine_tuning_job":
            case.body = JOB | {"suffix": name}

    def check(self, case: Case, response: Response) -> None:
        """What was made is what the next cases are about: what there was may be deleted by now."""
        if name_of(case) == "create_run" and response.status_code == 201:
            self.names["run_id"] = self.names["job_id"] = response.json()["id"]
            make_checkpoint(self.service.folder / "runs" / self.names["run_id"], 1)
        if name_of(case) == "upload_file" and response.status_code == 201:
            self.names["file_id"] = response.json()["id"]
        try:
            conforms(case, response)
        except FailureGroup as failure:  # told at the end: the service remembers, so that nothing can be tried again
            self.problems.append(f"{failure}: " + "; ".join(str(one) for one in failure.exceptions))

    def headers(self, case: Case) -> dict[str, str]:
        """An administrator's key; of a run that reports, its own token."""
        secret = self.service.key
        if name_of(case) == "report_events":
            job = self.service.store.runs.job(str(case.path_parameters["run_id"]))
            secret = self.service.state.signer.token(job or "")
        return {"Authorization": f"Bearer {secret}"}


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
def tried(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Tried]:
    folder = tmp_path_factory.mktemp("fuzz")
    database = None
    if request.param == "postgresql":
        running: Postgres = request.getfixturevalue("server")
        database = running.database("fuzz")
    with serving(folder, lambda _url: EndlessLauncher(), database=database) as service:
        document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
        yield Tried(service=service, document=document, names=_furnish(service))


def _furnish(service: Service) -> dict[str, str]:
    service.http.post("/v1/runs", json=submitted(name="known")).raise_for_status()
    service.http.post("/v1/teachers", json={"name": "big", "teacher": OPENAI | {"url": service.url}}).raise_for_status()
    file = service.http.post(
        "/v1/files?filename=a.jsonl&purpose=prompts",
        content=b'{"prompt": "1 + 1 = ?"}\n',
        headers={"Content-Type": "application/jsonl"},
    )
    other, _ = service.store.keys.create(owner="other", label="", scopes=[])
    return {
        "run_id": "known",
        "job_id": "known",
        "checkpoint": "step-000001",
        "path": "model/config.json",
        "file_id": file.json()["id"],
        "teacher_id": "big",
        "key_id": other.id,
        "own_key": service.http.get("/v1/me").json()["id"],
    }


def conforms(case: Case, response: Response) -> None:
    if response.content == NO_HTTP:
        return
    case.validate_response(
        response,
        checks=[
            schemathesis.checks.not_a_server_error,
            checks.status_code_conformance,
            checks.content_type_conformance,
            checks.response_schema_conformance,
            checks.unsupported_method,
            checks.allow_header_conformance,
        ],
    )


def name_of(case: Case) -> str:
    return str(case.operation.definition.raw["operationId"])


@pytest.mark.parametrize("operation", sorted(ANSWERS))
def test_no_request_breaks_a_route(operation: str, tried: Tried):
    @given(case=tried.document.find_operation_by_id(operation).as_strategy())
    @settings(max_examples=8 * HARDER, **BOUNDS)
    def one(case: Case) -> None:
        tried.prepare(case)
        tried.check(case, case.call(headers=tried.headers(case)))

    one()
    assert tried.problems == []


def test_no_sequence_of_requests_breaks_the_service(tried: Tried):
    """Five hundred steps, more until some things have succeeded; every other one is about something that is there."""
    succeeded = {("create_run", 201), ("create_fine_tuning_job", 200), ("get_run", 200), ("list_events", 200)}
    steps, most = 500 * HARDER, 2500 * HARDER
    seen: Counter[tuple[str, int]] = Counter()

    class Clients(tried.document.as_state_machine()):  # type: ignore[misc]
        def before_call(self, case: Case) -> None:
            tried.prepare(case)

        def get_call_kwargs(self, case: Case) -> dict[str, Any]:
            return {"headers": tried.headers(case)}

        def validate_response(self, response: Response, case: Case, **_: Any) -> None:
            seen[name_of(case), response.status_code] += 1
            tried.check(case, response)

    while seen.total() < steps or (seen.total() < most and not succeeded <= seen.keys()):
        with suppress(Flaky):  # the service remembers: what was answered once is answered otherwise the second time
            Clients.run(settings=settings(max_examples=5, stateful_step_count=25, **BOUNDS | {"derandomize": False}))
    assert tried.problems == []
    assert succeeded <= seen.keys(), "what was tried is too little"
