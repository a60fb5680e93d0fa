"""The service over HTTP: the real app under uvicorn, a real SQLite file, and runs that are real processes."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import yaml

from orchestrator.service.bodies import MAX_BODY_BYTES
from potstill.config_file import load, parse
from potstill.errors import ServiceError
from potstill.journal import STOP_AT_ONCE
from tests.launchers import AwayLauncher, ProcessLauncher
from tests.plain import PLAIN
from tests.service_configs import submitted
from tests.services import RUN, Service, serving, until


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose cluster is away: nothing is launched, so that a test can speak in a run's place."""
    with serving(tmp_path_factory.mktemp("lonely"), lambda _url: AwayLauncher()) as running:
        yield running


def token_of(service: Service, name: str) -> str:
    """With which the run's present job reports."""
    return service.state.signer.token(service.store.runs.get(name).submission_id)


def error_of(response: httpx2.Response) -> dict[str, Any]:
    body = response.json()["error"]
    assert set(body) == {"message", "type", "code", "param", "details", "retryable", "request_id"}
    assert body["request_id"] == response.headers["x-request-id"]
    return body


# Who may ask


def test_every_v1_route_without_a_key_is_401(service: Service):
    paths = service.http.get("/openapi.json").json()["paths"]
    asked = [(method, path) for path in paths for method in paths[path] if path.startswith("/v1")]
    assert len(asked) > 40
    for headers in ({}, {"Authorization": "Bearer ps_000000000000_x"}, {"Authorization": f"Basic {service.key}"}):
        with httpx2.Client(base_url=service.url, headers=headers, trust_env=False, verify=PLAIN) as stranger:
            for method, path in asked:
                changes = method in {"post", "put", "patch"}
                sent = {"content": b"{broken", "headers": {"content-type": "application/json"}} if changes else {}
                response = stranger.request(method, re.sub(r"{[a-z_]+}", "one", path), **sent)
                assert (response.status_code, error_of(response)["type"]) == (401, "authentication_error"), path


def test_probes_and_version_need_no_key(service: Service):
    with httpx2.Client(base_url=service.url, trust_env=False, verify=PLAIN) as stranger:
        until(lambda: stranger.get("/readyz").status_code == 200)
        assert stranger.get("/livez").json() == {"status": "ok"}
        assert stranger.get("/version").json()["version"]


def test_only_the_run_itself_may_report(lonely: Service):
    for name in ("mine", "other"):
        lonely.http.post("/v1/runs", json=submitted(name=name))
    token, other = token_of(lonely, "mine"), token_of(lonely, "other")
    for secret, status in ((lonely.key, 401), (other, 401), (token, 200)):
        headers = {"Authorization": f"Bearer {secret}"}
        assert lonely.http.post("/v1/runs/mine/events", json={}, headers=headers).status_code == status
    assert lonely.http.get("/v1/runs", headers={"Authorization": f"Bearer {token}"}).status_code == 401
    lonely.store.runs.again("mine", "its process was lost")
    headers = {"Authorization": f"Bearer {token}"}
    assert lonely.http.post("/v1/runs/mine/events", json={}, headers=headers).status_code == 401  # an earlier job's


def test_while_the_cluster_is_away_runs_are_kept_and_readiness_says_so(lonely: Service):
    assert lonely.http.post("/v1/runs", json=submitted(name="patient")).status_code == 201
    ready = lonely.http.get("/readyz")
    assert (ready.status_code, error_of(ready)["code"]) == (503, "cluster_unavailable")
    assert int(ready.headers["retry-after"]) > 0
    assert lonely.http.get("/v1/runs/patient").json()["status"] == "queued"


# What is refused


def test_a_wrong_config_is_a_400_with_every_line_and_the_key_of_the_first(service: Service):
    body = submitted() | {"optim": {"lr": 1e-4, "weight_dekay": 1}, "loop": {"steps": -1}}
    error = error_of(service.http.post("/v1/runs", json=body))
    assert (error["code"], error["param"]) == ("invalid_config", "/optim/weight_dekay")
    assert "did you mean 'weight_decay'" in error["message"]
    assert [detail["loc"] for detail in error["details"]] == ["/optim/weight_dekay", "/loop/steps"]


