"""Who may do what, on every route of /openapi.json: strangers, each scope alone, other owners, administrators.

A route that is in the document and not in this table, or the other way round, is a failure: whoever adds one says here
who may use it.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from orchestrator.service import run_logs
from orchestrator.service.principals import Scope
from orchestrator.service.runs import State
from tests.launchers import AwayLauncher
from tests.plain import PLAIN
from tests.run_folders import make_checkpoint
from tests.service_configs import submitted
from tests.services import Service, serving
from tests.teacher_tables import OPENAI

READ, WRITE, SCORE = Scope.RUNS_READ, Scope.RUNS_WRITE, Scope.SCORES_WRITE
TEACHERS, ADMIN = Scope.TEACHERS_ADMIN, Scope.ADMIN
ANYBODY, ANY_KEY, THE_RUN = "anybody", "any key", "the run itself"

ALLOWED: dict[str, Scope | str] = {
    **dict.fromkeys(("live", "ready", "version"), ANYBODY),
    "who_am_i": ANY_KEY,
    "report_events": THE_RUN,
    **dict.fromkeys(("list_runs", "get_run", "get_run_config", "list_events", "get_metrics", "get_logs"), READ),
    **dict.fromkeys(("list_samples", "list_checkpoints", "get_checkpoint", "download_checkpoint_file"), READ),
    **dict.fromkeys(("list_files", "get_file", "get_file_content", "list_teachers", "get_teacher"), READ),
    **dict.fromkeys(("get_capabilities", "list_models"), READ),
    **dict.fromkeys(("list_fine_tuning_jobs", "get_fine_tuning_job", "list_fine_tuning_events"), READ),
    "list_fine_tuning_checkpoints": READ,
    **dict.fromkeys(("create_run", "update_run", "delete_run", "cancel_run", "pause_run", "resume_run"), WRITE),
    **dict.fromkeys(("retry_run", "fork_run", "delete_checkpoint", "set_checkpoint_ttl"), WRITE),
    **dict.fromkeys(("publish_checkpoint", "withdraw_checkpoint", "upload_file", "delete_file"), WRITE),
    **dict.fromkeys(("create_fine_tuning_job", "cancel_fine_tuning_job", "pause_fine_tuning_job"), WRITE),
    "resume_fine_tuning_job": WRITE,
    "score_text": SCORE,
    **dict.fromkeys(("register_teacher", "update_teacher", "delete_teacher", "probe_teacher"), TEACHERS),
    **dict.fromkeys(("list_keys", "create_key", "get_key", "update_key", "rotate_key", "revoke_key"), ADMIN),
    "list_audit": ADMIN,
}
JOB = {"model": "none", "training_file": "none.jsonl", "method": {"type": "distillation", "distillation": {}}}
BODIES: dict[str, dict[str, Any]] = {
    "create_run": submitted(name="another"),
    "update_run": {"priority": 1},
    "fork_run": {"name": "forked"},
    "set_checkpoint_ttl": {"seconds": None},
    "publish_checkpoint": {"name": "published"},
    "register_teacher": {"name": "second", "teacher": OPENAI},
    "update_teacher": {"teacher": OPENAI},
    "score_text": {"teacher": "big", "items": []},
    "create_key": {"owner": "carol"},
    "update_key": {"limits": {}},
    "create_fine_tuning_job": JOB,
}
REMOVE = {"delete_run", "delete_checkpoint", "delete_file", "delete_teacher", "rotate_key", "revoke_key"}
HEADERS = {"update_run": {"If-Match": '"r1"'}, "update_teacher": {"If-Match": '"r1"'}}
OPERATIONS = sorted(ALLOWED)
WITH_KEY = [name for name in OPERATIONS if ALLOWED[name] not in {ANYBODY, THE_RUN}]
WITH_BODY = {"POST", "PUT", "PATCH"}
OWNED = ("run_id", "job_id", "file_id")  # a path with one of these leads to what has an owner


@dataclass(frozen=True, kw_only=True)
class Place:
    """A service with things of alice's, and everybody's keys."""

    service: Service
    operations: dict[str, tuple[str, str]]
    names: dict[str, str]
    keys: dict[str, str]

    def ask(self, operation: str, key: str | None, body: dict[str, Any] | None = None) -> httpx2.Response:
        method, path = self.operations[operation]
        headers = {"X-Request-Id": "asked", **HEADERS.get(operation, {})}
        headers |= {} if key is None else {"Authorization": f"Bearer {key}"}
        with httpx2.Client(
            base_url=self.service.url, headers=headers, trust_env=False, verify=PLAIN, timeout=30.0
        ) as http:
            if operation == "upload_file":
                query = {"filename": "a.jsonl", "purpose": "prompts"}
                return http.post(
                    path, params=query, content=b'{"prompt": "?"}\n', headers={"Content-Type": "application/jsonl"}
                )
            sent = {"json": self.body(operation) if body is None else body} if method in WITH_BODY else {}
            return http.request(method, path.format(**self.names), **sent)

    def body(self, operation: str) -> dict[str, Any]:
        body = BODIES.get(operation, {})
        if body.get("teacher") == OPENAI:  # at an address that refuses at once: the service's own
            return body | {"teacher": OPENAI | {"url": self.service.url}}
        return body


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("matrix")
    with serving(folder, lambda _url: AwayLauncher()) as service:
        paths = service.http.get("/openapi.json").json()["paths"]
        operations = {
            inner["operationId"]: (method.upper(), path) for path in paths for method, inner in paths[path].items()
        }
        keys = {scope.value: service.key_for("alice", scope) for scope in Scope}
        yield Place(service=service, operations=operations, names=_furnish(service, keys), keys=keys | _ended(service))


def _furnish(service: Service, keys: dict[str, str]) -> dict[str, str]:
    """What the paths name: a run that is at its end, with a checkpoint; a file; a teacher; a key."""
    with service.asking(keys["runs:write"]) as alice:
        alice.post("/v1/runs", json=submitted(name="alices")).raise_for_status()
        file = alice.post(
            "/v1/files?filename=a.jsonl&purpose=prompts",
            content=b'{"prompt": "1 + 1 = ?"}\n',
            headers={"Content-Type": "application/jsonl"},
        )
    service.store.runs.move("alices", State.FAILED, "for the test")
    folder = service.folder / "runs" / "alices"
    make_checkpoint(folder, 1)
    log = folder / run_logs.FOLDER / run_logs.OWN
    log.parent.mkdir()
    log.write_text("a line\n")
    service.http.post("/v1/teachers", json={"name": "big", "teacher": OPENAI | {"url": service.url}}).raise_for_status()
    made = service.http.post("/v1/keys", json={"owner": "alice"}).json()
    return {
        "run_id": "alices",
        "job_id": "alices",
        "checkpoint": "step-000001",
        "path": "model/config.json",
        "file_id": file.json()["id"],
        "teacher_id": "big",
        "key_id": made["id"],
    }


def _ended(service: Service) -> dict[str, str]:
    """Keys that are worth nothing, whatever they once were, and those of another owner and of an administrator."""
    keys, scopes = service.store.keys, list(Scope)
    _, expired = keys.create(owner="alice", label="", scopes=scopes, expires_at=time.time() - 1)
    made, revoked = keys.create(owner="alice", label="", scopes=scopes)
    keys.revoke(made.id)
    other = service.key_for("bob", READ, WRITE, SCORE, TEACHERS, Scope.SAMPLES_PRIVILEGED)
    return {"expired": expired, "revoked": revoked, "bob": other, "operator": service.key}


def has_owner(place: Place, operation: str) -> bool:
    return any(f"{{{name}}}" in place.operations[operation][1] for name in OWNED)


def test_the_table_names_every_route_of_the_document_and_no_other(place: Place):
    assert set(place.operations) == set(ALLOWED)


def test_the_document_says_the_same_of_scopes(place: Place):
    paths = place.service.http.get("/openapi.json").json()["paths"]
    said = {inner["operationId"]: inner.get("security") for path in paths.values() for inner in path.values()}
    for operation, allowed in ALLOWED.items():
        if allowed == ANYBODY:
            assert said[operation] is None
        elif allowed == THE_RUN:
            assert said[operation] == [{"run": []}]
        else:
            scopes = [allowed.value] if isinstance(allowed, Scope) else []
            assert said[operation] == [{"key": scopes}, {"session": scopes}], operation


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("who", ["nobody", "garbage", "almost", "expired", "revoked", "a run"])
def test_strangers_see_the_probes_and_nothing_else(place: Place, operation: str, who: str):
    strange = {
        "nobody": None,
        "garbage": "xyz",
        "almost": place.service.key[:-1] + ("A" if place.service.key[-1] != "A" else "B"),
        "a run": place.service.state.signer.token("potstill-alices-00000000"),
    }
    response = place.ask(operation, strange[who] if who in strange else place.keys[who])
    if ALLOWED[operation] == ANYBODY:
        assert response.status_code in {200, 503}  # 503: readiness, while the cluster is away
    else:
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("operation", WITH_KEY)
@pytest.mark.parametrize("scope", [scope for scope in Scope if scope is not ADMIN])
def test_a_scope_alone_opens_its_own_routes_and_no_other(place: Place, operation: str, scope: Scope):
    if ALLOWED[operation] in {scope, ANY_KEY}:
        return  # what it opens is asked below, once for each route
    response = place.ask(operation, place.keys[scope.value])
    assert response.status_code == 403, response.text
    wanted = ALLOWED[operation]
    assert isinstance(wanted, Scope)
    assert wanted.value in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "operation", [name for name in WITH_KEY if ALLOWED[name] is not ADMIN and name != "delete_teacher"]
)
def test_what_is_somebody_elses_does_not_exist(place: Place, operation: str):
    response = place.ask(operation, place.keys["bob"])
    if has_owner(place, operation):
        assert response.status_code == 404, response.text
        assert response.json() == _like_nothing(place, operation)
    else:
        assert response.status_code not in {401, 403}


def _like_nothing(place: Place, operation: str) -> dict[str, Any]:
    """What the same request gets for an id that nothing has."""
    nothing = dict.fromkeys(OWNED, "file-0" if "{file_id}" in place.operations[operation][1] else "nothing")
    elsewhere = Place(service=place.service, operations=place.operations, names=place.names | nothing, keys=place.keys)
    body: dict[str, Any] = elsewhere.ask(operation, place.keys["bob"]).json()
    return body


@pytest.mark.parametrize("operation", WITH_KEY)
def test_an_administrator_sees_everything(place: Place, operation: str):
    if operation in REMOVE:
        return  # asked last, below
    response = place.ask(operation, place.keys["operator"])
    assert response.status_code not in {401, 403, 404}, response.text
    assert response.status_code < 500 or operation == "probe_teacher"  # which is away


@pytest.mark.parametrize("operation", [name for name in WITH_KEY if ALLOWED[name] not in {ADMIN, ANY_KEY}])
def test_the_scope_that_the_table_names_is_enough(place: Place, operation: str):
    if operation in REMOVE:
        return  # asked last, below
    wanted = ALLOWED[operation]
    assert isinstance(wanted, Scope)
    response = place.ask(operation, place.keys[wanted.value])
    assert response.status_code not in {401, 403, 404}, response.text


@pytest.mark.parametrize("operation", sorted(BODIES))
@pytest.mark.parametrize("field", ["owner_id", "is_admin", "submission_id", "__proto__"])
def test_a_field_that_is_not_the_clients_to_set_is_refused_by_its_pointer(place: Place, operation: str, field: str):
    response = place.ask(operation, place.keys["operator"], place.body(operation) | {field: "x"})
    assert response.status_code == 400, response.text
    pointers = [detail["loc"] for detail in response.json()["error"]["details"]]
    assert f"/{field}" in pointers or f"/method/distillation/{field}" in pointers


@pytest.mark.parametrize(
    "value", ["..", "../..", "%2e%2e", "%2e%2e%2f%2e%2e%2fetc", "..%5c..", "a%00b", "%ff", "%F0%9F%92%A9"]
)
@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in {"live", "ready", "version"}])
def test_an_id_that_would_lead_elsewhere_leads_nowhere(place: Place, operation: str, value: str):
    method, path = place.operations[operation]
    token = place.keys["operator"]
    for name in place.names:
        if f"{{{name}}}" not in path:
            continue
        asked = path.format(**place.names | {name: value})
        status, body = raw(
            place.service.url, method, asked, token, BODIES.get(operation, {}), HEADERS.get(operation, {})
        )
        assert status in {400, 401, 404, 405}, (asked, body)  # 401: of a run's own route, whoever asks
        assert set(json.loads(body)) == {"error"}


def raw(url: str, method: str, path: str, key: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, bytes]:
    """A request whose path is sent as it is: clients tidy it up."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    try:
        sent = {"Authorization": f"Bearer {key}", "Content-Type": "application/json", **headers}
        connection.request(method, path, json.dumps(body) if method in WITH_BODY else None, sent)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_a_run_reports_with_the_token_of_its_present_job_alone(place: Place):
    service = place.service
    service.http.post("/v1/runs", json=submitted(name="reporting")).raise_for_status()
    job = service.store.runs.get("reporting").submission_id
    with service.asking(service.state.signer.token(job)) as run:
        assert run.post("/v1/runs/reporting/events", json={}).status_code == 200
        assert run.post("/v1/runs/alices/events", json={}).status_code == 401
        for operation in WITH_KEY:
            assert place.ask(operation, service.state.signer.token(job)).status_code == 401


def test_what_removes_things_is_the_scopes_too(place: Place):
    """Last, because afterwards there is nothing left to ask about."""
    place.ask("withdraw_checkpoint", place.keys["runs:write"])
    runs = place.service.store.runs
    if not runs.get("alices").state.final:  # it was retried, paused, resumed
        runs.move("alices", State.FAILED, "for the test")
    for operation, status in (("delete_checkpoint", 204), ("delete_run", 204), ("delete_file", 200)):
        assert place.ask(operation, place.keys["runs:write"]).status_code == status, operation
    assert place.ask("delete_teacher", place.keys["teachers:admin"]).status_code == 204
    for operation in ("rotate_key", "revoke_key"):
        assert place.ask(operation, place.keys["operator"]).status_code == 200
