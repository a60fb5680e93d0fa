"""What the routes of one service share. Made once, by serve.py or a test; nothing in it changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from orchestrator.service.catalog import Catalog
from orchestrator.service.following import Following
from orchestrator.service.keys import Signer
from orchestrator.service.store import Store
from orchestrator.service.supervisor import Supervisor


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceState:
    store: Store
    supervisor: Supervisor
    signer: Signer  # of the tokens with which runs report
    catalog: Catalog  # which models, files and teachers a submitted run may name
    runs: Path  # one folder a run
    following: Following