def test_the_folder_of_runs_is_not_the_clients_to_choose(service: Service):
    error = error_of(service.http.post("/v1/runs", json=submitted() | {"runs": "/etc"}))
    assert (error["code"], error["param"]) == ("invalid_config", "/runs")


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a": NaN}', b"\xff", b'{"a": "\\ud800"}', b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_a_400(service: Service, body: bytes):
    response = service.http.post("/v1/runs", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_a_body_that_is_too_large_is_a_413(service: Service):
    body = b'{"a": "' + b"x" * MAX_BODY_BYTES + b'"}'
    response = service.http.post("/v1/runs", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_post_that_a_web_page_could_send_is_a_415(service: Service, kind: str):
    response = service.http.post("/v1/runs", content=b"{}", headers={"content-type": kind})
    assert (response.status_code, error_of(response)["code"]) == (415, "content_type")


@pytest.mark.parametrize(
    ("host", "status"),
    [("evil.example", 400), ("127.0.0.1.evil.example:80", 400), ("", 400), ("localhost:1", 200), ("[::1]:9", 200)],
)
def test_only_listed_hosts_are_answered(service: Service, host: str, status: int):
    assert service.http.get("/v1/runs", headers={"host": host}).status_code == status


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/runs/nobody", 404, "run_not_found"),
        ("GET", "/v1/runs/nobody/events", 404, "run_not_found"),
        ("DELETE", "/v1/runs", 405, "method_not_allowed"),
        ("GET", "/v1/runs?limit=0", 400, "invalid_request"),
        ("GET", "/v1/runs?after=nobody", 400, "bad_cursor"),
        ("GET", "/v1/runs/nobody/events?after=-1", 400, "invalid_request"),
        ("GET", "/boom", 500, "internal"),
    ],
)
def test_every_refusal_has_the_same_shape_and_tells_nothing_of_the_inside(
    service: Service, method: str, path: str, status: int, code: str
):
    response = service.http.request(method, path, headers={"x-request-id": "mine-1"})
    error = error_of(response)
    assert (response.status_code, error["code"], error["request_id"]) == (status, code, "mine-1")
    assert "secret" not in response.text
    assert "Error" not in error["message"]


# The life of a run


def test_a_submitted_run_succeeds_and_its_events_are_gap_free(service: Service):
    response = service.http.post("/v1/runs", json=submitted(name="good"))
    assert (response.status_code, response.headers["location"]) == (201, "/v1/runs/good")
    with service.client() as client:
        run = client.wait("good", poll_s=0.05)
        events = list(client.events("good"))
    assert (run["status"], run["error"]) == ("succeeded", None)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    statuses = [event["data"]["status"] for event in events if event["type"] == "run.status"]
    assert statuses == ["queued", "starting", "running", "succeeded"]
    assert [event["data"]["step"] for event in events if event["type"] == "step.finished"] == [1, 2, 3]
    assert [event["data"]["loss"] for event in events if event["type"] == "metrics"] == [1.0, 0.5, 1 / 3]


def test_the_job_reads_the_config_that_was_submitted(service: Service):
    service.http.post("/v1/runs", json=submitted(name="faithful"))
    with service.client() as client:
        client.wait("faithful", poll_s=0.05)
    here = {
        "runs": str(service.folder / "runs"),
        "student": {"model": str(service.folder / "models" / "none")},
        "data": {"kind": "jsonl", "path": str(service.folder / "data" / "none.jsonl")},
    }
    expected = parse(submitted(name="faithful") | here)
    assert load(service.folder / "runs" / "faithful" / "submitted.json") == expected
    shown = service.http.get("/v1/runs/faithful/config").json()
    assert (shown["student"]["model"], shown["data"]["path"], shown["optim"]["eps"]) == ("none", "none.jsonl", 1e-8)
    assert str(service.folder) not in json.dumps(shown)
    for kind, parses in (("toml", tomllib.loads), ("yaml", yaml.safe_load)):
        text = service.http.get("/v1/runs/faithful/config", params={"format": kind}).text
        assert parses(text)["student"]["model"] == "none"


def test_a_dry_run_answers_with_the_plan_and_stores_nothing(service: Service):
    response = service.http.post("/v1/runs", json=submitted(name="only-asked"), params={"dry_run": True})
    plan = response.json()
    assert (response.status_code, plan["object"], plan["config"]["loop"]["steps"]) == (200, "run.plan", 3)
    assert str(service.folder) not in response.text
    assert service.http.get("/v1/runs/only-asked").status_code == 404


def test_a_failure_keeps_its_type_and_category(service: Service):
    with service.client() as client:
        client.create_run(submitted(name="bad", seed=1))
        error = client.wait("bad", poll_s=0.05)["error"]
    assert error == {"type": "NonFinite", "category": "system", "message": "step 3: the loss is NaN", "log_tail": None}


