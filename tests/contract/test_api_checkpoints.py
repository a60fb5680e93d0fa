"""Checkpoints over real HTTP: they arrive as they were written, stay as long as they are needed, and are begun with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner import checkpoint
from orchestrator.service.runs import State
from potstill.errors import ServiceError
from potstill.journal import write_json
from tests.checkpoints import RUNS, make_trainer, save, save_students, train
from tests.launchers import AwayLauncher
from tests.left_behind import begin, error_of
from tests.run_folders import FILES
from tests.service_configs import submitted
from tests.services import Service, serving

WEIGHTS = FILES["model/model.safetensors"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Whose cluster is away, so that a test can leave behind what it wants."""
    with serving(tmp_path_factory.mktemp("checkpoints"), lambda _url: AwayLauncher()) as running:
        yield running


def test_checkpoints_are_listed_in_pages_newest_first(service: Service):
    begin(service, "saving", steps=(1, 2, 3))
    path = "/v1/runs/saving/checkpoints"
    assert [one["id"] for one in service.http.get(path).json()["data"]] == ["step-000003", "step-000002", "step-000001"]
    first = service.http.get(path, params={"limit": 2, "order": "asc"}).json()
    rest = service.http.get(path, params={"order": "asc", "after": first["last_id"]}).json()
    assert [one["step"] for one in first["data"] + rest["data"]] == [1, 2, 3]
    assert first["has_more"]
    one = service.http.get(f"{path}/step-000002").json()
    assert (one["status"], one["kind"], one["step"], one["run"]) == ("ready", "full", 2, "saving")
    assert error_of(service.http.get(f"{path}/step-000004")) == (404, "checkpoint_not_found")


