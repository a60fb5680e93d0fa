"""The two that drive programs: one over httpx2.Client, one over httpx2.AsyncClient. They know steps, and no call.

Refuses proxies from the environment and redirects: a key goes to the URL that it was given for, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from typing import IO, Any, Self, TypeVar

import httpx2

from potstill import __version__
from potstill.authorities import trusted
from potstill.client.answers import ask
from potstill.client.patience import Patience, attempts
from potstill.client.steps import (
    Aside,
    Ask,
    Call,
    Flow,
    Give,
    Hear,
    Listen,
    Lost,
    Message,
    Pause,
    Program,
    Reply,
    Save,
    Send,
    Step,
    advance,
)
from potstill.errors import ConfigError, ServiceError

R = TypeVar("R")
T = TypeVar("T")

CONNECT_S = 10.0
_BLOCK = 1 << 18
_NEVER_ARRIVED = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout)


class SyncDriver:
    """Talks to one service. `url` is its base URL, `key` an API key. Close it, or use it in a `with`.

    `timeout_s`: of silence within a request; `patience`: how often one is sent; `tls`: for an authority of your own.
    """

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout_s: float = 30.0,
        patience: Patience | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._url, self._timeout_s, self._patience = _base(url), timeout_s, patience or Patience()
        self._http = httpx2.Client(**_settings(self._url, key, tls))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def do(self, wanted: Call[R] | Program[R]) -> R:
        """Run a call or a program to its end, and return what it returns."""
        with contextlib.closing(ask(wanted) if isinstance(wanted, Call) else wanted) as program:
            answer: Any = None
            while True:
                try:
                    step = advance(program, answer)
                except StopIteration as done:
                    result: R = done.value
                    return result
                answer = self._take(step)

    def iterate(self, flow: Flow[T]) -> Generator[T]:
        """What a flow gives, when it gives it. Closed early, it closes its stream."""
        with contextlib.closing(flow), contextlib.ExitStack() as stream:
            messages: Iterator[httpx2.ServerSentEvent] = iter(())
            answer: Any = None
            while True:
                try:
                    step = advance(flow, answer)
                except StopIteration:
                    return
                if isinstance(step, Give):
                    yield step.item
                    answer = None
                elif isinstance(step, Listen):
                    stream.close()
                    answer, messages = self._listen(step.call, stream)
                elif isinstance(step, Hear):
                    answer = self._hear(messages)
                else:
                    answer = self._take(step)

    def _take(self, step: Step) -> Any:
        """Do it. A ServiceError is an answer: the program may know what to do."""
        try:
            match step:
                case Ask(call):
                    return self.do(attempts(call, self._patience))
                case Send(call):
                    return self._send(call)
                case Save():
                    return self._save(step)
                case Aside(work):
                    return work()
                case Pause(seconds):
                    time.sleep(seconds)
                    return None
        except ServiceError as error:
            return error

    def _send(self, call: Call[Any]) -> Reply | Lost:
        with contextlib.ExitStack() as held:
            try:
                content = _blocks(held, call) if call.upload is not None else None
                response = self._http.request(**_arguments(call, self._timeout_s), content=content)
            except httpx2.RequestError as error:
                return _lost(error, self._url)
            return _reply(response, response.content)

    def _save(self, step: Save) -> Reply | Lost:
        try:
            with self._http.stream(**_arguments(step.call, self._timeout_s)) as response:
                reply = _reply(response)
                if not step.sink.begin(reply):
                    return _reply(response, response.read())
                with contextlib.closing(step.sink):
                    for chunk in response.iter_raw():
                        step.sink.write(chunk)
                return reply
        except httpx2.RequestError as error:
            return _lost(error, self._url)

    def _listen(
        self, call: Call[Any], stream: contextlib.ExitStack
    ) -> tuple[Reply | Lost, Iterator[httpx2.ServerSentEvent]]:
        try:
            response = stream.enter_context(self._http.stream(**_arguments(call, self._timeout_s)))
            if _is_stream(response):
                return _reply(response), iter(httpx2.EventSource(response))
            return _reply(response, response.read()), iter(())
        except httpx2.RequestError as error:
            return _lost(error, self._url), iter(())

    def _hear(self, messages: Iterator[httpx2.ServerSentEvent]) -> Message | Lost | None:
        try:
            message = next(messages, None)
        except httpx2.RequestError as error:
            return _lost(error, self._url)
        return None if message is None else Message(event=message.event, data=message.data)


class AsyncDriver:
    """The same for asyncio: every method is awaited, every iterator is asynchronous. Use it in an `async with`."""

    def __init__(
        self,
        url: str,
        key: str,
        *,
        timeout_s: float = 30.0,
        patience: Patience | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._url, self._timeout_s, self._patience = _base(url), timeout_s, patience or Patience()
        self._http = httpx2.AsyncClient(**_settings(self._url, key, tls))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_raised: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def do(self, wanted: Call[R] | Program[R]) -> R:
        """Run a call or a program to its end, and return what it returns."""
        with contextlib.closing(ask(wanted) if isinstance(wanted, Call) else wanted) as program:
            answer: Any = None
            while True:
                try:
                    step = advance(program, answer)
                except StopIteration as done:
                    result: R = done.value
                    return result
                answer = await self._take(step)

    async def iterate(self, flow: Flow[T]) -> AsyncGenerator[T]:
        """What a flow gives, when it gives it. Closed early, it closes its stream."""
        with contextlib.closing(flow):
            async with contextlib.AsyncExitStack() as stream:
                messages: AsyncIterator[httpx2.ServerSentEvent] = _none()
                answer: Any = None
                while True:
                    try:
                        step = advance(flow, answer)
                    except StopIteration:
                        return
                    if isinstance(step, Give):
                        yield step.item
                        answer = None
                    elif isinstance(step, Listen):
                        await stream.aclose()
                        answer, messages = await self._listen(step.call, stream)
                    elif isinstance(step, Hear):
                        answer = await self._hear(messages)
                    else:
                        answer = await self._take(step)

    async def _take(self, step: Step) -> Any:
        """Do it. A ServiceError is an answer: the program may know what to do."""
        try:
            match step:
                case Ask(call):
                    return await self.do(attempts(call, self._patience))
                case Send(call):
                    return await self._send(call)
                case Save():
                    return await self._save(step)
                case Aside(work):
                    return await asyncio.to_thread(work)
                case Pause(seconds):
                    return await asyncio.sleep(seconds)
        except ServiceError as error:
            return error

    async def _send(self, call: Call[Any]) -> Reply | Lost:
        with contextlib.ExitStack() as held:
            try:
                content = _blocks_in_turn(held, call) if call.upload is not None else None
                response = await self._http.request(**_arguments(call, self._timeout_s), content=content)
            except httpx2.RequestError as error:
                return _lost(error, self._url)
            return _reply(response, response.content)

    async def _save(self, step: Save) -> Reply | Lost:
        try:
            async with self._http.stream(**_arguments(step.call, self._timeout_s)) as response:
                reply = _reply(response)
                if not step.sink.begin(reply):
                    return _reply(response, await response.aread())
                with contextlib.closing(step.sink):
                    async for chunk in response.aiter_raw():
                        await asyncio.to_thread(step.sink.write, chunk)
                return reply
        except httpx2.RequestError as error:
            return _lost(error, self._url)

    async def _listen(
        self, call: Call[Any], stream: contextlib.AsyncExitStack
    ) -> tuple[Reply | Lost, AsyncIterator[httpx2.ServerSentEvent]]:
        try:
            response = await stream.enter_async_context(self._http.stream(**_arguments(call, self._timeout_s)))
            if _is_stream(response):
                return _reply(response), aiter(httpx2.EventSource(response))
            return _reply(response, await response.aread()), _none()
        except httpx2.RequestError as error:
            return _lost(error, self._url), _none()

    async def _hear(self, messages: AsyncIterator[httpx2.ServerSentEvent]) -> Message | Lost | None:
        try:
            message = await anext(messages, None)
        except httpx2.RequestError as error:
            return _lost(error, self._url)
        return None if message is None else Message(event=message.event, data=message.data)


def _base(url: str) -> str:
    """Raises ConfigError for what is no base URL."""
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        parsed = httpx2.URL("")
    plain = not (parsed.userinfo or parsed.query or parsed.fragment or re.search(r"\s", url))
    if parsed.scheme not in {"http", "https"} or not parsed.host or not plain:
        raise ConfigError(f"{url!r} is no base URL of a service: write http://host:port or https://host")
    return url.rstrip("/")


def _settings(url: str, key: str, tls: ssl.SSLContext | None) -> dict[str, Any]:
    if not key.isascii() or not key.isprintable():
        raise ConfigError("the API key has characters in it that no key has")
    headers = {"Authorization": f"Bearer {key}", "User-Agent": f"potstill/{__version__}"}
    return {
        "base_url": url,
        "headers": headers,
        "trust_env": False,
        "follow_redirects": False,
        "verify": trusted() if tls is None else tls,
    }


def _arguments(call: Call[Any], timeout_s: float) -> dict[str, Any]:
    headers = dict(call.headers)
    if call.upload is not None:
        headers |= {"Content-Type": call.upload.media_type, "Content-Length": str(call.upload.path.stat().st_size)}
    return {
        "method": call.method,
        "url": call.path,
        "params": {name: value for name, value in call.params.items() if value is not None},
        "json": call.body,
        "headers": headers,
        "timeout": httpx2.Timeout(call.timeout_s or timeout_s, connect=CONNECT_S),
    }


def _open(held: contextlib.ExitStack, call: Call[Any]) -> IO[bytes]:
    assert call.upload is not None
    return held.enter_context(call.upload.path.open("rb"))


def _blocks(held: contextlib.ExitStack, call: Call[Any]) -> Iterator[bytes]:
    file = _open(held, call)
    return iter(lambda: file.read(_BLOCK), b"")


async def _blocks_in_turn(held: contextlib.ExitStack, call: Call[Any]) -> AsyncIterator[bytes]:
    file = _open(held, call)
    while block := await asyncio.to_thread(file.read, _BLOCK):
        yield block


async def _none() -> AsyncIterator[httpx2.ServerSentEvent]:
    nothing: tuple[httpx2.ServerSentEvent, ...] = ()
    for message in nothing:
        yield message


def _is_stream(response: httpx2.Response) -> bool:
    return response.is_success and response.headers.get("content-type", "").startswith("text/event-stream")


def _reply(response: httpx2.Response, content: bytes = b"") -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(status=response.status_code, headers=headers, content=content)


def _lost(error: httpx2.RequestError, where: str) -> Lost:
    return Lost(where=where, sent=not isinstance(error, _NEVER_ARRIVED))
