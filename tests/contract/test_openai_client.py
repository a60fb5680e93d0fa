"""OpenAI's own client, unchanged, over the service: files, fine-tuning jobs, their events, checkpoints, errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from orchestrator.service.principals import Scope
from tests.launchers import ProcessLauncher
from tests.plain import PLAIN
from tests.run_folders import make_checkpoint
from tests.service_configs import submitted
from tests.services import RUN, Service, serving, until

LINES = b"".join(json.dumps({"prompt": f"{n} + 1 = ?", "solution": str(n + 1)}).encode() + b"\n" for n in range(4))
BOTH = (Scope.RUNS_READ, Scope.RUNS_WRITE)


class Asking(OpenAI):
    """The client, and the requests that it has sent."""

    def __init__(self, service: Service, key: str, **options: Any) -> None:
        self.sent: list[httpx2.Request] = []
        http = httpx2.Client(trust_env=False, verify=PLAIN, event_hooks={"request": [self.sent.append]})
        super().__init__(base_url=f"{service.url}/v1", api_key=key, http_client=http, **options)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("openai")
    with serving(folder, lambda url: ProcessLauncher(folder / "jobs", RUN, url)) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[Asking]:
    with Asking(service, service.key) as asking:
        yield asking


@pytest.fixture(scope="module")
def file_id(service: Service) -> str:
    with Asking(service, service.key) as asking:
        return asking.files.create(file=("train.jsonl", LINES), purpose="fine-tune").id


def method(**changes: Any) -> Any:
    settings = {key: submitted()[key] for key in ("method", "teacher", "rollout", "optim", "loop")}
    return {"type": "distillation", "distillation": settings | changes}


def create(client: OpenAI, file_id: str, *, how: str = "succeeds", **changes: Any) -> FineTuningJob:
    seed = {"succeeds": 0, "fails": 1, "waits": 2}[how]  # of tests/tiny_run.py
    return client.fine_tuning.jobs.create(
        **{"model": "none", "training_file": file_id, "method": method(), "seed": seed} | changes
    )


def at_its_end(client: OpenAI, job_id: str) -> FineTuningJob:
    def ended() -> FineTuningJob | None:
        job = client.fine_tuning.jobs.retrieve(job_id)
        return job if job.status in {"succeeded", "failed", "cancelled"} else None

    found: FineTuningJob = until(ended, 60.0)
    return found


def status_is(client: OpenAI, job_id: str, status: str) -> None:
    until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == status, 60.0)


# What goes well


def test_from_a_file_to_a_model_with_nothing_but_openais_client(service: Service, client: Asking):
    file = client.files.create(file=("train.jsonl", LINES), purpose="fine-tune")
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", len(LINES), "train.jsonl", "fine-tune")
    job = create(client, file.id, suffix="whole", metadata={"team": "a"})
    assert (job.id, job.object, job.model, job.training_file) == ("whole", "fine_tuning.job", "none", file.id)
    assert (job.status, job.fine_tuned_model, job.finished_at, job.metadata) == ("queued", None, None, {"team": "a"})
    for step in (1, 3):
        make_checkpoint(service.folder / "runs" / "whole", step)
    ended = at_its_end(client, "whole")
    assert (ended.status, ended.error, ended.fine_tuned_model) == ("succeeded", None, "run/whole/step-000003")
    assert ended.finished_at is not None
    assert ended.finished_at >= ended.created_at > 1_700_000_000
    found = client.fine_tuning.jobs.checkpoints.list("whole")
    assert [(one.step_number, one.fine_tuned_model_checkpoint) for one in found] == [
        (3, "run/whole/step-000003"),
        (1, "run/whole/step-000001"),
    ]
    assert found.data[0].metrics.train_loss == pytest.approx(1 / 3)


def test_a_job_without_a_suffix_gets_an_id_that_is_a_run_on_the_other_surface(
    service: Service, client: Asking, file_id: str
):
    job = create(client, file_id)
    assert job.id.startswith("ftjob-")
    assert at_its_end(client, job.id).status == "succeeded"
    run = service.http.get(f"/v1/runs/{job.id}").json()
    assert (run["object"], run["status"], run["student"]) == ("run", "succeeded", "none")


def test_a_run_of_the_other_surface_is_a_job(service: Service, client: Asking):
    service.http.post("/v1/runs", json=submitted(name="native")).raise_for_status()
    job = client.fine_tuning.jobs.retrieve("native")
    assert (job.training_file, job.model, job.seed) == ("none.jsonl", "none", 0)
    assert job.method is not None
    assert job.method.to_dict()["distillation"]["optim"] == {"lr": 1e-4}  # type: ignore[index]


def test_events_come_newest_first_in_pages_without_a_seam(client: Asking, file_id: str):
    job = create(client, file_id)
    at_its_end(client, job.id)
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    numbers = [int(event.id.rpartition("-")[2]) for event in events]
    assert numbers == list(range(len(events), 0, -1))
    assert len(events) > 6
    assert {event.object for event in events} == {"fine_tuning.job.event"}
    losses = [event.data["loss"] for event in events if event.type == "metrics"]  # type: ignore[index]
    assert losses == [pytest.approx(1 / 3), 0.5, 1.0]


def test_jobs_are_listed_in_pages_and_by_their_metadata(service: Service, client: Asking, file_id: str):
    made = [create(client, file_id, metadata={"sweep": "s", "number": str(number)}).id for number in range(5)]
    listed = [job.id for job in client.fine_tuning.jobs.list(limit=2, metadata={"sweep": "s"})]
    assert listed == made[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"sweep": "s", "number": "3"})] == [made[3]]
    assert set(made) < {job.id for job in client.fine_tuning.jobs.list()}


def test_a_job_is_paused_resumed_and_cancelled(client: Asking, file_id: str):
    job = create(client, file_id, how="waits")
    status_is(client, job.id, "running")
    assert client.fine_tuning.jobs.pause(job.id).status in {"pausing", "paused"}
    status_is(client, job.id, "paused")
    assert client.fine_tuning.jobs.resume(job.id).status in {"queued", "running"}
    status_is(client, job.id, "running")
    assert client.fine_tuning.jobs.cancel(job.id).status in {"running", "cancelled"}
    assert at_its_end(client, job.id).status == "cancelled"


def test_a_failed_job_says_why(client: Asking, file_id: str):
    job = create(client, file_id, how="fails")
    ended = at_its_end(client, job.id)
    assert ended.error is not None
    assert (ended.status, ended.error.code, ended.error.message) == ("failed", "NonFinite", "step 3: the loss is NaN")


def test_the_same_request_under_one_key_makes_one_job(client: Asking, file_id: str):
    headers = {"Idempotency-Key": "job-once"}
    first = create(client, file_id, extra_headers=headers)
    again = client.fine_tuning.jobs.with_raw_response.create(
        model="none", training_file=file_id, method=method(), seed=0, extra_headers=headers
    )
    assert again.parse().id == first.id
    assert again.headers["idempotent-replayed"] == "true"
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(client, file_id, how="fails", extra_headers=headers)
    assert caught.value.code == "idempotency_key_reused"


def test_every_answer_carries_its_request_id(client: Asking, file_id: str):
    page = client.fine_tuning.jobs.with_raw_response.list(extra_headers={"X-Request-Id": "mine-1"})
    assert page.request_id == "mine-1"
    with pytest.raises(openai.NotFoundError) as caught:
        client.fine_tuning.jobs.retrieve("nobody", extra_headers={"X-Request-Id": "mine-2"})
    assert caught.value.request_id == "mine-2"


# What is refused


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"model": "unknown"}, "/model", "unknown"),
        ({"training_file": "file-0"}, "/training_file", "file"),
        ({"suffix": "Not A Name"}, "/suffix", "pattern"),
        ({"seed": -1}, "/seed", "greater than or equal to 0"),
        ({"validation_file": "file-1"}, "/validation_file", "data.holdout"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "/integrations", "operator"),
        ({"hyperparameters": {"n_epochs": 1}}, "/hyperparameters", "method.distillation"),
        ({"method": {"type": "supervised"}}, "/method/type", "distillation"),
        ({"method": method(optim={"lr": 1e-4, "weight_dekay": 0})}, "/method/distillation/optim/weight_dekay", "decay"),
        ({"method": method(seed=3)}, "/method/distillation/seed", "the job's seed"),
        ({"metadata": {"k": "v" * 513}}, "/metadata/k", "512"),
        ({"extra_body": {"modell": "x"}}, "/modell", "permitted"),
    ],
)
def test_a_wrong_job_is_a_bad_request_that_names_the_field(
    client: Asking, file_id: str, changes: dict[str, Any], param: str, says: str
):
    with pytest.raises(openai.BadRequestError) as caught:
        create(client, file_id, **changes)
    assert caught.value.param == param
    assert says in caught.value.message
    assert caught.value.type == "invalid_request_error"
    assert len(client.sent) == 1


def test_a_taken_suffix_is_a_conflict_that_is_not_tried_again(client: Asking, file_id: str):
    create(client, file_id, suffix="taken")
    client.sent.clear()
    with pytest.raises(openai.ConflictError) as caught:
        create(client, file_id, suffix="taken")
    assert (caught.value.code, len(client.sent)) == ("name_taken", 1)


def test_steering_a_job_that_is_at_its_end_is_a_conflict_that_is_not_tried_again(client: Asking, file_id: str):
    job = create(client, file_id)
    at_its_end(client, job.id)
    client.sent.clear()
    for steer in (client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.pause, client.fine_tuning.jobs.resume):
        with pytest.raises(openai.ConflictError) as caught:
            steer(job.id)
        assert caught.value.code == "illegal_transition"
    assert len(client.sent) == 3


def test_what_is_not_there_or_somebody_elses_is_not_found(service: Service, client: Asking, file_id: str):
    job = create(client, file_id)
    with Asking(service, service.key_for("stranger", *BOTH)) as stranger:
        for asking, wanted in ((client, "nobody"), (stranger, job.id)):
            jobs = asking.fine_tuning.jobs
            for call in (jobs.retrieve, jobs.list_events, jobs.checkpoints.list, jobs.cancel, jobs.pause, jobs.resume):
                with pytest.raises(openai.NotFoundError):
                    call(wanted)
        with pytest.raises(openai.BadRequestError) as caught:
            create(stranger, file_id)
        assert caught.value.param == "/training_file"
        assert list(stranger.fine_tuning.jobs.list()) == []


def test_a_cursor_that_names_nothing_is_a_bad_request(client: Asking, file_id: str):
    job = create(client, file_id)
    jobs = client.fine_tuning.jobs
    for call in (
        lambda: jobs.list(after="nobody"),
        lambda: jobs.list_events(job.id, after="ftevent-other-3"),
        lambda: jobs.checkpoints.list(job.id, after="ftckpt-other-3"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            call()
        assert caught.value.code == "bad_cursor"


def test_a_full_quota_is_a_rate_limit_that_is_tried_again_when_the_service_says(service: Service, file_id: str):
    key = service.key_for("operator", *BOTH, unfinished=0)
    with Asking(service, key, max_retries=1) as limited, pytest.raises(openai.RateLimitError) as caught:
        create(limited, file_id)
    assert (caught.value.code, int(caught.value.response.headers["retry-after"])) == ("quota_exceeded", 2)
    assert [request.headers["x-stainless-retry-count"] for request in limited.sent] == ["0", "1"]


def test_keys_that_are_wrong_or_may_not_are_told_apart(service: Service, file_id: str):
    with Asking(service, "sk-no-such-key") as nobody, pytest.raises(openai.AuthenticationError):
        nobody.fine_tuning.jobs.list()
    with Asking(service, service.key_for("reader", Scope.RUNS_READ)) as reader:
        assert list(reader.fine_tuning.jobs.list()) == []
        with pytest.raises(openai.PermissionDeniedError):
            create(reader, file_id)
