"""The service's client: runs are created, read, followed, cancelled and awaited over HTTP.

Every refusal of the service is a ServiceError with its status and code. Refuses to use proxies from the environment,
to follow redirects, and to send a key anywhere but to the URL it was given.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import httpx2

from potstill.errors import ServiceError

FINAL = frozenset({"succeeded", "failed", "cancelled"})
_TRIES = 4
_FIRST_DELAY_S = 0.25
_FOLLOW_PATIENCE_S = 60.0  # without a word from the service, while it is followed
_SILENCE_S = 45.0  # three of the service's keep-alives


class Client:
    """Talks to one service. `url` is its base URL, `key` an API key. Close it, or use it in a `with`.

    Requests that the service could not take (away, overloaded) are tried a few times; creating a run is safe to repeat
    because every creation carries an Idempotency-Key.
    """

    def __init__(self, url: str, key: str, *, timeout_s: float = 30.0) -> None:
        self._url = url.rstrip("/")
        self._http = httpx2.Client(
            base_url=self._url,
            headers={"Authorization": f"Bearer {key}"},
            timeout=timeout_s,
            trust_env=False,
            follow_redirects=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def create_run(self, config: Mapping[str, Any], *, idempotency_key: str | None = None) -> dict[str, Any]:
        """Submit a RunConfig mapping. The answer means that the run is stored; it starts by itself."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._ask("POST", "/v1/runs", json=dict(config), headers=headers)

    def list_runs(self, *, limit: int = 20, after: str | None = None, order: str = "desc") -> dict[str, Any]:
        """A page of runs: {"data": […], "has_more": …, "last_id": …}. `after` is the last_id of the page before."""
        params = {"limit": limit, "order": order} | ({"after": after} if after is not None else {})
        return self._ask("GET", "/v1/runs", params=params)

    def get_run(self, run_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/v1/runs/{run_id}")

    def cancel_run(self, run_id: str) -> dict[str, Any]:
        """Ask a run to stop. Its status is `cancelling` until it has; see `wait`."""
        return self._ask("POST", f"/v1/runs/{run_id}/cancel", json={})

    def list_events(self, run_id: str, *, after: int = 0, limit: int = 100) -> dict[str, Any]:
        """A page of events with seq > after."""
        return self._ask("GET", f"/v1/runs/{run_id}/events", params={"after": after, "limit": limit})

    def wait(self, run_id: str, *, poll_s: float = 1.0) -> dict[str, Any]:
        """The run, once it is in a final state."""
        while (run := self.get_run(run_id))["status"] not in FINAL:
            time.sleep(poll_s)
        return run

    def events(self, run_id: str, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Every event with seq > after, as it happens, until the run ends; each exactly once and in order.

        A broken stream is resumed behind the last event; where no stream can be had, pages are read instead.
        """
        heard = time.monotonic()
        while True:
            try:
                for event in self._stream(run_id, after):
                    heard = time.monotonic()
                    if event is None:
                        return
                    after = event["seq"]
                    yield event
            except httpx2.TransportError:
                if time.monotonic() - heard > _FOLLOW_PATIENCE_S:
                    raise self._unreachable() from None
            time.sleep(_FIRST_DELAY_S)

    def _stream(self, run_id: str, after: int) -> Iterator[dict[str, Any] | None]:
        """One connection's events; None at the run's end. Falls back to pages when the answer is no event stream."""
        path, headers = f"/v1/runs/{run_id}/events", {"Last-Event-ID": str(after)}
        with self._http.sse(path, headers=headers, timeout=httpx2.Timeout(10.0, read=_SILENCE_S)) as source:
            response = source.response
            if response.is_success and "text/event-stream" in response.headers.get("content-type", ""):
                for message in source:
                    if message.event == "end":
                        yield None
                        return
                    if message.data:
                        yield json.loads(message.data)
                return
            response.read()
            if response.status_code not in {200, 406, 429, 503}:
                raise _refusal(response)
        yield from self._pages(run_id, after)

    def _pages(self, run_id: str, after: int) -> Iterator[dict[str, Any] | None]:
        ended = self.get_run(run_id)["status"] in FINAL  # before the events: a final run's are all there
        page = self.list_events(run_id, after=after)
        yield from page["data"]
        if ended and not page["has_more"]:
            yield None

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        """One request, repeated while the service is away or overloaded."""
        delay_s = _FIRST_DELAY_S
        for tries_left in reversed(range(_TRIES)):
            try:
                response = self._http.request(method, path, **arguments)
            except httpx2.TransportError:
                if tries_left == 0:
                    raise self._unreachable() from None
            else:
                if response.is_success:
                    answer: dict[str, Any] = response.json()
                    return answer
                if response.status_code not in {429, 503} or tries_left == 0:
                    raise _refusal(response)
            time.sleep(delay_s)
            delay_s *= 2
        raise self._unreachable()

    def _unreachable(self) -> ServiceError:
        return ServiceError(f"{self._url} does not answer: is `potstill serve` running there?", None, "unreachable")


def _refusal(response: httpx2.Response) -> ServiceError:
    """The service's own words, or the bare status of whoever answered in its place."""
    status = response.status_code
    try:
        error = response.json()["error"]
        return ServiceError(str(error["message"]), status, str(error["code"]))
    except (ValueError, KeyError, TypeError):
        return ServiceError(f"{response.url} answered HTTP {status}; that is no potstill service", status, None)
