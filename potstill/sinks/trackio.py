"""Trackio: a local database, or a Trackio server of one's own. No Space is ever made or called.

Trackio's client raises nothing once it has begun: what goes wrong it says as a warning, which is an error here. A step
that is done again is a second row. It has no place for a summary: the report's headline is logged with the last step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from potstill.errors import SinkError
from potstill.sinks.sink import Ending, Facts, Note, Rewind, Step


class Trackio:
    """`settings`: TrackioConfig as JSON."""

    def __init__(self, settings: Mapping[str, Any], secret: str | None) -> None:
        os.environ.update({"TRACKIO_DIR": os.path.abspath(settings["folder"]), "HF_HUB_OFFLINE": "1"})
        if secret is not None:
            os.environ["TRACKIO_WRITE_TOKEN"] = secret
        import trackio

        self._trackio: Any = trackio
        self._settings = settings
        self._run: Any = None
        self.errors: tuple[type[Exception], ...] = (SinkError, ValueError, OSError)

    def open(self, facts: Facts) -> None:
        with _said():
            self._run = self._trackio.init(
                project=self._settings["project"],
                name=facts.name,
                server_url=self._settings["url"],
                config=dict(facts.config),
                resume="allow" if facts.resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def step(self, step: Step) -> None:
        with _said():
            self._run.log(dict(step.values), step=step.step)

    def note(self, note: Note) -> None:
        level = self._trackio.AlertLevel.ERROR if note.level == "error" else self._trackio.AlertLevel.WARN
        with _said():
            self._run.alert(title=note.type, text=note.message, level=level, step=note.step)

    def rewind(self, rewind: Rewind) -> None:
        title, level = "run.resumed", self._trackio.AlertLevel.INFO
        with _said():
            self._run.alert(title=title, text=f"from step {rewind.step}", level=level, step=rewind.step)

    def finish(self, ending: Ending) -> None:
        with _said():
            if ending.headline:
                self._run.log(dict(ending.headline), step=ending.step)
            self._run.finish()


@contextmanager
def _said() -> Iterator[None]:
    """Raise SinkError with what Trackio warned of in the block. What its threads say later is in the log alone."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    said = [str(warning.message) for warning in given if warning.category is UserWarning]
    if said:
        raise SinkError("; ".join(said))
