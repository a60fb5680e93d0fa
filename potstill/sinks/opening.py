"""From a [sinks] table to sinks. What is wrong with it is said before a run begins; nothing after that stops one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from potstill.config import RunConfig
from potstill.config_sinks import MlflowConfig, SinksConfig, TrackioConfig, WandbConfig
from potstill.errors import ConfigError
from potstill.journal import Journal
from potstill.sinks.feed import Feed
from potstill.sinks.listener import Listener
from potstill.sinks.process import ProcessSink
from potstill.sinks.sink import Facts, Sink
from potstill.sinks.tensorboard import TensorBoard
from potstill.teachers.opening import guard_of, secret

PACKAGES = {  # of a kind: any one of these, by the extra that brings the first
    "tensorboard": ("orchestrator", ("tensorboard",)),
    "wandb": ("wandb", ("wandb",)),
    "mlflow": ("mlflow", ("mlflow-skinny", "mlflow")),
    "trackio": ("trackio", ("trackio",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A sink that can be opened. `abandon` ends whatever it is doing, for good."""

    name: str
    sink: Sink
    abandon: Callable[[], None]


def ready(sinks: SinksConfig) -> list[Ready]:
    """The sinks that the table names, none of them opened.

    Raises ConfigError for a package that is not installed, a secret that is not there, a URL that may not be called.
    """
    made = []
    if sinks.tensorboard is not None:
        require("tensorboard", *PACKAGES["tensorboard"])
        sink = TensorBoard(sinks.tensorboard.folder)
        made.append(Ready(name="tensorboard", sink=sink, abandon=lambda: None))
    for name, table in (("wandb", sinks.wandb), ("mlflow", sinks.mlflow), ("trackio", sinks.trackio)):
        if table is not None:
            require(name, *PACKAGES[name])
            client = _client(name, table, close_s=sinks.close_s)
            made.append(Ready(name=name, sink=client, abandon=client.kill))
    return made


@contextlib.contextmanager
def told(sinks: Sequence[Ready], config: RunConfig, journal: Journal, *, resumed: bool) -> Iterator[None]:
    """Tell the sinks what the journal says while the block lasts. Leaving it takes sinks.close_s, or little more."""
    if not sinks:
        yield
        return
    facts = Facts(name=config.name, folder=journal.folder, config=config.model_dump(mode="json"), resumed=resumed)
    feeds = [Feed(one.name, one.sink, facts, capacity=config.sinks.queue, abandon=one.abandon) for one in sinks]
    listener = Listener(journal, feeds)
    journal.listen(listener)
    try:
        yield
    finally:
        listener.close(config.sinks.close_s)


def _client(name: str, table: WandbConfig | MlflowConfig | TrackioConfig, *, close_s: float) -> ProcessSink:
    settings = {**table.model_dump(mode="json"), "close_s": close_s}
    if isinstance(table, WandbConfig) and table.mode == "offline":
        return ProcessSink(name, settings)
    guard = guard_of(os.environ)
    if table.url is not None:
        guard.check(table.url)
    key = None if table.secret_ref is None else secret(table.secret_ref, f"sinks.{name}.secret_ref")
    return ProcessSink(name, settings, secret=key, url=table.url, guard=guard)


def require(name: str, extra: str, packages: Sequence[str]) -> None:
    """Raise ConfigError unless one of `packages` is installed, the first of which comes with `extra`."""
    if not any(_has(package) for package in packages):
        raise ConfigError(f"sinks.{name}: the package {packages[0]} is not installed: pip install 'potstill[{extra}]'")


def _has(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
