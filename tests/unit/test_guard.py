"""The guard against URLs and resolvers that mean ill, with a canary on loopback that nobody may reach."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx2
import pytest

from potstill.calling.guard import LAPTOP, LOOPBACK, Guard
from potstill.errors import ConfigError, TargetRefused

TIMEOUT = httpx2.Timeout(2.0)
SERVER, CANARY = "127.0.0.1", "127.0.0.2"


@dataclass
class Listener:
    """Keeps the first bytes of everyone who connects, and answers all of them alike."""

    answer: bytes
    port: int = 0
    heard: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.heard.append(await reader.read(4096))
        writer.write(self.answer)
        await writer.drain()
        writer.close()


@asynccontextmanager
async def listening(
    host: str = CANARY, answer: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
) -> AsyncIterator[Listener]:
    listener = Listener(answer)
    async with await asyncio.start_server(listener.serve, host, 0) as server:
        listener.port = server.sockets[0].getsockname()[1]
        yield listener


class Resolver:
    """Gives the n-th asker the n-th answer, the last one ever after."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = answers
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers[min(len(self.asked), len(self._answers)) - 1]


async def get(guard: Guard, url: str, path: str = "/") -> httpx2.Response:
    async with guard.client(url, timeout=TIMEOUT) as client:
        return await client.get(path)


LOOPBACK_SPELLINGS = """
    127.0.0.2 127.0.2 127.2 0x7f000002 0x7f.0.0.2 0X7F.2 2130706434 017700000002 0177.0.0.2 0177.0.2 127.0.0.0x2
    127.0.0.002 0x7f.0x0.0x2 000000177.2 127。0。0。2 127.0.0.2. %31%32%37.0.0.2 １２７.0.0.2 ①②⑦.0.0.2
    [::1] [0::1] [::] [::127.0.0.2] [::ffff:127.0.0.2] [::ffff:7f00:2] [0:0:0:0:0:ffff:127.0.0.2] [::1%25lo]
    [64:ff9b::127.0.0.2] [64:ff9b::7f00:2] [64:ff9b:1::127.0.0.2] [2002:7f00:2::1] 0 0.0.0.0
    localhost LOCALHOST a.localhost localhost. localhost%00.example.org
    127.0.0.2%20 127.0.0.2%00 127.0.0.2%2eexample.org
"""
URLS = [
    *(f"https://{host}:{{port}}/v1" for host in LOOPBACK_SPELLINGS.split()),
    *(f"http://{host}:{{port}}" for host in ("127.0.0.2", "0x7f000002", "[::ffff:127.0.0.2]", "localhost")),
    "https://teacher.example@127.0.0.2:{port}/",
    "https://127.0.0.2:{port}@teacher.example/",
    "https://teacher.example\\@127.0.0.2:{port}/",
    "https://127.0.0.2:{port}\\@teacher.example/",
    "https://:@127.0.0.2:{port}/",
    "https://@127.0.0.2:{port}/",
    "https://teacher.example#@127.0.0.2:{port}/",
    "https://teacher.example?@127.0.0.2:{port}/",
    "https://teacher.example /../127.0.0.2:{port}",
    "https://127.0.0.2:{port}\t/",
    "https://127.0.0.2\r\nhost: teacher.example:{port}/",
    "//127.0.0.2:{port}/",
    "127.0.0.2:{port}",
    "///127.0.0.2:{port}",
    "https:127.0.0.2:{port}",
    "https:///127.0.0.2:{port}",
    "ftp://127.0.0.2:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.2:{port}/_x",
    "unix:///run/docker.sock",
    "https://10.0.0.7/",
    "https://172.16.0.1/",
    "https://192.168.1.1/",
    "https://100.64.0.1/",
    "https://169.254.169.254/latest/meta-data",
    "http://169.254.169.254/latest/meta-data",
    "https://[::ffff:169.254.169.254]/",
    "https://[64:ff9b::a9fe:a9fe]/",
    "https://[2002:a9fe:a9fe::]/",
    "https://[fd00:ec2::254]/",
    "https://[fe80::a9fe:a9fe]/",
    "https://2852039166/",
    "https://100.100.100.200/",
    "https://168.63.129.16/",
    "https://192.0.0.192/",
    "https://192.0.0.8/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://240.0.0.1/",
    "https://192.0.2.1/",
    "https://198.18.0.1/",
    "https://[ff02::1]/",
    "https://[fc00::1]/",
    "https://[fec0::1]/",
    "https://[2001:db8::1]/",
    "https://[2001:0:7f00:2::]/",
    "https://8.8.8.8:22/",
    "https://8.8.8.8:6379/",
    "https://8.8.8.8:0/",
    "https://8.8.8.8:99999/",
    "https://8.8.8.8:-1/",
    "https://8.8.8.8:80:80/",
    "https://256.1.1.1/",
    f"https://{'a' * 64}.example/",
    "http://8.8.8.8/",
    "http://teacher.example/",
    "",
    "https://",
]


