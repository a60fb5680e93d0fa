"""Ports of loopback that nobody uses now, and that nobody is given who asks the system for any port."""

from __future__ import annotations

import errno
import random
import socket

PORTS = range(20_000, 32_000)  # below those that Linux and macOS give away themselves, above Ray's


def free_port() -> int:
    """Whoever gets it starts a server there in a while: a port of the system's own might be another's by then."""
    for port in random.SystemRandom().sample(PORTS, 100):
        try:
            with socket.create_server(("127.0.0.1", port)):
                return port
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("a hundred ports were tried, and none was free")
