"""Samples are those of steps that count, newest first, and show no more than a key may see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.service.samples import FIELDS, TOKEN_FIELDS, samples_of
from potstill.errors import ServiceError
from rollout_worker.actor import described
from tests.rollouts import random_batch
from tests.run_folders import make_sample, make_samples


def ids(runs: Path) -> list[str]:
    return [sample["id"] for sample in samples_of(runs, "one", privileged=False)]


def test_the_newest_step_comes_first_and_a_steps_samples_in_their_order(tmp_path: Path):
    make_samples(tmp_path / "one", {1: 2, 5: 2, 9: 1})
    assert ids(tmp_path) == ["9-0", "5-0", "5-1", "1-0", "1-1"]
    assert samples_of(tmp_path, "nobody", privileged=True) == []


def test_what_a_run_undid_by_going_back_to_a_checkpoint_is_not_shown(tmp_path: Path):
    make_samples(tmp_path / "one", {1: 1, 5: 2, 9: 2}, reward=0.0)
    make_samples(tmp_path / "one", {5: 2}, reward=1.0)
    found = samples_of(tmp_path, "one", privileged=False)
    assert [(sample["id"], sample["reward"]) for sample in found] == [("5-0", 1.0), ("5-1", 1.0), ("1-0", 0.0)]


def test_lines_of_earlier_versions_without_an_id_are_shown_as_they_are(tmp_path: Path):
    (tmp_path / "one").mkdir()
    lines = [{name: value for name, value in make_sample(3, n).items() if name != "rollout_id"} for n in (0, 1)]
    (tmp_path / "one" / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    assert ids(tmp_path) == ["3-0", "3-1"]


def test_a_field_that_is_not_known_to_be_harmless_needs_the_scope(tmp_path: Path):
    tokens = [{"text": "a", "id": 1, "teacher_prompt": "CANARY"}]
    make_samples(tmp_path / "one", {1: 1}, teacher_prompt="CANARY", answer="CANARY", tokens=tokens)
    assert "CANARY" not in json.dumps(samples_of(tmp_path, "one", privileged=False))
    shown = samples_of(tmp_path, "one", privileged=True)[0]
    assert (shown["teacher_prompt"], shown["answer"], shown["tokens"][0]["teacher_prompt"]) == ("CANARY",) * 3


def test_every_field_that_a_rollout_worker_writes_is_known_here():
    for scored in random_batch([(3, 4), (1, 3)], vocabulary=20, seed=0):
        record = described(scored, str)
        assert set(record) | {"step"} <= FIELDS
        for token in record["tokens"]:
            assert set(token) <= TOKEN_FIELDS
        assert len(record["tokens"]) == len(scored.rollout.completion_ids)
        assert [token["version"] for token in record["tokens"]] == scored.rollout.weight_versions.tolist()
        assert [token["trained"] for token in record["tokens"]] == scored.rollout.loss_mask.tolist()


@pytest.mark.parametrize("line", ["[]", "null", "{}", '{"step": "1"}', "{", "\xff"])
def test_a_line_that_is_no_sample_is_an_error_that_shows_nothing_of_it(line: str, tmp_path: Path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "samples.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(ServiceError, match="a line is no sample") as caught:
        samples_of(tmp_path, "one", privileged=False)
    assert (caught.value.status, caught.value.code) == (500, "samples_damaged")
