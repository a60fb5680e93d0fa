"""Waiting for a run at a service, with something to look at: its panel on a terminal, its states as lines elsewhere.

All of it goes to stderr. Refuses to end the run when the waiting is ended: it goes on.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from potstill.client.resources import FINAL
from potstill.console import say
from potstill.errors import RunError

if TYPE_CHECKING:
    from potstill.client import Client
    from potstill.client.resources import Run


def wait_for(client: Client, run: Run) -> Run:
    """The run at its end. Ctrl-C ends the waiting alone."""
    try:
        return _in_a_panel(client, run) if sys.stderr.isatty() else _in_lines(client, run)
    except KeyboardInterrupt:
        say(f"{run['id']} goes on; `potstill cancel {run['id']}` ends it")
        raise


def _in_lines(client: Client, run: Run) -> Run:
    """Its states but the last, which is the command's own result."""
    told = ""
    for now in client.watch(run["id"]):
        run = now
        if run["status"] not in {told, *FINAL}:
            told = run["status"]
            say(f"{run['id']} is {told}")
    return run


def _in_a_panel(client: Client, run: Run) -> Run:
    """What `potstill run` shows, from the run's events."""
    from potstill.display import make_display

    with (
        contextlib.suppress(RunError),
        make_display(run["progress"]["max_steps"], run["id"], file=sys.stderr) as display,
    ):
        for event in client.events(run["id"]):
            if event["type"] == "metrics":
                display("metrics", event["data"])
            else:
                display("event", event)
        run = client.get_run(run["id"])
        if run["status"] != "succeeded":
            raise RunError("so that the panel ends as the run did")
    return run
