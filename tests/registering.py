"""Teachers for a service of tests: registered, asked to score, and what is said of it."""

from __future__ import annotations

import socket
from typing import Any

import httpx2

from tests.services import Service

CONTEXT, COMPLETION = [1, 2, 3], [4, 5, 6, 7]
ITEM = {"id": "a", "context_ids": CONTEXT, "completion_ids": COMPLETION}


def register(service: Service, name: str, table: dict[str, Any], **headers: str) -> httpx2.Response:
    return service.http.post("/v1/teachers", json={"name": name, "teacher": table}, headers=headers)


def registered(service: Service, name: str, table: dict[str, Any]) -> dict[str, Any]:
    response = register(service, name, table)
    assert response.status_code == 201, response.text
    return dict(response.json())


def error_of(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def server_at(url: str, **more: Any) -> dict[str, Any]:
    return {"kind": "server", "url": url, "secret_ref": "file:sesame", "deadline_s": 2, **more}


def nobody() -> str:
    """A URL at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return f"http://127.0.0.1:{held.getsockname()[1]}"


def score(service: Service, teacher: str = "real", **fields: Any) -> httpx2.Response:
    return service.http.post("/v1/score", json={"teacher": teacher, "items": [ITEM], **fields})
