"""An endpoint against a scripted one: a real server on loopback that answers byte by byte as each test tells it to."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate

import pytest
from pydantic import SecretStr

from potstill.calling.guard import LOOPBACK, Guard
from potstill.calling.outbound import Answer, CallPolicy, Endpoint, retry_after_s
from potstill.errors import AlignmentError, ConfigError, TargetRefused, TeacherRefused, TeacherUnavailable

SECRET = "sk-canary-4711"
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Scripted:
    """Answers the n-th request with the n-th script, the last one ever after; one request a connection."""

    scripts: tuple[Script, ...]
    url: str = ""
    heads: list[bytes] = field(default_factory=list)
    in_flight: int = 0
    most_in_flight: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            self.heads.append(await reader.readuntil(b"\r\n\r\n"))
            await self.scripts[min(len(self.heads), len(self.scripts)) - 1](reader, writer)
        except ConnectionError:
            return  # the client hung up, as some tests want it to
        finally:
            self.in_flight -= 1
            writer.close()


@asynccontextmanager
async def scripted(*scripts: Script, port: int = 0) -> AsyncIterator[Scripted]:
    one = Scripted(scripts)
    server = await asyncio.start_server(one.serve, "127.0.0.1", port)
    one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield one
    finally:
        server.close()


def says(status: int = 200, body: bytes = b"{}", **headers: str) -> Script:
    """A whole answer; header names are written with underscores."""
    lines = {"content-length": str(len(body)), "connection": "close"}
    lines |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return sends(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + body)


def sends(*parts: bytes, pause_s: float = 0.0) -> Script:
    """Exactly these bytes, and then the end of the connection."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return script


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()  # until the client hangs up


async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await sends(b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(2**20)] * 512)(reader, writer)


BECAUSE = json.dumps({"error": {"message": "because", "code": "nope", "param": "items[0].id"}}).encode()
SOON = {"retry_after_ms": "1"}
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n"


def endpoint(
    url: str, *, deadline_s: float = 5.0, concurrency: int = 4, failures_to_open: int = 50, cool_down_s: float = 0.3
) -> AbstractAsyncContextManager[Endpoint]:
    policy = CallPolicy(
        deadline_s=deadline_s, concurrency=concurrency, failures_to_open=failures_to_open, cool_down_s=cool_down_s
    )
    headers = {"authorization": SecretStr(f"Bearer {SECRET}")}
    return aclosing(Endpoint(url=url, headers=headers, guard=Guard(LOOPBACK), policy=policy))


async def call(one: Endpoint, *, limit_bytes: int = 1000) -> Answer:
    accept = "application/json"
    return await one.call("POST", "/v1/x", body=b"{}", content_type=accept, accept=accept, limit_bytes=limit_bytes)


async def check_unavailable(url: str, match: str, *, at_most_s: float, deadline_s: float = 0.4) -> None:
    clock = asyncio.get_running_loop()
    started = clock.time()
    async with endpoint(url, deadline_s=deadline_s) as one:
        with pytest.raises(TeacherUnavailable, match=match):
            await call(one)
        assert one.limit.in_flight == 0
    assert clock.time() - started < at_most_s


async def test_an_answer_comes_back_whole_and_is_counted():
    async with scripted(says(body=b'{"a": 1}', x_kept="yes")) as server, endpoint(server.url) as one:
        answer = await call(one)
    assert (answer.status, answer.content, answer.headers["x-kept"]) == (200, b'{"a": 1}', "yes")
    head = server.heads[0].lower()
    for line in (b"post /v1/x http/1.1", b"accept-encoding: identity", f"authorization: bearer {SECRET}".encode()):
        assert line in head
    traffic = one.traffic
    assert (traffic.requests, traffic.retries, traffic.bytes_out, traffic.bytes_in) == (1, 0, 2, 8)
    assert traffic.seconds > 0
    assert not traffic.failures


PASSING = {
    **{f"a {status}": says(status, BECAUSE, **SOON) for status in (408, 429, 502, 503, 504)},
    "a 429 without a header": says(429),
    "a 503 without a header": says(503),
    "a reset": resets,
    "half an answer": sends(HEAD, b"half"),
    "half a header": sends(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "no HTTP": sends(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "nothing": sends(),
}


@pytest.mark.parametrize("fault", PASSING)
async def test_a_fault_that_may_pass_is_tried_again(fault):
    async with scripted(PASSING[fault], says()) as server, endpoint(server.url) as one:
        assert (await call(one)).status == 200
    assert len(server.heads) == one.traffic.requests == 2
    assert (one.traffic.retries, sum(one.traffic.failures.values())) == (1, 1)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (302, TeacherRefused),
        (400, TeacherRefused),
        (401, TeacherRefused),
        (404, TeacherRefused),
        (500, TeacherUnavailable),
    ],
)
async def test_another_status_comes_back_after_one_request_and_says_why(status, kind):
    async with scripted(says(status, BECAUSE, location="http://127.0.0.1:9/")) as server, endpoint(server.url) as one:
        answer = await call(one)
        refusal = one.refusal(answer)
    assert (answer.status, len(server.heads)) == (status, 1)
    assert type(refusal) is kind
    assert str(refusal) == f"teacher {server.url} answered {status}: because (items[0].id)"
    assert one.problem(answer).code == "nope"


