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
from potstill.planner import check_teacher, nearest, num_parameters, plan
from potstill.wire import Capabilities
from tests.tiny_models import save_tiny_model

SERVER = {"kind": "server", "url": "http://127.0.0.1:1", "secret_ref": "env:TEACHER_KEY"}
SERVED_HERE = {"kind": "server", "model": "models/teacher"}
SELF = {"kind": "self", "privileged_template": "{prompt} {answer}"}
NONE = {"kind": "none"}
BESIDE = "rollout.beside=reference"
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
            "'opsd' needs a teacher of tier FULL, this one offers IDS, and FULL once teacher.head names the model that "
            "it serves; nearest that it can serve: \\w+",
        ),
        (make_config(method="gkd", teacher={**SERVED_HERE, "tokenizer": "t"}), "this one offers IDS; nearest"),
        (make_config(method="gkd", teacher={**SERVED_HERE, "follows": "student"}), "this one offers IDS; nearest"),
        (make_config(teacher=NONE), "'opd' needs a teacher of tier IDS, this one offers TEXT; nearest .* sft"),
        (make_config(method="sft", teacher=SERVER, source="teacher"), "needs one that writes"),
        (make_config(method="sft", teacher=NONE, source="teacher"), "needs one that writes"),
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
        (
            make_config("m", "objective.support.m=129", method="async_opd"),
            r"support\.m is 129: a teacher server scores at most 128 ids",
        ),
        (make_config("m", "data.verifier=exact", method="pi_distill", teacher=SELF), r"rollout\.view = \"privileged\""),
        (
            make_config(
                "m",
                "data.verifier=exact",
                "objective.loss.kl_penalty=0.1",
                "objective.loss.near=own_prompt",
                method="grpo",
            ),
            r"loss\.near = \"own_prompt\" is of text written under the teacher's prompt",
        ),
        (make_config(method="dasd", teacher=NONE, source="handoff"), "a teacher that goes on where another stopped"),
        (make_config("m", method="gad"), "'gad' pairs the student's answers with others: set rollout.beside"),
        (make_config("m", BESIDE, "rollout.beside_share=0.5", method="gad"), r"at every prompt: rollout\.beside_share"),
        (make_config("m", BESIDE, "rollout.beside_instead=true", method="gad"), "beside_instead = false"),
        (make_config("m", BESIDE, method="gad"), r"compares completions .*: rollout\.samples_per_prompt = 4"),
        (
            make_config("m", BESIDE, "rollout.view=privileged", method="gad", teacher=SELF),
            'judge "discriminator" reads answers under the student\'s own prompt: rollout.view = "own"',
        ),
        (make_config("m", method="ranked_preference"), r"'ranked_preference' needs a reward: data\.verifier"),
        (make_config("m", "data.verifier=exact", method="ranked_preference"), r"rollout\.samples_per_prompt = 4"),
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
        ("gkd", SERVED_HERE, "student"),
        ("gkd", SERVER | {"head": "models/teacher"}, "student"),
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


def capabilities(**changes: Any) -> Capabilities:
    """Of a teacher server that offers everything, unless said otherwise."""
    usual = {"model": "t", "revision": "r", "tokenizer_fingerprint": "f", "tier": Tier.FULL, "context_length": 4096}
    limits = dict.fromkeys(("vocabulary", "max_items", "max_tokens", "max_body_bytes"), 10**6)
    return Capabilities(**{**usual, **limits, "max_top_k": 128, "hidden_size": 64, "head_id": "h", **changes})


def test_a_teacher_that_sends_no_states_cannot_serve_a_method_that_reads_all_logits():
    config = make_config(method="gkd", teacher=SERVED_HERE)
    check_teacher(config, capabilities())
    with pytest.raises(PlanError, match="'gkd' needs a teacher of tier FULL, t offers IDS; nearest"):
        check_teacher(config, capabilities(hidden_size=0, head_id=""))


def test_a_top_k_wider_than_a_teacher_sends_is_refused_unless_it_sends_states():
    with pytest.raises(PlanError, match=r"support\.k is 64: t sends at most 8"):
        check_teacher(make_config("m", "objective.support.k=64"), capabilities(max_top_k=8))
    of_states = make_config("m", 'objective.support={"kind": "union_topk", "k": 200}', teacher=SERVED_HERE)
    assert of_states.objective.tier is Tier.FULL
    check_teacher(of_states, capabilities(max_top_k=8))


@pytest.mark.parametrize(
    "teacher",
    [
        SERVED_HERE | {"head": "m"},
        SERVER | {"head": "m", "tokenizer": "t"},
        SERVER | {"head": "m", "follows": "student"},
        {"kind": "several", "members": {name: {"teacher": SERVER | {"head": "m"}} for name in ("a", "b")}},
    ],
)
def test_a_head_is_of_one_server_that_runs_already_and_keeps_it(teacher: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"teacher\.head stands beside teacher\.url|read by log-probs, not by states"):
        make_config(teacher=teacher)


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
    half = plan(make_config(model, "student.dtype=bfloat16"))
    assert (half.engine_bytes, half.learner_bytes) == (weights // 2, weights // 2 + 4 * weights)


def test_a_discriminator_needs_no_verifier_and_is_held_in_float32_beside_the_student(model: Path):
    parameters = num_parameters(model)
    changes = (BESIDE, "rollout.samples_per_prompt=2")
    found = plan(make_config(model, *changes, method="gad", teacher=NONE))
    assert found.learner_bytes == 2 * 4 * 4 * parameters
    in_bfloat16 = plan(make_config(model, *changes, "student.dtype=bfloat16", method="gad", teacher=NONE))
    assert in_bfloat16.learner_bytes == (2 + 16) * parameters + 16 * parameters


def test_the_plan_says_how_weights_will_travel(model: Path):
    assert plan(make_config(model)).weights == "shared_memory on one host, object_store between hosts"
    named = plan(make_config(model, "weights.transport=device", "rollout.engine=vllm")).weights
    assert named.startswith("device: as weights.transport says; gloo from CPU to CPU")


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
    assert all(PRESETS[name].objective.tier <= Tier.IDS for name in found)
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
