"""Runs as the service's pure files see them, with what a test does not care for filled in."""

from __future__ import annotations

from typing import Any

from orchestrator.service.runs import ResolvedRun, State


def run(id: str = "r", state: State = State.RUNNING, **changes: Any) -> ResolvedRun:
    config = {
        "method": "opd",
        "student": {"model": "s"},
        "teacher": {"kind": "none"},
        "loop": {"steps": 10},
    }
    fields: dict[str, Any] = {
        "owner": "alice",
        "key_id": "a",
        "state_since": 0.5,
        "state_message": "",
        "submitted": config,
        "config": config,
        "config_sha256": None,
        "submission_id": f"potstill-{id}-1",
        "attempt": 1,
        "revision": 1,
        "priority": 0,
        "metadata": {},
        "notes": "",
        "step": 0,
        "latest": {},
        "heartbeat_at": None,
        "code_version": None,
        "error": None,
        "forked_from": None,
        "forked_checkpoint": None,
        "created_at": 0.5,
        "started_at": None,
        "finished_at": None,
        "launched_at": None,
        "gpus": 0.0,
        "busy_s": 0.0,
        "teacher_tokens": 0,
        "teacher_usd": 0.0,
    }
    return ResolvedRun(id=id, state=state, **fields | changes)
