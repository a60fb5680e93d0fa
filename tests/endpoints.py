"""Endpoints on loopback for tests of teachers that are somebody else's: scripted servers, and the client's side."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import SecretStr
from transformers import AutoModelForCausalLM

from potstill.calling.guard import LOOPBACK, Guard
from potstill.calling.outbound import CallPolicy, Endpoint
from potstill.types import IntArray

Said = tuple[int, Any]
"""Status and JSON of an answer."""


def endpoint(url: str, *, key: str | None = None, deadline_s: float = 5.0, concurrency: int = 4) -> Endpoint:
    headers = {} if key is None else {"authorization": SecretStr(f"Bearer {key}")}
    policy = CallPolicy(deadline_s=deadline_s, concurrency=concurrency, failures_to_open=5, cool_down_s=1.0)
    return Endpoint(url=url, headers=headers, guard=Guard(LOOPBACK), policy=policy)


@dataclass
class Scripted:
    """A server whose answers are a function of path and JSON; `asked` is what it was sent, in order."""

    answer: Callable[[str, Any], Said]
    url: str = ""
    asked: list[tuple[str, Any]] = field(default_factory=list)


@contextmanager
def scripted(answer: Callable[[str, Any], Said]) -> Iterator[Scripted]:
    server = Scripted(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one packet: two would wait for each other

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            given = json.loads(body) if body else None
            server.asked.append((self.path, given))
            status, said = server.answer(self.path, given)
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


class Exact:
    """The slow obvious teacher: one plain float32 forward pass of transformers per text."""

    def __init__(self, folder: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def logprobs(self, context: Sequence[int], completion: IntArray) -> np.ndarray:
        """[T, V] before each token of the completion."""
        logits = self._model(torch.tensor([[*context, *completion.tolist()]])).logits[0]
        return torch.log_softmax(logits.double(), -1)[len(context) - 1 : -1].numpy()
