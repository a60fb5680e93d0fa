"""Endpoint: one HTTP endpoint, and the one layer of potstill that calls, retries and gives up.

    call ──► breaker closed? ──► slot of the adaptive limit ──► guard ──► the endpoint
      ▲                                                                       │
      └──────── pause: what the answer asked for, plus a random one ◄─────────┘  429, 5xx, a broken connection

Everything happens within the call's deadline: waiting for a slot, connecting, reading, pausing. Whoever calls an
Endpoint adds no retries of its own, or the two multiply. What is sent must be safe to send twice.

It refuses answers that are longer than they may be, compressed, or of another media type. It does not know what an
answer means: another status than the retried ones is returned, and `refusal` makes an error of it.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from pydantic import SecretStr

from potstill.calling.breaker import Breaker
from potstill.calling.concurrency import AdaptiveLimit, Slot
from potstill.calling.guard import Guard
from potstill.calling.quoting import without_quotes
from potstill.errors import AlignmentError, ConfigError, TeacherError, TeacherRefused, TeacherUnavailable

RETRIED = frozenset({408, 429, 502, 503, 504})
_TOO_MUCH = frozenset({429, 503})
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_LONGEST_RETRY_AFTER_S = 120.0
_CONNECT_S = 5.0
_PROBLEM_BYTES = 2**16  # of an answer that is no success; what follows is not read
_PROBLEM_CHARACTERS = 500
_SILENT = "it did not answer in time"
_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]+)?")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPolicy:
    """How patient a caller is with one endpoint."""

    deadline_s: float
    """Of a call with its retries. Too short: a busy endpoint fails the run. Too long: a dead one stalls it."""
    concurrency: int
    """Most requests in flight; the limit moves from 1 to this. Too small: the endpoint idles. Too large: it refuses."""
    failures_to_open: int
    """Failures in a row after which it is left alone. At or below `concurrency`, one blip under full load is enough."""
    cool_down_s: float
    """How long it is left alone. Too long: it is back and nobody notices; too short: it is hit while it starts."""
    retried: frozenset[int] = RETRIED
    """Statuses that are sent again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for `sent`. `content` is cut after 64 KiB when `status` is no success."""

    status: int
    headers: httpx2.Headers
    content: bytes
    sent: bytes | None = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What an endpoint says is wrong, as one printable line with neither our secrets nor our questions in it."""

    message: str
    code: str | None
    param: str | None

    def __str__(self) -> str:
        return f"{self.message} ({self.param})" if self.param else self.message


@dataclass(slots=True, kw_only=True)
class Traffic:
    """What went over the wire, ever growing. `failures` counts by status or by the name of what broke."""

    requests: int = 0
    retries: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0  # of requests, added up: with n in flight, n seconds a second
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    method: str
    path: str
    body: bytes | None
    headers: Mapping[str, str]
    limit_bytes: int


