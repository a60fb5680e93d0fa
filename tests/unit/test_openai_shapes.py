"""What a fine-tuning job's body means, and what OpenAI's clients read of a run."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.service.openai_shapes import (
    STATUSES,
    NewJob,
    event_number,
    job_event_resource,
    job_resource,
    said_of_the_job,
    submission_of,
)
from orchestrator.service.runs import Event, Failure, Run, State
from potstill.errors import ConfigError, PlanError, ServiceError
from tests.runs import run
from tests.service_configs import submitted

ON_OPENAIS_WIRE = {"validating_files", "queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"}


def job(**changes: Any) -> NewJob:
    settings = {key: value for key, value in submitted().items() if key not in {"name", "seed", "student", "data"}}
    body = {
        "model": "small",
        "training_file": "file-1",
        "method": {"type": "distillation", "distillation": settings | {"data": {"holdout": 2}}},
    }
    return NewJob.model_validate(body | changes)


def a_run(**changes: Any) -> Run:
    return run(**{"submitted": submitted(steps=10), "config": submitted(steps=10)} | changes)


def test_every_state_has_a_status_that_openais_clients_know():
    assert set(STATUSES) == set(State)
    assert set(STATUSES.values()) <= ON_OPENAIS_WIRE
    ends = {state: status for state, status in STATUSES.items() if state.final}
    assert {state.value for state in ends} == set(ends.values())


def test_a_job_is_a_submission_with_its_model_and_file_in_their_places():
    body = submission_of(job(suffix="mine", seed=7, metadata={"team": "a"}))
    assert body == {
        **{key: submitted()[key] for key in ("method", "teacher", "rollout", "optim", "loop")},
        "name": "mine",
        "seed": 7,
        "metadata": {"team": "a"},
        "student": {"model": "small"},
        "data": {"kind": "jsonl", "path": "file-1", "holdout": 2},
    }


def test_without_a_suffix_every_job_gets_an_id_of_its_own_that_is_a_runs_name_too():
    first, second = (submission_of(job())["name"] for _ in range(2))
    assert first != second
    assert first.startswith("ftjob-")
    assert len(first) == len("ftjob-") + 16


def test_a_job_does_not_change_what_it_was_made_of():
    asked = job()
    before = asked.model_dump()
    submission_of(asked)["optim"]["lr"] = 9.0
    assert asked.model_dump() == before


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ({"name": "x"}, "name: say it in the job's suffix"),
        ({"seed": 1}, "seed: say it in the job's seed"),
        ({"metadata": {}}, "metadata: say it in the job's metadata"),
        ({"student": {"model": "other"}}, "student.model: say it in the job's model"),
        ({"data": {"path": "other"}}, "data.path: say it in the job's training_file"),
        ({"data": {"kind": "parquet"}}, "data.kind: say it in the job's training_file"),
        ({"student": "small"}, "student: a table of settings, not a str"),
    ],
)
def test_a_setting_that_the_job_says_elsewhere_is_refused(setting: dict[str, Any], field: str):
    with pytest.raises(ConfigError, match=f"^method.distillation.{field}$"):
        submission_of(job(method={"type": "distillation", "distillation": setting}))


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("validation_file", "file-2", "data.holdout"),
        ("integrations", [{"type": "wandb", "wandb": {"project": "p"}}], "set by the operator"),
        ("hyperparameters", {"n_epochs": 3}, "method.distillation"),
        ("method", {"type": "supervised", "supervised": {}}, "distillation"),
        ("modell", "x", "not permitted"),
    ],
)
def test_what_would_have_to_be_ignored_is_refused(field: str, value: Any, advice: str):
    with pytest.raises(ValidationError) as caught:
        job(**{field: value})
    assert any(problem["loc"][0] == field and advice in problem["msg"] for problem in caught.value.errors())


def test_what_clients_send_for_nothing_is_taken_as_nothing():
    assert job(validation_file=None, integrations=[], hyperparameters={}) == job()


def test_a_mistake_in_the_submission_is_said_of_the_jobs_own_fields():
    lines = {
        "student.model: there is no such model": "model: there is no such model",
        "student.lora.rank: too small": "method.distillation.student.lora.rank: too small",
        "data.path: there is no such file": "training_file: there is no such file",
        "name: String should match pattern '^[a-z]'": "suffix: String should match pattern '^[a-z]'",
        "metadata.team: too long": "metadata.team: too long",
        "optim.lr: must be positive": "method.distillation.optim.lr: must be positive",
        "the method needs a teacher": "the method needs a teacher",
    }
    with pytest.raises(PlanError) as caught, said_of_the_job():
        raise PlanError("\n".join(lines))
    assert str(caught.value).splitlines() == list(lines.values())


def test_what_is_read_of_a_job_makes_the_same_job_again():
    first = submission_of(job(suffix="one", seed=3))
    shown = job_resource(a_run(submitted=first, config=first), None)
    again = NewJob.model_validate(
        {key: shown[key] for key in ("model", "training_file", "method", "seed")} | {"suffix": "one"}
    )
    assert submission_of(again) == first


def test_a_job_shows_whole_seconds_and_its_error_in_openais_words():
    failure = Failure(type="NonFinite", category="system", message="the loss is NaN")
    shown = job_resource(
        a_run(state=State.FAILED, error=failure, created_at=12.9, finished_at=20.5, latest={"tokens_trained": 640.0}),
        "published",
    )
    assert (shown["created_at"], shown["finished_at"], shown["estimated_finish"]) == (12, 20, None)
    assert shown["error"] == {"code": "NonFinite", "message": "the loss is NaN", "param": None}
    assert (shown["status"], shown["trained_tokens"], shown["fine_tuned_model"]) == ("failed", 640, "published")


def test_tokens_are_told_at_the_end_and_a_finish_is_estimated_until_then():
    shown = job_resource(
        a_run(
            state=State.RUNNING,
            step=5,
            started_at=100.0,
            launched_at=100.0,
            heartbeat_at=150.0,
            latest={"tokens_trained": 5.0},
        ),
        None,
    )
    assert (shown["trained_tokens"], shown["estimated_finish"]) == (None, 200)


@pytest.mark.parametrize(
    ("type", "level", "shown"), [("metrics", "info", "metrics"), ("run.status", "debug", "message")]
)
def test_an_event_keeps_its_number_in_its_id(type: str, level: str, shown: str):
    event = Event(seq=12, time=5.5, type=type, level=level, message="m", data={"a": 1})
    resource = job_event_resource("ftjob-1", event)
    assert (resource["type"], resource["level"], resource["created_at"]) == (shown, "info", 5)
    assert event_number("ftjob-1", resource["id"]) == 12


@pytest.mark.parametrize(
    "wrong", ["ftevent-other-12", "ftevent-ftjob-1-", "ftevent-ftjob-1-x", "12", "ftevent-ftjob-1-1\n"]
)
def test_an_id_that_is_no_event_of_the_job_is_no_cursor(wrong: str):
    with pytest.raises(ServiceError, match="names no event of this job"):
        event_number("ftjob-1", wrong)
