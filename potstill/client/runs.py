"""The calls about runs, each described once: submitted, listed, steered, forked, waited for, deleted."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from potstill.client.answers import as_nothing, as_object, as_text, ask, path, read
from potstill.client.following import enduring
from potstill.client.resources import FINAL, Page, Plan, Run
from potstill.client.steps import Ask, Call, Flow, Give, Pause, Program, Reply

POLL_S = 1.0
_EDITS = 5  # of a run that others edit at the same time


def create_run(
    config: Mapping[str, Any],
    *,
    priority: int | None = None,
    metadata: Mapping[str, str] | None = None,
    notes: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Run]:
    """Submit a run config: the answer means that the run is stored; it starts by itself.

    `idempotency_key` names the request, so that it makes one run however often it is sent; by default a new name.
    """
    body = {**config, **_remarks(priority, metadata, notes)}
    return Call(method="POST", path="/v1/runs", body=body, headers=idempotency(idempotency_key), reads=as_object)


def plan_run(config: Mapping[str, Any]) -> Call[Plan]:
    """What would become of a config, with its resolved settings; nothing is stored."""
    return Call(method="POST", path="/v1/runs", params={"dry_run": True}, body=dict(config), reads=as_object)


def list_runs(
    *,
    status: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    created_after: str | None = None,
    limit: int = 20,
    after: str | None = None,
    order: Literal["asc", "desc"] = "desc",
) -> Call[Page[Run]]:
    """A page of runs, newest first. `after` is the last_id of the page before; `created_after` a time in RFC 3339."""
    params = {f"metadata[{name}]": value for name, value in (metadata or {}).items()}
    return Call(
        method="GET",
        path="/v1/runs",
        params={
            "status": list(status) or None,
            "created_after": created_after,
            "limit": limit,
            "after": after,
            "order": order,
            **params,
        },
        reads=as_object,
    )


def each_run(
    *, status: Sequence[str] = (), metadata: Mapping[str, str] | None = None, created_after: str | None = None
) -> Flow[Run]:
    """Every run, newest first, page after page."""
    after: str | None = None
    more = True
    while more:
        page = yield from ask(
            list_runs(status=status, metadata=metadata, created_after=created_after, limit=100, after=after)
        )
        for run in page["data"]:
            yield Give(run)
        after, more = page["last_id"], page["has_more"]


def get_run(run_id: str) -> Call[Run]:
    """Where a run stands."""
    return Call(method="GET", path=path("v1", "runs", run_id), reads=as_object)


def update_run(
    run_id: str,
    *,
    priority: int | None = None,
    metadata: Mapping[str, str] | None = None,
    notes: str | None = None,
    etag: str | None = None,
) -> Program[Run]:
    """Change what does not decide a run's numbers. What is None stays.

    `etag`: of the run as you read it; it is refused (412) when the run was edited since. None: whoever edits last wins.
    """
    for tries_left in reversed(range(_EDITS)):
        seen = etag
        if seen is None:
            reply: Reply = yield Ask(get_run(run_id))
            read(get_run(run_id), reply)
            seen = reply.headers.get("etag", "")
        change: Call[Run] = Call(
            method="PATCH",
            path=path("v1", "runs", run_id),
            body=_remarks(priority, metadata, notes),
            headers={"If-Match": seen},
            reads=as_object,
            repeatable=etag is None,
        )
        answer: Reply = yield Ask(change)
        if answer.status != 412 or etag is not None or tries_left == 0:
            return read(change, answer)
    raise AssertionError("the last try returns")


def cancel_run(
    run_id: str, *, mode: Literal["graceful", "immediate"] = "graceful", reason: str | None = None
) -> Call[Run]:
    """Ask a run to stop, graceful: after its step and with a checkpoint. It is `cancelling` until it has: see wait."""
    body = {"mode": mode} if reason is None else {"mode": mode, "reason": reason}
    return Call(method="POST", path=path("v1", "runs", run_id, "cancel"), body=body, reads=as_object)


def pause_run(run_id: str) -> Call[Run]:
    """Have a run leave a checkpoint and give its processes back."""
    return Call(method="POST", path=path("v1", "runs", run_id, "pause"), body={}, reads=as_object)


def resume_run(run_id: str) -> Call[Run]:
    """Put a paused run into the queue again."""
    return Call(method="POST", path=path("v1", "runs", run_id, "resume"), body={}, reads=as_object, repeatable=False)


def retry_run(run_id: str) -> Call[Run]:
    """Have a run that failed or was cancelled go on from its last checkpoint, as another attempt of the same run."""
    return Call(method="POST", path=path("v1", "runs", run_id, "retry"), body={}, reads=as_object, repeatable=False)


def fork_run(
    run_id: str,
    *,
    name: str,
    from_checkpoint: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    priority: int | None = None,
    metadata: Mapping[str, str] | None = None,
    notes: str | None = None,
    idempotency_key: str | None = None,
) -> Call[Run]:
    """A new run with another one's config and changes to it by dotted key; its student may begin as a checkpoint."""
    body: dict[str, Any] = {"name": name, "overrides": dict(overrides or {}), **_remarks(priority, metadata, notes)}
    if from_checkpoint is not None:
        body["from_checkpoint"] = from_checkpoint
    return Call(
        method="POST",
        path=path("v1", "runs", run_id, "fork"),
        body=body,
        headers=idempotency(idempotency_key),
        reads=as_object,
    )


def delete_run(run_id: str, *, artifacts: Literal["keep", "delete"] = "keep") -> Call[None]:
    """Forget a run that is at its end, and with artifacts="delete" remove its folder."""
    return Call(method="DELETE", path=path("v1", "runs", run_id), params={"artifacts": artifacts}, reads=as_nothing)


def get_config(run_id: str) -> Call[dict[str, Any]]:
    """Everything that decides a run, resolved."""
    return Call(method="GET", path=path("v1", "runs", run_id, "config"), reads=as_object)


def config_text(run_id: str, *, format: Literal["json", "toml", "yaml"] = "toml") -> Call[str]:
    """The same as a file that can be submitted again."""
    return Call(method="GET", path=path("v1", "runs", run_id, "config"), params={"format": format}, reads=as_text)


def wait(run_id: str, *, poll_s: float = POLL_S) -> Program[Run]:
    """The run, once it is in a final state. One that is paused is waited for, and so is a service that restarts."""
    while True:
        run = yield from enduring(get_run(run_id))
        if run["status"] in FINAL:
            return run
        yield Pause(poll_s)


def watch(run_id: str, *, poll_s: float = POLL_S) -> Flow[Run]:
    """The run as it is now, and again whenever its status, attempt or step is another, to its final state."""
    shown: tuple[Any, ...] = ()
    while True:
        run = yield from enduring(get_run(run_id))
        state = (run["status"], run["attempt"], run["progress"]["step"])
        if state != shown:
            yield Give(run)
            shown = state
        if run["status"] in FINAL:
            return
        yield Pause(poll_s)


def idempotency(key: str | None) -> dict[str, str]:
    """The header under which a request makes one thing, however often it is sent."""
    return {"Idempotency-Key": key or uuid.uuid4().hex}


def _remarks(priority: int | None, metadata: Mapping[str, str] | None, notes: str | None) -> dict[str, Any]:
    said = {"priority": priority, "notes": notes, "metadata": None if metadata is None else dict(metadata)}
    return {name: value for name, value in said.items() if value is not None}
