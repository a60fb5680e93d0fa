"""Files for a service of tests: their bytes, how they are sent, and what is left of them."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq

from potstill.environments import open_environment
from tests.service_configs import submitted
from tests.services import Service

LINES = "application/jsonl"
PARQUET = "application/vnd.apache.parquet"
ROWS = [{"prompt": "1 + 1 = ?", "answer": "2"}, {"prompt": [{"role": "user", "content": "häh?"}], "domain": "d"}]


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


def upload(
    service: Service,
    content: Any,
    *,
    kind: str = LINES,
    name: str = "a.jsonl",
    purpose: str = "prompts",
    **headers: str,
) -> httpx2.Response:
    query = {"filename": name, "purpose": purpose}
    return service.http.post("/v1/files", content=content, params=query, headers={"content-type": kind, **headers})


def refused(response: httpx2.Response, status: int, code: str) -> str:
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    return str(error["message"])


def left_over(service: Service) -> list[str]:
    return [path.name for path in (service.folder / "runs/.uploads").iterdir() if path.name.startswith(".")]


def read_by_a_run(service: Service, file_id: str) -> list[Any]:
    """The prompts that a run's own reader finds in the file."""
    with_file = {**submitted(), "data": {"kind": "jsonl", "path": file_id}}
    who = service.store.keys.bearer(service.key)
    environment = open_environment(service.state.catalog.resolve(with_file, who).data)
    return [environment.train(index) for index in range(2)]


def head(service: Service, *, length: int) -> bytes:
    """What a client sends of an upload before its body."""
    asked = f"POST /v1/files?filename=a&purpose=prompts HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {LINES}\r\n"
    return f"{asked}Authorization: Bearer {service.key}\r\nContent-Length: {length}\r\n\r\n".encode()
