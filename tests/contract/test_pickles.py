"""Pickles sent to every port that is ours: refused, and never unpickled."""

from __future__ import annotations

import io
import pickle
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest
import torch

from tests.builders_teacher import KEY, ServerProcess, teacher_server
from tests.launchers import AwayLauncher
from tests.pickles import Canary, canary
from tests.plain import PLAIN
from tests.services import Service, serving
from tests.tiny_models import save_tiny_model

KINDS = (
    *("application/json", "application/x-safetensors", "application/octet-stream", "application/python-pickle"),
    *("application/x-python-serialize", "multipart/form-data; boundary=x", "application/jsonl", "text/plain"),
    "application/vnd.apache.parquet",
)
TEACHER_ROUTES = ("/v1/score", "/v1/completions", "/v1/weights?version=1", "/v1/models", "/nowhere")


def bodies(sang: Path) -> list[bytes]:
    """The canary in everything that an unpickler opens: plain, of old protocols, as .npy, as a torch checkpoint."""
    npy, archive = io.BytesIO(), io.BytesIO()
    np.save(npy, np.array([Canary(sang)], dtype=object), allow_pickle=True)
    torch.save({"weight": Canary(sang)}, archive)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", canary(sang))
    plain = [canary(sang, protocol) for protocol in (0, 2, pickle.HIGHEST_PROTOCOL)]
    return [*plain, npy.getvalue(), archive.getvalue(), zipped.getvalue()]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(tmp_path_factory.mktemp("pickles"), lambda _url: AwayLauncher()) as running:
        yield running


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", seed=0, layers=1)
    with teacher_server(folder, "--accept-weights") as process:
        yield process


def speak(url: str, content: bytes) -> bytes:
    """Send bytes that are no HTTP to the port itself; what it answers before it closes."""
    host, port = urlsplit(url).hostname, urlsplit(url).port
    with socket.create_connection((host, port), timeout=10) as raw:
        raw.sendall(content + b"\r\n\r\n")
        raw.shutdown(socket.SHUT_WR)
        return raw.recv(4096)


def test_the_canary_sings_when_it_is_unpickled(tmp_path: Path) -> None:
    for number, read in enumerate((pickle.loads, lambda b: np.load(io.BytesIO(b), allow_pickle=True)[0])):
        sang = tmp_path / f"sang-{number}"
        read(bodies(sang)[(0, 3)[number]])
        assert sang.exists()


def test_no_route_of_the_service_unpickles(service: Service, tmp_path: Path) -> None:
    sang = tmp_path / "sang"
    paths = service.http.get("/openapi.json").json()["paths"]
    asked = [(method, path) for path in paths for method in paths[path] if method in {"post", "put", "patch"}]
    assert len(asked) > 20
    query = {"filename": "a", "purpose": "eval"}
    for method, path in asked:
        for kind in KINDS:
            for body in bodies(sang):
                sent = {"content": body, "headers": {"content-type": kind}, "params": query}
                response = service.http.request(method, path, **sent)
                assert 400 <= response.status_code < 500, (method, path, kind)
    assert not sang.exists()


def test_no_route_of_a_teacher_server_unpickles(teacher: ServerProcess, tmp_path: Path) -> None:
    sang = tmp_path / "sang"
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx2.Client(base_url=teacher.url, headers=headers, trust_env=False, verify=PLAIN, timeout=30.0) as http:
        for path in TEACHER_ROUTES:
            for kind in KINDS:
                for body in bodies(sang):
                    response = http.post(path, content=body, headers={"content-type": kind})
                    assert 400 <= response.status_code < 500, (path, kind)
        assert http.get("/livez").status_code == 200
    assert not sang.exists()


def test_a_pickle_that_is_no_request_is_answered_by_a_refusal_or_not_at_all(
    service: Service, teacher: ServerProcess, tmp_path: Path
) -> None:
    sang = tmp_path / "sang"
    for url in (service.url, teacher.url):
        for body in bodies(sang):
            answer = speak(url, body)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 400 ")
    assert service.http.get("/livez").status_code == 200
    assert not sang.exists()
