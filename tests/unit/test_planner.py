"""The planner refuses what cannot work before anything starts, by name, and counts what the models weigh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from potstill.algebra.objective import Tier
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import ConfigError, PlanError
from potstill.methods import PRESETS
from potstill.planner import nearest, num_parameters, plan
from tests.tiny_models import save_tiny_model

SERVER = {"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "env:TEACHER_KEY"}
SERVED_HERE = {"kind": "server", "model": "models/teacher"}
SELF = {"kind": "self", "privileged_template": "{prompt} {answer}"}
NONE = {"kind": "none"}
LOCAL = {"kind": "local", "models": [{"model": "models/teacher"}]}


def make_config(
    model: Path | str = "models/student",
    *changes: str,
    method: str = "opd",
    teacher: Any = SERVER,
    source: str = "student",
) -> RunConfig:
    return parse(
        {
            "name": "one",
            "method": method,
            "student": {"model": str(model)},
            "teacher": teacher,
            "data": {"kind": "jsonl", "path": "data.jsonl"},
            "rollout": {"source": source, "prompts_per_step": 3, "sampling": {"max_new_tokens": 5}},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 7},
        },
        changes,
    )


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            make_config(method="opsd"),
            "'opsd' needs a teacher of tier FULL, this one offers IDS; nearest that it can serve: \\w+",
        ),
        (make_config(teacher=NONE), "'opd' needs a teacher of tier IDS, this one offers TEXT; nearest .* sft"),
        (make_config(method="sft", teacher=SERVER, source="teacher"), "needs teacher.model, a folder"),
        (make_config(method="sft", teacher=NONE, source="teacher"), "needs teacher.model, a folder"),
        (make_config(teacher=SERVED_HERE, source="teacher"), 'for text of the student: rollout.source = "student"'),
        (make_config(source="reference"), 'for text of the student: .* for other text use method "sft"'),
        (
            make_config(method="sft", teacher=NONE),
            "for text of the teacher or the data: rollout.source or rollout.besi",
        ),
        (make_config(method="stable_opd"), "its term 'gold', is for text of the teacher or the data"),
        (make_config("m", "rollout.sampling.temperature=0"), r"rollout\.sampling\.temperature = 0 never explores"),
        (make_config("m", "data.verifier=none", method="kdrl"), r"'kdrl' needs a reward: data\.verifier"),
        (make_config("m", "data.verifier=exact", method="kdrl"), r"rollout\.samples_per_prompt = 4 or more"),
        (make_config("m", method="opsd", teacher=LOCAL), r"teacher that reads more than the student: teacher\.priv"),
        (
            make_config("m", "objective.support.k=200"),
            r"support\.k is 200: a teacher server sends at most 128",
        ),
        (make_config("m", method="gad"), "'gad' needs .*, which a run cannot bring yet; nearest"),
    ],
)
def test_what_cannot_work_is_refused_by_name_with_what_would(config: RunConfig, says: str):
    with pytest.raises(PlanError, match=says) as caught:
        plan(config)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), seed=0)


@pytest.mark.parametrize(
    ("method", "teacher", "source"),
    [
        ("opd", SERVER, "student"),
        ("opd_sampled", SERVER, "student"),
        ("gkd_topk", SERVED_HERE, "student"),
        ("gkd", LOCAL, "student"),
        ("opd", LOCAL, "student"),
        ("opd_sampled", SELF, "student"),
        ("opsd", SELF, "student"),
        ("sft", SERVED_HERE, "teacher"),
        ("sft", SELF, "teacher"),
        ("sft", NONE, "reference"),
    ],
)
def test_what_fits_together_is_planned(model: Path, method: str, teacher: Any, source: str):
    found = plan(make_config(model, method=method, teacher=teacher, source=source))
    assert (found.method, found.source) == (method, source)
    assert (found.tokens_per_step_at_most, found.tokens_at_most) == (3 * 5, 3 * 5 * 7)


def test_parameters_counted_from_headers_are_the_models(model: Path):
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert num_parameters(model) == sum(parameter.numel() for parameter in loaded.parameters())


def test_parameters_of_all_shards_are_counted_and_tied_ones_once(tmp_path: Path):
    save_tiny_model(tmp_path / "one", seed=0, tie_word_embeddings=True)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    network.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert num_parameters(tmp_path / "shards") == sum(parameter.numel() for parameter in network.parameters())


def test_a_learner_holds_weights_gradient_and_two_moments(model: Path):
    weights = 4 * num_parameters(model)
    found = plan(make_config(model))
    assert (found.engine_bytes, found.learner_bytes) == (weights, 4 * weights)


def test_a_model_folder_without_weights_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no \*\.safetensors there"):
        plan(make_config(tmp_path))


def test_a_damaged_weights_file_is_named(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a readable safetensors file"):
        plan(make_config(tmp_path))


def test_the_nearest_method_is_of_the_same_kind_and_can_be_served():
    found = nearest("opsd_reverse", Tier.IDS)
    assert found
    assert all(PRESETS[name].objective.tier <= Tier.IDS and not PRESETS[name].missing for name in found)
    assert PRESETS[found[0]].objective.loss.kind == "reverse_kl"


def test_a_run_that_differs_from_the_papers_is_noted(model: Path):
    notes = plan(make_config(model, "eval.items=1", "rollout.sampling.top_p=1.0", method="lsm")).notes
    assert any(note.startswith("the paper of 'lsm' has rollout.sampling.top_p = 0.9, this run 1.0") for note in notes)


def test_what_changes_the_meaning_of_a_number_is_noted(model: Path):
    assert plan(make_config(model, "eval.items=1")).notes == ()
    tempered = plan(make_config(model, "eval.items=1", "rollout.sampling.temperature=0.7"))
    sampled = plan(make_config(model, "eval.items=1", method="opd_sampled"))
    unmeasured = plan(make_config(model))
    assert "not drawn from the student at temperature 1" in tempered.notes[0]
    assert "noisy" in sampled.notes[0]
    assert "eval.items = 0" in unmeasured.notes[0]
