"""Prompts are the same for ever, held-out ones are never trained on, and every verdict has a verifier behind it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym

from orchestrator.prompts import PromptStream
from potstill.config import JsonlData, ReasoningGymData
from potstill.environments import Environment, final_answer, open_environment
from potstill.errors import ConfigError
from potstill.types import Message, Prompt

SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # a few hundred questions


def sums(*, seed: int = 0, dataset: str = "chain_sum", **options: Any) -> Environment:
    return open_environment(ReasoningGymData(dataset=dataset, options=options or SMALL, seed=seed))


def jsonl(path: Path, *rows: Any, **config: Any) -> Environment:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    )
    return open_environment(JsonlData(path=str(path), **config))


def question(prompt: Prompt) -> str:
    return prompt.messages[-1].content


def test_training_prompts_are_the_same_in_any_order_and_in_another_process_life():
    indices = [7, 0, 3, 7, 1 << 24, 2]
    first, second = sums(), sums()
    assert [first.train(index) for index in indices] == [second.train(index) for index in indices]
    assert first.train(0) == second.train(0)
    assert first.train(7).id == "train-7"
    assert len({question(first.train(index)) for index in range(50)}) > 10


@pytest.mark.parametrize("seed", [0, 1, 5])
def test_no_held_out_question_is_ever_trained_on_however_few_questions_there_are(seed: int):
    environment = sums(seed=seed)
    held_out = {question(prompt) for prompt in environment.held_out(8)}
    assert len(held_out) == 8
    for run in (0, 1, 2):
        prompts = PromptStream(environment, seed=run, prompts_per_step=8).take(range(400))
        assert held_out.isdisjoint(question(prompt) for prompt in prompts)


def test_held_out_prompts_of_one_data_seed_are_not_trained_on_under_another():
    held_out = {question(prompt) for prompt in sums(seed=3).held_out(8)}
    assert held_out.isdisjoint(question(sums(seed=4).train(index)) for index in range(400))


def test_the_first_held_out_prompts_are_the_same_however_many_are_asked_for():
    assert sums().held_out(8)[:3] == sums().held_out(3)


def test_more_held_out_questions_than_there_are_is_an_error():
    with pytest.raises(ConfigError, match=r"fewer than 40 held-out questions: lower eval\.items"):
        sums(min_terms=2, max_terms=2, min_digits=1, max_digits=1, allow_negation=False).held_out(40)


def test_a_data_set_whose_only_question_is_held_out_ends_instead_of_looking_for_ever():
    refused = []
    for n in range(1, 65):
        environment = open_environment(ReasoningGymData(dataset="count_bits", options={"min_n": n, "max_n": n}))
        try:
            environment.train(0)
        except ConfigError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 20
    assert all("'count_bits' has hardly a question that is not held out" in said for said in refused)


@pytest.mark.parametrize("dataset", ["chain_sum", "gcd", "count_bits"])
def test_the_verifier_agrees_with_the_data_sets_own_answer(dataset: str):
    environment = open_environment(ReasoningGymData(dataset=dataset))
    for prompt in [*map(environment.train, range(10)), *environment.held_out(3)]:
        assert prompt.answer is not None
        assert environment.score(prompt, f"thinking <answer>{prompt.answer}</answer>") == 1.0
        assert environment.score(prompt, f"<answer>{prompt.answer}7</answer>") < 1.0
        assert environment.score(prompt, prompt.answer) == 0.0  # it never committed itself
        assert environment.score(prompt, "") == 0.0


def test_the_prompt_is_the_data_sets_question():
    prompt = sums().train(0)
    entry = reasoning_gym.create_dataset("chain_sum", seed=0, size=10, **SMALL)[prompt.info["item"]]
    assert prompt.messages == (Message(role="user", content=entry["question"]),)
    assert prompt.answer == entry["answer"]
    assert prompt.domain == "chain_sum"


@pytest.mark.parametrize(
    ("dataset", "options"), [("chain_sums", {}), ("chain_sum", {"digits": 3}), ("chain_sum", {"min_terms": 0})]
)
def test_a_wrong_data_set_or_option_is_named(dataset: str, options: dict[str, Any]):
    with pytest.raises(ConfigError, match=f"^data.dataset '{dataset}' with "):
        open_environment(ReasoningGymData(dataset=dataset, options=options))


def test_the_last_answer_counts():
    assert final_answer("<answer>1</answer> no, <answer> 2\n</answer>") == "2"
    assert final_answer("<answer>1") is None


def test_two_runs_see_other_prompts_and_one_run_the_same():
    environment = sums(min_terms=4, max_terms=4, min_digits=4, max_digits=4)
    streams = [PromptStream(environment, seed=seed, prompts_per_step=8) for seed in (0, 0, 1)]
    first, again, other = (stream.take(range(20)) for stream in streams)
    assert first == again
    assert {question(p) for p in first}.isdisjoint(question(p) for p in other)
    assert streams[0].take([5, 3]) == [first[5], first[3]]


def test_lines_are_prompts_in_their_order_and_from_the_top_again(tmp_path: Path):
    rows = [
        {"prompt": "a", "answer": 1, "solution": "one", "domain": "letters", "private": ["Jane", "日本"]},
        "",
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "b\u2028c"}]},
        {"prompt": "held"},
    ]
    environment = jsonl(tmp_path / "d.jsonl", *rows, holdout=1)
    first, second = environment.train(0), environment.train(1)
    assert (question(first), first.answer, first.solution, first.domain) == ("a", "1", "one", "letters")
    assert second.messages == (Message(role="system", content="s"), Message(role="user", content="b\u2028c"))
    assert (second.answer, second.solution, second.domain) == (None, None, "default")
    assert (first.private, second.private) == (("Jane", "日本"), ())
    assert [question(environment.train(index)) for index in (2, 3, 1001)] == ["a", "b\u2028c", "b\u2028c"]
    assert environment.train(2).id == "train-2"
    assert [question(prompt) for prompt in environment.held_out(1)] == ["held"]
    with pytest.raises(ConfigError, match=r"eval\.items = 2, but data\.holdout keeps 1"):
        environment.held_out(2)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"prompt": ', "not JSON"),
        ('["a"]', "a line is an object"),
        ('{"answer": "1"}', "`prompt` must be a text or a list"),
        ('{"prompt": ""}', "`prompt` must be a text or a list"),
        ('{"prompt": [{"role": "user"}]}', "needs a `role` and a `content`"),
        ('{"prompt": [{"role": "user", "content": 3}]}', "needs a `role` and a `content`"),
        ('{"prompt": "a", "solution": 3}', "`solution` must be a text"),
        ('{"prompt": "a", "private": "Jane"}', "`private` must be a list of texts"),
        ('{"prompt": "a", "private": ["Jane", 7]}', "`private` must be a list of texts"),
        ('{"prompt": "a", "private": [""]}', "none of them empty"),
        ('{"prompt": "a", "private": ""}', "`private` must be a list of texts"),
        ('{"prompt": "a", "answer": "many"}', "`answer` is no number"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: str, says: str):
    path = tmp_path / "d.jsonl"
    with pytest.raises(ConfigError) as caught:
        jsonl(path, {"prompt": "a"}, "", line, verifier="last_number")
    assert str(caught.value).startswith(f"{path}:3: ")
    assert says in str(caught.value)


def test_a_file_that_is_missing_empty_or_all_held_out_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        open_environment(JsonlData(path=str(tmp_path / "none.jsonl")))
    with pytest.raises(ConfigError, match=r"0 prompts, of which data\.holdout = 0"):
        jsonl(tmp_path / "d.jsonl")
    with pytest.raises(ConfigError, match=r"1 prompts, of which data\.holdout = 1"):
        jsonl(tmp_path / "d.jsonl", {"prompt": "a"}, holdout=1)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ConfigError, match="is not UTF-8"):
        open_environment(JsonlData(path=str(tmp_path / "latin.jsonl")))


@pytest.mark.parametrize(
    ("verifier", "answer", "completion", "reward"),
    [
        ("exact", "yes", " yes\n", 1.0),
        ("exact", "yes", "yes.", 0.0),
        ("last_number", "1,234", "first 7, then 1,234.", 1.0),
        ("last_number", "21", "21 or rather 22", 0.0),
        ("last_number", "-3.5", "x = -3.50", 1.0),
        ("last_number", "21", "no number", 0.0),
    ],
)
def test_verifiers_of_a_file(tmp_path: Path, verifier: str, answer: str, completion: str, reward: float):
    environment = jsonl(tmp_path / "d.jsonl", {"prompt": "a", "answer": answer}, verifier=verifier)
    assert environment.score(environment.train(0), completion) == reward


def test_what_nothing_can_judge_is_nan(tmp_path: Path):
    rows = ({"prompt": "a", "answer": "1"}, {"prompt": "b"})
    unjudged = jsonl(tmp_path / "d.jsonl", *rows, verifier="none")
    judged = jsonl(tmp_path / "d.jsonl", *rows, verifier="exact")
    assert math.isnan(unjudged.score(unjudged.train(0), "1"))
    assert judged.score(judged.train(0), "1") == 1.0
    assert math.isnan(judged.score(judged.train(1), "1"))
