"""Answers on disk that are asked for once, and scores in memory that fit."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from potstill.errors import ConfigError, TeacherUnavailable
from potstill.teachers.cache import AnswerStore, Paid, Question, ScoreCache, score_key
from potstill.types import Message, ScoreStatus, TeacherIdentity, TeacherScores

PAID = Paid(text="Grüße\n", finish_reason="stop", tokens_in=5, tokens_out=2, cost_usd="0.00012")
IDENTITY = TeacherIdentity(name="big", revision="r1", tokenizer_fingerprint="f1")


def question(text: str = "12 + 9 = ?", *, model: str = "big@r1", **parameters: Any) -> Question:
    return Question(model=model, parameters=parameters, messages=(Message(role="user", content=text),))


class Teacher:
    """Answers when it is let, and counts how often it was asked and how often its caller left."""

    def __init__(self, *, answer: Paid = PAID, error: Exception | None = None, let: bool = True) -> None:
        self._answer, self._error = answer, error
        self.may_answer = asyncio.Event()
        if let:
            self.may_answer.set()
        self.asked = self.left = 0

    async def __call__(self) -> Paid:
        self.asked += 1
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.left += 1
            raise
        if self._error is not None:
            raise self._error
        return self._answer


def rows(path: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(path) as db:
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        return db.execute("select * from answers").fetchall()


async def test_an_answer_is_asked_for_once_and_outlives_the_store(tmp_path):
    teacher = Teacher()
    for hits in (0, 1):
        store = AnswerStore(tmp_path / "answers.db")
        assert await store.get_or_ask(question(temperature=0.7, max_tokens=9), teacher) == PAID
        assert (store.hits, store.misses) == (hits, 1 - hits)
        store.close()
    assert teacher.asked == 1


async def test_a_row_holds_the_question_and_what_it_cost(tmp_path):
    store = AnswerStore(tmp_path / "answers.db")
    await store.get_or_ask(question(temperature=0.7), Teacher())
    store.close()
    ((key, request, text, finish_reason, tokens_in, tokens_out, cost_usd, created_at),) = rows(tmp_path / "answers.db")
    assert json.loads(request) == {
        "model": "big@r1",
        "parameters": {"temperature": 0.7},
        "messages": [{"role": "user", "content": "12 + 9 = ?"}],
    }
    assert key == question(temperature=0.7).key
    assert (text, finish_reason, tokens_in, tokens_out, cost_usd) == ("Grüße\n", "stop", 5, 2, "0.00012")
    assert created_at > 1.7e9


def test_the_order_of_parameters_is_no_part_of_a_question_and_everything_else_is():
    one = question(a=1, b=2)
    assert one.key == question(b=2, a=1).key
    others = [question("x", a=1, b=2), question(a=1, b=3), question(a=1), question(model="big@r2", a=1, b=2)]
    assert len({one.key, *(other.key for other in others)}) == 5
    with pytest.raises(ValueError, match="not JSON compliant"):
        question(temperature=float("nan")).canonical  # noqa: B018


async def test_the_same_question_at_the_same_time_is_asked_once(tmp_path):
    store, teacher = AnswerStore(tmp_path / "answers.db"), Teacher(let=False)
    tasks = [asyncio.create_task(store.get_or_ask(question(), teacher)) for _ in range(20)]
    other = asyncio.create_task(store.get_or_ask(question("other"), Teacher()))
    assert await other == PAID
    teacher.may_answer.set()
    assert await asyncio.gather(*tasks) == [PAID] * 20
    assert (teacher.asked, store.misses, store.hits) == (1, 2, 19)
    store.close()


async def test_a_failure_reaches_all_who_wait_and_is_not_kept(tmp_path):
    store, down = AnswerStore(tmp_path / "answers.db"), Teacher(error=TeacherUnavailable("away"))
    results = await asyncio.gather(*(store.get_or_ask(question(), down) for _ in range(3)), return_exceptions=True)
    assert [type(result) for result in results] == [TeacherUnavailable] * 3
    assert down.asked == 1
    assert await store.get_or_ask(question(), Teacher()) == PAID
    store.close()


async def test_the_request_ends_with_the_last_who_waits_for_it(tmp_path):
    store, teacher = AnswerStore(tmp_path / "answers.db"), Teacher(let=False)
    first, second = (asyncio.create_task(store.get_or_ask(question(), teacher)) for _ in range(2))
    await asyncio.sleep(0.01)
    for task, left in ((first, 0), (second, 1)):
        task.cancel()
        await asyncio.sleep(0.01)
        assert (task.cancelled(), teacher.left) == (True, left)
    assert await store.get_or_ask(question(), Teacher()) == PAID
    store.close()


async def test_of_two_processes_that_ask_the_first_answer_is_kept_and_both_return_it(tmp_path):
    one, two = (AnswerStore(tmp_path / "answers.db") for _ in range(2))
    slow = Teacher(answer=replace(PAID, text="late"), let=False)
    waiting = asyncio.create_task(two.get_or_ask(question(), slow))
    await asyncio.sleep(0.01)
    assert await one.get_or_ask(question(), Teacher()) == PAID
    slow.may_answer.set()
    assert await waiting == PAID
    assert len(rows(tmp_path / "answers.db")) == 1
    one.close()
    two.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from potstill.teachers.cache import AnswerStore, Question, Paid

async def main(path, count):
    store = AnswerStore(path)
    for number in range(count):
        async def ask():
            return Paid(text=str(number), finish_reason="stop", tokens_in=1, tokens_out=1, cost_usd="0")
        await store.get_or_ask(Question(model="m", parameters={"n": number}, messages=()), ask)
        print(number, flush=True)

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def writer(path: Path, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(count)], stdout=subprocess.PIPE, text=True)


def test_processes_that_write_one_file_at_once_double_nothing(tmp_path):
    writers = [writer(tmp_path / "answers.db", 200) for _ in range(4)]
    for one in writers:
        one.communicate(timeout=30)
    assert [one.returncode for one in writers] == [0] * 4
    assert sorted(int(row[2]) for row in rows(tmp_path / "answers.db")) == list(range(200))


def test_a_process_that_is_killed_leaves_every_answer_that_it_had_returned(tmp_path):
    one = writer(tmp_path / "answers.db", 10**6)
    assert one.stdout is not None
    lines = [one.stdout.readline() for _ in range(50)]
    one.send_signal(signal.SIGKILL)
    lines += one.communicate(timeout=10)[0].splitlines(keepends=True)
    returned = {int(line) for line in lines if line.endswith("\n")}
    assert returned <= {int(row[2]) for row in rows(tmp_path / "answers.db")}


@pytest.mark.parametrize("content", [b"not a database, but long enough to be one" * 40, b"{}\n"])
def test_another_file_is_not_taken_for_a_store(tmp_path, content):
    (tmp_path / "answers.db").write_bytes(content)
    with pytest.raises(ConfigError, match=r"answers\.db is not a store"):
        AnswerStore(tmp_path / "answers.db")
    assert (tmp_path / "answers.db").read_bytes() == content


def scores(value: float = -1.0, *, length: int = 1000, status: int = ScoreStatus.OK) -> TeacherScores:
    return TeacherScores(status=status, identity=IDENTITY, sampled=np.full(length, value, np.float32))


def key(**changes: Any) -> bytes:
    ids = np.array([1, 2, 3, 4], np.int32)
    parts = {
        "identity": IDENTITY,
        "context_ids": ids,
        "completion_ids": ids,
        "chosen_ids": None,
        "asked": "Ask(top_k=8)",
    }
    return score_key(**(parts | changes))


def test_a_key_tells_apart_whatever_could_change_the_scores():
    ids = np.array([1, 2, 3, 4], np.int32)
    others = [
        key(identity=replace(IDENTITY, revision="r2")),
        key(identity=replace(IDENTITY, name="bi", revision="gr1")),
        key(context_ids=ids[:3], completion_ids=np.array([4, 1, 2, 3, 4], np.int32)),
        key(completion_ids=ids[::-1]),
        key(chosen_ids=ids[:, None]),
        key(chosen_ids=ids.reshape(2, 2)),
        key(chosen_ids=ids[:0]),
        key(asked="Ask(top_k=9)"),
    ]
    assert len({key(), *others}) == len(others) + 1
    assert key() == key(context_ids=ids.astype(np.int64), completion_ids=np.repeat(ids, 2)[::2])


def test_the_least_recently_used_scores_go_first():
    cache = ScoreCache(max_bytes=3 * 6000)
    for name in (b"a", b"b", b"c"):
        cache.put(name, scores())
    assert cache.get(b"a") is not None
    cache.put(b"d", scores())
    assert [name in cache._scores for name in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert cache.get(b"b") is None
    assert (cache.hits, cache.misses, cache.evictions, len(cache)) == (1, 1, 1, 3)


def test_the_memory_of_a_cache_is_bounded_and_counted():
    cache = ScoreCache(max_bytes=50_000)
    for number in range(500):
        cache.put(bytes([number % 256]), scores(length=number))
        assert cache.num_bytes <= 50_000
    cache.put(b"too large", scores(length=20_000))
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_a_key_that_is_put_again_is_held_once():
    cache = ScoreCache(max_bytes=50_000)
    cache.put(b"a", scores(-1.0))
    size = cache.num_bytes
    cache.put(b"a", scores(-2.0))
    kept = cache.get(b"a")
    assert kept is not None
    assert (kept.sampled[0], cache.num_bytes) == (-2.0, size)


def test_kept_scores_are_copies_that_nobody_can_change():
    cache, given = ScoreCache(max_bytes=50_000), scores(-1.0)
    cache.put(b"a", given)
    given.sampled[:] = -9.0
    kept = cache.get(b"a")
    assert kept is not None
    assert (kept.sampled == -1.0).all()
    with pytest.raises(ValueError, match="read-only"):
        kept.sampled[0] = 0.0


def test_missing_scores_are_asked_for_again():
    cache = ScoreCache(max_bytes=50_000)
    cache.put(b"a", scores(float("nan"), status=ScoreStatus.FAILED))
    assert cache.get(b"a") is None
