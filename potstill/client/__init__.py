"""The service's Python client: the whole API, typed, sync and async.

    with Client(url, key) as client:                      async with AsyncClient(url, key) as client:
        run = client.create_run(config)                       run = await client.create_run(config)
        for event in client.events(run["id"]):                async for event in client.events(run["id"]):
            …                                                     …

    surface.py     every call as a method of both
       │           runs.py results.py checkpoints.py files.py teachers.py keys.py service.py: each call, described once
       ▼
    drivers.py     two loops that do the steps of a program (steps.py), and retry by one rule (patience.py)

Every refusal of the service is a Refused with status, code and request id; resources are dicts (resources.py).
"""

from __future__ import annotations

from potstill.client.answers import Refused
from potstill.client.drivers import AsyncDriver, SyncDriver
from potstill.client.patience import Patience
from potstill.client.surface import Surface

__all__ = ["AsyncClient", "Client", "Patience", "Refused"]


class Client(Surface, SyncDriver):
    __doc__ = SyncDriver.__doc__


class AsyncClient(Surface, AsyncDriver):
    __doc__ = AsyncDriver.__doc__
