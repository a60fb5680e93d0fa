"""The service of the bench: the real application as `potstill serve` composes it, over a cluster where nothing runs.

`python -m bench.api.server FOLDER PORT DATABASE`. Ray is left out, so that the figures are the service's own.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import uvicorn

from orchestrator.service.app import create_app
from orchestrator.service.jobs import Job
from orchestrator.service.keys import Signer
from orchestrator.service.measures import Measures
from orchestrator.service.runs import Run
from orchestrator.service.serve import SHUTDOWN_S, compose
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from tests.services import options

SECRET = b"bench"
SLOTS = 10  # the runs that are at work: what the bench creates stays in the queue


class EndlessJobs:
    """A Launcher whose jobs are alive for ever."""

    def __init__(self, known: Mapping[str, Job]) -> None:
        self._jobs = dict(known)

    def launch(self, run: Run, config: Path, token: str, *, resume: bool) -> None:
        self._jobs[run.submission_id] = _alive()

    def look(self) -> Mapping[str, Job]:
        return dict(self._jobs)

    def stop(self, submission_id: str) -> None:
        """Nothing runs."""

    def log_tail(self, submission_id: str) -> str:
        return ""


def main() -> None:
    folder, port, database = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    store = Store(Database(database))
    launcher = EndlessJobs({run.submission_id: _alive() for run in store.runs.unfinished()})
    state = compose(store, launcher, Signer(SECRET), options(folder, database, slots=SLOTS), holder="bench")
    app = create_app(state, measures=Measures(store))
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_config=None,
        access_log=False,
        backlog=1024,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    uvicorn.Server(config).run()


def _alive() -> Job:
    return Job(alive=True, exit_code=None, ours=True)


if __name__ == "__main__":
    main()
