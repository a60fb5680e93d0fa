"""A checkpoint's model under a name of its own, so that a later run may begin with it.

    <runs>/.published/NAME/       what the checkpoint's model/ has, put into place by one rename

The files are hard links where the file system has them: a checkpoint's are never written again. Each is read and
compared with its digest before, so that what is published is sound. The database says whose a name is.
Refuses a name that is taken, a second name for one checkpoint, and to withdraw a model that an unfinished run uses.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.service import confined
from orchestrator.service.artifacts import users_of
from orchestrator.service.manifests import MODEL, Checkpoint, checkpoint_of, open_of
from orchestrator.service.runs import Run
from orchestrator.service.store import Store
from orchestrator.service.store.checkpoints import Keeping
from potstill.errors import ServiceError
from potstill.journal import fsync_folder

PUBLISHED = ".published"
_publishing = threading.Lock()
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP}


def publish(store: Store, runs: Path, run: Run, checkpoint_name: str, name: str) -> bool:
    """Whether it is published now and was not before. `name` is one that the catalog allows.

    Raises ServiceError: 404; 409 for a name that is taken, another name, a damaged file; 503 while another one is.
    """
    checkpoint = checkpoint_of(runs, run.id, checkpoint_name)
    earlier = store.checkpoints.of_run(run.id).get(checkpoint_name, Keeping()).published_as
    if earlier not in {None, name}:
        raise ServiceError(f"it is published as {earlier}: withdraw that first", 409, "already_published")
    place = runs / PUBLISHED / name
    if earlier == name and place.exists():
        return False
    with _alone():
        _check_digests(runs, checkpoint)
        store.checkpoints.note(run.id, checkpoint_name, published_as=name)  # whoever is first has the name
        try:
            _put_into_place(runs, checkpoint, place)
        except BaseException:
            store.checkpoints.note(run.id, checkpoint_name, published_as=None)
            raise
    return True


def withdraw(store: Store, runs: Path, run: Run, checkpoint_name: str) -> str:
    """Take the name back, and return it. Raises ServiceError: 404, 409 while an unfinished run uses the model."""
    name = store.checkpoints.of_run(run.id).get(checkpoint_name, Keeping()).published_as
    if name is None:
        raise ServiceError("that checkpoint is not published", 404, "not_published")
    users = users_of(runs / PUBLISHED / name, store.runs.unfinished())
    if users:
        raise ServiceError(f"run {users[0]} uses it, and is not at its end", 409, "model_in_use")
    try:
        with confined.taken_away(runs, PUBLISHED, name):
            store.checkpoints.note(run.id, checkpoint_name, published_as=None)
    except FileNotFoundError:
        store.checkpoints.note(run.id, checkpoint_name, published_as=None)
    return name


@contextmanager
def _alone() -> Iterator[None]:
    """Large files are read from end to end: one publication at a time leaves threads to everybody else."""
    if not _publishing.acquire(blocking=False):
        raise ServiceError("another checkpoint is being published: try again", 503, "publishing")
    try:
        yield
    finally:
        _publishing.release()


def _check_digests(runs: Path, checkpoint: Checkpoint) -> None:
    if checkpoint.damaged:
        raise _damaged(checkpoint, "a file is missing or cut short")
    for name in _model_files(checkpoint):
        with open_of(runs, checkpoint, name) as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != checkpoint.files[name].sha256:
                raise _damaged(checkpoint, f"{name} is not what was written")


def _put_into_place(runs: Path, checkpoint: Checkpoint, place: Path) -> None:
    place.parent.mkdir(mode=0o700, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex[:8]}")
    try:
        for name in _model_files(checkpoint):
            target = temporary / name.removeprefix(MODEL)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(runs, checkpoint, name, target)
            fsync_folder(target.parent)
        try:
            temporary.rename(place)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            message = "something else lies under that name: choose another"
            raise ServiceError(message, 409, "name_taken") from None
        fsync_folder(place.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _link_or_copy(runs: Path, checkpoint: Checkpoint, name: str, target: Path) -> None:
    *outer, last = checkpoint.parts(name)
    try:
        with confined.folder(runs, *outer) as inside:
            os.link(last, target, src_dir_fd=inside, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with confined.open_file(runs, *outer, last) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())


def _model_files(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.files if name.startswith(MODEL)]


def _damaged(checkpoint: Checkpoint, why: str) -> ServiceError:
    return ServiceError(f"{checkpoint.name} is damaged: {why}", 409, "checkpoint_damaged")