class Endpoint:
    """Lives in one event loop; close it with `aclose`.

    `headers` are sent with every request, to this endpoint only. Raises ConfigError for a URL that `guard` refuses.
    """

    def __init__(self, *, url: str, headers: Mapping[str, SecretStr], guard: Guard, policy: CallPolicy) -> None:
        for name, value in headers.items():
            if not _HEADER_VALUE.fullmatch(value.get_secret_value()):
                raise ConfigError(
                    f"{name} for {url}: the value is empty or holds what no header may, like a line break"
                )
        self.url = url
        self.policy = policy
        self.traffic = Traffic()
        self.limit = AdaptiveLimit(policy.concurrency)
        self.breaker = Breaker(
            failures_to_open=policy.failures_to_open, cool_down_s=policy.cool_down_s, clock=time.monotonic
        )
        self._secret_headers = dict(headers)
        self._dice = random.Random()
        self._last_failure = _SILENT
        self._http = guard.client(
            url,
            timeout=httpx2.Timeout(policy.deadline_s, connect=_CONNECT_S),
            limits=httpx2.Limits(max_connections=policy.concurrency, max_keepalive_connections=policy.concurrency),
        )

    async def aclose(self) -> None:
        await self._http.aclose()

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        content_type: str | None = None,
        accept: str | None = None,
        limit_bytes: int,
        deadline: float | None = None,
    ) -> Answer:
        """The answer to one request, sent again while that may help.

        `accept` is the only media type that a success may have; `limit_bytes` the most bytes of one; `deadline` a time
        of the running loop, by default the policy's seconds from now.

        Raises TeacherUnavailable when no answer came in time, or at once while the endpoint is left alone;
        AlignmentError for an answer that may not be read; TargetRefused for an address that may not be called.
        """
        clock = asyncio.get_running_loop()
        by = clock.time() + self.policy.deadline_s if deadline is None else deadline
        request = _Request(
            method=method,
            path=path,
            body=body,
            headers={name: value for name, value in (("content-type", content_type), ("accept", accept)) if value},
            limit_bytes=limit_bytes,
        )
        if self.breaker.state == "open":
            raise TeacherUnavailable(self._left_alone())
        attempts, reason = 0, _SILENT
        while True:
            asked_s = 0.0
            try:
                answer = await self._attempt(request, by, is_retry=attempts > 0)
            except TimeoutError:
                raise TeacherUnavailable(self._gave_up(reason, attempts)) from None
            except httpx2.TransportError as error:
                attempts, reason = attempts + 1, _broken(error)
            else:
                if answer is None and attempts == 0:
                    raise TeacherUnavailable(self._left_alone())
                if answer is not None:
                    if answer.status not in self.policy.retried:
                        return answer
                    attempts, reason = attempts + 1, self._answered(answer)
                    asked_s = retry_after_s(answer.headers, time.time())
            jitter_s = self._dice.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempts))
            pause_s = max(asked_s, self.breaker.open_for_s()) + jitter_s
            if clock.time() + pause_s >= by:
                raise TeacherUnavailable(self._gave_up(reason, attempts))
            await asyncio.sleep(pause_s)

    def problem(self, answer: Answer) -> Problem:
        """What the endpoint said, from the error shapes of OpenAI, vLLM, FastAPI and potstill."""
        said = _said(answer.content)
        code, param = said.get("code"), said.get("param")
        return Problem(
            message=self._line(said.get("message") or said.get("detail"), answer.sent) or "no reason given",
            code=None if code is None else self._line(str(code), answer.sent),
            param=self._line(param, answer.sent) or None,
        )

    def refusal(self, answer: Answer) -> TeacherError:
        """The error for an answer that is no success: TeacherUnavailable from 500 on, else TeacherRefused."""
        kind = TeacherUnavailable if answer.status >= 500 else TeacherRefused
        return kind(f"teacher {self.url} answered {answer.status}: {self.problem(answer)}")

    async def _attempt(self, request: _Request, by: float, *, is_retry: bool) -> Answer | None:
        """One request, in its turn; None when the breaker says that it must not be sent."""
        clock = asyncio.get_running_loop()
        async with asyncio.timeout_at(by), self.limit.slot() as slot:
            if not self.breaker.admit():
                return None
            verdict, started = self.breaker.abandoned, clock.time()
            self.traffic.requests += 1
            self.traffic.retries += is_retry
            try:
                answer = await self._exchange(request)
                verdict = self._weigh(answer, slot)
            except httpx2.TransportError as error:
                verdict, self._last_failure = self.breaker.failed, _broken(error)
                self.traffic.failures[type(error).__name__] += 1
                raise
            except AlignmentError:
                self.traffic.failures["unreadable"] += 1
                raise
            except asyncio.CancelledError:
                if clock.time() >= by:  # the deadline, not the caller
                    verdict, self._last_failure = self.breaker.failed, _SILENT
                    self.traffic.failures["deadline"] += 1
                raise
            finally:
                verdict()
                self.traffic.seconds += clock.time() - started
        return answer

    def _weigh(self, answer: Answer, slot: Slot) -> Callable[[], None]:
        """Tell the limit and the counters how it went; returns what the breaker is to be told."""
        if answer.status >= 400:
            self.traffic.failures[str(answer.status)] += 1
        if answer.status in _TOO_MUCH:
            slot.overloaded()
        elif answer.status < 500:
            slot.succeeded()
        is_busy = answer.status == 503 and "retry-after" in answer.headers  # who names a time is alive
        if answer.status < 500 or is_busy:
            return self.breaker.succeeded
        self._last_failure = self._answered(answer)
        return self.breaker.failed

    async def _exchange(self, request: _Request) -> Answer:
        """Send, and read no more than may be read. Leaving early, for whatever reason, closes the connection."""
        secrets = {name: value.get_secret_value() for name, value in self._secret_headers.items()}
        headers = {"accept-encoding": "identity", **request.headers, **secrets}
        self.traffic.bytes_out += len(request.body or b"")
        async with self._http.stream(request.method, request.path, content=request.body, headers=headers) as response:
            is_readable = response.headers.get("content-encoding", "identity") == "identity"
            if response.is_success:
                self._check_kind(request, response.headers, is_readable)
            most = request.limit_bytes if response.is_success else _PROBLEM_BYTES * is_readable
            content = bytearray()
            async for chunk in response.aiter_raw():
                self.traffic.bytes_in += len(chunk)
                content += chunk
                if len(content) > most:
                    break
            if response.is_success and len(content) > most:
                raise AlignmentError(
                    f"the teacher's answer to {request.path} is longer than the {most} bytes it may have"
                )
            return Answer(
                status=response.status_code,
                headers=response.headers,
                content=bytes(content[:most]),
                sent=request.body,
            )

    def _check_kind(self, request: _Request, headers: httpx2.Headers, is_readable: bool) -> None:
        if not is_readable:
            raise AlignmentError(f"the teacher's answer to {request.path} is compressed, which it was asked not to be")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        wanted = request.headers.get("accept")
        if wanted is not None and kind not in {"", wanted}:
            raise AlignmentError(f"the teacher's answer to {request.path} is {_printable(kind)}, not {wanted}")

    def _left_alone(self) -> str:
        times, wait_s = self.breaker.failures, self.breaker.open_for_s()
        until = f"for another {wait_s:.1f} s" if wait_s > 0 else "until the probe under way has an answer"
        return f"teacher {self.url} failed {times} times in a row and is left alone {until}: {self._last_failure}"

    def _answered(self, answer: Answer) -> str:
        return f"it answered {answer.status}: {self.problem(answer).message}"

    def _gave_up(self, reason: str, attempts: int) -> str:
        patience = f"{self.policy.deadline_s:g} s ({attempts} attempts)"
        return f"teacher {self.url} gave no answer within {patience}: {reason}"

    def _line(self, said: object, sent: bytes | None) -> str:
        """Foreign text for our messages: one printable line, shortened, without our secrets and what we `sent`."""
        if not isinstance(said, str):
            return ""
        for value in self._secret_headers.values():
            for secret in (value.get_secret_value(), value.get_secret_value().removeprefix("Bearer ")):
                said = said.replace(secret, "***")
        return _printable(without_quotes(said[: 2 * _PROBLEM_CHARACTERS], sent))


