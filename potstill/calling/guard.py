"""Guard: decides which addresses a call may go to, before a packet is sent.

A URL in a config is somebody else's text, and whoever calls it lends them this machine's place in the network. So:

    public address     https only
    listed             http too: a private network or a host name on the allow list
    never              metadata services, link-local, multicast, "this host" and reserved ranges; no list opens them

A name is judged by what it resolves to, every answer of it, at the moment of connecting, and the connection goes to the
address that was judged: a name that answers differently the second time gains nothing. Redirects are not followed,
proxies and the environment are not read, and a client calls no other origin than the one it was made for.

It refuses to switch itself off: there is no entry for "everything".
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

import httpcore2
import httpx2

from potstill.authorities import trusted
from potstill.errors import ConfigError, TargetRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]

LOOPBACK = ("127.0.0.0/8", "::1/128", "localhost")
LAPTOP = (*LOOPBACK, "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
"""For a run that its own user started on a machine of theirs. A service that takes URLs from others must pass the list
of its operator instead: with this one, every host of the operator's network can be called by whoever may submit."""

_NEVER = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("169.254.0.0/16", "fe80::/10"),  # link-local: metadata of AWS, Azure, GCP, OpenStack
        *("fd00:ec2::/32", "fd20:ce::254/128", "100.100.100.200/32", "168.63.129.16/32"),  # AWS, GCP, Alibaba, Azure
        *("0.0.0.0/8", "::/128"),  # "this host": Linux connects these to loopback
        *("192.0.0.0/24", "192.88.99.0/24"),  # protocol assignments (Oracle's metadata), 6to4 relays
        *("224.0.0.0/4", "ff00::/8", "240.0.0.0/4"),  # multicast, reserved, broadcast
    )
)
_GLOBAL_IPV6 = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_WIDEST_PREFIX = {4: 8, 6: 7}  # 10.0.0.0/8 and fc00::/7; what is wider is no private network
_HOST = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NOT_IN_A_BASE_URL = re.compile(r"[\s\\@?#]")
_LIKE_AN_ADDRESS = re.compile(r"(.*\.)?(0x[0-9a-f]*|[0-9]+)")
_FIRST_FREE_PORT = 1024
# What listens there takes text for commands (ftp, ssh, telnet, mail, Redis, memcached, IRC) or starts jobs (Ray)
_NEVER_PORTS = frozenset({21, 22, 23, 25, 110, 143, 465, 587, 6379, 6667, 8265, 11211})


