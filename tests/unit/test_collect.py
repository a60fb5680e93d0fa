"""What a rollout worker makes of prompts: whose text it is, what is trained on, what is asked of engine and teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.config import JsonlData, RunConfig, SamplingConfig
from potstill.config_file import parse
from potstill.environments import Environment, open_environment
from potstill.errors import ConfigError
from potstill.tokenization import render
from potstill.types import FinishReason, Message, Prompt, ScoredRollout
from potstill.wire import Ask
from rollout_worker.actor import receipt_of
from rollout_worker.collect import Collected, Collector
from rollout_worker.engine import Completion, GenerationRequest
from tests.buffers import make_buffer
from tests.builders_teacher import IDENTITY, failed_scores
from tests.collectors import collector_of
from tests.rollouts import make_scores
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
SERVER = {"kind": "server", "model": "models/teacher"}
ADVISOR = {"url": "http://127.0.0.1:1", "model": "m"}
DATA = (
    '{"prompt": "1 + 2 = ?", "answer": "3", "solution": "so 3"}\n'
    '{"prompt": "2 + 2 = ?", "answer": "4", "solution": "so 4", "domain": "even"}\n'
    '{"prompt": "why?"}\n'
)


class ScriptedEngine:
    """Writes `text` to every request, as weights version 4, and remembers what it was asked."""

    version = 4

    def __init__(self, text: str = "3", *, finish_reason: FinishReason = FinishReason.STOP) -> None:
        self._ids = tokens(text) if finish_reason is FinishReason.LENGTH else [*tokens(text), TOKENIZER.eos_token_id]
        self._finish_reason = finish_reason
        self.requests: list[GenerationRequest] = []
        self.asked: list[tuple[SamplingConfig, bool, int]] = []

    async def generate(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, want_logprobs: bool, support_k: int
    ) -> list[Completion]:
        self.requests += requests
        self.asked.append((sampling, want_logprobs, support_k))
        return [self._completion(want_logprobs, support_k) for _ in requests]

    def _completion(self, want_logprobs: bool, support_k: int) -> Completion:
        length = len(self._ids)
        ids = np.tile(np.arange(support_k, dtype=np.int32), (length, 1))
        return Completion(
            token_ids=np.array(self._ids, np.int32),
            logprobs=np.full(length, -0.5 if want_logprobs else math.nan, np.float32),
            support_ids=ids if support_k else None,
            support_logprobs=np.full(ids.shape, -1.0, np.float32) if support_k else None,
            weight_versions=np.full(length, self.version, np.int32),
            finish_reason=self._finish_reason,
        )


class ScriptedTeacher:
    """Scores every token −1 but those of the rollout `failing`, and remembers what it was asked."""

    def __init__(self, failing: str | None = None) -> None:
        self._failing = failing
        self.asked: list[Any] = []

    async def score(self, items: Any, ask: Any, expect: Any) -> list[Any]:
        self.asked.append((items, ask, expect))
        return [
            failed_scores(item) if item.id == self._failing else make_scores(sampled=[-1.0] * len(item.completion_ids))
            for item in items
        ]


class CountUp:
    """An advisor of few words."""

    async def advised(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return [replace(prompt, advice="count up") for prompt in prompts]


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def chat(text: str) -> list[int]:
    return render(TOKENIZER, [Message(role="user", content=text)])


def make_config(
    *changes: str, method: str = "opd", source: str = "student", teacher: Any = SERVER, seed: int = 0
) -> RunConfig:
    return parse(
        {
            "name": "one",
            "seed": seed,
            "method": method,
            "student": {"model": "models/student"},
            "teacher": teacher,
            "data": {"kind": "jsonl", "path": "unused"},
            "rollout": {"source": source, "prompts_per_step": 2, "sampling": {"max_new_tokens": 9, "temperature": 0.8}},
            "optim": {"lr": 1e-4},
            "loop": {"steps": 3},
        },
        changes,
    )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    (tmp_path / "data.jsonl").write_text(DATA)
    return open_environment(JsonlData(path=str(tmp_path / "data.jsonl"), verifier="last_number"))


def make_collector(config: RunConfig, environment: Environment, *, student: Any = None, **parts: Any) -> Collector:
    """A student that writes what it always writes, and beside it what `parts` bring."""
    return collector_of(config, environment, TOKENIZER, student=student or ScriptedEngine(), **parts)


def prompts(environment: Environment, count: int = 2) -> list[Prompt]:
    return [environment.train(index) for index in range(count)]


def only(collected: Collected) -> ScoredRollout:
    (scored,) = collected.scored
    return scored


async def test_what_the_student_writes_is_its_own(environment: Environment):
    engine = ScriptedEngine("so 3")
    collected = await make_collector(make_config(), environment, student=engine).collect(prompts(environment))
    first, second = (scored.rollout for scored in collected.scored)
    assert [(r.id, r.prompt_id, r.index, r.domain) for r in (first, second)] == [
        ("train-0/0", "train-0", 0, "default"),
        ("train-1/0", "train-1", 1, "even"),
    ]
    assert first.prompt_ids.tolist() == chat("1 + 2 = ?") == engine.requests[0].prompt_ids.tolist()
    assert first.completion_ids.tolist() == [*tokens("so 3"), TOKENIZER.eos_token_id]
    assert first.loss_mask.all()
    assert first.student_logprobs.tolist() == [-0.5] * 5
    assert first.weight_versions.tolist() == [4] * 5
    assert first.teacher_context_ids is None
    assert (first.temperature, first.finish_reason) == (0.8, FinishReason.STOP)
    assert (first.reward, second.reward) == (1.0, 0.0)
    assert [scored.scores for scored in collected.scored] == [None, None]


async def test_the_engine_is_asked_for_the_configs_sampling_and_the_students_own_top_k(environment: Environment):
    engine = ScriptedEngine()
    config = make_config("objective.support.k=3")
    collected = await make_collector(config, environment, student=engine).collect(prompts(environment, 1))
    assert engine.asked == [(config.rollout.sampling, True, 3)]
    rollout = only(collected).rollout
    assert rollout.support_ids is not None
    assert rollout.support_ids.shape == (2, 3)


@pytest.mark.parametrize("method", ["opd_sampled", "gkd_topk"])
async def test_a_support_that_is_not_the_students_is_not_asked_of_it(environment: Environment, method: str):
    engine = ScriptedEngine()
    await make_collector(make_config(method=method), environment, student=engine).collect(prompts(environment, 1))
    assert engine.asked[0][2] == 0


async def test_samples_of_a_prompt_lie_together_and_are_numbered(environment: Environment):
    config = make_config("rollout.samples_per_prompt=3")
    collected = await make_collector(config, environment).collect(prompts(environment))
    assert [(scored.rollout.id, scored.rollout.index) for scored in collected.scored] == [
        (f"train-{prompt}/{sample}", 3 * prompt + sample) for prompt in (0, 1) for sample in (0, 1, 2)
    ]


async def test_seeds_depend_on_run_prompt_and_sample_and_on_nothing_else(environment: Environment):
    async def seeds(run_seed: int, taken: Sequence[Prompt], samples: int = 2, method: str = "opd") -> dict[str, int]:
        engine = ScriptedEngine()
        config = make_config(f"rollout.samples_per_prompt={samples}", method=method, seed=run_seed)
        await make_collector(config, environment, student=engine).collect(taken)
        return {request.id: request.seed for request in engine.requests}

    both = prompts(environment)
    all_of_run_0 = await seeds(0, both)
    assert len(set(all_of_run_0.values())) == 4
    assert all(0 <= seed < 2**63 for seed in all_of_run_0.values())
    assert await seeds(0, both[::-1]) == all_of_run_0
    assert (await seeds(0, both[1:], samples=4, method="gkd_topk")).items() >= {
        name: seed for name, seed in all_of_run_0.items() if name.startswith("train-1")
    }.items()
    assert set(all_of_run_0.values()).isdisjoint((await seeds(1, both)).values())


async def test_references_are_the_datas_own_words_and_nobodys_weights(environment: Environment):
    student = ScriptedEngine()
    config = make_config(method="sft", source="reference", teacher={"kind": "none"})
    scored = only(await make_collector(config, environment, student=student).collect(prompts(environment, 1)))
    assert student.requests == []
    rollout = scored.rollout
    assert rollout.completion_ids.tolist() == [*tokens("so 3"), TOKENIZER.eos_token_id]
    assert rollout.loss_mask.all()
    assert np.isnan(rollout.student_logprobs).all()
    assert rollout.weight_versions.tolist() == [-1] * 5
    assert (rollout.finish_reason, rollout.reward, scored.scores) == (FinishReason.STOP, 1.0, None)


async def test_a_prompt_without_a_solution_cannot_be_a_reference(environment: Environment):
    config = make_config(method="sft", source="reference", teacher={"kind": "none"})
    with pytest.raises(ConfigError, match="prompt train-2 has no solution"):
        await make_collector(config, environment).collect(prompts(environment, 3))


async def test_a_teacher_that_writes_reads_its_privileged_prompt_and_the_student_trains_on_its_own(
    environment: Environment,
):
    writer = ScriptedEngine("It is 3.")
    teacher = {**SERVER, "privileged_template": "{prompt} (it is {answer})"}
    config = make_config(method="sft", source="teacher", teacher=teacher)
    rollout = only(await make_collector(config, environment, writer=writer).collect(prompts(environment, 1))).rollout
    assert writer.requests[0].prompt_ids.tolist() == chat("1 + 2 = ? (it is 3)")
    assert rollout.prompt_ids.tolist() == chat("1 + 2 = ?")
    assert rollout.weight_versions.tolist() == [-1] * len(rollout.completion_ids)
    assert np.isnan(rollout.student_logprobs).all()
    assert writer.asked[0][1:] == (False, 0)


async def test_a_teacher_that_scores_gets_its_privileged_prompt_beside_the_students(environment: Environment):
    teacher = ScriptedTeacher()
    config = make_config("teacher.privileged_template={prompt} (it is {answer})")
    scored = only(await make_collector(config, environment, teacher=teacher).collect(prompts(environment, 1)))
    ((item,), _, _) = teacher.asked[0]
    assert item.context_ids.tolist() == chat("1 + 2 = ?")
    assert item.teacher_context_ids.tolist() == chat("1 + 2 = ? (it is 3)")
    assert scored.rollout.teacher_context_ids is not None
    assert scored.rollout.teacher_context_ids.tolist() == chat("1 + 2 = ? (it is 3)")


@pytest.mark.parametrize(
    ("method", "ask"),
    [
        ("opd", Ask(num_ids=4)),
        ("gkd_topk", Ask(top_k=16)),
        ("opd_sampled", Ask()),
        ("eopd", Ask(top_k=16, entropy=True)),
    ],
)
async def test_a_teacher_is_asked_for_what_the_method_reads(environment: Environment, method: str, ask: Ask):
    teacher = ScriptedTeacher()
    config = make_config(*(["objective.support.k=4"] if method == "opd" else []), method=method)
    collected = await make_collector(config, environment, teacher=teacher).collect(prompts(environment))
    ((items, *rest),) = teacher.asked
    assert rest == [ask, IDENTITY]
    for item, scored in zip(items, collected.scored, strict=True):
        assert item.id == scored.rollout.id
        assert item.completion_ids is scored.rollout.completion_ids
        assert item.token_ids is (scored.rollout.support_ids if ask.num_ids else None)
        assert scored.scores is not None


async def test_scores_stay_with_their_rollout_when_one_of_them_failed(environment: Environment):
    teacher = ScriptedTeacher(failing="train-0/0")
    config = make_config(method="opd_sampled")
    collected = await make_collector(config, environment, teacher=teacher).collect(prompts(environment))
    finite = {s.rollout.id: bool(np.isfinite(s.scores.sampled).all()) for s in collected.scored if s.scores is not None}
    assert finite == {"train-0/0": False, "train-1/0": True}


async def test_held_out_prompts_are_answered_greedily_by_the_student(environment: Environment):
    engine = ScriptedEngine("4", finish_reason=FinishReason.LENGTH)
    verdicts = await make_collector(make_config(), environment, student=engine).evaluate(
        prompts(environment), "student"
    )
    assert verdicts.rewards == (0.0, 1.0)
    assert (verdicts.num_tokens, verdicts.num_truncated) == (2, 2)
    ((sampling, want_logprobs, support_k),) = engine.asked
    assert (sampling.temperature, sampling.max_new_tokens, want_logprobs, support_k) == (0.0, 9, False, 0)


async def test_the_writer_is_judged_with_its_privilege_and_the_student_without(environment: Environment):
    student, writer = ScriptedEngine(), ScriptedEngine()
    teacher = {**SERVER, "privileged_template": "{prompt} (it is {answer})"}
    config = make_config(method="sft", source="teacher", teacher=teacher)
    collector = make_collector(config, environment, student=student, writer=writer)
    await collector.evaluate(prompts(environment, 1), "student")
    await collector.evaluate(prompts(environment, 1), "teacher")
    assert student.requests[0].prompt_ids.tolist() == chat("1 + 2 = ?")
    assert writer.requests[0].prompt_ids.tolist() == chat("1 + 2 = ? (it is 3)")


async def test_no_teacher_can_be_judged_where_none_writes(environment: Environment):
    config = make_config(method="sft", source="reference", teacher={"kind": "none"})
    with pytest.raises(ConfigError, match="no teacher writes"):
        await make_collector(config, environment).evaluate(prompts(environment, 1), "teacher")


async def test_a_text_beside_the_students_own_is_of_the_same_prompt_and_nobodys_weights(environment: Environment):
    config = make_config("rollout.beside=reference", method="stable_opd")
    collected = await make_collector(config, environment, teacher=ScriptedTeacher()).collect(prompts(environment))
    found = [(s.rollout.id, s.rollout.origin, s.scores is not None) for s in collected.scored]
    assert found == [
        ("train-0/0", "student", True),
        ("train-1/0", "student", True),
        ("train-0/reference", "others", False),
        ("train-1/reference", "others", False),
    ]


async def test_a_share_of_the_prompts_is_answered_by_the_data_instead_and_always_the_same(environment: Environment):
    changes = ("rollout.beside=reference", "rollout.beside_share=0.5", "rollout.beside_instead=true")
    two = prompts(environment)
    many = [replace(two[i % 2], id=f"p{i}") for i in range(100)]

    async def origins(taken: Sequence[Prompt]) -> dict[str, str]:
        collected = await make_collector(make_config(*changes, method="gkd_topk"), environment).collect(taken)
        return {scored.rollout.prompt_id: scored.rollout.origin for scored in collected.scored}

    found = await origins(many)
    assert len(found) == 100
    assert 30 < sum(origin == "others" for origin in found.values()) < 70
    assert await origins(many[::-1]) == found


async def test_a_privileged_view_writes_once_under_the_hint_and_is_learnt_under_both_prompts(environment: Environment):
    engine = ScriptedEngine()
    teacher = {"kind": "self", "privileged_template": "{prompt} (it is {answer})"}
    config = make_config("rollout.view=privileged", method="opsd", teacher=teacher)
    collected = await make_collector(config, environment, student=engine).collect(prompts(environment, 1))
    own, privileged = (scored.rollout for scored in collected.scored)
    assert engine.requests[0].prompt_ids.tolist() == chat("1 + 2 = ? (it is 3)")
    assert own.prompt_ids.tolist() == chat("1 + 2 = ?")
    assert privileged.prompt_ids.tolist() == chat("1 + 2 = ? (it is 3)")
    assert (own.origin, privileged.origin) == ("student", "privileged")
    assert own.completion_ids.tolist() == privileged.completion_ids.tolist()
    assert own.student_logprobs.tolist() == privileged.student_logprobs.tolist()


async def test_sodas_pairs_are_a_snapshots_answers_beside_the_teachers(environment: Environment):
    snapshot, writer = ScriptedEngine("4"), ScriptedEngine("3")
    config = make_config("rollout.beside=teacher", method="soda", source="snapshot")
    collected = await make_collector(config, environment, writer=writer, snapshot=snapshot).collect(
        prompts(environment)
    )
    rollouts = [scored.rollout for scored in collected.scored]
    assert [(r.id, r.origin, r.snapshot, TOKENIZER.decode(r.completion_ids[:-1])) for r in rollouts] == [
        ("train-0/0", "student", True, "4"),
        ("train-1/0", "student", True, "4"),
        ("train-0/teacher", "others", False, "3"),
        ("train-1/teacher", "others", False, "3"),
    ]
    assert all(rollout.loss_mask.all() for rollout in rollouts)
    assert np.isfinite(rollouts[0].student_logprobs).all()


async def test_a_snapshots_text_is_of_no_version_and_never_too_old(environment: Environment):
    config = make_config("rollout.beside=teacher", method="soda", source="snapshot")
    collector = make_collector(config, environment, writer=ScriptedEngine(), snapshot=ScriptedEngine())
    collected = await collector.collect(prompts(environment, 1))
    receipts = [receipt_of(collected, n, collected.scored, repetition=math.nan) for n in (0, 1)]
    assert [receipt.oldest_version for receipt in receipts] == [-1, -1]
    buffer = make_buffer(B=1, steps=99, S=0, version=90)
    async with buffer.lease(lambda: 90) as chunk:
        buffer.put(chunk, [receipts])
    assert (await buffer.batch(91)).receipts == tuple(receipts)


@pytest.mark.parametrize("share", [0.0, 1.0])
async def test_a_reference_that_is_learnt_under_the_hint_says_so(environment: Environment, share: float):
    teacher = {"kind": "self", "privileged_template": "{prompt} (it is {answer})"}
    config = make_config(f"rollout.privileged_share={share}", method="sft", source="reference", teacher=teacher)
    rollout = only(await make_collector(config, environment).collect(prompts(environment, 1))).rollout
    assert rollout.privileged == bool(share)
    assert rollout.prompt_ids.tolist() == chat("1 + 2 = ? (it is 3)" if share else "1 + 2 = ?")
    assert rollout.origin == "others"


async def test_a_teacher_that_is_examined_reads_its_advice(environment: Environment):
    writer = ScriptedEngine()
    teacher = {"kind": "self", "privileged_template": "{prompt} ({advice})", "advisor": ADVISOR}
    config = make_config(method="sft", source="teacher", teacher=teacher)
    collector = make_collector(config, environment, writer=writer, advisor=CountUp())
    await collector.evaluate(prompts(environment, 1), "teacher")
    assert writer.requests[0].prompt_ids.tolist() == chat("1 + 2 = ? (count up)")


async def test_held_out_answers_are_sampled_where_the_config_says_so(environment: Environment):
    engine = ScriptedEngine()
    teacher = {"kind": "self", "privileged_template": "{prompt} {answer}"}
    changes = ("eval.temperature=1.0", "rollout.samples_per_prompt=3", "rollout.view=privileged")
    config = make_config(*changes, method="opsd", teacher=teacher)
    verdicts = await make_collector(config, environment, student=engine).evaluate(prompts(environment), "student")
    assert [request.prompt_ids.tolist() for request in engine.requests] == [chat("1 + 2 = ?"), chat("2 + 2 = ?")]
    assert (len(verdicts.rewards), engine.asked[0][0].temperature) == (2, 1.0)
