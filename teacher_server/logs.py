"""What this server logs: one JSON line per event on stderr, never a value that a client sent.

An error is logged as its type and the places it passed. Its text is left out: an error's message, and a traceback with
local variables even more so, may quote the prompt or the privileged context that it came from.
"""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import MutableMapping
from typing import Any

import structlog

Event = MutableMapping[str, Any]


def start() -> None:
    """Configure structlog, and log threads that end by an error the same way."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            without_values,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    log = structlog.get_logger(__name__)

    def thread_ended(ended: threading.ExceptHookArgs) -> None:
        log.error("thread.ended", thread=ended.thread and ended.thread.name, exc_info=ended.exc_value)

    threading.excepthook = thread_ended


def without_values(_: object, __: str, event: Event) -> Event:
    """The structlog processor that turns `exc_info`, an exception, into its type and its frames."""
    error = event.pop("exc_info", None)
    if isinstance(error, BaseException):
        event["error"] = type(error).__name__
        event["frames"] = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return event
