"""Commands run in this process against a running service: what each printed, and how it ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner, Result

from potstill.service_cli import register
from tests.service_configs import submitted
from tests.services import Service

Command = Callable[..., Result]


def commands() -> typer.Typer:
    """Those that speak with a service."""
    app = typer.Typer(rich_markup_mode=None)
    register(app)
    return app


def commanding(service: Service, home: Path) -> Command:
    """Runs a command as an administrator of the service; variables may be changed, None: not set."""

    def run(*arguments: str | Path, input: str | None = None, **variables: str | None) -> Result:
        env: dict[str, str | None] = {
            "POTSTILL_URL": service.url,
            "POTSTILL_API_KEY": service.key,
            "XDG_CONFIG_HOME": str(home / "config"),
            "BROWSER": "true",
        }
        return CliRunner().invoke(
            commands(), [str(argument) for argument in arguments], env=env | variables, input=input
        )

    return run


def done(result: Result) -> str:
    """What a command that did its work printed."""
    assert result.exit_code == 0, result.output
    return result.stdout


def read(result: Result) -> Any:
    return json.loads(done(result))


def refused(result: Result, code: int, *words: str) -> str:
    """The one line of a command that did not do its work."""
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("potstill: ")
    for word in words:
        assert word in result.stderr, result.stderr
    return result.stderr


def finished(service: Service, name: str, seed: int = 0) -> str:
    """A run at its end."""
    with service.client() as client:
        client.create_run(submitted(name=name, seed=seed))
        client.wait(name, poll_s=0.05)
    return name
