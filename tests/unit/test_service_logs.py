"""Nothing secret and nothing that forges a line gets through the one processor."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import pytest
import structlog

from orchestrator.service import logs
from orchestrator.service.keys import Signer, new_key


class Written:
    """What was logged: lines, when it is called, and the text."""

    def __init__(self, stream: io.StringIO) -> None:
        self.text = stream.getvalue

    def __call__(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text().splitlines()]


@pytest.fixture
def written(capsys: pytest.CaptureFixture[str]):
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    logs.start()
    stream = io.StringIO()
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    yield Written(stream)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    structlog.reset_defaults()


def test_secrets_are_taken_out_wherever_they_stand(written):
    key, token = new_key()[0], Signer(b"s").token("job")
    log = logging.getLogger("library")
    log.warning("request with %s and Authorization: Bearer abcdefgh12345", key)
    log.warning("token %s, sk-proj-1234567890abcdef", token)
    structlog.get_logger("ours").warning("e", api_key="anything", nested={"password": "x", "list": [key]})
    try:
        raise ValueError(key)
    except ValueError:
        log.exception("it broke")
    text = json.dumps(written())
    assert key not in text
    assert token not in text
    assert "abcdefgh12345" not in text
    assert "1234567890abcdef" not in text
    assert "anything" not in text
    assert text.count("[secret]") >= 7


def test_a_name_cannot_forge_a_line_or_speak_to_a_terminal(written):
    logging.getLogger("x").warning("run %s", 'a\n{"event": "forged"}\x1b[31m\u202e')
    (line,) = written()
    assert line["event"] == 'run a\n{"event": "forged"}\x1b[31m\u202e'
    assert written.text().isascii()
    assert "\x1b" not in written.text()