def test_the_list_of_bad_urls_is_long_and_has_none_twice():
    assert len(set(URLS)) == len(URLS) >= 60


@pytest.mark.parametrize("url", URLS)
async def test_a_bad_url_is_refused_before_a_packet_is_sent(url):
    guard = Guard(())
    async with listening() as canary:
        with pytest.raises(ConfigError) as caught:
            guard.check(url.format(port=canary.port))
        with pytest.raises(ConfigError):
            guard.client(url.format(port=canary.port), timeout=TIMEOUT)
    assert canary.heard == []
    assert "\n" not in str(caught.value)


BAD_ANSWERS = """
    127.0.0.2 ::1 ::ffff:127.0.0.2 64:ff9b::7f00:2 2002:7f00:2:: 0.0.0.0 :: 10.0.0.1 169.254.169.254
    ::ffff:169.254.169.254 fd00:ec2::254 fe80::1%lo 224.0.0.1 192.0.0.8 100.64.0.1 255.255.255.255 168.63.129.16
    fc00::1 ff02::1 64:ff9b::10.0.0.1 2002:0a00:1:: 192.88.99.1
"""


@pytest.mark.parametrize("answer", BAD_ANSWERS.split())
@pytest.mark.parametrize("good", [(), ("8.8.8.8",)])
async def test_a_name_with_one_bad_answer_is_not_called_at_all(answer, good):
    async with listening() as canary:
        guard, url = Guard((), resolve=Resolver([*good, answer])), f"https://teacher.example:{canary.port}"
        guard.check(url)
        with pytest.raises(TargetRefused):
            await get(guard, url)
    assert canary.heard == []


@pytest.mark.parametrize("answer", ["8.8.8.8", "10.0.0.1", "127.0.0.2"])
async def test_a_name_is_called_without_encryption_only_where_its_address_is_listed(answer):
    async with listening() as canary:
        guard, url = Guard(("192.168.0.0/16",), resolve=Resolver([answer])), f"http://teacher.example:{canary.port}"
        guard.check(url)
        with pytest.raises(TargetRefused, match="use https"):
            await get(guard, url)
    assert canary.heard == []


async def test_a_resolver_that_changes_its_mind_after_it_was_asked_gains_nothing():
    resolver = Resolver([SERVER], [CANARY], ["8.8.8.8", CANARY])
    async with listening(SERVER) as server, listening() as canary:
        guard = Guard((f"{SERVER}/32",), resolve=resolver)
        url = f"http://teacher.example:{server.port}/base"
        async with guard.client(url, timeout=TIMEOUT) as client:
            assert (await client.get("/x")).text == "ok"
            for _ in range(3):
                with pytest.raises(TargetRefused):
                    await client.get("/x")
    assert canary.heard == []
    assert resolver.asked == ["teacher.example"] * 4  # once for each connection
    (request,) = server.heard
    assert request.startswith(b"GET /base/x HTTP/1.1\r\n")
    assert f"host: teacher.example:{server.port}\r\n".encode() in request.lower()


async def test_the_name_and_not_the_address_is_what_tls_asks_for():
    async with listening(SERVER, answer=b"") as server:
        guard = Guard(LOOPBACK, resolve=Resolver([SERVER]))
        with pytest.raises(httpx2.TransportError):
            await get(guard, f"https://teacher.example:{server.port}")
    (hello,) = server.heard
    assert b"teacher.example" in hello


async def test_the_next_address_is_tried_when_one_does_not_answer():
    async with listening(SERVER) as server:
        guard = Guard(LOOPBACK, resolve=Resolver(["127.0.0.9", "::1", SERVER]))
        assert (await get(guard, f"http://teacher.example:{server.port}")).text == "ok"


async def test_a_redirect_is_not_followed():
    async with listening() as canary:
        location = (
            f"HTTP/1.1 302 Found\r\nlocation: http://{CANARY}:{canary.port}/\r\ncontent-length: 0\r\n\r\n".encode()
        )
        async with listening(SERVER, answer=location) as server:
            response = await get(Guard(LOOPBACK), f"http://{SERVER}:{server.port}")
    assert response.status_code == 302
    assert canary.heard == []