def test_a_process_that_dies_without_a_word_is_a_failure_with_its_last_lines(service: Service):
    with service.client() as client:
        client.create_run(submitted(name="dead", seed=3))
        run = client.wait("dead", poll_s=0.05)
    assert (run["status"], run["error"]["type"], run["error"]["category"]) == ("failed", "WorkerLost", "system")
    assert "exit code 9" in run["error"]["message"]
    assert "the last words of this process" in run["error"]["log_tail"]


def test_cancelling_lets_the_run_clean_up_and_can_be_asked_twice(service: Service):
    with service.client() as client:
        client.create_run(submitted(name="long", seed=2))
        until(lambda: client.get_run("long")["status"] == "running")
        first = service.http.post("/v1/runs/long/cancel", json={})
        assert (first.status_code, first.json()["status"]) == (202, "cancelling")
        assert client.wait("long", poll_s=0.05)["status"] == "cancelled"
        assert "run.cleaned" in [event["type"] for event in client.events("long")]
    assert service.http.post("/v1/runs/long/cancel", json={}).status_code == 200


def test_a_run_that_has_ended_cannot_be_cancelled(service: Service):
    with service.client() as client:
        client.create_run(submitted(name="over"))
        client.wait("over", poll_s=0.05)
        with pytest.raises(ServiceError, match="over is succeeded") as caught:
            client.cancel_run("over")
    assert (caught.value.status, caught.value.code) == (409, "illegal_transition")


def test_a_paused_run_goes_on_where_it_was(service: Service):
    http = service.http
    http.post("/v1/runs", json=submitted(name="rests", seed=2))
    until(lambda: http.get("/v1/runs/rests").json()["status"] == "running")
    assert http.post("/v1/runs/rests/resume", json={}).status_code == 409
    paused = http.post("/v1/runs/rests/pause", json={})
    assert (paused.status_code, paused.json()["status"]) == (202, "pausing")
    until(lambda: http.get("/v1/runs/rests").json()["status"] == "paused")
    assert http.post("/v1/runs/rests/pause", json={}).status_code == 200
    assert http.post("/v1/runs/rests/resume", json={}).json()["status"] == "queued"
    until(lambda: http.get("/v1/runs/rests").json()["status"] == "running")
    assert http.get("/v1/runs/rests").json()["attempt"] == 2
    http.post("/v1/runs/rests/cancel", json={"mode": "immediate", "reason": "enough"})
    until(lambda: http.get("/v1/runs/rests").json()["status"] == "cancelled")
    assert (service.folder / "runs" / "rests" / STOP_AT_ONCE).exists()
    said = [event["message"] for event in http.get("/v1/runs/rests/events").json()["data"]]
    assert "a client asked to cancel the run: enough" in said


def test_a_run_that_is_lost_while_it_is_paused_or_waits_has_no_process(service: Service):
    http = service.http
    http.post("/v1/runs", json=submitted(name="first-paused", seed=2) | {"priority": -100})
    http.post("/v1/runs/first-paused/pause", json={})
    until(lambda: http.get("/v1/runs/first-paused").json()["status"] == "paused")
    jobs = service.folder / "jobs"
    until(
        lambda: not any(job.alive for name, job in ProcessLauncher(jobs, RUN, "").look().items() if "first-p" in name)
    )
    assert http.post("/v1/runs/first-paused/cancel", json={}).json()["status"] == "cancelled"


def test_a_run_that_failed_is_tried_again_under_its_name(service: Service):
    http = service.http
    http.post("/v1/runs", json=submitted(name="again", seed=1))
    until(lambda: http.get("/v1/runs/again").json()["status"] == "failed")
    retried = http.post("/v1/runs/again/retry", json={})
    assert (retried.status_code, retried.json()["attempt"], retried.json()["error"]) == (202, 2, None)
    until(lambda: http.get("/v1/runs/again").json()["status"] == "failed")
    http.post("/v1/runs", json=submitted(name="well"))
    until(lambda: http.get("/v1/runs/well").json()["status"] == "succeeded")
    assert http.post("/v1/runs/well/retry", json={}).status_code == 409


