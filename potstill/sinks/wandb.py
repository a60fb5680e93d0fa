"""Weights & Biases: one W&B run for a run, however often it is resumed.

W&B's own step counter only grows and refuses what is behind it, so `step` is a metric like others and the axis of all:
a step that is done again is a second point at its place, and the summary has the later one.
Nothing of this machine is sent: no code, no git, no hardware, no console, no packages.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

from potstill.errors import PotstillError
from potstill.journal import Status
from potstill.sinks.kept import keep_id, kept_id
from potstill.sinks.sink import Ending, Facts, Note, Rewind, Step

TITLE = 63  # characters of an alert's


class Wandb:
    """`settings`: WandbConfig as JSON, and close_s."""

    def __init__(self, settings: dict[str, Any], secret: str | None) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self._wandb: Any = wandb
        self._settings = settings
        self._secret = secret
        self._run: Any = None
        self.errors: tuple[type[Exception], ...] = (wandb.Error, PotstillError, OSError, ValueError)

    def open(self, facts: Facts) -> None:
        settings = self._settings
        where = f"{settings['url']} {settings['entity']} {settings['project']}"
        kept = facts.folder / "sinks" / "wandb.json"
        run = kept_id(kept, where) or secrets.token_hex(8)
        keep_id(kept, where, run)
        self._run = self._wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            id=run,
            name=facts.name,
            resume="allow",
            config=dict(facts.config),
            allow_val_change=True,  # a resumed run may have more steps
            mode=settings["mode"],
            dir=str(facts.folder),
            settings=self._wandb.Settings(**self._quiet()),
        )
        self._run.define_metric("*", step_metric="step")

    def step(self, step: Step) -> None:
        self._run.log({"step": step.step, **step.values})

    def note(self, note: Note) -> None:
        self._run.alert(title=note.type[:TITLE], text=note.message, level=note.level.upper(), wait_duration=0)

    def rewind(self, rewind: Rewind) -> None:
        self._run.summary["resumed_from_step"] = rewind.step

    def finish(self, ending: Ending) -> None:
        self._run.summary.update({"status": ending.status, **ending.headline})
        self._run.finish(exit_code=0 if ending.status == Status.SUCCEEDED else 1)

    def _quiet(self) -> dict[str, Any]:
        """Only what the run tells, and no waiting beyond the run's end."""
        url = {} if self._settings["url"] is None else {"base_url": self._settings["url"]}
        return {
            **url,
            "api_key": self._secret,
            "console": "off",
            "silent": True,
            "disable_code": True,
            "disable_git": True,
            "disable_job_creation": True,
            "x_disable_machine_info": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
            "finish_timeout": 0.8 * self._settings["close_s"],  # then it says so itself, before it is ended
            "finish_timeout_raises": True,
        }