async def system_resolver(host: str, port: int) -> list[str]:
    """Every address that this machine's resolver gives for `host`. Raises socket.gaierror."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class Guard:
    """Which addresses may be called. `allow` lists private networks (CIDR) and host names that may be called as well.

    A host that is listed by its name may resolve to any private address: its DNS is trusted. `setting` is how messages
    call the list. Raises ConfigError for an entry that is neither, too wide, or within what no list opens.
    """

    def __init__(
        self, allow: Sequence[str], *, setting: str = "the allow list", resolve: Resolver = system_resolver
    ) -> None:
        self._setting = setting
        self.resolve = resolve
        self._networks: list[Network] = []
        self._names: set[str] = set()
        for entry in allow:
            network = _network(entry)
            if network is not None:
                self._networks.append(self._checked(entry, network))
            elif _HOST.fullmatch(entry.lower()):
                self._names.add(entry.lower())
            else:
                raise ConfigError(f"{setting}: {entry!r} is neither a network like 10.0.0.0/8 nor a host name")

    def check(self, url: str) -> None:
        """Raise ConfigError for a base URL that cannot be called. Asks no resolver: names are judged on connecting."""
        try:
            base = _parsed(url)
            literal = _literal(_host(base))
            if literal is not None:
                self.admit(base, literal)
            elif base.scheme == "http" and _host(base) not in self._names and not self._networks:
                raise TargetRefused(self._plain(_host(base)))
        except TargetRefused as error:
            raise ConfigError(f"{_shown(url)}: {error}") from None

    def client(
        self, base_url: str, *, timeout: httpx2.Timeout, limits: httpx2.Limits | None = None
    ) -> httpx2.AsyncClient:
        """A client of one origin. Raises ConfigError as `check` does; its requests raise TargetRefused."""
        self.check(base_url)
        base = _parsed(base_url)
        transport = _Transport(self, base, httpx2.Limits() if limits is None else limits)
        return httpx2.AsyncClient(
            base_url=base, transport=transport, timeout=timeout, follow_redirects=False, trust_env=False
        )

    def admit(self, base: httpx2.URL, address: Address) -> None:
        """Raise TargetRefused unless a call to `base` may go to `address`."""
        address = _unmapped(address)
        inner = _carried(address)
        if any(one in network for one in (address, inner) for network in _NEVER):
            raise TargetRefused(f"{address} is a metadata, link-local or reserved address, which is never called")
        if _host(base) in self._names or any(address in network for network in self._networks):
            return
        if base.scheme == "http":
            raise TargetRefused(self._plain(str(address)))
        if not _is_public(inner):
            raise TargetRefused(f"{address} is a private address: add it to {self._setting} if it may be called")
        if _port(base) != 443 and _port(base) < _FIRST_FREE_PORT:
            raise TargetRefused(f"port {_port(base)} of a public host is not called: use 443, or one above 1023")

    def _plain(self, host: str) -> str:
        return f"http is not encrypted: use https, or add {host} to {self._setting}"

    def _checked(self, entry: str, network: Network) -> Network:
        if network.prefixlen < _WIDEST_PREFIX[network.version]:
            raise ConfigError(f"{self._setting}: {entry} is too wide; list the private networks that may be called")
        if any(_within(network, never) for never in _NEVER):
            raise ConfigError(f"{self._setting}: {entry} is a metadata, link-local or reserved range; take it out")
        return network


class _Backend(httpcore2.AsyncNetworkBackend):
    """Connects to `base` only, and there only to addresses that the guard has admitted."""

    def __init__(self, guard: Guard, base: httpx2.URL) -> None:
        self._guard = guard
        self._base = base
        self._sockets = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        if (host, port) != (_host(self._base), _port(self._base)):
            raise TargetRefused(f"{host}:{port} is not the host that this client was made for")
        clock = asyncio.get_running_loop()
        deadline = None if timeout is None else clock.time() + timeout
        addresses = await self._admitted(host, port, timeout)
        failure: Exception = httpcore2.ConnectError("the name has no address")
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            share = None if deadline is None else max(0.0, deadline - clock.time()) / left
            try:
                return await self._sockets.connect_tcp(str(address), port, share, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[SocketOption] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        raise TargetRefused("a teacher is not called through a socket file")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def _admitted(self, host: str, port: int, timeout: float | None) -> list[Address]:
        """Every address of `host`, all of them admitted: one bad answer is a reason to trust none of them."""
        try:
            async with asyncio.timeout(timeout):
                texts = await self._guard.resolve(host, port)
        except TimeoutError:
            raise httpcore2.ConnectTimeout("the name was not resolved in time") from None
        except socket.gaierror:
            raise httpcore2.ConnectError("the name does not resolve") from None
        addresses = [ipaddress.ip_address(text) for text in texts]
        for address in addresses:
            self._guard.admit(self._base, address)
        return addresses


class _Transport(httpx2.AsyncHTTPTransport):
    """httpx2 has no argument for the network backend, its pool has: this is the one place that reaches for it."""

    def __init__(self, guard: Guard, base: httpx2.URL, limits: httpx2.Limits) -> None:
        super().__init__(verify=trusted(), trust_env=False, limits=limits)
        self._pool._network_backend = _Backend(guard, base)


def _parsed(url: str) -> httpx2.URL:
    """The base URL as httpx2 will call it. Raises TargetRefused when two readers could read it differently."""
    if _NOT_IN_A_BASE_URL.search(url):
        raise TargetRefused("a base URL has no user name, query, fragment, backslash or space")
    try:
        base = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise TargetRefused("this is not a URL") from None
    host = _host(base)
    if base.scheme not in {"http", "https"}:
        raise TargetRefused("a base URL begins with https:// or http://")
    is_plain = _HOST.fullmatch(host) is not None
    is_address = (is_plain or ":" in host) and _literal(host) is not None
    if not is_address and (not is_plain or _LIKE_AN_ADDRESS.fullmatch(host)):
        raise TargetRefused("a base URL names a host by letters, digits, '-' and '.', or by its address")
    _, colon, port = url.partition("//")[2].partition("/")[0].rpartition("]")[2].partition(":")
    if colon and not re.fullmatch(r"[0-9]*", port):  # int() reads 4_43, and the digits of every script
        raise TargetRefused("a port is written in the digits 0 to 9")
    if not 1 <= _port(base) <= 65535 or _port(base) in _NEVER_PORTS:
        raise TargetRefused(f"port {_port(base)} is not one that a teacher listens on")
    return base


def _host(base: httpx2.URL) -> str:
    return base.raw_host.decode()


def _port(base: httpx2.URL) -> int:
    return base.port if base.port is not None else {"http": 80, "https": 443}[base.scheme]


def _literal(host: str) -> Address | None:
    """The address that a host part is, in any spelling that a resolver takes: 127.1, 0x7f000001, 2130706433.

    "localhost" and names below it are loopback wherever they are asked for (RFC 6761).
    """
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    return None if "%" in host else address


def _unmapped(address: Address) -> Address:
    """::ffff:127.0.0.1 is another spelling of 127.0.0.1."""
    return address.ipv4_mapped or address if isinstance(address, ipaddress.IPv6Address) else address


def _carried(address: Address) -> Address:
    """The IPv4 address that a gateway makes of an IPv6 one (NAT64, 6to4), else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour or address


def _is_public(address: Address) -> bool:
    """`is_global` calls some IPv6 ranges global that nobody was given: public ones lie in 2000::/3 (RFC 4291)."""
    return address.is_global and (address.version == 4 or address in _GLOBAL_IPV6)


def _network(entry: str) -> Network | None:
    try:
        return ipaddress.ip_network(entry)
    except ValueError:
        return None


def _within(network: Network, outer: Network) -> bool:
    return network.network_address in outer and network.prefixlen >= outer.prefixlen


def _shown(url: str) -> str:
    """A URL for a message: without what might be a password, and on one line."""
    return re.sub(r"//[^/]*@", "//…@", "".join(char if char.isprintable() else "?" for char in url))[:200]
