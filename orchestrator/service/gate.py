"""What every request passes and every refusal looks like: request id, host and content-type checks, one error shape.

Refuses hosts that are not listed (a web page that rebinds its own name cannot reach a service on loopback), bodies
that are not JSON (a web page cannot send those elsewhere without asking), whoever is not known (authentication.py), and
then bodies that are too large (bodies.py).
No message contains the text of a foreign exception, a path or a repr.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator.service.authentication import SAFE, Authentication
from orchestrator.service.bodies import read_json
from orchestrator.service.ranges import Unsatisfiable
from orchestrator.service.runs import SequenceGap
from orchestrator.service.waits import briefly
from potstill.errors import ConfigError, ServiceError

log = logging.getLogger(__name__)

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
RETRY_AFTER_S = 2
MOST_DETAILS = 20  # mistakes that one refusal names
LONGEST_LINE = 1000

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "internal_error",
    502: "teacher_error",
    503: "overloaded_error",
    504: "teacher_error",
}
_UNREAD = frozenset({408, 413})
_RETRYABLE = frozenset({429, 503})
_PHRASES = {404: "there is nothing at this path", 405: "this path does not take this method"}
_PROBES = frozenset({"/livez", "/readyz"})  # a kubelet asks by address
JSON, FORM = "application/json", "multipart/form-data"
# A form is what a page of another site may send without asking: the Origin alone turns it away.
_UPLOADS = {("POST", "/v1/files"): (FORM, "application/jsonl", "application/vnd.apache.parquet")}


class Gate:
    """ASGI middleware. Gives each request an id, and turns away what no route should see before its body is read."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str], authentication: Authentication) -> None:
        self._app = app
        self._hosts = LOOPBACK | set(hosts)
        self._authentication = authentication

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            receive = await self._admitted(scope, headers, receive)
        except ServiceError as error:
            await _refuse(request_id, error)(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)

    async def _admitted(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """Raises ServiceError for what is turned away; returns what gives the body."""
        method, path = scope["method"], scope["path"]
        self._check_origin(method, path, headers)
        asked = self._authentication
        who = await briefly(asked.store, asked.of_request, method, path, headers)
        scope["state"]["principal"] = who
        if _kinds(method, path, headers) != (JSON,):
            return receive
        scope["state"]["body"], receive = await read_json(receive, headers.get("content-length"))
        return receive

    def _check_origin(self, method: str, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if path not in _PROBES and _host_name(host) not in self._hosts:
            raise ServiceError("this service does not answer to that Host", 400, "host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and method not in SAFE and origin.partition("://")[2].lower() != host.lower():
            raise ServiceError("this request comes from a page of another site", 403, "origin_not_allowed")


def _kinds(method: str, path: str, headers: Headers) -> tuple[str, ...]:
    """The kinds of body that the path takes; none, where the method has no body. Raises ServiceError (415)."""
    if method not in {"POST", "PUT", "PATCH"}:
        return ()
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    taken = _UPLOADS.get((method, path), (JSON,))
    if not kind and headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
        return taken  # nothing is sent: most routes that steer a run want nothing
    if kind not in taken:
        raise ServiceError(f"send a body of Content-Type: {' or '.join(taken)}", 415, "content_type")
    return taken


async def json_object(request: Request) -> dict[str, Any]:
    """The request's body, which the gate has read."""
    body: dict[str, Any] = request.state.body
    return body


JsonObject = Annotated[dict[str, Any], Depends(json_object)]


def install(app: FastAPI, hosts: Iterable[str], authentication: Authentication) -> None:
    """Put the gate before every route, and one error shape behind every way of failing."""
    app.add_middleware(Gate, hosts=hosts, authentication=authentication)

    @app.exception_handler(ServiceError)
    async def _service(request: Request, error: ServiceError) -> JSONResponse:
        return _refuse(request.state.request_id, error)

    @app.exception_handler(ConfigError)
    async def _config(request: Request, error: ConfigError) -> JSONResponse:
        return _invalid(request, "invalid_config", [_config_line(line) for line in str(error).splitlines()])

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> JSONResponse:
        return _invalid(request, "invalid_request", [_argument_line(problem) for problem in error.errors()])

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = _PHRASES.get(error.status_code, "the request cannot be answered")
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        return _error(request.state.request_id, error.status_code, code, message, headers=error.headers)

    @app.exception_handler(Exception)
    async def _bug(request: Request, _error_raised: Exception) -> JSONResponse:
        message = "the service made a mistake; its log tells which, under this request id"
        return _error(request.state.request_id, 500, "internal", message)


def _invalid(request: Request, code: str, mistakes: list[dict[str, Any]]) -> JSONResponse:
    """400 with what is wrong, a line a mistake: the first ones, and no longer than somebody reads."""
    details = [
        {name: None if text is None else text[:LONGEST_LINE] for name, text in mistake.items()}
        for mistake in mistakes[:MOST_DETAILS]
    ]
    lines = [str(detail["message"]) for detail in details]
    if len(mistakes) > len(details):
        lines.append(f"and {len(mistakes) - len(details)} more")
    return _error(request.state.request_id, 400, code, "\n".join(lines), details)


def _refuse(request_id: str, error: ServiceError) -> JSONResponse:
    status = error.status if error.status is not None else 500
    details = None
    if isinstance(error, SequenceGap):
        details = [{"loc": error.stream, "message": str(error), "wanted": error.wanted}]
    headers = error.headers if isinstance(error, Unsatisfiable) else None
    return _error(request_id, status, error.code or "error", str(error), details, headers)


def _error(
    request_id: str,
    status: int,
    code: str,
    message: str,
    details: list[dict[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The one error shape. Logged here, so that a request id in a bug report leads to a line."""
    log.info("request %s: HTTP %d %s", request_id, status, code)
    sent = dict(headers or {}) | {"x-request-id": request_id}
    if status == 401:
        sent["www-authenticate"] = "Bearer"
    if status in _UNREAD or status == 500:  # the rest of the body would come; the server hangs up after a mistake
        sent["connection"] = "close"
    if status in _RETRYABLE:
        sent["retry-after"] = str(RETRY_AFTER_S)
    if status == 409:
        sent["x-should-retry"] = "false"  # OpenAI's clients retry every 409 unless told that it is permanent
    error = {
        "message": message,
        "type": _TYPES.get(status, "invalid_request_error"),
        "code": code,
        "param": details[0]["loc"] if details else None,
        "details": details,
        "retryable": status in _RETRYABLE,
        "request_id": request_id,
    }
    return JSONResponse({"error": error}, status_code=status, headers=sent)


def _config_line(line: str) -> dict[str, Any]:
    """A line of a ConfigError begins with the dotted key it is about, when it is about one."""
    found = re.match(r"([a-z0-9_]+(?:\.[A-Za-z0-9_]+)*): ", line)
    return {"loc": _pointer(found[1].split(".")) if found else None, "message": line}


def _argument_line(problem: Mapping[str, Any]) -> dict[str, Any]:
    """A mistake in an argument: in the body at a JSON pointer, elsewhere by its name."""
    where, *parts = problem["loc"]
    loc = _pointer(parts) if where == "body" else ".".join(map(str, parts))
    message = problem["msg"].removeprefix("Value error, ")
    return {"loc": loc, "message": f"{'.'.join(map(str, parts))}: {message}" if parts else message}


def _pointer(parts: Iterable[str | int]) -> str:
    """A JSON pointer, RFC 6901."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def _request_id(offered: str | None) -> str:
    if offered is not None and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", offered):
        return offered
    return uuid.uuid4().hex


def _host_name(host: str) -> str:
    """The name in a Host header without its port: `[::1]:8000` is ::1."""
    bracketed = re.fullmatch(r"\[([^\]]+)\](:\d+)?", host)
    return bracketed[1] if bracketed else host.rpartition(":")[0] if re.search(r":\d+$", host) else host
