"""Followers of a run's events over HTTP: resumed anywhere, ended with the run or the service, or served pages."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.launchers import AwayLauncher, ProcessLauncher
from tests.service_configs import submitted
from tests.services import RUN, Service, serving, until


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


def without_streams(app: ASGIApp) -> ASGIApp:
    """What stands before a service whose clients get pages only: a proxy that forgets the Accept header."""

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name, value) for name, value in scope.get("headers", []) if name != b"accept"]
        await app(dict(scope) | {"headers": headers}, receive, send)

    return proxy


def test_a_stream_is_resumed_behind_any_event_and_ends_with_the_run(service: Service):
    with service.client() as client:
        client.create_run(submitted(name="streamed", seed=4, steps=20))
        whole = list(client.events("streamed"))
    assert [event["seq"] for event in whole] == list(range(1, len(whole) + 1))
    for after in (0, 1, len(whole) // 2, len(whole)):
        with service.http.sse("/v1/runs/streamed/events", headers={"Last-Event-ID": str(after)}) as source:
            messages = list(source)
        assert [int(message.id) for message in messages if message.event == "run.event"] == list(
            range(after + 1, len(whole) + 1)
        )
        assert (messages[-1].event, json.loads(messages[-1].data)) == ("end", {"status": "succeeded"})


def test_pages_of_events_hold_what_the_stream_holds(service: Service):
    with service.client() as client:
        client.create_run(submitted(name="paged"))
        streamed = list(client.events("paged"))
        paged, after, more = [], 0, True
        while more:
            page = client.list_events("paged", after=after, limit=2)
            paged, after, more = paged + page["data"], page["last_id"], page["has_more"]
    assert paged == streamed


def test_where_no_stream_can_be_had_the_client_reads_pages(tmp_path: Path):
    with serving(tmp_path, lambda url: ProcessLauncher(tmp_path / "jobs", RUN, url), before=without_streams) as service:
        assert service.http.get("/v1/runs", headers={"accept": "text/event-stream"}).json()["object"] == "list"
        with service.client() as client:
            client.create_run(submitted(name="paged", seed=4, steps=10))
            seqs = [event["seq"] for event in client.events("paged")]
            assert client.get_run("paged")["status"] == "succeeded"
    assert seqs == list(range(1, len(seqs) + 1))
    assert len(seqs) == 24  # four statuses, ten events, ten steps of metrics


def test_a_service_that_ends_ends_the_streams_of_those_who_follow(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with serving(tmp_path, lambda _url: AwayLauncher()) as service, ThreadPoolExecutor(1) as reader:
        service.http.post("/v1/runs", json=submitted(name="waits")).raise_for_status()

        def follow() -> list[str]:
            with service.asking(service.key).sse("/v1/runs/waits/events") as source:
                return [message.event for message in source]

        heard = reader.submit(follow)
        until(lambda: service.state.following.followers)
        service.end()
        assert set(heard.result(timeout=30)) == {"message", "run.event"}  # no break, and no end of the run
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == []
