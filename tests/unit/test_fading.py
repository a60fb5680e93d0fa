"""A privileged context fades sentence by sentence, and at the end nothing of it is left, in no prompt of a run."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.prompts import PromptStream
from potstill.config import ReasoningGymData, RunConfig
from potstill.config_file import parse
from potstill.environments import Environment, open_environment
from potstill.errors import ConfigError
from potstill.fading import faded, share
from potstill.methods import PRESETS
from potstill.privilege import teacher_messages
from potstill.types import Message, Prompt, ScoredRollout
from tests.collectors import collector_of
from tests.tiny_models import tiny_tokenizer

SOLUTION = 'Add 2.5 and 9. Carry "1."\nIs 1+0+1=2? Yes!\n\nAnswer: 21'
SENTENCES = ["Add 2.5 and 9.", ' Carry "1."', "\nIs 1+0+1=2?", " Yes!", "\n\nAnswer: 21"]


@pytest.mark.parametrize("kept", range(6))
def test_whole_sentences_are_kept_in_order(kept: int) -> None:
    assert faded(SOLUTION, share=kept / 5) == "".join(SENTENCES[:kept])


@given(context=st.text(alphabet="ab .!?\n\"'", max_size=60), step=st.integers(11, 99))
def test_nothing_survives_once_the_share_is_zero(context: str, step: int) -> None:
    assert faded(context, share=share(step, decay_steps=10)) == ""


@given(context=st.text(alphabet="ab .!?\n\"'", max_size=60))
def test_at_first_all_of_it_is_there(context: str) -> None:
    assert faded(context, share=share(1, decay_steps=10)).split() == context.split()


@given(context=st.text(alphabet="ab .!?\n", max_size=60))
def test_what_is_kept_only_shrinks_and_is_always_a_beginning(context: str) -> None:
    left = [faded(context, share=share(step, decay_steps=10)) for step in range(1, 12)]
    for longer, shorter in pairwise(left):
        assert longer.startswith(shorter)


def test_the_share_falls_in_a_line_to_zero_and_stays() -> None:
    assert [share(step, decay_steps=4) for step in (1, 2, 3, 4, 5, 6, 100)] == [1, 0.75, 0.5, 0.25, 0, 0, 0]


TOKENIZER = tiny_tokenizer()
TEMPLATE = "{prompt}\nHint: {answer} {solution}"
PROMPT = Prompt(
    id="train-7",
    index=7,
    messages=(Message(role="system", content="Be brief."), Message(role="user", content="12 + 9 = ?")),
    domain="sums",
    answer="21",
    solution="Ones. Tens. Sum.",
)


def make_config(*changes: str, method: str = "skintern", **teacher: Any) -> RunConfig:
    return parse(
        {
            "name": "one",
            "method": method,
            "student": {"model": "models/student"},
            "teacher": {"kind": "self", "privileged_template": TEMPLATE, "fade_steps": 4, **teacher},
            "data": {"kind": "reasoning_gym", "dataset": "basic_arithmetic", "options": {"operators": ["+"]}},
            "rollout": {
                "source": "reference",
                "privileged_share": 1.0,
                "prompts_per_step": 2,
                "sampling": {"max_new_tokens": 9},
            },
            "optim": {"lr": 1e-4},
            "loop": {"steps": 6},
        },
        changes,
    )


def read_at(step: int | None, **teacher: Any) -> str | None:
    """The last message of the teacher's prompt."""
    messages = teacher_messages(dataclasses.replace(PROMPT, step=step), make_config(**teacher).teacher)
    return None if messages is None else messages[-1].content


def test_what_a_teacher_reads_fades_with_the_step_until_it_reads_the_students_prompt() -> None:
    assert [read_at(step) for step in range(1, 7)] == [
        "12 + 9 = ?\nHint: 21 Ones. Tens. Sum.",
        "12 + 9 = ?\nHint: 21 Ones. Tens.",
        "12 + 9 = ?\nHint:  Ones. Tens.",
        "12 + 9 = ?\nHint:  Ones.",
        "12 + 9 = ?",
        "12 + 9 = ?",
    ]


def test_only_what_the_template_shows_keeps_a_hint_alive() -> None:
    answer = {"privileged_template": "{prompt} ({answer})"}
    assert [read_at(step, **answer) for step in (2, 3)] == ["12 + 9 = ? (21)", "12 + 9 = ?"]


def test_held_out_prompts_and_teachers_that_do_not_fade_keep_it_whole() -> None:
    whole = "12 + 9 = ?\nHint: 21 Ones. Tens. Sum."
    assert (read_at(None), read_at(99, fade_steps=None)) == (whole, whole)


def test_a_teacher_without_a_prompt_of_its_own_has_nothing_to_fade() -> None:
    local = {"kind": "local", "models": [{"model": "m"}]}
    config = parse({**make_config("rollout.privileged_share=0").model_dump(), "method": "gkd", "teacher": local})
    assert teacher_messages(PROMPT, config.teacher) is None


@pytest.mark.parametrize("step", [1, 99])
def test_a_privilege_that_the_prompt_does_not_have_is_an_error_at_every_step(step: int) -> None:
    prompt = dataclasses.replace(PROMPT, step=step, solution=None)
    with pytest.raises(ConfigError, match=r"wants {solution}, which prompt train-7 does not have"):
        teacher_messages(prompt, make_config().teacher)


async def collected(config: RunConfig, environment: Environment, prompts: list[Prompt]) -> list[ScoredRollout]:
    """No engine writes a solution of the data."""
    collector = collector_of(config, environment, TOKENIZER, student=None)
    return list((await collector.collect(prompts)).scored)


@pytest.fixture(scope="module")
def sums() -> Environment:
    options: dict[str, Any] = {"operators": ["+"], "allow_parentheses": False, "min_digits": 3, "max_digits": 3}
    return open_environment(ReasoningGymData(dataset="basic_arithmetic", options=options | {"min_terms": 2}))


@pytest.mark.parametrize("seed", [0, 5])
async def test_skintern_learns_the_whole_solution_under_ever_less_of_it(sums: Environment, seed: int) -> None:
    """At step s of the run, whatever its seed, the prompt holds the share 1 − (s − 1)/T of the lines, T = 4."""
    config = make_config("teacher.privileged_template={prompt}\n{solution}")
    prompts = PromptStream(sums, seed=seed, prompts_per_step=2).take(range(12))
    for prompt, scored in zip(prompts, await collected(config, sums, prompts), strict=True):
        assert prompt.solution is not None
        assert prompt.step is not None
        lines, question = prompt.solution.split("\n"), prompt.messages[-1].content
        kept = round(max(0.0, 1 - (prompt.step - 1) / 4) * len(lines))
        expected = "\n".join([question, *lines[:kept]])
        found = TOKENIZER.decode(scored.rollout.prompt_ids.tolist())
        assert found == f"<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
        assert TOKENIZER.decode(scored.rollout.completion_ids.tolist()) == prompt.solution + "<|im_end|>"
        assert scored.rollout.origin == "others"
    assert [prompt.step for prompt in prompts] == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


async def test_a_teacher_inside_the_learner_reads_the_students_prompt_once_its_own_has_faded(sums: Environment) -> None:
    """It still has a prompt of its own, which the learner looks for: the same ids, without a template around them."""
    prompts = PromptStream(sums, seed=0, prompts_per_step=2).take(range(10))
    config = make_config("rollout.privileged_share=0")
    for prompt, scored in zip(prompts, await collected(config, sums, prompts), strict=True):
        rollout = scored.rollout
        assert rollout.teacher_context_ids is not None
        assert prompt.step is not None
        same = rollout.teacher_context_ids.tolist() == rollout.prompt_ids.tolist()
        assert same == (prompt.step > 4)


def test_skintern_is_the_likelihood_of_sft() -> None:
    assert PRESETS["skintern"].objective == PRESETS["sft"].objective
    assert PRESETS["skintern"].settings["rollout.privileged_share"] == 1.0
