"""Each rule of what does not fit together fires on its misfit, alone, and not on the same run put right."""

from __future__ import annotations

import re
from typing import Any

import pytest

from potstill.algebra.objective import Tier
from potstill.config import RunConfig
from potstill.config_file import parse
from potstill.errors import PlanError
from potstill.methods import PRESETS
from potstill.misfits import misfits
from potstill.planner import check_teacher
from potstill.wire import Capabilities
from tests.builders_teacher import IDENTITY
from tests.teacher_tables import (
    ADVISED,
    COMPLETIONS,
    LOCAL,
    NONE,
    OPENAI,
    SELF,
    SERVED_HERE,
    SERVER,
    SEVERAL,
    VLLM,
    offering,
)

WEIGHED = {**LOCAL, "models": [{"model": "models/a"}, {"model": "models/b"}], "learn_weights": 0.1}
RANKS = {**OPENAI, "ranks": "likeness"}
SAMPLES = "rollout.samples_per_prompt=4"
SNAPSHOT = "rollout.source=snapshot"
REVISION = "rollout.source=revision"
REFERENCE = "rollout.source=reference"
BESIDE = "rollout.beside=teacher"
VERIFIED = "data.verifier=exact"
ADAPTIVE = ("rollout.adaptive.validate_every=2", "rollout.adaptive.validate_items=2", "data.holdout=2")


def make_config(method: str, teacher: dict[str, Any], *changes: str) -> RunConfig:
    return parse(
        {
            "name": "one",
            "method": method,
            "student": {"model": "models/student"},
            "teacher": teacher,
            "data": {"kind": "jsonl", "path": "data.jsonl"},
            "rollout": {"prompts_per_step": 3, "sampling": {"max_new_tokens": 5}},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 7},
        },
        changes,
    )


def several(**member: Any) -> dict[str, Any]:
    members = {"a": {"teacher": {**VLLM, **member}, "domains": ["a"]}, "b": {"teacher": VLLM}}
    return {**SEVERAL, "members": members}


@pytest.mark.parametrize(
    ("wrong", "says", "right"),
    [
        (
            ("sft", SERVER, "rollout.source=teacher"),
            "text of the teacher needs one that writes",
            ("sft", OPENAI, "rollout.source=teacher"),
        ),
        (("soda", VLLM, SNAPSHOT, BESIDE), "needs one that writes", ("soda", OPENAI, SNAPSHOT, BESIDE)),
        (("soda", OPENAI, SNAPSHOT), "pairs the student's answers with others: set", ("soda", LOCAL, SNAPSHOT, BESIDE)),
        (
            ("opd", SERVER, "rollout.snapshot=models/s"),
            'rollout.snapshot is who writes where rollout.source = "snapshot"',
            ("opd", SERVER, SNAPSHOT, "rollout.snapshot=models/s"),
        ),
        (
            ("opsd", SELF, SNAPSHOT, "rollout.view=privileged"),
            "a snapshot reads the student's own prompt",
            ("opsd", SELF, "rollout.view=privileged"),
        ),
        (
            ("sft", NONE, REFERENCE, "rollout.beside=reference"),
            'rollout.beside = "reference" is the text of rollout.source once more',
            ("sft", OPENAI, REFERENCE, "rollout.beside=teacher"),
        ),
        (
            ("opd", {**SERVER, "privileged_template": "{prompt} {advice}"}),
            'shows {advice}, which only a teacher of kind "self" has',
            ("opd", {**SERVER, "privileged_template": "{prompt} {answer}"}),
        ),
        (
            ("opsd", {**SELF, "privileged_template": "{prompt}", "fade_steps": 4}),
            "teacher.fade_steps: teacher.privileged_template shows nothing that fades",
            ("opsd", {**ADVISED, "fade_steps": 4}),
        ),
        (
            ("multi_teacher", {**WEIGHED, "models": LOCAL["models"]}, VERIFIED),
            "teacher.learn_weights weighs several models",
            ("multi_teacher", WEIGHED, VERIFIED),
        ),
        (
            ("multi_teacher", {**WEIGHED, "models": [{"model": "a", "domains": ["maths"]}, {"model": "b"}]}, VERIFIED),
            "none of teacher.models has domains",
            ("multi_teacher", WEIGHED, VERIFIED),
        ),
        (
            ("sft", WEIGHED, VERIFIED, REFERENCE),
            "method 'sft' reads no teacher",
            ("baby_llama", WEIGHED, VERIFIED, REFERENCE),
        ),
        (
            ("multi_teacher", WEIGHED),
            "teacher.learn_weights needs text that is known to be right",
            ("distillm", WEIGHED, "rollout.beside=reference"),
        ),
        (
            ("baby_llama", WEIGHED, "rollout.source=teacher", "rollout.beside=reference"),
            "teacher.learn_weights needs text that is known to be right",
            ("baby_llama", WEIGHED, REFERENCE),
        ),
        (("opsd", LOCAL), "reads more than the student: teacher.privileged_template", ("opsd", ADVISED)),
        (
            ("sft", NONE, REFERENCE, "rollout.privileged_share=0.5"),
            'rollout.privileged_share needs source = "reference" and a [teacher] of kind "self"',
            ("sft", SELF, REFERENCE, "rollout.privileged_share=0.5"),
        ),
        (
            ("ranked_preference", OPENAI, SAMPLES),
            'needs a reward: data.verifier must not be "none", or teacher.ranks',
            ("ranked_preference", RANKS, SAMPLES),
        ),
        (
            ("soda", RANKS, SNAPSHOT, BESIDE, SAMPLES),
            "teacher.ranks rewards completions, and method 'soda' reads no reward",
            ("soda", OPENAI, SNAPSHOT, BESIDE, SAMPLES),
        ),
        (
            ("gad", OPENAI, BESIDE, SAMPLES, "learner.ranks=2"),
            'judge "discriminator" learns in one process: learner.ranks = 1',
            ("gad", OPENAI, BESIDE, SAMPLES),
        ),
        (
            ("gad", OPENAI, BESIDE, SAMPLES, "learner.recompute=true"),
            "lends its weights to the student's layers for one pass: learner.recompute = false",
            ("gad", OPENAI, BESIDE, SAMPLES),
        ),
        (
            ("ranked_preference", RANKS),
            "teacher.ranks puts completions of one prompt in order",
            ("ranked_preference", RANKS, SAMPLES),
        ),
        (
            ("kdrl", SERVER, VERIFIED),
            "compares completions of one prompt",
            ("kdrl", SERVER, VERIFIED, SAMPLES),
        ),
        (
            ("opd", {**SERVER, "tokenizer": "models/t"}),
            "teacher.tokenizer names other tokens than the student's",
            ("cross_tokenizer", {**SERVER, "tokenizer": "models/t"}),
        ),
        (
            ("opd", several(tokenizer="models/t")),
            "teacher.members.a.teacher.tokenizer names other tokens",
            ("opd", several()),
        ),
        (
            ("opd", SERVER, "objective.support.k=200"),
            "objective.support.k is 200: a teacher server sends at most 128",
            ("opd", LOCAL, "objective.support.k=200"),
        ),
        (
            ("dac_kl_scrg", LOCAL, REVISION),
            'rollout.source = "revision" asks the teacher which token to replace',
            ("dac_kl_scrg", SERVED_HERE, REVISION),
        ),
        (("gkd_topk", COMPLETIONS, REVISION), 'kind = "server", "vllm" or "several"', ("gkd_topk", VLLM, REVISION)),
        (
            ("cross_tokenizer", {**SERVER, "tokenizer": "models/t"}, REVISION),
            "with the student's tokenizer",
            ("first", SERVER, REVISION),
        ),
        (
            ("opd_sampled", SERVER, REVISION),
            "method 'opd_sampled', term 'main', counts on the student's own draws",
            ("opd", SERVER, REVISION),
        ),
        (
            ("opd", SERVER, REVISION, "objective.correction=truncated"),
            "has tokens that nobody sampled, and method 'opd'",
            ("opd", SERVER, REVISION),
        ),
        (
            ("opd", SERVER, *ADAPTIVE, "rollout.adaptive.capacity=9"),
            "has steps on text that the student did not sample: term 'main'",
            ("distillm", LOCAL, *ADAPTIVE, "rollout.adaptive.capacity=9"),
        ),
        (
            ("distillm", LOCAL, *ADAPTIVE, "rollout.adaptive.capacity=2"),
            "rollout.adaptive.capacity = 2, but a step has 3 prompts",
            ("distillm", LOCAL, *ADAPTIVE, "rollout.adaptive.capacity=3"),
        ),
        (
            ("distillm", LOCAL, *ADAPTIVE, "data.holdout=1"),
            "rollout.adaptive.validate_items = 2, but data.holdout keeps 1",
            ("distillm", LOCAL, *ADAPTIVE),
        ),
    ],
)
def test_a_misfit_is_said_and_the_same_run_put_right_has_none(wrong: Any, says: str, right: Any):
    found = list(misfits(make_config(*wrong)))
    assert any(says in problem for problem in found), found
    assert all("\n" not in problem for problem in found)
    assert list(misfits(make_config(*right))) == []


