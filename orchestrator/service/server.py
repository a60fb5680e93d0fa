"""What listens for HTTP: uvicorn, which also ends what would never end by itself.

Access is not logged here: gate.py gives every request its id, audit records say who did what.
"""

from __future__ import annotations

import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from orchestrator.service.following import Following

SHUTDOWN_S = 3  # for answers under way


class Server(uvicorn.Server):
    """settings: uvicorn's own, over ours."""

    def __init__(self, app: ASGIApp, following: Following, **settings: Any) -> None:
        ours = {
            "log_config": None,
            "log_level": "warning",
            "access_log": False,
            "server_header": False,
            "timeout_graceful_shutdown": SHUTDOWN_S,
        }
        super().__init__(uvicorn.Config(app, **ours | settings))
        self._following = following

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._following.end()
        await super().shutdown(sockets)
