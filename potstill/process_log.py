"""Where the processes of a run write what they have to say: a file each in the run's folder, which only grows.

    <run>/logs/orchestrator.log  learner-0.log …  rollout-0.log …

A process that is started for the run has its output sent there by whoever starts it; an actor, which is started before
it knows its run, does it itself. What it wrote is then there when the process, its node and the cluster are gone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from potstill.refusals import refusals

FOLDER = "logs"
DRIVER = "orchestrator"  # the process that drives the run


def log_of(run: Path, who: str = DRIVER) -> Path:
    """Of one process, in a run's folder."""
    return run / FOLDER / f"{who}.log"


def begin(run: Path, heading: str) -> None:
    """Make the driver's log if need be, and say in it what comes now. Raises RunError when the disk refuses."""
    path = log_of(run)
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(f"── {heading}\n".encode())


def write_to(path: Path) -> None:
    """Send what this process and its children write to stdout and stderr to the end of `path` from now on.

    Raises RunError when the disk refuses.
    """
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
