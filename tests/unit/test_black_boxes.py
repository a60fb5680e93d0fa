"""What a black box does in a run: its answers as the student's tokens, its advice, and the orders that it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potstill.config import JsonlData
from potstill.config_teachers import SelfTeacher
from potstill.environments import open_environment
from potstill.errors import TeacherRefused
from potstill.tokenization import render
from potstill.types import FinishReason, Message, Prompt
from rollout_worker.black_boxes import Advised, Answers, AskedOrder, LikenessOrder
from rollout_worker.engine import Completion
from rollout_worker.judges import Ranked, Verifier
from rollout_worker.sources import Text
from rollout_worker.views import Views
from tests.chat_server import chat_server, opened, says
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = TOKENIZER.eos_token_id
RANKING = "{prompt}\n{answers}"
ADVISOR = {"url": "http://127.0.0.1:1", "model": "m"}


def make_prompt(number: int = 0, *, answer: str = "21") -> Prompt:
    question = Message(role="user", content=f"{number} + 9 = ?")
    return Prompt(id=f"train-{number}", index=number, messages=(question,), domain="d", answer=answer, solution=None)


def tokens(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def make_text(text: str, *, prompt: Prompt | None = None, sample: int = 0, version: int = 4) -> Text:
    """What the student, or for version −1 somebody else, wrote."""
    ids = [*tokens(text), END]
    completion = Completion(
        token_ids=np.array(ids, np.int32),
        logprobs=np.full(len(ids), -0.5, np.float32),
        support_ids=None,
        support_logprobs=None,
        weight_versions=np.full(len(ids), version, np.int32),
        finish_reason=FinishReason.STOP,
    )
    return Text(prompt=prompt or make_prompt(), sample=sample, completion=completion)


async def answered(folder: Path, said: Any, tokenizer: Any = TOKENIZER) -> Completion:
    with chat_server(lambda text: said) as server:
        async with opened(server, folder) as box:
            (text,) = await Answers(box, tokenizer).write([make_prompt()])
    return text.completion


async def test_an_answer_is_the_students_tokens_and_its_end_and_nobodys_weights(tmp_path: Path):
    found = await answered(tmp_path, says("It is 21."))
    assert found.token_ids.tolist() == [*tokens("It is 21."), END]
    assert (found.finish_reason, set(found.weight_versions.tolist())) == (FinishReason.STOP, {-1})
    assert np.isnan(found.logprobs).all()


async def test_a_cut_answer_has_no_end(tmp_path: Path):
    found = await answered(tmp_path, says("It is", finish_reason="length"))
    assert found.token_ids.tolist() == tokens("It is")
    assert found.finish_reason == FinishReason.LENGTH


async def test_the_name_of_a_special_token_in_an_answer_is_text_and_ends_nothing(tmp_path: Path):
    found = await answered(tmp_path, says("21<|im_end|>", finish_reason="length"))
    assert END not in found.token_ids.tolist()
    assert TOKENIZER.decode(found.token_ids.tolist()) == "21<|im_end|>"


async def test_a_text_that_is_no_token_is_an_error_that_names_the_prompt(tmp_path: Path):
    core = Tokenizer(models.WordLevel({"known": 0, "<end>": 1}, unk_token="<none>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    deaf = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    assert deaf.encode(" ", add_special_tokens=False) == []
    with pytest.raises(TeacherRefused, match="answer to prompt train-0 is no token of the student's"):
        await answered(tmp_path, says(" "), deaf)


async def test_answers_come_in_the_order_of_their_prompts(tmp_path: Path):
    with chat_server(lambda text: says(f"to {text}")) as server:
        async with opened(server, tmp_path) as box:
            found = await Answers(box, TOKENIZER).write([make_prompt(number) for number in (3, 1, 2)])
    assert [(text.prompt.id, TOKENIZER.decode(text.completion.token_ids[:-1])) for text in found] == [
        (f"train-{number}", f"to {number} + 9 = ?") for number in (3, 1, 2)
    ]


async def test_advice_reaches_the_teachers_prompt_and_not_the_students(tmp_path: Path):
    teacher = SelfTeacher(privileged_template="{prompt} Hint: {advice}", advisor=ADVISOR)
    views = Views(TOKENIZER, teacher)
    with chat_server(lambda text: says("carry the one")) as server:
        async with opened(server, tmp_path, instruction="Advise: {prompt} ({answer})") as box:
            (advised,) = await Advised(box).advised([make_prompt()])
    assert server.questions == ["Advise: 0 + 9 = ? (21)"]
    assert advised == replace(make_prompt(), advice="carry the one")
    assert views.own(advised).tolist() == views.own(make_prompt()).tolist()
    hinted = [Message(role="user", content="0 + 9 = ? Hint: carry the one")]
    assert views.teachers(advised).tolist() == render(TOKENIZER, hinted)


async def test_likeness_puts_the_nearest_first_and_the_first_of_two_that_are_as_near(tmp_path: Path):
    with chat_server(lambda text: says("the sum is 21")) as server:
        async with opened(server, tmp_path) as box:
            order = await LikenessOrder(box).order(make_prompt(), ["xyz", "the sum is 20", "the sum is 21", "xyw"])
    assert order == [2, 1, 0, 3]
    assert server.questions == ["0 + 9 = ?"]


async def asked_order(folder: Path, reply: str, answers: Sequence[str]) -> tuple[list[int], list[str]]:
    with chat_server(lambda text: says(reply)) as server:
        async with opened(server, folder) as box:
            return await AskedOrder(box, RANKING).order(make_prompt(), answers), server.questions


@pytest.mark.parametrize("reply", ["2, 3, 1", "Best first: [2] > [3] > [1].", "2\n3\n1"])
async def test_an_order_is_read_from_the_numbers_of_a_reply(tmp_path: Path, reply: str):
    order, questions = await asked_order(tmp_path, reply, ["a", "b", "c"])
    assert order == [1, 2, 0]
    assert questions == ["0 + 9 = ?\n[1]\na\n\n[2]\nb\n\n[3]\nc"]


async def test_what_answers_say_is_not_filled_in_again(tmp_path: Path):
    _, questions = await asked_order(tmp_path, "1 2", ["{prompt}", "{answers}"])
    assert questions == ["0 + 9 = ?\n[1]\n{prompt}\n\n[2]\n{answers}"]


@pytest.mark.parametrize("reply", ["1, 2", "1, 2, 2", "1, 2, 3, 4", "0, 1, 2", "none", "1, 2, 03", "9" * 5000])
async def test_a_reply_that_is_no_order_is_refused_by_the_prompt_it_is_of(tmp_path: Path, reply: str):
    with pytest.raises(TeacherRefused, match=r"rank 3 answers to prompt train-0, .* change teacher\.ranking"):
        await asked_order(tmp_path, reply, ["a", "b", "c"])


class Alphabet:
    """Ranks answers by the alphabet, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    async def order(self, prompt: Prompt, answers: Sequence[str]) -> list[int]:
        self.asked.append((prompt.id, list(answers)))
        return sorted(range(len(answers)), key=lambda index: answers[index])


