"""The client against the real service: everything that the service offers, by both clients, over HTTP."""

from __future__ import annotations

import asyncio
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, get_origin, get_type_hints

import pytest

from potstill.client import AsyncClient, Client, Refused, resources
from potstill.client.runs import update_run
from potstill.client.steps import Ask, Call, Reply
from potstill.client.surface import Surface, Verb
from potstill.client.teachers import update_teacher
from potstill.errors import ServiceError
from potstill.keys_cli import Place
from tests.launchers import ProcessLauncher
from tests.run_folders import FILES, make_checkpoint
from tests.service_configs import submitted
from tests.services import RUN, Service, serving, until

NOT_THE_CLIENTS = re.compile(
    r"GET /livez"  # a kubelet's
    r"|POST /v1/runs/\{run_id\}/events"  # a run's own
    r"|\w+ /v1/fine_tuning/.*"  # OpenAI's clients'
    r"|GET /v1/runs/\{run_id\}/checkpoints/\{checkpoint\}/files/\{path\}"  # a download's, below
    r"|GET /v1/files/\{file_id\}/content"
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as connected:
        yield connected


def described() -> Iterator[Call[Any]]:
    """Every call of the client, with something in the place of each argument."""
    for verb in (value for value in vars(Surface).values() if isinstance(value, Verb)):
        describe = verb.__get__(None, Surface)
        required = {
            name: {} if "Mapping" in str(parameter.annotation) else __file__ if name == "file" else "x"
            for name, parameter in inspect.signature(describe).parameters.items()
            if parameter.default is inspect.Parameter.empty
        }
        if describe.__name__ == "upload_file":
            required["file"] = str(Path(__file__).parents[2] / "CHANGELOG.jsonl")
        made = describe(**required) if describe.__name__ != "upload_file" else None
        if isinstance(made, Call):
            yield made


def changes() -> Iterator[Call[Any]]:
    """The calls of programs that read before they change."""
    for program in (update_run("x", notes="x"), update_teacher("x", {})):
        next(program)
        step = program.send(Reply(status=200, headers={"content-type": "application/json"}, content=b"{}"))
        assert isinstance(step, Ask)
        yield step.call


def test_the_client_has_a_call_for_everything_that_the_service_offers(service: Service):
    schema = service.http.get("/openapi.json").json()
    offered = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    asked = {f"{call.method} {call.path}" for call in [*described(), *changes()]} | {"POST /v1/files"}

    def is_asked(offer: str) -> bool:
        pattern = re.sub(r"\\\{\w+\\\}", "x", re.escape(offer))
        return any(re.fullmatch(pattern, call) for call in asked)

    missing = {offer for offer in offered if not is_asked(offer)}
    assert {offer for offer in missing if not NOT_THE_CLIENTS.fullmatch(offer)} == set()
    patterns = [re.sub(r"\\\{\w+\\\}", "x", re.escape(offer)) for offer in offered]
    assert {call for call in asked if not any(re.fullmatch(pattern, call) for pattern in patterns)} == set()


def test_every_field_of_a_resource_that_the_types_promise_is_there(client: Client, service: Service):
    def check(kind: type, found: Mapping[str, Any]) -> None:
        promised = {name for name, hint in get_type_hints(kind, include_extras=True).items() if not is_optional(hint)}
        assert promised <= set(found), kind.__name__

    def is_optional(hint: Any) -> bool:
        return get_origin(hint) is NotRequired

    client.create_run(submitted(name="typed"))
    check(resources.Run, client.wait("typed", poll_s=0.05))
    check(resources.Progress, client.get_run("typed")["progress"])
    check(resources.Plan, client.plan_run(submitted(name="plan")))
    check(resources.Page, client.list_runs())
    check(resources.Event, client.list_events("typed")["data"][0])
    check(resources.Metrics, client.get_metrics("typed"))
    check(resources.Samples, client.list_samples("typed"))
    make_checkpoint(service.folder / "runs" / "typed", 1)
    checkpoint = client.get_checkpoint("typed", "step-000001")
    check(resources.Checkpoint, checkpoint)
    check(resources.CheckpointFile, checkpoint["files"][0])
    check(resources.Key, client.who_am_i())
    check(resources.Audited, client.list_audit()["data"][0])
    client.create_run(submitted(name="fails", seed=1))
    error = client.wait("fails", poll_s=0.05)["error"]
    assert error is not None
    check(resources.Failure, error)
    check(resources.Teacher, client.register_teacher("t", {"kind": "vllm", "url": "http://127.0.0.1:1", "model": "m"}))


def test_events_metrics_and_logs_are_the_same_by_both_clients(service: Service, client: Client):
    client.create_run(submitted(name="both"))
    told = list(client.events("both"))
    assert [event["seq"] for event in told] == list(range(1, len(told) + 1))
    assert told[-1]["data"]["status"] == "succeeded"

    async def again() -> tuple[Any, ...]:
        async with AsyncClient(service.url, service.key) as other:
            heard = [event async for event in other.events("both")]
            followed = [piece async for piece in other.follow_logs("both")]
            return heard, followed, await other.get_metrics("both"), await other.get_logs("both")

    heard, followed, metrics, logs = asyncio.run(again())
    assert heard == told
    assert "".join(followed) == logs == client.get_logs("both")
    assert metrics == client.get_metrics("both")
    assert metrics["columns"]["loss"] == [1.0, 0.5, 1 / 3]


def test_a_checkpoint_comes_whole_over_the_real_routes(service: Service, client: Client, tmp_path: Path):
    client.create_run(submitted(name="kept"))
    client.wait("kept", poll_s=0.05)
    make_checkpoint(service.folder / "runs" / "kept", 2)
    half = tmp_path / ".mine.partial" / "model" / "model.safetensors"
    half.parent.mkdir(parents=True)
    half.write_bytes(FILES["model/model.safetensors"][:1000])
    place = client.download_checkpoint("kept", "step-000002", tmp_path / "mine")
    found = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    assert found.pop("manifest.json")
    assert found == FILES


def test_a_file_goes_there_and_back(client: Client, tmp_path: Path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{n} = ?", "answer": "é" * 100}) + "\n" for n in range(5000)))
    made = client.upload_file(data, idempotency_key="k")
    assert client.upload_file(data, idempotency_key="k") == made
    assert (made["rows"], made["filename"]) == (5000, "data.jsonl")
    assert client.download_file(made["id"], tmp_path / "back.jsonl").read_bytes() == data.read_bytes()


def test_a_request_whose_answer_was_lost_is_known_when_it_comes_again(client: Client):
    first = client.create_run(submitted(name="named"), idempotency_key="mine")
    assert client.create_run(submitted(name="named"), idempotency_key="mine")["created_at"] == first["created_at"]
    with pytest.raises(Refused, match="use a new one") as raised:
        client.create_run(submitted(name="other"), idempotency_key="mine")
    assert (raised.value.status, raised.value.code) == (422, "idempotency_key_reused")
    assert raised.value.request_id


def test_a_key_whose_first_answer_was_lost_is_rotated(client: Client):
    made = client.create_key(owner="ivan", idempotency_key="ivan-1")
    again = client.create_key(owner="ivan", idempotency_key="ivan-1")
    assert again == {name: value for name, value in made.items() if name != "key"}
    with pytest.raises(ServiceError, match=f"potstill keys rotate {made['id']}$"):
        Place(None).put(again, as_json=False)
    assert client.rotate_key(made["id"])["key"] != made["key"]


def test_a_run_is_watched_and_edited_while_it_goes_on(client: Client):
    client.create_run(submitted(name="watched", seed=4, steps=20))
    client.update_run("watched", notes="by hand", metadata={"a": "b"})
    seen = [(run["status"], run["progress"]["step"]) for run in client.watch("watched", poll_s=0.05)]
    assert seen[-1] == ("succeeded", 20)
    assert seen == sorted(seen, key=lambda state: state[1])
    assert [run["id"] for run in client.each_run(metadata={"a": "b"})] == ["watched"]
    assert client.get_config("watched")["loop"]["steps"] == 20
    with pytest.raises(Refused, match="final"):
        client.update_run("watched", notes="too late")


def test_runs_are_read_page_after_page(client: Client):
    names = [f"many-{number}" for number in range(3)]
    for name in names:
        client.create_run(submitted(name=name), metadata={"many": "yes"})
        client.wait(name, poll_s=0.05)
    first = client.list_runs(metadata={"many": "yes"}, limit=2)
    second = client.list_runs(metadata={"many": "yes"}, limit=2, after=first["last_id"])
    assert [run["id"] for run in [*first["data"], *second["data"]]] == names[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert [run["id"] for run in client.each_run(metadata={"many": "yes"}, status=["succeeded"])] == names[::-1]


def test_a_refused_config_names_every_setting(client: Client):
    with pytest.raises(Refused) as raised:
        client.create_run(submitted() | {"optim": {"lr": -1.0, "warmup": 3}})
    assert [detail["loc"] for detail in raised.value.details] == ["/optim/warmup", "/optim/lr"]


def test_the_service_says_what_it_has(client: Client):
    assert "none" in client.get_capabilities()["models"]
    assert [model["id"] for model in client.list_models()["data"]] == ["none"]
    assert until(lambda: client.ready()["status"] == "ok")
    assert client.version()["version"]