def test_a_fork_is_a_new_run_with_the_changes(service: Service):
    http = service.http
    http.post("/v1/runs", json=submitted(name="parent") | {"metadata": {"team": "a"}})
    body = {"name": "child", "overrides": {"optim.lr": 5e-4, "loop.steps": 2}, "notes": "half the steps"}
    made = http.post("/v1/runs/parent/fork", json=body, headers={"Idempotency-Key": "fork-1"})
    assert (made.status_code, made.json()["forked_from"]) == (201, {"run": "parent", "checkpoint": None})
    again = http.post("/v1/runs/parent/fork", json=body, headers={"Idempotency-Key": "fork-1"})
    assert (again.status_code, again.json()["submission_id"]) == (200, made.json()["submission_id"])
    config = http.get("/v1/runs/child/config").json()
    assert (config["optim"]["lr"], config["loop"]["steps"], config["data"]["path"]) == (5e-4, 2, "none.jsonl")
    wrong = http.post("/v1/runs/parent/fork", json={"name": "x", "overrides": {"optim.lrr": 1.0}})
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "/optim/lrr")
    absent = http.post("/v1/runs/parent/fork", json={"name": "x", "from_checkpoint": "step-000009"})
    assert absent.status_code in {400, 404}


def test_priority_metadata_and_notes_are_changed_by_who_has_read_them(service: Service):
    http = service.http
    http.post("/v1/runs", json=submitted(name="noted", seed=2) | {"metadata": {"team": "b"}})
    etag = http.get("/v1/runs/noted").headers["etag"]
    assert http.patch("/v1/runs/noted", json={"notes": "n"}).status_code == 428
    changed = http.patch("/v1/runs/noted", json={"notes": "n"}, headers={"If-Match": etag})
    assert (changed.json()["notes"], changed.json()["metadata"]) == ("n", {"team": "b"})
    assert http.patch("/v1/runs/noted", json={"notes": "m"}, headers={"If-Match": etag}).status_code == 412
    found = http.get("/v1/runs", params={"metadata[team]": "b"}).json()["data"]
    assert [run["id"] for run in found] == ["noted"]
    for wrong in ({"metadata": {str(n): "" for n in range(17)}}, {"priority": 101}, {"status": "succeeded"}):
        refused = http.patch("/v1/runs/noted", json=wrong, headers={"If-Match": changed.headers["etag"]})
        assert refused.status_code == 400, wrong
    http.post("/v1/runs/noted/cancel", json={})


def test_a_run_is_deleted_at_its_end_with_or_without_what_it_left(service: Service):
    http = service.http
    for name, how in (("kept", "keep"), ("gone", "delete")):
        http.post("/v1/runs", json=submitted(name=name))
        assert http.delete(f"/v1/runs/{name}").status_code in {409, 204}
        if http.get(f"/v1/runs/{name}").status_code == 404:
            continue
        until(lambda name=name: http.get(f"/v1/runs/{name}").json()["status"] == "succeeded")
        until(lambda name=name, how=how: http.delete(f"/v1/runs/{name}", params={"artifacts": how}).status_code == 204)
        assert http.get(f"/v1/runs/{name}").status_code == 404
        assert (service.folder / "runs" / name).exists() is (how == "keep")


# Keys


def test_a_key_that_is_asked_for_twice_is_one_key_whose_secret_was_shown_once(service: Service):
    asked = {"json": {"owner": "grace"}, "headers": {"Idempotency-Key": "grace-1"}}
    made, again = service.http.post("/v1/keys", **asked), service.http.post("/v1/keys", **asked)
    assert (made.status_code, again.status_code, again.headers["idempotent-replayed"]) == (201, 200, "true")
    assert again.json() == {name: value for name, value in made.json().items() if name != "key"}
    assert made.headers["location"] == f"/v1/keys/{made.json()['id']}"
    other = service.http.post("/v1/keys", json={"owner": "heidi"}, headers=asked["headers"])
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    records = [record["action"] for record in service.http.get("/v1/audit").json()["data"]]
    assert records[:1] == ["key.create"]
    assert [key["owner"] for key in service.http.get("/v1/keys").json()["data"]].count("grace") == 1


