"""What `potstill run` looks like to the service, with nothing to train. It starts in a third of a second: it reads the
few settings that it needs and leaves the others to the service, which checks them before it starts anything.

`python -m tests.tiny_run CONFIG --report-to URL`. The config's seed says how it goes: 0 succeeds, 1 fails and says so,
2 works until it is told to stop, 3 dies without a word, 4 works as long as it has steps, 50 ms each,
or until it is told to stop, 5 dies without a word the first time and succeeds when it is resumed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

from orchestrator.reporting import HttpReporter
from potstill.errors import NonFinite
from potstill.journal import Journal, Status


def main() -> int:
    config = json.loads(Path(sys.argv[1]).read_bytes())
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    resumed = "--resume" in sys.argv
    journal = Journal(Path(config["runs"]) / config["name"], resume=resumed)
    token = os.environ["POTSTILL_RUN_TOKEN"]
    reporter = HttpReporter(sys.argv[3], config["name"], token, journal.folder)
    journal.listen(reporter)
    journal.status(Status.STARTING)
    journal.status(Status.RUNNING)
    code = work(config["seed"], config["loop"]["steps"], journal, stopped, resumed=resumed)
    reporter.close(timeout_s=3.0)
    journal.close()
    return code


def work(seed: int, steps: int, journal: Journal, stopped: threading.Event, *, resumed: bool) -> int:
    if seed == 3 or (seed == 5 and not resumed):
        print("the last words of this process", flush=True)
        os._exit(9)
    for step in range(1, steps + 1):
        journal.event("step.finished", f"step {step}", step=step)
        journal.metrics(step, {"loss": 1.0 / step})
        if seed == 4 and stopped.wait(0.05):
            journal.status(Status.CANCELLED)
            return 5
    if seed == 2:
        stopped.wait(60.0)
        journal.event("run.cleaned", "the checkpoint is written")
        journal.status(Status.CANCELLED)
        return 5
    if seed == 1:
        journal.status(Status.FAILED, error=NonFinite("step 3: the loss is NaN"))
        return 1
    journal.status(Status.SUCCEEDED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