async def ranked(folder: Path, texts: Sequence[Text]) -> tuple[list[float], list[tuple[str, list[str]]]]:
    (folder / "data.jsonl").write_text('{"prompt": "0 + 9 = ?", "answer": "21"}\n')
    environment = open_environment(JsonlData(path=str(folder / "data.jsonl"), verifier="last_number"))
    ranker = Alphabet()
    rewards = await Ranked(ranker, Verifier(environment, TOKENIZER), TOKENIZER).rewards(texts)
    return rewards, ranker.asked


async def test_completions_earn_their_place_among_those_of_their_prompt(tmp_path: Path):
    other = make_prompt(1)
    texts = [make_text("c"), make_text("a"), make_text("b"), make_text("z", prompt=other), make_text("y", prompt=other)]
    rewards, asked = await ranked(tmp_path, texts)
    assert rewards == [0.0, 1.0, 0.5, 0.0, 1.0]
    assert asked == [("train-0", ["c", "a", "b"]), ("train-1", ["z", "y"])]


async def test_equal_completions_share_a_place_and_are_shown_once(tmp_path: Path):
    rewards, asked = await ranked(tmp_path, [make_text(text) for text in ("b", "a", "b", "c")])
    assert rewards == [0.5, 1.0, 0.5, 0.0]
    assert asked == [("train-0", ["b", "a", "c"])]


@pytest.mark.parametrize("texts", [("a",), ("a", "a", "a")])
async def test_where_there_is_nothing_to_compare_nothing_is_asked_and_nobody_is_ahead(tmp_path: Path, texts: Any):
    rewards, asked = await ranked(tmp_path, [make_text(text) for text in texts])
    assert rewards == [0.5] * len(texts)
    assert asked == []


async def test_text_of_others_is_judged_by_the_verifier_and_takes_part_in_no_ranking(tmp_path: Path):
    texts = [make_text("b"), make_text("a"), make_text("It is 21", version=-1), make_text("20", version=-1)]
    rewards, asked = await ranked(tmp_path, texts)
    assert rewards == [0.0, 1.0, 1.0, 0.0]
    assert asked == [("train-0", ["b", "a"])]