def test_every_file_arrives_as_it_was_written_with_its_digest(service: Service):
    begin(service, "whole", steps=(1,))
    for file in service.http.get("/v1/runs/whole/checkpoints/step-000001").json()["files"]:
        answer = service.http.get(f"/v1/runs/whole/checkpoints/step-000001/files/{file['name']}")
        assert answer.status_code == 200
        assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
        assert answer.headers["etag"] == f'"{file["sha256"]}"'
        assert answer.headers["content-length"] == str(file["bytes"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("attachment")


def test_ranges_and_conditions_of_a_download(service: Service):
    begin(service, "ranged", steps=(1,))
    path = "/v1/runs/ranged/checkpoints/step-000001/files/model/model.safetensors"
    etag = service.http.get(path).headers["etag"]
    size = len(WEIGHTS)

    def get(**headers: str) -> httpx2.Response:
        return service.http.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    ranges = {"bytes=0-9": WEIGHTS[:10], "bytes=10200-": WEIGHTS[10200:], "bytes=-7": WEIGHTS[-7:]}
    for header, content in ranges.items():
        part = get(range=header)
        assert (part.status_code, part.content) == (206, content)
        assert part.headers["content-range"].endswith(f"/{size}")
        assert part.headers["repr-digest"] == get().headers["repr-digest"]
    for header in (f"bytes={size}-", "bytes=5-2", "bytes=0-0,2-3", "bytes=" + ",".join(["0-1"] * 500), "bytes=x"):
        refused = get(range=header)
        assert error_of(refused) == (416, "range_not_satisfiable")
        assert refused.headers["content-range"] == f"bytes */{size}"
    assert get(range="pages=1-2").status_code == 200
    assert get(if_none_match=etag).status_code == 304
    assert get(if_none_match=f'"x", W/{etag}').content == b""
    assert get(if_none_match='"x"').status_code == 200
    assert get(range="bytes=0-0", if_range=etag).status_code == 206
    for stale in ('"x"', f"W/{etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        assert (get(range="bytes=0-0", if_range=stale).status_code, get(range="bytes=0-0", if_range=stale).content) == (
            200,
            WEIGHTS,
        )


def test_a_download_that_breaks_off_is_resumed_and_one_that_was_altered_is_found_out(service: Service, tmp_path: Path):
    folder = begin(service, "altered", steps=(1, 2))
    with service.client() as client:
        client.download_checkpoint("altered", "step-000001", tmp_path / "fine")
        assert (tmp_path / "fine" / "model" / "model.safetensors").read_bytes() == WEIGHTS
        weights = folder / "checkpoints" / "step-000002" / "model" / "model.safetensors"
        flipped = bytearray(WEIGHTS)
        flipped[5000] ^= 4
        weights.write_bytes(flipped)
        with pytest.raises(ServiceError, match="does not come whole"):
            client.download_checkpoint("altered", "step-000002", tmp_path / "flipped")
        weights.write_bytes(WEIGHTS[:-1])
        with pytest.raises(ServiceError, match="is damaged"):
            client.download_checkpoint("altered", "step-000002", tmp_path / "short")
    assert not (tmp_path / "flipped").exists()
    assert not (tmp_path / "short").exists()
    assert service.http.get("/v1/runs/altered/checkpoints/step-000002").json()["status"] == "damaged"
    refused = service.http.get("/v1/runs/altered/checkpoints/step-000002/files/model/config.json")
    assert error_of(refused) == (500, "checkpoint_damaged")


def test_a_time_to_live_is_set_and_taken_back(service: Service):
    begin(service, "timed", steps=(1, 2, 3))
    path = "/v1/runs/timed/checkpoints/step-000001"
    assert service.http.put(f"{path}/ttl", json={"seconds": 3600}).json()["expires_at"] is not None
    assert service.http.put(f"{path}/ttl", json={"seconds": None}).json()["expires_at"] is None
    for wrong in ({"seconds": -1}, {"seconds": "x"}, {}, {"seconds": 1, "more": 1}, {"seconds": 1e300}):
        assert error_of(service.http.put(f"{path}/ttl", json=wrong))[0] == 400


def test_a_checkpoint_is_removed_unless_somebody_needs_it(service: Service):
    begin(service, "pruned", state=State.RUNNING, steps=(1, 2, 3))
    path = "/v1/runs/pruned/checkpoints"
    assert service.http.delete(f"{path}/step-000001").status_code == 204
    assert error_of(service.http.delete(f"{path}/step-000002")) == (409, "checkpoint_in_use")
    assert error_of(service.http.delete(f"{path}/step-000001")) == (404, "checkpoint_not_found")
    types = [event["type"] for event in service.http.get("/v1/runs/pruned/events").json()["data"]]
    assert "checkpoint.deleted" in types


def test_a_run_is_deleted_with_all_that_it_left(service: Service):
    folder = begin(service, "doomed", steps=(1,))
    assert service.http.delete("/v1/runs/doomed", params={"artifacts": "delete"}).status_code == 204
    assert not folder.exists()
    assert error_of(service.http.get("/v1/runs/doomed/checkpoints"))[0] == 404


# What a checkpoint is for


@pytest.fixture(scope="module")
def trained(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that really has a checkpoint: a tiny student after one step. The checkpoint's folder."""
    model = save_students(tmp_path_factory.mktemp("students")) / "untied"
    folder = begin(service, "real")
    write_json(folder / "attempt", 1)
    return save(train(make_trainer(model, **RUNS["all weights"]), 1, 1), folder / "checkpoints" / "step-000001", model)


def test_a_downloaded_checkpoint_loads_in_transformers_with_equal_logits(
    service: Service, trained: Path, tmp_path: Path
):
    with service.client() as client:
        got = client.download_checkpoint("real", "step-000001", tmp_path / "got")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place / "model") for place in (trained, got))
    ids = torch.arange(20).reshape(1, -1)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    vocabularies = [AutoTokenizer.from_pretrained(place / "model").get_vocab() for place in (trained, got)]
    assert vocabularies[0] == vocabularies[1]
    assert json.loads((got / "manifest.json").read_bytes()) == json.loads((trained / "manifest.json").read_bytes())


def test_a_published_checkpoint_is_a_model_that_a_later_run_begins_with(service: Service, trained: Path):
    path = "/v1/runs/real/checkpoints/step-000001"
    taken = service.http.post(f"{path}/publish", json={"name": "none"})
    assert error_of(taken) == (409, "name_taken")
    for wrong in ("", "../x", "a/b", ".x", "a" * 201):
        assert error_of(service.http.post(f"{path}/publish", json={"name": wrong}))[0] == 400
    first, again = (service.http.post(f"{path}/publish", json={"name": "distilled"}) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json()["published_as"] == again.json()["published_as"] == "distilled"
    assert error_of(service.http.post(f"{path}/publish", json={"name": "other"})) == (409, "already_published")
    assert error_of(service.http.delete(path)) == (409, "checkpoint_in_use")

    later = submitted(name="later") | {"student": {"model": "distilled"}}
    service.http.post("/v1/runs", json=later).raise_for_status()
    assert error_of(service.http.delete(f"{path}/publish")) == (409, "model_in_use")
    service.store.runs.move("later", State.CANCELLED, "it was cancelled")
    assert service.http.delete(f"{path}/publish").status_code == 204
    assert error_of(service.http.post("/v1/runs", json=later | {"name": "too-late"}))[0] == 400
    assert service.http.get(path).json()["published_as"] is None


def test_a_checkpoint_that_another_run_begins_with_outlives_its_own_run(
    service: Service, trained: Path, tmp_path: Path
):
    folder = begin(service, "parent", state=State.RUNNING) / "checkpoints"
    for step in (1, 2, 3, 4):
        shutil.copytree(trained, folder / f"step-{step:06d}")
    body = {"name": "offspring", "from_checkpoint": "step-000001"}
    dry = submitted(name="dry") | {"student": {"model": "run/parent/step-000002"}}
    assert service.http.post("/v1/runs", params={"dry_run": True}, json=dry).status_code == 200  # marks nothing
    service.http.post("/v1/runs/parent/fork", json=body).raise_for_status()

    checkpoint.prune(folder, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000001", "step-000003", "step-000004"]
    assert error_of(service.http.delete("/v1/runs/parent/checkpoints/step-000001")) == (409, "checkpoint_in_use")
    service.store.runs.move("offspring", State.CANCELLED, "it was cancelled")
    assert service.http.delete("/v1/runs/parent/checkpoints/step-000001").status_code == 204
    assert error_of(service.http.post("/v1/runs/parent/fork", json=body | {"name": "too-late-too"}))[0] == 400
