"""The commands about runs at a service: submit, status, list, cancel, pause, resume, retry, fork, edit, delete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from potstill.connection import KEY_ENV, KeyEnv, RunName, Url, connect
from potstill.console import AsJson, one_line_errors, pairs, say, show, show_json, show_table, show_yaml
from potstill.errors import ConfigError

if TYPE_CHECKING:
    from potstill.client.resources import Run

EXIT_OF_STATUS = {"succeeded": 0, "failed": 1, "cancelled": 5}

Overrides = Annotated[list[str] | None, typer.Argument(help="Dotted settings: optim.lr=1e-4")]
Priority = Annotated[int | None, typer.Option(help="Of runs that wait, the highest starts first.", min=-100, max=100)]
Meta = Annotated[list[str] | None, typer.Option("--meta", metavar="NAME=VALUE", help="Repeatable.")]
Notes = Annotated[str | None, typer.Option(help="Any text.")]
Idempotency = Annotated[str | None, typer.Option(help="A name for this request: sent again, it makes nothing new.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `app`."""
    for command in (submit, status, list_, cancel, pause, resume, retry, fork, edit, delete):
        app.command(name=command.__name__.rstrip("_"))(command)


@one_line_errors
def submit(
    config: Annotated[Path, typer.Argument(help="A .toml, .yaml or .json file, as for `potstill run`.")],
    overrides: Overrides = None,
    wait: Annotated[bool, typer.Option("--wait", help="Exit 0 succeeded, 1 failed, 5 cancelled.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print config and plan; make no run.")] = False,
    priority: Priority = None,
    meta: Meta = None,
    notes: Notes = None,
    idempotency_key: Idempotency = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Submit a run. A data file of this machine is uploaded; models are names that the service knows."""
    from potstill.submission import submission
    from potstill.waiting import wait_for

    metadata = pairs(meta, "--meta") or None
    with connect(url, key_env) as client:
        body = submission(client, config, overrides or (), say)
        if dry_run:
            plan = client.plan_run(body)
            show_json(plan) if as_json else show_yaml({key: value for key, value in plan.items() if key != "object"})
            return
        run = client.create_run(
            body, priority=priority, metadata=metadata, notes=notes, idempotency_key=idempotency_key
        )
        if wait:
            run = wait_for(client, run)
    _show(run, as_json)
    if wait:
        raise typer.Exit(EXIT_OF_STATUS[run["status"]])


@one_line_errors
def status(run: RunName, as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Show where a run stands."""
    with connect(url, key_env) as client:
        _show(client.get_run(run), as_json, whole=True)


@one_line_errors
def list_(
    limit: Annotated[int, typer.Option(help="Newest runs to show.", min=1, max=100)] = 20,
    after: Annotated[str | None, typer.Option(help="Those behind this run, for the next page.")] = None,
    status: Annotated[list[str] | None, typer.Option(help="Only of this status; repeatable.")] = None,
    meta: Meta = None,
    since: Annotated[str | None, typer.Option(help="Only those created after this time, in RFC 3339.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """List runs, newest first."""
    with connect(url, key_env) as client:
        page = client.list_runs(
            limit=limit, after=after, status=status or (), metadata=pairs(meta, "--meta"), created_after=since
        )
    if as_json:
        show_json(page)
        return
    rows = [
        [run["id"], run["status"], _steps(run), run["method"], run["owner"], run["created_at"]] for run in page["data"]
    ]
    show_table(["RUN", "STATUS", "STEP", "METHOD", "OWNER", "CREATED"], rows)
    if page["has_more"]:
        say(f"there are more: --after {page['last_id']}")


@one_line_errors
def cancel(
    run: RunName,
    now: Annotated[bool, typer.Option("--now", help="End it at once, without a checkpoint.")] = False,
    reason: Annotated[str | None, typer.Option(help="Kept in the run's events.")] = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Ask a run to stop, after its step and with a checkpoint."""
    with connect(url, key_env) as client:
        _show(client.cancel_run(run, mode="immediate" if now else "graceful", reason=reason), as_json)


@one_line_errors
def pause(run: RunName, as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Have a run leave a checkpoint and give its processes back."""
    with connect(url, key_env) as client:
        _show(client.pause_run(run), as_json)


@one_line_errors
def resume(run: RunName, as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Have a paused run go on from its last checkpoint."""
    with connect(url, key_env) as client:
        _show(client.resume_run(run), as_json)


@one_line_errors
def retry(run: RunName, as_json: AsJson = False, url: Url = None, key_env: KeyEnv = KEY_ENV) -> None:
    """Have a run that failed or was cancelled go on from its last checkpoint."""
    with connect(url, key_env) as client:
        _show(client.retry_run(run), as_json)


@one_line_errors
def fork(
    run: RunName,
    name: Annotated[str, typer.Option(help="Of the new run.")],
    overrides: Overrides = None,
    checkpoint: Annotated[str | None, typer.Option("--from", help="Its student begins as this checkpoint.")] = None,
    priority: Priority = None,
    meta: Meta = None,
    notes: Notes = None,
    idempotency_key: Idempotency = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Make a new run with another one's config and changes to it."""
    from potstill.submission import split_override

    changes = dict(split_override(override) for override in overrides or ())
    with connect(url, key_env) as client:
        made = client.fork_run(
            run,
            name=name,
            from_checkpoint=checkpoint,
            overrides=changes,
            priority=priority,
            metadata=pairs(meta, "--meta"),
            notes=notes,
            idempotency_key=idempotency_key,
        )
    _show(made, as_json)


@one_line_errors
def edit(
    run: RunName,
    priority: Priority = None,
    meta: Meta = None,
    notes: Notes = None,
    as_json: AsJson = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Change a run's priority, metadata or notes. --meta replaces all pairs."""
    if priority is None and meta is None and notes is None:
        raise ConfigError("there is nothing to change: give --priority, --meta or --notes")
    with connect(url, key_env) as client:
        _show(
            client.update_run(
                run, priority=priority, metadata=None if meta is None else pairs(meta, "--meta"), notes=notes
            ),
            as_json,
        )


@one_line_errors
def delete(
    run: RunName,
    artifacts: Annotated[bool, typer.Option("--artifacts", help="Remove its folder too, checkpoints and all.")] = False,
    url: Url = None,
    key_env: KeyEnv = KEY_ENV,
) -> None:
    """Forget a run that is at its end. Its folder stays, unless --artifacts."""
    with connect(url, key_env) as client:
        client.delete_run(run, artifacts="delete" if artifacts else "keep")
    say(f"{run} is forgotten" + (", and its folder removed" if artifacts else ""))


def _show(run: Run, as_json: bool, *, whole: bool = False) -> None:
    if as_json:
        show_json(run)
        return
    show(f"{run['id']} is {run['status']}")
    if whole:
        show(f"step {_steps(run)}{_time_left(run)}, attempt {run['attempt']}; {run['method']} of {run['student']}")
        for name, value in run["metadata"].items():
            show(f"{name} = {value}")
        if run["notes"]:
            show(run["notes"])
    error = run["error"]
    if error is not None:
        show(f"{error['category']}: {error['message']}")
        if error["log_tail"]:
            show(error["log_tail"])


def _steps(run: Run) -> str:
    return f"{run['progress']['step']}/{run['progress']['max_steps']}"


def _time_left(run: Run) -> str:
    eta = run["progress"]["eta_seconds"]
    return "" if eta is None else f", about {eta / 60:.0f} min to go"
