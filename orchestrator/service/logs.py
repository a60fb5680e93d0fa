"""What the service logs: one JSON line an event on stderr, all of it through one processor that takes secrets out.

Keys, tokens and whatever else looks like a bearer secret become [secret] wherever they stand, also in what libraries
log. JSON in ASCII escapes line ends and control characters: a name cannot forge a line or speak to a terminal.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

Event = MutableMapping[str, Any]

_SECRET = re.compile(
    r"ps_[0-9a-f]{12}_[A-Za-z0-9_-]{43}"  # a key of ours
    r"|\b[0-9a-f]{64}\b"  # a run's token
    r"|(?i:bearer)\s+[A-Za-z0-9._~+/=-]{8,}|sk-[A-Za-z0-9_-]{16,}"  # somebody else's
)
_NAMES = re.compile(r"(?i)^(authorization|cookie|set-cookie|.*(secret|token|password|api_?key).*)$")
HIDDEN = "[secret]"


def start(level: int = logging.INFO) -> None:
    """Have structlog and the standard library log alike."""
    shared: list[Any] = [
        structlog.stdlib.add_logger_name,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        redacted,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            redacted,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("httpx2", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def redacted(_logger: object, _method: str, event: Event) -> Event:
    """The processor. Returns the event with nothing secret in it."""
    return {name: HIDDEN if _NAMES.match(name) else clean(value) for name, value in event.items()}


def clean(value: Any) -> Any:
    """A value as it may be logged."""
    if isinstance(value, str):
        return _SECRET.sub(HIDDEN, value)
    if isinstance(value, dict):
        return redacted(None, "", value)
    if isinstance(value, list | tuple):
        return [clean(inner) for inner in value]
    return value
