"""The calls about a run's checkpoints: listed, published, kept for a while, removed, and brought to this machine."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from potstill.client.answers import as_nothing, as_object, ask, path, refusal
from potstill.client.landing import Part, check_free, files_below, partial, prepare, take_place
from potstill.client.patience import Patience, asked_to_wait, unreachable
from potstill.client.resources import Checkpoint, Page
from potstill.client.steps import Aside, Call, Lost, Pause, Program, Reply, Save
from potstill.errors import ServiceError

FETCHING = Patience(tries=8, first_s=0.5, longest_s=20.0)


def list_checkpoints(run_id: str, *, limit: int = 100, after: str | None = None) -> Call[Page[Checkpoint]]:
    """A page of a run's checkpoints, as far as they are kept, newest first."""
    params = {"limit": limit, "after": after}
    return Call(method="GET", path=path("v1", "runs", run_id, "checkpoints"), params=params, reads=as_object)


def get_checkpoint(run_id: str, name: str) -> Call[Checkpoint]:
    """One checkpoint with its files."""
    return Call(method="GET", path=path("v1", "runs", run_id, "checkpoints", name), reads=as_object)


def publish_checkpoint(run_id: str, name: str, *, as_name: str) -> Call[Checkpoint]:
    """Give a checkpoint a name under which other runs can begin with it."""
    return Call(
        method="POST",
        path=path("v1", "runs", run_id, "checkpoints", name, "publish"),
        body={"name": as_name},
        reads=as_object,
    )


def withdraw_checkpoint(run_id: str, name: str) -> Call[None]:
    """Take that name back; the checkpoint stays. Refused while an unfinished run uses it."""
    return Call(method="DELETE", path=path("v1", "runs", run_id, "checkpoints", name, "publish"), reads=as_nothing)


def set_checkpoint_ttl(run_id: str, name: str, *, seconds: float | None) -> Call[Checkpoint]:
    """Have a checkpoint removed after so many seconds; None: it is kept."""
    return Call(
        method="PUT",
        path=path("v1", "runs", run_id, "checkpoints", name, "ttl"),
        body={"seconds": seconds},
        reads=as_object,
    )


def delete_checkpoint(run_id: str, name: str) -> Call[None]:
    """Remove a checkpoint."""
    return Call(method="DELETE", path=path("v1", "runs", run_id, "checkpoints", name), reads=as_nothing)


def download_checkpoint(run_id: str, name: str, to: str | os.PathLike[str]) -> Program[Path]:
    """Bring a checkpoint to the folder `to`, which does not exist yet, and return it.

    It appears there whole and verified, or not at all; what a download that broke off has brought is not asked for
    again. Raises Refused, ServiceError (damaged_download, unsafe_name, unreachable), and ConfigError for a taken place.
    """
    place = Path(to)
    check_free(place)
    checkpoint = yield from ask(get_checkpoint(run_id, name))
    if checkpoint["status"] == "damaged":
        raise ServiceError(f"{name} is damaged: ask for another checkpoint", None, "checkpoint_damaged")
    parts = files_below(partial(place), checkpoint["files"])
    yield Aside(functools.partial(prepare, partial(place), parts.values()))
    for file, part in parts.items():
        url = path("v1", "runs", run_id, "checkpoints", name, "files") + path(*file.split("/"))
        yield from fetch(url, part)
    yield Aside(functools.partial(take_place, partial(place), place))
    return place


def fetch(url: str, part: Part) -> Program[None]:
    """Bring one file, going on where an earlier try or an earlier download has stopped."""
    yield Aside(part.find)
    failures = damaged = 0
    while not part.right:
        if part.whole:  # every byte is there, and they are not the right ones
            damaged += 1
            if damaged == 2:
                raise _damaged(part)
            yield Aside(part.discard)
        had, wait_s = part.have, 0.0
        outcome: Reply | Lost = yield Save(_file(url, part), part)
        if isinstance(outcome, Reply) and outcome.status == 416:  # what is here is no beginning of what is there
            yield Aside(part.discard)
        elif isinstance(outcome, Reply) and not outcome.good:
            asked = asked_to_wait(outcome)
            if asked is None:
                raise refusal(outcome)
            wait_s = asked
        if not part.whole:
            failures = 1 if part.have > had else failures + 1
            if failures == FETCHING.tries:
                raise unreachable(outcome) if isinstance(outcome, Lost) else _damaged(part)
            yield Pause(max(wait_s, FETCHING.pause(failures)))


def _damaged(part: Part) -> ServiceError:
    return ServiceError(f"{part.path.name} does not come whole: ask for another checkpoint", None, "damaged_download")


def _file(url: str, part: Part) -> Call[None]:
    headers = {"Accept-Encoding": "identity"}
    if part.have:
        headers |= {"Range": f"bytes={part.have}-", "If-Range": f'"{part.sha256}"'}
    return Call(method="GET", path=url, headers=headers, reads=as_nothing)
