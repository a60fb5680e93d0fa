"""The commands about what a service has: checkpoints, files, teachers, keys; and about whose key is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.service.principals import Scope
from tests.commands import Command, commanding, done, finished, read, refused
from tests.launchers import ProcessLauncher
from tests.run_folders import FILES, make_checkpoint
from tests.services import RUN, Service, serving


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


@pytest.fixture
def command(service: Service, tmp_path: Path) -> Command:
    return commanding(service, tmp_path)


# -------------------------------------------------------------------------------------------------- checkpoints, files


def test_a_checkpoint_is_listed_fetched_published_and_removed(service: Service, command: Command, tmp_path: Path):
    name = finished(service, "saved")
    for step in (1, 2, 3):
        make_checkpoint(service.folder / "runs" / name, step)
    rows = done(command("checkpoints", "list", name)).splitlines()
    assert [row.split()[0] for row in rows] == ["NAME", "step-000003", "step-000002", "step-000001"]
    place = done(command("checkpoints", "get", name, "latest", "-o", tmp_path / "mine")).strip()
    assert place == str(tmp_path / "mine")
    for path, content in FILES.items():
        assert (tmp_path / "mine" / path).read_bytes() == content
    refused(command("checkpoints", "get", name, "step-000003", "-o", tmp_path / "mine"), 2, "name a place that is free")
    assert "published as better" in done(command("checkpoints", "publish", name, "step-000002", "better"))
    refused(command("checkpoints", "rm", name, "step-000002"), 4, "published as better", "checkpoint_in_use")
    done(command("checkpoints", "withdraw", name, "step-000002"))
    assert read(command("checkpoints", "ttl", name, "step-000002", "3600", "--json"))["expires_at"] is not None
    assert read(command("checkpoints", "ttl", name, "step-000002", "none", "--json"))["expires_at"] is None
    refused(command("checkpoints", "ttl", name, "step-000002", "soon"), 2, "a number of seconds, or none")
    done(command("checkpoints", "rm", name, "step-000001"))
    left = read(command("checkpoints", "list", name, "--json"))["data"]
    assert [item["id"] for item in left] == ["step-000003", "step-000002"]
    refused(command("checkpoints", "get", finished(service, "unsaved"), "latest"), 2, "has no checkpoint yet")


def test_a_file_is_put_listed_fetched_and_removed(command: Command, tmp_path: Path):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(f'{{"prompt": "{n}", "answer": "{n}"}}\n' for n in range(3)))
    file_id = done(command("files", "put", data, "--purpose", "eval", "--name", "mine.jsonl")).strip()
    (listed,) = read(command("files", "list", "--purpose", "eval", "--json"))["data"]
    assert (listed["id"], listed["filename"], listed["rows"]) == (file_id, "mine.jsonl", 3)
    assert listed["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert re.search(rf"{file_id} +mine.jsonl +eval +3 +\d+ +20\d\d-", done(command("files", "list")))
    done(command("files", "get", file_id, "-o", tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == data.read_bytes()
    done(command("files", "rm", file_id))
    refused(command("files", "get", file_id), 4, "file_not_found")
    refused(command("files", "put", tmp_path / "none.jsonl"), 2, "there is no such file")


# ----------------------------------------------------------------------------------------------------- teachers, keys


def test_a_teacher_is_registered_from_a_file_or_by_options(service: Service, command: Command, tmp_path: Path):
    (service.folder / "secrets" / "big").write_text("sk-secret\n")
    (tmp_path / "big.toml").write_text(
        '[teacher]\nkind = "openai"\nurl = "https://teachers.example"\nmodel = "big"\nsecret_ref = "file:big"\n'
    )
    made = read(command("teachers", "add", "big", tmp_path / "big.toml", "--set", "max_tokens=99", "--json"))
    assert (made["teacher"]["model"], made["teacher"]["max_tokens"]) == ("big", 99)
    options = ["--kind", "vllm", "--at", "http://127.0.0.1:1", "--model", "m"]
    assert "potstill teachers probe small" in command("teachers", "add", "small", *options).stderr
    rows = [line.split() for line in done(command("teachers", "list")).splitlines()]
    assert ["big", "openai", "https://teachers.example", "big", "not", "yet"] in rows
    assert "sk-secret" not in done(command("teachers", "list", "--json"))
    refused(command("teachers", "add", "big", tmp_path / "big.toml"), 4, "name_taken")
    refused(command("teachers", "probe", "small", "--tokenizer", "none"), 4)
    done(command("teachers", "rm", "small"))
    refused(command("teachers", "rm", "small"), 4, "teacher_not_found")
    (tmp_path / "run.toml").write_text("name = 'x'\n")
    refused(command("teachers", "add", "x", tmp_path / "run.toml"), 2, "no [teacher] table")
    refused(command("teachers", "add", "x"), 2, "say what the teacher is")


def test_a_key_is_made_shown_once_renewed_and_ended(service: Service, command: Command, tmp_path: Path):
    options = ["--owner", "ann", "--label", "laptop", "--limit", "running=2", "--limit", "gpu_hours=0.5"]
    result = command("keys", "create", *options, "--expires", "30d")
    key = done(result).strip()
    assert "shown once" in result.stderr
    assert "ann at" in done(command("whoami", POTSTILL_API_KEY=key))
    me = read(command("whoami", "--json", POTSTILL_API_KEY=key))
    assert (me["limits"]["running"], me["limits"]["gpu_hours"], me["scopes"]) == (2, 0.5, ["runs:read", "runs:write"])
    assert re.search(rf"{me['id']} +ann +laptop", done(command("keys", "list")))
    assert key not in done(command("keys", "list", "--json"))
    refused(command("keys", "list", POTSTILL_API_KEY=key), 4, "lacks the scope admin", "missing_scope")

    assert "running=5" in done(command("keys", "limit", me["id"], "running=5"))
    changed = read(command("whoami", "--json", POTSTILL_API_KEY=key))["limits"]
    assert (changed["running"], "gpu_hours" in changed) == (5, False)

    made = command("keys", "rotate", me["id"], "--key-file", tmp_path / "new")
    fresh = (tmp_path / "new").read_text().strip()
    assert fresh not in done(made) + made.stderr
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    refused(command("whoami", POTSTILL_API_KEY=key), 4, "invalid_key")
    done(command("whoami", POTSTILL_API_KEY=fresh))
    assert command("keys", "revoke", me["id"]).stderr == f"{me['id']} of ann has ended\n"
    refused(command("whoami", POTSTILL_API_KEY=fresh), 4, "invalid_key")


def test_a_key_that_could_not_be_kept_is_not_made(service: Service, command: Command, tmp_path: Path):
    before = len(service.store.keys.list())
    (tmp_path / "taken").touch()
    refused(command("keys", "create", "--owner", "a", "--key-file", tmp_path / "taken"), 2, "File exists")
    refused(command("keys", "create", "--owner", "a", "--expires", "soon"), 2, "e.g. 30d")
    refused(command("keys", "create", "--owner", "a", "--limit", "running=two"), 2, "a number is needed")
    refused(command("keys", "create", "--owner", "A A", "--key-file", tmp_path / "unmade"), 4, "invalid_request")
    assert not (tmp_path / "unmade").exists()
    assert len(service.store.keys.list()) == before


# ------------------------------------------------------------------------------------------------------------- access


def test_a_kept_key_is_used_where_no_variable_names_one(service: Service, command: Command, tmp_path: Path):
    none: dict[str, str | None] = {"POTSTILL_API_KEY": None, "POTSTILL_URL": None}
    line = command("login", "--key-file", "-", "--url", service.url, input=service.key + "\n", **none).stderr
    kept = tmp_path / "config" / "potstill" / "credentials.toml"
    assert f"knows you as operator; the key is kept in {kept}" in line
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert "operator at" in done(command("whoami", **none))

    other = service.key_for("bob", Scope.RUNS_READ)
    assert "bob at" in done(command("whoami", **none | {"POTSTILL_API_KEY": other}))
    refused(command("whoami", "--url", "http://127.0.0.1:1", **none), 2, "no key is kept for http://127.0.0.1:1")

    kept.chmod(0o640)
    refused(command("whoami", **none), 2, "others can read it", "chmod 600")
    kept.chmod(0o600)
    assert "is forgotten here" in command("logout", **none).stderr
    refused(command("whoami", "--url", service.url, **none), 2, "potstill login")
    refused(command("logout", "--url", service.url, **none), 2, "no key is kept")


def test_a_key_that_the_service_does_not_know_is_not_kept(command: Command, tmp_path: Path):
    key_file = tmp_path / "key"
    key_file.write_text("ps_wrong\n")
    key_file.chmod(0o644)
    refused(command("login", "--key-file", key_file), 2, "others can read it")
    key_file.chmod(0o600)
    refused(command("login", "--key-file", key_file), 4, "invalid_key")
    refused(command("login", "--key-file", tmp_path / "none"), 2, "No such file")
    key_file.write_text("\n")
    refused(command("login", "--key-file", key_file), 2, "there is no key in it")
    assert not (tmp_path / "config").exists()


def test_the_dashboards_address_is_printed(service: Service, command: Command):
    assert done(command("open")) == f"{service.url}/\n"
    assert done(command("open", "my-run", "--no-browser")) == f"{service.url}/runs/my-run\n"
