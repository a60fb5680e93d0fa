"""A teacher server on loopback that tells what it can, and answers every question alike, or none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.builders_teacher import IDENTITY
from tests.teacher_tables import offering


@dataclass
class Talking:
    url: str = ""
    asked: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)


@contextmanager
def talking(answer: tuple[int, Any] | None) -> Iterator[Talking]:
    """`asked`: somebody wants a text scored; `left`: whoever got no answer to that has gone."""
    server = Talking()
    able = (200, offering(IDENTITY).model_dump())
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    server.url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    def talk(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            while request := lines.readline():
                length = 0
                while (line := lines.readline().lower()) not in {b"\r\n", b""}:
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                lines.read(length)
                is_question = b" /v1/score " in request
                if is_question:
                    server.asked.set()
                if is_question and answer is None:
                    lines.read(1)  # until the connection ends
                    server.left.set()
                    return
                status, said = answer if is_question and answer is not None else able
                content = json.dumps(said).encode()
                head = (
                    f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
                )
                connection.sendall(head.encode() + content)

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()
