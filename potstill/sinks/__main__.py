"""The process of a sink: reads what to do, one JSON line each, and answers each with a line.

What the client raises by its own name is an answer; anything else ends the process, and its traceback is in the log.
Standard output is the log too, since clients like to talk. The process ends with the run's, however that ends.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol, TextIO

from potstill.processes import end_with_parent
from potstill.sinks.sink import Ending, Facts, Note, Rewind, Sink, Step

CLIENTS = {"wandb": "Wandb", "mlflow": "Mlflow", "trackio": "Trackio"}  # by kind, which is their module
NICENESS = 10  # a run's own processes go first


class Client(Sink, Protocol):
    """A sink that knows somebody's API."""

    errors: tuple[type[Exception], ...]
    """What that API raises when it cannot do something."""


def main() -> None:
    os.nice(NICENESS)
    end_with_parent(os.getppid())
    requests, answers = _private_ends()
    module = importlib.import_module(f"potstill.sinks.{sys.argv[1]}")
    first = json.loads(requests.readline())["with"]
    client: Client = getattr(module, CLIENTS[sys.argv[1]])(first["settings"], first["secret"])
    facts = Facts(**{**first["facts"], "folder": Path(first["facts"]["folder"])})
    answer(answers, client, "open", facts)
    makers = {"step": Step, "note": Note, "rewind": Rewind, "finish": Ending}
    for line in requests:
        asked = json.loads(line)
        answer(answers, client, asked["do"], makers[asked["do"]](**asked["with"]))
        if asked["do"] == "finish":
            return
    os._exit(1)  # the run is gone without an end: no hook of the client's may call it finished


def answer(answers: TextIO, client: Client, what: str, record: Any) -> None:
    """Do it and say how it went."""
    error = None
    try:
        getattr(client, what)(record)
    except client.errors as problem:
        error = f"{type(problem).__name__}: {problem}"
    answers.write(json.dumps({"error": error}) + "\n")
    answers.flush()


def _private_ends() -> tuple[TextIO, TextIO]:
    """The two pipes under other numbers, which children do not inherit; 0 reads nothing, 1 is the log."""
    requests, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return os.fdopen(requests), os.fdopen(answers, "w")


if __name__ == "__main__":
    main()