def retry_after_s(headers: Mapping[str, str], now: float) -> float:
    """Seconds that an answer asks its caller to wait: retry-after-ms, or Retry-After as seconds or as a date.

    `now` is Unix time. 0.0 when nothing legible is said; at most 120, because a caller must not be put to sleep.
    """
    milliseconds, after = headers.get("retry-after-ms", ""), headers.get("retry-after", "")
    if _NUMBER.fullmatch(milliseconds):
        wanted_s = float(milliseconds) / 1000
    elif _NUMBER.fullmatch(after):
        wanted_s = float(after)
    else:
        try:
            wanted_s = parsedate_to_datetime(after).timestamp() - now
        except (ValueError, OverflowError):
            return 0.0
    return min(max(0.0, wanted_s), _LONGEST_RETRY_AFTER_S)


def _broken(error: httpx2.TransportError) -> str:
    """Its kind alone: its text may hold addresses and what was sent."""
    return f"the connection failed ({type(error).__name__})"


def _said(content: bytes) -> dict[str, Any]:
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):  # ValueError: bad JSON, bad UTF-8
        return {}
    inner = said.get("error", said) if isinstance(said, dict) else {}
    if isinstance(inner, str):
        return {"message": inner}
    return inner if isinstance(inner, dict) else {}


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text[:_PROBLEM_CHARACTERS])
