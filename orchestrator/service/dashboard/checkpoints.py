"""A checkpoint as the page lists it: how large, until when, and where each of its files is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from orchestrator.service.dashboard.words import Moment, moment, size
from orchestrator.service.manifests import Checkpoint
from orchestrator.service.store.checkpoints import Keeping


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """`files` are (name, size, where to download it, sha256)."""

    name: str
    step: str
    kind: str
    damaged: bool
    size: str
    created: Moment | None
    expires: Moment | None
    published_as: str | None
    files: Sequence[tuple[str, str, str, str]]


def entry(checkpoint: Checkpoint, keeping: Keeping | None, now: float) -> Entry:
    kept = keeping or Keeping()
    where = f"/v1/runs/{checkpoint.run}/checkpoints/{checkpoint.name}/files/"
    return Entry(
        name=checkpoint.name,
        step=f"{checkpoint.step:,}",
        kind=checkpoint.kind,
        damaged=checkpoint.damaged,
        size=size(sum(file.bytes for file in checkpoint.files.values())),
        created=moment(checkpoint.created_at, now),
        expires=moment(kept.expires_at, now),
        published_as=kept.published_as,
        files=[
            (name, size(file.bytes), where + quote(name), file.sha256)
            for name, file in sorted(checkpoint.files.items())
        ],
    )
