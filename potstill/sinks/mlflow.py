"""MLflow tracking: one MLflow run for a run, however often it is resumed.

The config becomes parameters, a leaf each, once: they never change there, so what a resumed run changed is in its
folder alone. A step that is done again is a second value at its step; MLflow calls the later one the latest. MLflow has
no place for events: the last of each type is a tag.
Only tracking is used: no artifact is stored, no model registered, no usage reported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from potstill.errors import PotstillError
from potstill.journal import Status
from potstill.sinks.kept import keep_id, kept_id
from potstill.sinks.sink import Ending, Facts, Note, Rewind, Step

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # about a minute
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
PARAMETERS = 100  # in a request, at most
LONGEST_KEY, LONGEST_VALUE = 250, 5000  # characters that every store takes
ENDED = {Status.SUCCEEDED: "FINISHED", Status.FAILED: "FAILED", Status.CANCELLED: "KILLED"}


class Mlflow:
    """`settings`: MlflowConfig as JSON."""

    def __init__(self, settings: Mapping[str, Any], secret: str | None) -> None:
        os.environ.update(ENVIRONMENT if secret is None else {**ENVIRONMENT, "MLFLOW_TRACKING_TOKEN": secret})
        import mlflow
        import mlflow.entities

        self._entities: Any = mlflow.entities
        self._client: Any = mlflow.MlflowClient(settings["tracking_uri"])
        self._settings = settings
        self._run = ""
        self.errors: tuple[type[Exception], ...] = (mlflow.MlflowException, PotstillError, OSError)

    def open(self, facts: Facts) -> None:
        kept, where = facts.folder / "sinks" / "mlflow.json", self._settings["tracking_uri"]
        self._run = kept_id(kept, where) or self._begin(facts, kept, where)
        self._client.update_run(self._run, status="RUNNING")

    def step(self, step: Step) -> None:
        self._log(step.values, step.step, step.time)

    def note(self, note: Note) -> None:
        text = f"step {note.step}: {note.message}"
        self._client.set_tag(self._run, key_of(f"event.{note.type}"), text[:LONGEST_VALUE])

    def rewind(self, rewind: Rewind) -> None:
        self._client.set_tag(self._run, "resumed_from_step", str(rewind.step))

    def finish(self, ending: Ending) -> None:
        self._log(ending.headline, ending.step, ending.time)
        self._client.set_terminated(self._run, ENDED.get(Status(ending.status), "FAILED"))

    def _begin(self, facts: Facts, kept: Path, where: str) -> str:
        """A run of its own, known by its parameters."""
        run = str(self._client.create_run(self._experiment(), run_name=facts.name).info.run_id)
        found = [self._entities.Param(key_of(key), value[:LONGEST_VALUE]) for key, value in leaves(facts.config)]
        for first in range(0, len(found), PARAMETERS):
            self._client.log_batch(run, params=found[first : first + PARAMETERS])
        keep_id(kept, where, run)
        return run

    def _experiment(self) -> str:
        name = self._settings["experiment"]
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found is not None else self._client.create_experiment(name))

    def _log(self, values: Mapping[str, float], step: int, time: float) -> None:
        milliseconds = int(time * 1000)
        made = [self._entities.Metric(key_of(name), value, milliseconds, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=made)


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every setting by its dotted name; what is None is left out.

    >>> list(leaves({"optim": {"lr": 0.1, "betas": [0.9, 0.95]}, "eval": {}}))
    [('optim.lr', '0.1'), ('optim.betas', '[0.9, 0.95]')]
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from leaves(inner, f"{place}.{name}".lstrip("."))
    elif value is not None:
        yield place, str(value)


def key_of(name: str) -> str:
    """In the characters that MLflow takes."""
    return re.sub(r"[^\w./ -]", "_", name)[:LONGEST_KEY]