async def test_the_time_that_an_answer_asks_for_is_waited():
    clock = asyncio.get_running_loop()
    async with scripted(says(429, retry_after_ms="300"), says()) as server, endpoint(server.url) as one:
        started = clock.time()
        await call(one)
    assert clock.time() - started >= 0.3


async def test_a_wait_beyond_the_deadline_is_not_begun():
    async with scripted(says(503, BECAUSE, retry_after="60")) as server:
        await check_unavailable(server.url, "503: because", at_most_s=0.5, deadline_s=2.0)
    assert len(server.heads) == 1


async def test_nobody_there_is_unavailable_at_the_deadline():
    async with scripted(says()) as server:
        url = server.url
    await check_unavailable(
        url, r"within 0.4 s \(\d+ attempts\): the connection failed \(ConnectError\)", at_most_s=0.6
    )


DRIPS = {
    "hangs": hangs,
    "drips its header": sends(*[b"x"] * 100, pause_s=0.05),
    "drips its body": sends(HEAD, *[b"x"] * 100, pause_s=0.05),
}


@pytest.mark.parametrize("drip", DRIPS)
async def test_an_answer_that_never_ends_is_given_up_at_the_deadline(drip):
    async with scripted(DRIPS[drip]) as server:
        await check_unavailable(server.url, "did not answer in time", at_most_s=0.8)


UNREADABLE = {
    "another media type": (says(content_type="text/html; charset=utf-8"), "is text/html, not application/json"),
    "compressed": (says(content_encoding="gzip", content_type="application/json"), "compressed"),
    "a little too long": (says(body=bytes(1001)), "longer than the 1000 bytes"),
}


@pytest.mark.parametrize("fault", UNREADABLE)
async def test_an_answer_that_may_not_be_read_is_an_error_and_not_tried_again(fault):
    script, match = UNREADABLE[fault]
    async with scripted(script) as server, endpoint(server.url) as one:
        with pytest.raises(AlignmentError, match=match):
            await call(one)
    assert len(server.heads) == 1
    assert one.traffic.failures == {"unreadable": 1}


async def test_the_media_type_may_have_parameters_and_may_be_left_out():
    for script in (says(content_type="Application/JSON; charset=utf-8"), says()):
        async with scripted(script) as server, endpoint(server.url) as one:
            assert (await call(one)).status == 200


async def test_a_huge_answer_costs_neither_memory_nor_time():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with scripted(floods) as server, endpoint(server.url) as one:
        with pytest.raises(AlignmentError, match="longer than"):
            await call(one, limit_bytes=2**20)
        assert one.traffic.bytes_in < 2 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 2**10  # KiB


async def test_a_huge_error_page_is_cut():
    async with scripted(says(400, bytes(2**24))) as server, endpoint(server.url) as one:
        answer = await call(one)
    assert (answer.status, len(answer.content)) == (400, 2**16)


async def test_a_cancelled_call_closes_its_connection_at_once():
    async with scripted(hangs) as server, endpoint(server.url, deadline_s=30.0) as one:
        task = asyncio.create_task(call(one))
        while not server.heads:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(0.5):
            while server.in_flight:
                await asyncio.sleep(0.01)
        assert (one.limit.in_flight, one.breaker.failures) == (0, 0)