async def test_a_client_calls_no_other_host_than_its_own():
    guard = Guard(LOOPBACK)
    async with listening() as canary, guard.client(f"http://{SERVER}:{canary.port}", timeout=TIMEOUT) as client:
        for url in (f"http://{CANARY}:{canary.port}/", f"http://{SERVER}:{canary.port + 1}/"):
            with pytest.raises(TargetRefused, match="made for"):
                await client.get(url)
    assert canary.heard == []


async def test_proxies_of_the_environment_are_not_used(monkeypatch):
    async with listening() as canary, listening(SERVER) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://{CANARY}:{canary.port}")
        assert (await get(Guard(LOOPBACK), f"http://{SERVER}:{server.port}")).text == "ok"
    assert canary.heard == []


async def test_a_name_that_does_not_resolve_is_unreachable_and_not_refused():
    async def nowhere(host: str, port: int) -> Sequence[str]:
        return []

    with pytest.raises(httpx2.ConnectError):
        await get(Guard(LAPTOP, resolve=nowhere), "https://teacher.example")


async def test_a_resolver_that_hangs_is_given_up_after_the_time_to_connect():
    async def hang(host: str, port: int) -> Sequence[str]:
        await asyncio.sleep(60)
        return [SERVER]

    async with Guard(LAPTOP, resolve=hang).client("https://teacher.example", timeout=httpx2.Timeout(0.1)) as client:
        with pytest.raises(httpx2.ConnectTimeout):
            await client.get("/")


@pytest.mark.parametrize(
    ("allow", "url"),
    [
        ((), "https://teacher.example"),
        ((), "https://teacher.example:8443/v1"),
        ((), "https://8.8.8.8/v1"),
        ((), "https://[2606:4700::1111]/v1"),
        ((), "https://[64:ff9b::8.8.8.8]/v1"),
        ((), "https://xn--fiqs8s.icom.museum"),
        (LOOPBACK, "http://127.0.0.1:8001"),
        (LOOPBACK, "http://127.1:8001"),
        (LOOPBACK, "http://[::ffff:127.0.0.1]:8001"),
        (LOOPBACK, "http://[::1]:8001"),
        (LOOPBACK, "http://localhost:8001"),
        (LAPTOP, "http://192.168.1.7:8001"),
        (LAPTOP, "http://box.lan:8001"),
        (("Teacher.Internal",), "http://teacher.internal/v1"),
        (("100.64.0.0/10",), "https://100.64.0.1"),
    ],
)
def test_what_may_be_called_passes(allow, url):
    Guard(allow).check(url)


def test_a_host_listed_by_name_may_be_private_but_never_a_metadata_service():
    guard, base = Guard(("teacher.internal",)), httpx2.URL("http://teacher.internal")
    guard.admit(base, ipaddress.ip_address("10.1.2.3"))
    for never in ("169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "0.1.2.3", "64:ff9b::a9fe:a9fe"):
        with pytest.raises(TargetRefused, match="never called"):
            guard.admit(base, ipaddress.ip_address(never))


def test_a_metadata_address_inside_a_listed_range_is_not_opened_by_it():
    with pytest.raises(ConfigError, match="never called"):
        Guard(("fc00::/7", "100.64.0.0/10")).check("http://[fd00:ec2::254]")
    with pytest.raises(ConfigError, match="never called"):
        Guard(("100.64.0.0/10",)).check("http://100.100.100.200")


TOO_WIDE = ("*", "0.0.0.0/0", "::/0", "0.0.0.0/1", "169.254.0.0/16", "169.254.169.254", "fe80::/64")
NO_ENTRY = ("", "a/b", "*.lan", "10.0.0.1/8", "http://a", "a:80", "[::1]")


@pytest.mark.parametrize("entry", TOO_WIDE + NO_ENTRY)
def test_an_entry_that_would_open_too_much_or_nothing_is_refused(entry):
    with pytest.raises(ConfigError, match=r"teacher\.allow"):
        Guard((entry,), setting="teacher.allow")


def test_a_refusal_names_what_to_add_and_where():
    guard = Guard((), setting="service.allow")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.7 is a private address: add it to service\.allow"):
        guard.check("https://10.0.0.7")
    with pytest.raises(ConfigError, match=r"use https, or add box\.lan to service\.allow"):
        guard.check("http://box.lan")


def test_a_refusal_does_not_repeat_a_password():
    with pytest.raises(ConfigError) as caught:
        Guard(()).check("https://me:hunter2@teacher.example/")
    assert "hunter2" not in str(caught.value)
