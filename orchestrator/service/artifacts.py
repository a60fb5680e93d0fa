"""What may be done to what a run left behind: the service removes checkpoints and folders here, and nowhere else.

A run removes its own older checkpoints, but none that was marked here because another run begins with it.

Refuses to remove a checkpoint that somebody may still need: one that is published, the newest two of a run that is not
at its end, one that an unfinished run uses as a model; and the folder of a run whose process is still at work.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.service import confined
from orchestrator.service.manifests import checkpoint_of, names_of
from orchestrator.service.principals import Principal
from orchestrator.service.runs import ResolvedRun, Run
from orchestrator.service.store import Store
from orchestrator.service.store.checkpoints import Keeping
from potstill.errors import ServiceError
from potstill.journal import KEPT

KEPT_TO_RESUME = 2  # of an unfinished run: the newest may turn out damaged, and then the one before it is used
DOOMED = ".doomed"  # below the runs: names of those whose folder is to be removed once their row is gone


def model_of_checkpoint(runs: Path, run_id: str, name: str) -> str:
    """The folder from which a fork's student is loaded. Raises ServiceError: 404, 409 for a damaged checkpoint."""
    checkpoint = checkpoint_of(runs, run_id, name)
    if checkpoint.damaged:
        raise ServiceError(f"{name} is damaged: fork from another checkpoint", 409, "checkpoint_damaged")
    return str(runs.joinpath(*checkpoint.parts("model")))


def keep_used(runs: Path, config: Mapping[str, Any]) -> None:
    """Have the checkpoints that a resolved config names outlive the pruning of the runs they are of.

    Raises ServiceError (409) for one that its run has removed since the config was resolved.
    """
    for run_id, name in sorted(_checkpoints_in(config, Path(os.path.realpath(runs)))):
        with contextlib.suppress(FileNotFoundError), confined.folder(runs, run_id, "checkpoints", name) as inside:
            os.close(os.open(KEPT, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=inside))
            os.fsync(inside)
        if name not in names_of(runs, run_id):  # asked after it was marked: see potstill/durable.py, take_away
            message = f"run {run_id} has just removed {name}: take a newer one"
            raise ServiceError(message, 409, "checkpoint_gone")


def delete_checkpoint(store: Store, runs: Path, run: Run, name: str) -> None:
    """Raises ServiceError: 404, or 409 with the reason why it stays."""
    checkpoint_of(runs, run.id, name)
    reason = why_it_stays(store, runs, run, name)
    if reason is not None:
        raise ServiceError(f"{name} stays: {reason}", 409, "checkpoint_in_use")
    remove_checkpoint(store, runs, run.id, name)


def why_it_stays(store: Store, runs: Path, run: Run, name: str) -> str | None:
    """For whom a checkpoint is kept; None: for nobody."""
    published_as = store.checkpoints.of_run(run.id).get(name, Keeping()).published_as
    if published_as is not None:
        return f"it is published as {published_as}; withdraw that first"
    if not run.state.final and name in names_of(runs, run.id)[-KEPT_TO_RESUME:]:
        return f"the run is {run.state} and goes on from its newest two checkpoints"
    users = users_of(runs / run.id / "checkpoints" / name, store.runs.unfinished())
    return f"run {users[0]} uses it, and is not at its end" if users else None


def users_of(folder: Path, unfinished: Sequence[ResolvedRun]) -> list[str]:
    """The runs whose config names `folder`, or something inside it."""
    place = os.path.realpath(folder)  # as the catalog resolves it
    return [
        run.id
        for run in unfinished
        if any(text == place or text.startswith(f"{place}/") for text in _texts(run.config))
    ]


def remove_checkpoint(store: Store, runs: Path, run_id: str, name: str) -> None:
    """Whoever calls has asked why_it_stays. One that the run itself has removed meanwhile is noted all the same."""
    try:
        with confined.taken_away(runs, run_id, "checkpoints", name):
            store.checkpoints.note(run_id, name, deleted_at=time.time(), expires_at=None)
    except FileNotFoundError:
        store.checkpoints.note(run_id, name, deleted_at=time.time(), expires_at=None)


def delete_run(store: Store, runs: Path, run_id: str, who: Principal, *, with_folder: bool) -> None:
    """Forget a run that is at its end, and remove its folder if that is wished. Raises ServiceError: 404, 409.

    The folder is doomed before the row is gone: a service that is killed in between removes it when it is back.
    """
    store.runs.get(run_id, who)
    doom = runs / DOOMED / run_id
    if any(keeping.published_as is not None for keeping in store.checkpoints.of_run(run_id).values()):
        raise ServiceError("a checkpoint of this run is published: withdraw it first", 409, "checkpoint_in_use")
    doom.unlink(missing_ok=True)
    if with_folder:
        _check_quiet(runs, run_id)
        if users := users_of(runs / run_id, store.runs.unfinished()):
            message = f"run {users[0]} uses a checkpoint of this one, and is not at its end"
            raise ServiceError(message, 409, "checkpoint_in_use")
        doom.parent.mkdir(mode=0o700, exist_ok=True)
        doom.touch()
    try:
        store.runs.delete(run_id, who)
    except ServiceError:
        doom.unlink(missing_ok=True)
        raise
    if with_folder:
        remove_run(runs, run_id)


def remove_run(runs: Path, run_id: str) -> None:
    """Remove the folder of a run that no row knows. A link in its place, or inside it, is removed and not followed."""
    if run_id in confined.names(runs):
        with confined.taken_away(runs, run_id):
            (runs / DOOMED / run_id).unlink(missing_ok=True)


def _checkpoints_in(config: Mapping[str, Any], runs: Path) -> set[tuple[str, str]]:
    """Run and name of each checkpoint in which a text of the config lies. `runs` has no links in it."""
    places = (Path(text).relative_to(runs).parts for text in _texts(config) if text.startswith(f"{runs}/"))
    return {(run, name) for run, folder, name, *_ in (p for p in places if len(p) > 2) if folder == "checkpoints"}


def _check_quiet(runs: Path, run_id: str) -> None:
    """Whoever drives a run holds its lock, however it ended by its row."""
    try:
        file = confined.open_file(runs, run_id, "lock")
    except FileNotFoundError:
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"a process of {run_id} is still at work: try again when it has ended"
            raise ServiceError(message, 409, "run_is_active") from None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a config, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)
