"""What this server takes: its limits, and how it says no.

A Refusal is the one way to answer anything but 200. Its message is written here, for the client: it never carries the
text of another exception, a path, or any part of a privileged context.
"""

from __future__ import annotations

from dataclasses import dataclass

from potstill.errors import ConfigError, PotstillError
from potstill.wire import MAX_TOP_K

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    409: "conflict_error",
    412: "conflict_error",
    422: "conflict_error",
    500: "internal_error",
    503: "overloaded_error",
    504: "overloaded_error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds of one request, and of all requests together. Raises ConfigError when they cannot hold together."""

    max_items: int = 256
    max_tokens: int = 262_144  # of one request, contexts included
    max_top_k: int = MAX_TOP_K  # also of ids per position that a caller chooses
    max_body_bytes: int = 64 * 2**20
    max_json_bytes: int = 2 * 2**20  # of a body: JSON is read in one go, during which the server can do nothing else
    max_json_keys: int = 32_768  # of a body: each unknown one would be looked at before the first is refused
    max_json_numbers: int = 131_072  # of an answer, for the same reason; safetensors has neither bound
    max_read_s: float = 60.0  # for a body to arrive
    max_deadline_s: float = 600.0  # after which a request is given up whatever its client says
    queue_tokens: int = 524_288  # waiting and being scored, over all requests
    inflight_requests: int = 1024  # from their headers to their answers, over all requests
    inflight_bytes: int = 4 * 2**30  # of their bodies and answers

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be above 0")
        if self.queue_tokens < self.max_tokens:
            raise ConfigError(
                f"queue_tokens ({self.queue_tokens}) is below max_tokens ({self.max_tokens}): "
                "the largest request allowed would never be admitted"
            )
        if self.inflight_bytes < self.max_body_bytes:
            raise ConfigError(
                f"inflight_bytes ({self.inflight_bytes}) is below max_body_bytes ({self.max_body_bytes}): "
                "the largest body allowed would never be admitted"
            )
        if self.inflight_bytes < self.max_body_bytes:
            raise ConfigError(
                f"inflight_bytes ({self.inflight_bytes}) is below max_body_bytes ({self.max_body_bytes}): "
                "the largest body allowed would never be admitted"
            )
        if self.inflight_bytes < self.max_body_bytes:
            raise ConfigError(
                f"inflight_bytes ({self.inflight_bytes}) is below max_body_bytes ({self.max_body_bytes}): "
                "the largest body allowed would never be admitted"
            )


class Refusal(PotstillError):
    """An answer other than 200. args: HTTP status, code, message, param, seconds after which to try again.

    Without such a time the same request can never succeed.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(status, code, message, param, retry_after_s)
        self.status, self.code, self.message, self.param, self.retry_after_s = self.args

    @property
    def retryable(self) -> bool:
        return self.retry_after_s is not None

    @property
    def headers(self) -> dict[str, str]:
        """What clients with retries built in read: OpenAI's send every 409 again unless told not to."""
        if self.retry_after_s is not None:
            return {"retry-after": str(self.retry_after_s)}
        return {"x-should-retry": "false"} if self.status == 409 else {}

    def envelope(self, request_id: str) -> dict[str, dict[str, str | bool | None]]:
        """OpenAI's error object, with the request's id and whether the same request may succeed later."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "code": self.code,
                "param": self.param,
                "request_id": request_id,
                "retryable": self.retryable,
            }
        }
