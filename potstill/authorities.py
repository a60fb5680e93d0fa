"""The certificate authorities that this machine trusts, read once: it takes 30 ms, and a service has many clients."""

from __future__ import annotations

import functools
import ssl

import httpx2


@functools.cache
def trusted() -> ssl.SSLContext:
    """Shared by all clients of this process. Variables of the environment add none."""
    return httpx2.create_ssl_context(trust_env=False)