def test_a_key_is_made_rotated_and_revoked_and_every_change_is_on_record(service: Service):
    http = service.http
    made = http.post("/v1/keys", json={"owner": "frank", "scopes": ["runs:read"], "expires_in_s": 3600})
    key, key_id = made.json()["key"], made.json()["id"]
    assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
    with service.asking(key) as frank:
        me = frank.get("/v1/me").json()
        assert (me["owner"], me["scopes"], me["usage"]["runs"]) == ("frank", ["runs:read"], 0)
        assert frank.post("/v1/runs", json=submitted(name="forbidden")).status_code == 403
        assert frank.get("/v1/runs/good").status_code == 404
        fresh = http.post(f"/v1/keys/{key_id}/rotate", json={}).json()["key"]
        assert frank.get("/v1/me").status_code == 401
    with service.asking(fresh) as frank:
        assert frank.get("/v1/me").status_code == 200
        http.delete(f"/v1/keys/{key_id}")
        assert frank.get("/v1/me").status_code == 401
    listed = http.get("/v1/keys").text
    assert key not in listed
    assert fresh not in listed
    own = http.get("/v1/me").json()["id"]
    assert http.delete(f"/v1/keys/{own}").status_code == 409
    actions = [record["action"] for record in http.get("/v1/audit").json()["data"] if record["object"] == key_id]
    assert actions == ["key.revoke", "key.rotate", "key.create"]
    assert key not in http.get("/v1/audit").text


def test_a_page_of_another_site_cannot_act(service: Service):
    for origin in ("http://evil.example", "null", service.url.replace("http", "https") + "0"):
        response = service.http.post("/v1/runs", json=submitted(name="x"), headers={"origin": origin})
        assert (response.status_code, error_of(response)["code"]) == (403, "origin_not_allowed")
    allowed = service.http.post("/v1/runs/nobody/cancel", json={}, headers={"origin": service.url})
    assert allowed.status_code == 404


def test_a_name_is_taken_by_a_row_or_by_a_folder(service: Service):
    folder = service.folder / "runs" / "made-by-hand"
    folder.mkdir(parents=True)
    (folder / "events.jsonl").touch()
    service.http.post("/v1/runs", json=submitted(name="taken"))
    for name in ("taken", "made-by-hand"):
        response = service.http.post("/v1/runs", json=submitted(name=name))
        assert (response.status_code, error_of(response)["code"]) == (409, "name_taken")
        assert response.headers["x-should-retry"] == "false"


def test_the_same_request_twice_makes_one_run(service: Service):
    headers = {"Idempotency-Key": "k1"}
    first = service.http.post("/v1/runs", json=submitted(name="once"), headers=headers)
    with service.client() as client:
        client.wait("once", poll_s=0.05)
    second = service.http.post("/v1/runs", json=submitted(name="once"), headers=headers)
    assert (first.status_code, second.status_code) == (201, 200)
    assert second.headers["idempotent-replayed"] == "true"
    assert first.json()["submission_id"] == second.json()["submission_id"]
    other = service.http.post("/v1/runs", json=submitted(name="twice"), headers=headers)
    assert (other.status_code, error_of(other)["code"]) == (422, "idempotency_key_reused")


def test_pages_of_runs_join_without_a_seam(service: Service):
    for name in ("page-1", "page-2", "page-3"):
        service.http.post("/v1/runs", json=submitted(name=name))
    with service.client() as client:
        seen, after = [], None
        while True:
            page = client.list_runs(limit=2, after=after)
            seen += [run["id"] for run in page["data"]]
            after = page["last_id"]
            if not page["has_more"]:
                break
        whole = [run["id"] for run in client.list_runs(limit=100)["data"]]
    assert seen == whole
    assert seen[:3] == ["page-3", "page-2", "page-1"]


# Events


def test_a_replayed_report_is_not_doubled_and_a_gap_names_what_is_wanted(lonely: Service):
    lonely.http.post("/v1/runs", json=submitted(name="reporter"))
    headers = {"Authorization": f"Bearer {token_of(lonely, 'reporter')}"}

    def post(*numbers: int) -> httpx2.Response:
        rows = [{"seq": n, "time": 1.0, "type": "t", "level": "info", "message": "m", "data": {}} for n in numbers]
        return lonely.http.post("/v1/runs/reporter/events", json={"events": rows}, headers=headers)

    assert post(1, 2).json() == {"events": 2, "metrics": 0}
    assert post(1, 2).json() == {"events": 2, "metrics": 0}
    gap = post(4)
    assert (gap.status_code, error_of(gap)["details"][0]["wanted"]) == (409, 3)
    kept = lonely.store.events.list("reporter", after=0, limit=100)
    assert [event.type for event in kept].count("t") == 2
    bad = lonely.http.post("/v1/runs/reporter/events", json={"events": [{"seq": 0}]}, headers=headers)
    assert (bad.status_code, error_of(bad)["param"]) == (400, "/events/0/seq")