async def test_an_overloaded_endpoint_is_asked_less_at_once():
    slow = sends(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", pause_s=0.02)
    async with scripted(*[says(429, **SOON)] * 4, slow) as server, endpoint(server.url, concurrency=4) as one:
        await asyncio.gather(*(call(one) for _ in range(4)))
        assert one.limit.limit == 3  # halved once to 2; after 2 of the 4 successes 3
    assert server.most_in_flight <= 4


async def test_after_failures_in_a_row_new_calls_fail_at_once():
    async with (
        scripted(says(500, BECAUSE)) as server,
        endpoint(server.url, failures_to_open=3, cool_down_s=60.0) as one,
    ):
        for _ in range(3):
            await call(one)
        said = r"failed 3 times in a row and is left alone for another \d\d\.\d s: it answered 500: because"
        async with asyncio.timeout(0.5), AsyncExitStack() as stack:
            for _ in range(4):  # not even a slot is waited for
                await stack.enter_async_context(one.limit.slot())
            with pytest.raises(TeacherUnavailable, match=said):
                await call(one)
    assert len(server.heads) == 3


async def test_hanging_until_the_deadline_is_a_failure_to_the_breaker():
    async with scripted(hangs) as server, endpoint(server.url, deadline_s=0.1, failures_to_open=2) as one:
        for _ in range(2):
            with pytest.raises(TeacherUnavailable):
                await call(one)
        assert (one.breaker.failures, one.traffic.failures) == (2, {"deadline": 2})


async def test_while_one_call_probes_the_others_fail_at_once():
    async with scripted(resets, hangs) as server, endpoint(server.url, failures_to_open=1, cool_down_s=0.05) as one:
        probing = asyncio.create_task(call(one))
        while len(server.heads) < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(TeacherUnavailable, match="until the probe under way has an answer"):
            await call(one)
        probing.cancel()
        await asyncio.wait([probing])
        assert one.breaker.state == "half-open"
    assert len(server.heads) == 2


async def test_a_call_under_way_outlasts_an_open_breaker_with_one_probe_at_a_time():
    faults = [resets] * 3
    async with scripted(*faults, says()) as server, endpoint(server.url, failures_to_open=2, cool_down_s=0.2) as one:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(call(one))
        assert one.breaker.state == "closed"
    assert len(server.heads) <= 6


async def test_a_busy_endpoint_that_names_a_time_is_not_taken_for_dead():
    async with scripted(says(503, retry_after="60")) as server, endpoint(server.url, failures_to_open=2) as one:
        for _ in range(3):
            with pytest.raises(TeacherUnavailable, match="503"):
                await call(one)
        assert (one.breaker.state, one.limit.limit) == ("closed", 1)


async def test_an_address_that_may_not_be_called_is_refused_without_a_second_try():
    async def flips(host: str, port: int) -> list[str]:
        return ["10.0.0.1"]

    policy = CallPolicy(deadline_s=5.0, concurrency=1, failures_to_open=1, cool_down_s=60.0)
    guard = Guard((), resolve=flips)
    async with aclosing(Endpoint(url="https://teacher.example", headers={}, guard=guard, policy=policy)) as one:
        with pytest.raises(TargetRefused):
            await call(one)
        assert (one.traffic.requests, one.breaker.state) == (1, "closed")
    with pytest.raises(ConfigError, match="private address"):
        Endpoint(url="https://10.0.0.1", headers={}, guard=guard, policy=policy)


async def test_the_secret_is_in_no_repr_no_log_and_no_message(caplog):
    caplog.set_level(logging.DEBUG)
    echo = json.dumps({"error": {"message": f"bad key {SECRET}\x1b[31m\n", "param": f"Bearer {SECRET}"}}).encode()
    async with scripted(says(401, echo)) as server, endpoint(server.url) as one:
        refusal = one.refusal(await call(one))
        shown = repr(vars(one)) + repr(one) + caplog.text
    assert str(refusal).endswith("answered 401: bad key *** [31m  (***)")
    assert SECRET not in shown


@pytest.mark.parametrize("value", ["", f"{SECRET}\n", f"{SECRET}\r\nhost: x", f"{SECRET}é", " x"])
def test_a_key_that_is_no_header_value_is_a_config_error_without_the_key(value):
    policy = CallPolicy(deadline_s=1.0, concurrency=1, failures_to_open=1, cool_down_s=1.0)
    with pytest.raises(ConfigError, match="authorization for http") as caught:
        Endpoint(
            url="http://127.0.0.1", headers={"authorization": SecretStr(value)}, guard=Guard(LOOPBACK), policy=policy
        )
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "m", "code": 404, "param": null}}', "m"),
        (b'{"error": "m"}', "m"),
        (b'{"object": "error", "message": "m", "code": 40401}', "m"),
        (b'{"detail": "m"}', "m"),
        (b'{"detail": [{"loc": []}]}', "no reason given"),
        (b"<html>", "no reason given"),
        (b"[" * 50_000, "no reason given"),
        (b'{"error": null}', "no reason given"),
        (b"\xff", "no reason given"),
    ],
)
async def test_the_reason_is_read_from_every_usual_shape(body, message):
    async with scripted(says(400, body)) as server, endpoint(server.url) as one:
        assert one.problem(await call(one)).message == message


def test_retry_after_is_read_in_all_its_forms():
    now = 1_700_000_000.0
    for headers, wanted in (
        ({}, 0.0),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": formatdate(now + 30, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(now - 30, usegmt=True)}, 0.0),
        ({"retry-after": "86400"}, 120.0),
        *(({"retry-after": text}, 0.0) for text in ("soon", "-5", "nan", "inf", "1e9", "٣", "9" * 400)),
    ):
        assert retry_after_s(headers, now) == wanted, headers
