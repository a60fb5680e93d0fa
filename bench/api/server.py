"""The service of the bench: the real application as `potstill serve` composes it, over a cluster where nothing runs.

`python -m bench.api.server FOLDER PORT DATABASE`. Ray is left out, so that the figures are the service's own.
"""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.service.app import create_app
from orchestrator.service.keys import Signer
from orchestrator.service.measures import Measures
from orchestrator.service.serve import collect_seldom, compose, take_short_turns
from orchestrator.service.server import Server
from orchestrator.service.store import Store
from orchestrator.service.store.database import Database
from tests.launchers import EndlessLauncher
from tests.services import options

SECRET = b"bench"
SLOTS = 10  # the runs that are at work: what the bench creates stays in the queue


def main() -> None:
    folder, port, database = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    take_short_turns()
    store = Store(Database(database))
    launcher = EndlessLauncher(run.submission_id for run in store.runs.unfinished())
    state = compose(store, launcher, Signer(SECRET), options(folder, database, slots=SLOTS), holder="bench")
    app = create_app(state, measures=Measures(store, lambda: state.supervisor.healthy))
    collect_seldom()
    Server(app, state.following, host="127.0.0.1", port=port, backlog=1024).run()


if __name__ == "__main__":
    main()