def test_a_method_that_reads_what_is_private_needs_data_that_says_it():
    config = make_config("swing", LOCAL)
    sums = {"kind": "reasoning_gym", "dataset": "chain_sum"}
    assert list(misfits(config)) == []
    assert list(misfits(parse({**config.model_dump(), "data": sums}))) == [
        "method 'swing' reads which text is private, as `private` of a line: data.kind = \"jsonl\""
    ]


def test_a_teacher_that_offers_what_the_method_reads_is_taken():
    check_teacher(make_config("opd", SERVED_HERE), offering(IDENTITY))


@pytest.mark.parametrize(
    ("able", "says"),
    [
        (
            offering(IDENTITY, tier=Tier.TOPK),
            r"'opd' needs a teacher of tier IDS, tiny offers TOPK; nearest that it can serve: (.+)",
        ),
        (
            offering(IDENTITY, tier=Tier.TEXT),
            r"'opd' needs a teacher of tier IDS, tiny offers TEXT; nearest that it can serve: (.+)",
        ),
        (offering(IDENTITY, max_top_k=8), r"objective\.support\.k is 16: tiny .* at most 8"),
        (offering(IDENTITY, context_length=516), r"tiny reads 516 tokens: lower rollout\.max_prompt_tokens 512 or"),
    ],
)
def test_a_teacher_that_was_met_and_cannot_serve_is_refused_with_what_it_can(able: Capabilities, says: str):
    with pytest.raises(PlanError) as caught:
        check_teacher(make_config("opd", SERVED_HERE), able)
    found = re.search(says, str(caught.value))
    assert found
    for name in found[1].split(", ") if found.groups() else ():
        assert PRESETS[name].objective.tier <= able.tier


@pytest.mark.parametrize("short", [{"tier": Tier.TOPK}, {"max_top_k": 31}])
def test_a_teacher_that_cannot_say_where_to_revise_is_refused(short: dict[str, int]):
    check_teacher(make_config("gkd_topk", VLLM, REVISION), offering(IDENTITY))
    with pytest.raises(
        PlanError, match=r"asks for log-probs of rollout\.revision_k = 32 ids .* offers \w+ and at most"
    ):
        check_teacher(make_config("gkd_topk", VLLM, REVISION), offering(IDENTITY, **short))
