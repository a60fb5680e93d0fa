"""A prompt of the stream says in which step it is trained and whose text it gets; a rollout worker does as it says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.offpolicy import Kept, OffPolicy
from orchestrator.prompts import PromptStream
from potstill.config import AdaptiveConfig, JsonlData, RunConfig, SamplingConfig
from potstill.config_file import parse
from potstill.environments import Environment, open_environment
from potstill.errors import ConfigError, PlanError
from potstill.methods import PRESETS
from potstill.planner import plan
from potstill.tokenization import render
from potstill.types import FinishReason, Message, Prompt, Rollout
from rollout_worker.engine import Completion, GenerationRequest
from tests.collectors import collector_of
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
LOCAL = {"kind": "local", "models": [{"model": "models/teacher"}]}
ADAPTIVE = {"validate_every": 2, "validate_items": 2}


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """Eight questions with their solutions, and one without."""
    rows = [{"prompt": f"{n} + 1 = ?", "answer": f"{n + 1}", "solution": f"so {n + 1}"} for n in range(8)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "why?"}]))
    return open_environment(JsonlData(path=str(path), verifier="last_number"))


def make_schedule(*, prompts_per_step: int, kept: Sequence[Kept] = (), rises: int = 0) -> OffPolicy:
    """Decided up to step 3: the first two given; the third new after a rise or, at the very end of a run, replayed."""
    schedule = OffPolicy(
        AdaptiveConfig(validate_every=1, rises=1),
        steps=2,
        prompts_per_step=prompts_per_step,
        max_staleness=0,
        seed=0,
    )
    for loss in range(rises + 1):
        schedule.validated(float(loss))
    schedule.trained(1, kept)
    return schedule


def make_config(*changes: str, method: str = "distillm", teacher: Any = LOCAL, **rollout: Any) -> RunConfig:
    return parse(
        {
            "name": "one",
            "method": method,
            "student": {"model": "models/student"},
            "teacher": teacher,
            "data": {"kind": "jsonl", "path": "unused", "holdout": 2},
            "rollout": {"prompts_per_step": 2, "sampling": {"max_new_tokens": 9}, "adaptive": ADAPTIVE, **rollout},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 3},
        },
        changes,
    )


class Writer:
    """Writes "7" to every request, as weights version 4."""

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        return [
            Completion(
                token_ids=np.array([*ids_of("7"), END], np.int32),
                logprobs=np.full(2, -0.5, np.float32),
                support_ids=None,
                support_logprobs=None,
                weight_versions=np.full(2, 4, np.int32),
                finish_reason=FinishReason.STOP,
            )
            for _ in requests
        ]


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


async def collected(prompts: Sequence[Prompt], environment: Environment, config: RunConfig) -> list[Rollout]:
    collector = collector_of(config, environment, TOKENIZER, student=Writer())
    return [scored.rollout for scored in (await collector.collect(prompts)).scored]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_step_is_counted_in_the_run_and_not_in_the_environment(environment: Environment, seed: int) -> None:
    found = PromptStream(environment, seed=seed, prompts_per_step=3).take([0, 2, 3, 8, 9])
    assert [prompt.step for prompt in found] == [1, 1, 2, 3, 4]
    assert [prompt.index for prompt in found] == [(seed << 24) + index for index in (0, 2, 3, 8, 9)]
    assert {prompt.text for prompt in found} == {None}
    assert environment.train(0).step is None


def test_text_is_that_of_the_schedule_wherever_a_call_begins_and_ends(environment: Environment) -> None:
    schedule = make_schedule(prompts_per_step=2, rises=1)
    stream = PromptStream(environment, seed=0, prompts_per_step=2, offpolicy=schedule)
    assert [(prompt.step, prompt.text) for prompt in stream.take(range(3, 6))] == [(2, "given"), (3, None), (3, None)]


def test_a_replayed_text_comes_with_its_prompt_under_an_id_of_its_place(environment: Environment) -> None:
    kept = [Kept(prompt=index, ids=(index, END)) for index in (6, 6)]
    schedule = make_schedule(prompts_per_step=2, rises=1, kept=kept)
    found = PromptStream(environment, seed=0, prompts_per_step=2, offpolicy=schedule).take([4, 5])
    assert [(prompt.id, prompt.index, prompt.step, prompt.text) for prompt in found] == [
        ("train-6@4", 6, 3, (6, END)),
        ("train-6@5", 6, 3, (6, END)),
    ]
    assert found[0].messages == environment.train(6).messages


async def test_a_worker_writes_replays_and_gives_as_each_prompt_says(environment: Environment) -> None:
    schedule = make_schedule(prompts_per_step=2, rises=1, kept=[Kept(prompt=6, ids=(9, 9)), Kept(prompt=7, ids=(END,))])
    scheduled = PromptStream(environment, seed=0, prompts_per_step=2, offpolicy=schedule)
    plain = PromptStream(environment, seed=0, prompts_per_step=2)
    prompts = [*plain.take([0]), *scheduled.take([3, 4, 5])]
    rollouts = await collected(prompts, environment, make_config())
    found = {rollout.prompt_id.split("@")[0]: rollout for rollout in rollouts}
    assert {name: (r.origin, r.completion_ids.tolist()) for name, r in found.items()} == {
        "train-0": ("student", [*ids_of("7"), END]),
        "train-3": ("others", [*ids_of("so 4"), END]),
        "train-6": ("others", [9, 9]),
        "train-7": ("others", [END]),
    }
    for name in ("train-3", "train-6", "train-7"):
        assert np.isnan(found[name].student_logprobs).all()
        assert found[name].loss_mask.all()
    assert found["train-6"].prompt_ids.tolist() == render(TOKENIZER, [Message(role="user", content="6 + 1 = ?")])
    cut, ended = found["train-6"].finish_reason, found["train-7"].finish_reason
    assert (cut, ended) == (FinishReason.LENGTH, FinishReason.STOP)
    assert {r.id for r in found.values()} >= {"train-3/reference"}
    assert sum("@" in r.id for r in found.values()) == 2


async def test_a_given_step_needs_a_solution_in_every_row(environment: Environment) -> None:
    schedule = make_schedule(prompts_per_step=9)
    prompts = PromptStream(environment, seed=0, prompts_per_step=9, offpolicy=schedule).take([17])
    with pytest.raises(ConfigError, match=r"prompt train-17 has no solution .* rollout\.adaptive"):
        await collected(prompts, environment, make_config())


SERVER = {"kind": "server", "model": "models/teacher"}
SELF = {"kind": "self", "privileged_template": "{prompt} {answer}"}
GYM = {"kind": "reasoning_gym", "dataset": "chain_sum"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (make_config(source="reference"), 'rollout.source = "student", beside = "none"'),
        (make_config(beside="reference"), 'rollout.source = "student", beside = "none"'),
        (make_config(view="privileged", teacher=SELF), 'view = "own"'),
        (make_config(method="opd_full"), "term 'main' must be over \"all\""),
        (
            make_config("objective.over=all", "objective.support.k=4", method="opd", teacher=SERVER),
            'of a served teacher no "student_topk"',
        ),
        (make_config(adaptive={**ADAPTIVE, "capacity": 1}), "capacity = 1, but a step has 2 prompts"),
        (make_config(adaptive={"validate_every": 1}), r"validate_items = 64, but data\.holdout keeps 2"),
        (make_config("teacher.fade_steps=3"), r"teacher\.fade_steps: teacher\.privileged_template shows nothing"),
        (
            make_config("teacher.fade_steps=3", "teacher.privileged_template={prompt} Think."),
            "shows nothing that fades",
        ),
        (
            parse({**make_config().model_dump(), "data": GYM}),
            r"data\.dataset 'chain_sum' comes without",
        ),
    ],
)
def test_a_schedule_that_something_contradicts_is_refused(config: RunConfig, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        plan(config)


@pytest.mark.parametrize("name", ["distillm", "distillm_forward"])
def test_distillms_own_schedule_is_among_its_settings_and_the_defaults(name: str) -> None:
    own = {key.rpartition(".")[2]: value for key, value in PRESETS[name].settings.items() if ".adaptive." in key}
    assert own == {"rises": 10, "tolerance": 0.1, "capacity": 1000}
    assert own.items() <= AdaptiveConfig(validate_every=1).model_dump().items()
