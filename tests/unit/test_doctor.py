"""The doctor of a service: what it finds, what it advises, and that it changes nothing."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from typer.testing import CliRunner, Result

from orchestrator.service import checkup, hardening
from orchestrator.service.checkup import Place
from orchestrator.service.principals import Scope
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from orchestrator.service.store.idempotency import Once
from potstill.cli import app
from potstill.doctor import Finding
from potstill.errors import ServiceError
from tests.ports import free_port
from tests.served import serving

DAY_S = 86400.0
ONCE = Once(key_id="k", key=None, route="/", body_digest="")


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "VLLM_SERVER_DEV_MODE", "PYTHONOPTIMIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "runs").mkdir(mode=0o750)
    return Place(
        runs=tmp_path / "runs",
        database=f"sqlite:///{tmp_path / 'runs' / 'potstill.db'}",
        host="127.0.0.1",
        port=free_port(),
        secrets=None,
    )


@contextmanager
def stored(place: Place) -> Iterator[Store]:
    """The service's memory, made and left again."""
    store = Store(Database(place.database))
    yield store
    store.close()


def found(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


def to_mend(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: f"{finding.found}: {finding.advice}" for finding in findings if not finding.ok}


def test_a_place_where_nothing_was_served_yet_is_well(place: Place):
    findings = [*checkup.examine(place), *hardening.examine(place)]
    assert to_mend(findings) == {}
    assert found(findings)["database"].found == "none yet: serve makes it"
    assert list(place.runs.iterdir()) == []


def test_what_is_in_the_database_is_counted_and_stays_as_it_is(place: Place):
    with stored(place) as store:
        now = time.time()
        for label, scope, expires_at in (
            ("first", Scope.ADMIN, None),
            ("soon", Scope.RUNS_READ, now + DAY_S),
            ("gone", Scope.ADMIN, now - 1.0),
        ):
            store.keys.create(owner="o", label=label, scopes=[scope], expires_at=expires_at)
        ending = store.keys.list()[1].id
    file = place.runs / "potstill.db"
    before = file.read_bytes()
    findings = found(checkup.examine(place))
    assert findings["database"].found.startswith("sqlite, revision 0")
    assert findings["keys"].ok
    assert findings["keys"].found == f"2 of 3 work, 1 administrators', 1 end within two weeks: {ending}"
    assert file.read_bytes() == before


def test_a_service_whose_last_administrator_is_about_to_go_is_told(place: Place):
    with stored(place) as store:
        store.keys.create(owner="o", label="", scopes=[Scope.ADMIN], expires_at=time.time() + DAY_S)
    assert "make one that lasts, while one works" in to_mend(checkup.examine(place))["keys"]


def test_a_database_that_cannot_be_used_is_named(place: Place, tmp_path: Path):
    (place.runs / "potstill.db").write_bytes(b"no database at all" * 100)
    assert "cannot be opened" in to_mend(checkup.examine(place))["database"]
    (place.runs / "potstill.db").unlink()
    with stored(place):
        pass
    with sqlite3.connect(place.runs / "potstill.db") as db:
        db.execute("UPDATE alembic_version SET version_num = '9999'")
    assert "a newer potstill has opened it" in to_mend(checkup.examine(place))["database"]
    for url, words in (("no url", "no SQLAlchemy URL"), ("postgresql+psycopg://127.0.0.1:1/x", "cannot be opened")):
        other = Place(runs=place.runs, database=url, host="127.0.0.1", port=place.port, secrets=None)
        assert words in to_mend(checkup.examine(other))["database"]


def test_an_older_database_is_upgraded_by_serving_not_by_looking(place: Place):
    with sqlite3.connect(place.runs / "potstill.db") as db:
        db.execute("CREATE TABLE alembic_version (version_num TEXT)")
        db.execute("INSERT INTO alembic_version VALUES ('0001')")
    finding = found(checkup.examine(place))["database"]
    assert finding.ok
    assert finding.found.startswith("sqlite, revision 0001: serve upgrades it")


def test_nothing_can_be_written_through_a_look(place: Place):
    with stored(place):
        pass
    glance = checkup.Glance(place.database)
    with pytest.raises(ServiceError), glance.reading() as db:
        db.exec_driver_sql("DELETE FROM keys")
    with pytest.raises(AssertionError, match="only reads"), glance.writing():
        pass
    glance.close()


def test_registered_teachers_are_there_or_not(place: Place):
    asked: list[str] = []

    def answer(request: object) -> JSONResponse:
        asked.append(str(getattr(request, "headers", {}).get("authorization")))
        return JSONResponse({}, 404)

    with serving(Starlette(routes=[Route("/{path:path}", answer)])) as url, stored(place) as store:
        store.teachers.add("here", {"kind": "vllm", "url": url, "model": "m", "secret_ref": "file:x"}, ONCE)
        store.teachers.add("away", {"kind": "vllm", "url": "http://127.0.0.1:1", "model": "m"}, ONCE)
        findings = checkup.examine(place)
    assert found(findings)["teacher here"].ok
    assert asked == ["None"]
    assert to_mend(findings) == {"teacher away": "http://127.0.0.1:1 does not answer: start it, or its runs wait"}


def test_who_is_at_the_port_is_told(place: Place):
    def at(url: str) -> Place:
        return Place(**{**vars_of(place), "port": int(url.rpartition(":")[2])})

    potstill = Starlette(routes=[Route("/version", lambda _request: JSONResponse({"version": "0.9"}))])
    with serving(potstill) as url:
        assert found(checkup.examine(at(url)))[f"port {at(url).port}"].found == "potstill 0.9 serves"
        assert "rewrites Host" in to_mend(hardening.examine(at(url)))["host names"]  # it answers to every name
    with serving(Starlette()) as url:
        assert "serve with another --port" in to_mend(checkup.examine(at(url)))[f"port {at(url).port}"]


def vars_of(place: Place) -> dict[str, object]:
    return {name: getattr(place, name) for name in Place.__slots__}


def test_a_cluster_that_the_environment_names_is_looked_for(place: Place, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert found(checkup.examine(place))["ray"].ok
    assert "mend RAY_ADDRESS" in to_mend(checkup.examine(place))["ray"]
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert "mend RAY_ADDRESS" in to_mend(checkup.examine(place))["ray"]


def test_a_cluster_without_tokens_is_to_be_mended(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert "RAY_AUTH_MODE is not set" in to_mend(hardening.examine(place))["ray token"]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "RAY_AUTH_MODE=disabled" in to_mend(hardening.examine(place))["ray token"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert to_mend(hardening.examine(place)) == {}


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("VLLM_SERVER_DEV_MODE", "1", "vllm dev mode"),
        ("HF_DATASETS_TRUST_REMOTE_CODE", "true", "remote code"),
        ("PYTHONOPTIMIZE", "1", "python -O"),
    ],
)
def test_a_variable_that_opens_a_door_is_found(
    place: Place, monkeypatch: pytest.MonkeyPatch, name: str, value: str, what: str
):
    monkeypatch.setenv(name, value)
    assert set(to_mend(hardening.examine(place))) == {what}
    monkeypatch.setenv(name, "0")
    assert to_mend(hardening.examine(place)) == {}


@pytest.mark.parametrize(
    ("port", "address", "closed"),
    [
        (8265, "127.0.0.1", True),
        (8265, "10.0.0.7", False),
        (8265, "0.0.0.0", False),  # noqa: S104 - read, not bound
        (6379, "10.0.0.7", True),
        (10001, "::", False),
    ],
)
def test_rays_dashboard_is_on_loopback_and_none_of_its_ports_everywhere(port: int, address: str, closed: bool):
    findings = hardening.of_ray({port: [address]})
    (finding,) = (finding for finding in findings if str(port) in finding.found)
    assert finding.ok is closed
    assert address in finding.found


def test_files_that_others_can_read_are_found_and_the_fix_is_a_command(place: Place, tmp_path: Path):
    with stored(place):
        pass
    (place.runs / ".service-secret").write_bytes(b"x")
    secrets = tmp_path / "secrets"
    secrets.mkdir(mode=0o700)
    (secrets / "big").write_text("sk")
    guarded = Place(**{**vars_of(place), "secrets": secrets})
    closed = [(place.runs, 0o750), (secrets, 0o700), (secrets / "big", 0o600), (place.runs / ".service-secret", 0o600)]
    for path, mode in closed:
        path.chmod(mode)
    assert to_mend(hardening.examine(guarded)) == {}
    for path, mode, what in (
        (place.runs, 0o755, "runs"),
        (secrets, 0o750, "secrets"),
        (secrets / "big", 0o640, "secret big"),
        (place.runs / ".service-secret", 0o644, "service secret"),
        (place.runs / "potstill.db", 0o644, "database file"),
    ):
        before = path.stat().st_mode & 0o777
        path.chmod(mode)
        (told,) = to_mend(hardening.examine(guarded)).items()
        assert told[0] == what
        assert f"mode {mode:04o}: chmod " in told[1]
        os.system(told[1].partition(": ")[2])  # noqa: S605 - the advice itself
        assert to_mend(hardening.examine(guarded)) == {}
        path.chmod(before)


def test_an_address_that_others_reach_needs_a_key_first(place: Place):
    wide = Place(**{**vars_of(place), "host": "192.0.2.1"})
    assert "make a key first" in to_mend(hardening.examine(wide))["bind address"]
    with stored(place) as store:
        store.keys.create(owner="o", label="", scopes=[Scope.ADMIN])
    finding = found(hardening.examine(wide))["bind address"]
    assert finding.ok
    assert "a proxy with TLS belongs before it" in finding.found


def test_the_command_says_so_by_its_exit_code(place: Place, tmp_path: Path):
    def doctor(*options: str) -> Result:
        return CliRunner().invoke(app, ["doctor", "--runs", str(place.runs), "--port", str(place.port), *options])

    fine = doctor("--security")
    assert fine.exit_code == 0, fine.output
    assert all(line.startswith("ok ") for line in fine.stdout.splitlines())
    place.runs.chmod(0o777)
    sick = doctor("--security")
    assert (sick.exit_code, "MEND runs " in sick.stdout) == (1, True)
    assert '"advice": "chmod o-rwx' in doctor("--security", "--json").stdout
    whole = doctor()
    assert "database         none yet" in whole.stdout
