"""A teacher that is away is waited for, in view of everybody, and not for ever."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.patience import Patience
from potstill.errors import TeacherRefused, TeacherUnavailable
from potstill.journal import Journal, read_jsonl


class Teacher:
    """Says each of `answers` in turn, and the last one for ever."""

    def __init__(self, *answers: Any) -> None:
        self._answers: Sequence[Any] = answers
        self.asked = 0

    async def __call__(self) -> Any:
        answer = self._answers[min(self.asked, len(self._answers) - 1)]
        self.asked += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


class Heard:
    """What the journal says, in order."""

    def __init__(self, folder: Path) -> None:
        self.journal = Journal(folder)
        self.statuses: list[str] = []
        self.journal.listen(self._hear)

    def _hear(self, stream: str, record: Any) -> None:
        if stream == "status":
            self.statuses.append(record["status"])

    @property
    def events(self) -> list[str]:
        return [event["type"] for event in read_jsonl(self.journal.folder / "events.jsonl")]


@pytest.fixture
def heard(tmp_path: Path) -> Heard:
    return Heard(tmp_path)


AWAY = TeacherUnavailable("503 from the teacher")


async def test_a_teacher_that_answers_is_not_worth_a_word(heard: Heard):
    assert await Patience(heard.journal, limit_s=10).wait_out(Teacher("scores")) == "scores"
    assert (heard.events, heard.statuses) == ([], [])


async def test_a_teacher_that_comes_back_is_asked_again_and_the_run_says_that_it_waits(heard: Heard, tmp_path: Path):
    teacher = Teacher(AWAY, "scores")
    waiting = asyncio.create_task(Patience(heard.journal, limit_s=10).wait_out(teacher))
    await asyncio.sleep(0.05)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "waiting_teacher"
    assert await waiting == "scores"
    assert (heard.events, heard.statuses) == (["teacher.away", "teacher.back"], ["waiting_teacher", "running"])
    away, back = read_jsonl(tmp_path / "events.jsonl")
    assert (away["level"], "503 from the teacher" in away["message"]) == ("warn", True)
    assert back["data"]["seconds"] >= 0.9
    assert teacher.asked == 2


async def test_many_calls_wait_for_one_teacher_and_it_is_said_once(heard: Heard):
    patience = Patience(heard.journal, limit_s=10)
    answers = await asyncio.gather(*[patience.wait_out(Teacher(AWAY, number)) for number in range(5)])
    assert answers == list(range(5))
    assert (heard.events, heard.statuses) == (["teacher.away", "teacher.back"], ["waiting_teacher", "running"])


async def test_a_teacher_that_goes_away_again_is_waited_for_again(heard: Heard):
    patience = Patience(heard.journal, limit_s=0.5)
    for _ in range(2):
        assert await patience.wait_out(Teacher(AWAY, "scores")) == "scores"
    assert heard.statuses == ["waiting_teacher", "running"] * 2


async def test_the_wait_has_an_end_and_the_error_names_the_setting(heard: Heard):
    with pytest.raises(TeacherUnavailable, match=r"loop\.teacher_wait_s allows: 503 from the teacher") as caught:
        await asyncio.wait_for(Patience(heard.journal, limit_s=0.1).wait_out(Teacher(AWAY)), 10)
    assert (caught.value.category, heard.events, heard.statuses) == ("teacher", ["teacher.away"], ["waiting_teacher"])


@pytest.mark.parametrize("error", [TeacherRefused("404"), ValueError("a bug")])
async def test_what_waiting_would_not_mend_is_raised_at_once(heard: Heard, error: Exception):
    with pytest.raises(type(error)) as caught:
        await Patience(heard.journal, limit_s=10).wait_out(Teacher(error, "scores"))
    assert (caught.value is error, heard.events) == (True, [])
