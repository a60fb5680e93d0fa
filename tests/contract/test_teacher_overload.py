"""The teacher's HTTP face under load. The model is a gate that the test opens, so that nothing depends on speed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from potstill.codec import SAFETENSORS, decode_response, encode_request
from potstill.types import ScoreStatus, TeacherIdentity, TeacherScores
from potstill.wire import Ask, ScoreItem
from teacher_server.app import create_app
from teacher_server.batching import Job, ScoringQueue
from teacher_server.limits import Limits
from tests.builders_teacher import IDENTITY, KEY, NOTHING_MORE, item, request
from tests.plain import PLAIN
from tests.served import serving
from tests.tiny_models import tiny_tokenizer

LONG = 60  # tokens of an item that fills more than half of the queue
CAPACITY = 100


@dataclass
class GatedTeacher:
    """Scores every token -1.0, one batch for each time that the gate is opened."""

    identity: TeacherIdentity = IDENTITY
    vocabulary: int = 259
    context_length: int = 512
    hidden_size: int = 0
    head_id: str = ""
    tokenizer: PreTrainedTokenizerBase = field(default_factory=tiny_tokenizer)
    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    entered: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    scored: list[int] = field(default_factory=list)  # tokens of each job
    error: Exception | None = None

    def score(self, jobs: Sequence[Job]) -> list[TeacherScores]:
        self.entered.release()
        self.gate.acquire()
        if self.error is not None:
            raise self.error
        self.scored += [len(job.input_ids) for job in jobs]
        return [
            TeacherScores(
                status=ScoreStatus.OK,
                identity=self.identity,
                sampled=np.full(len(job.completion_ids), -1.0, np.float32),
            )
            for job in jobs
        ]


@dataclass
class Served:
    url: str
    teacher: GatedTeacher
    queue: ScoringQueue

    def ask(
        self,
        *items: ScoreItem,
        ask: Ask = NOTHING_MORE,
        deadline_ms: int | None = None,
        expect_revision: str | None = None,
        timeout_s: float = 20.0,
    ) -> httpx2.Response:
        asked = replace(request(*items, ask=ask, deadline_ms=deadline_ms), expect_revision=expect_revision)
        body = encode_request(asked, SAFETENSORS)
        headers = {"authorization": f"Bearer {KEY}", "content-type": SAFETENSORS, "accept": SAFETENSORS}
        return httpx2.post(
            f"{self.url}/v1/score", content=body, headers=headers, timeout=timeout_s, trust_env=False, verify=PLAIN
        )

    def ask_aside(self, *items: ScoreItem) -> Callable[[], httpx2.Response]:
        """Ask on another thread, wait until the model is at it, and return what waits for the answer."""
        answers: list[httpx2.Response] = []
        thread = threading.Thread(target=lambda: answers.append(self.ask(*items)))
        thread.start()
        assert self.teacher.entered.acquire(timeout=10)

        def answer() -> httpx2.Response:
            thread.join()
            return answers[0]

        return answer


@contextmanager
def served(**changes: Any) -> Iterator[Served]:
    teacher = GatedTeacher()
    queue = ScoringQueue(teacher.score, capacity=CAPACITY, batch_tokens=1, window_s=0.0)  # a batch for every job
    limits = replace(Limits(max_tokens=CAPACITY, queue_tokens=CAPACITY), **changes)
    app = create_app(teacher, queue, limits, KEY)
    with serving(app) as url:
        try:
            yield Served(url=url, teacher=teacher, queue=queue)
        finally:
            teacher.gate.release(100)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def long_item(name: str, tokens: int = LONG) -> ScoreItem:
    return item(name, context=(1,), completion=[5] * tokens)


def statuses(answer: httpx2.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return [scores.status for scores in decode_response(answer.content, SAFETENSORS).scores]


def test_beyond_its_queue_the_server_says_503_and_when_to_come_back():
    with served() as it:
        first = it.ask_aside(long_item("a"))
        refused = it.ask(long_item("b"))
        assert refused.status_code == 503
        assert 1 <= int(refused.headers["retry-after"]) <= 120
        assert refused.json()["error"] | {"request_id": None, "message": None} == {
            "type": "overloaded_error",
            "code": "overloaded",
            "param": None,
            "retryable": True,
            "request_id": None,
            "message": None,
        }
        assert httpx2.get(f"{it.url}/livez", trust_env=False, verify=PLAIN).status_code == 200
        it.teacher.gate.release(2)
        assert statuses(first()) == [ScoreStatus.OK]
        assert statuses(it.ask(long_item("b"))) == [ScoreStatus.OK]


def test_a_deadline_that_passes_before_anything_is_scored_is_504():
    with served() as it:
        started = time.monotonic()
        answer = it.ask(long_item("a"), deadline_ms=200)
        assert time.monotonic() - started < 2
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "retry-after" in answer.headers


def test_a_deadline_that_passes_in_between_returns_what_there_is_and_nan_for_the_rest():
    with served() as it:
        it.teacher.gate.release(1)
        answer = it.ask(long_item("first", 10), long_item("second", 30), deadline_ms=400)
        assert statuses(answer) == [ScoreStatus.OK, ScoreStatus.DEADLINE]
        quick, slow = decode_response(answer.content, SAFETENSORS).scores
        assert np.isnan(slow.sampled).all()
        assert (len(slow.sampled), len(quick.sampled)) == (30, 10)
        assert (quick.sampled == -1.0).all()


def test_what_a_client_that_left_had_asked_for_is_not_scored():
    with served() as it:
        with pytest.raises(httpx2.ReadTimeout):
            it.ask(long_item("a", 20), long_item("b", 30), long_item("c", 40), timeout_s=0.3)
        wait_until(lambda: it.queue.tokens == 20)  # the batch that had begun; the others have left the queue
        it.teacher.gate.release(100)
        wait_until(lambda: it.queue.tokens == 0)
        assert statuses(it.ask(long_item("d", 7))) == [ScoreStatus.OK]
        assert it.teacher.scored == [20, 7]


def test_items_of_a_batch_that_failed_are_marked_and_the_next_batch_is_scored():
    with served() as it:
        it.teacher.gate.release(2)
        it.teacher.error = RuntimeError("out of memory at /some/path")
        answer = it.ask(long_item("a"))
        assert statuses(answer) == [ScoreStatus.FAILED]
        assert b"/some/path" not in answer.content
        it.teacher.error = None
        assert statuses(it.ask(long_item("a"))) == [ScoreStatus.OK]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_whose_scoring_thread_died_is_not_alive_and_takes_nothing():
    with served() as it:
        it.teacher.gate.release(1)
        it.teacher.error = TypeError("a bug")
        assert it.ask(long_item("a")).status_code == 503  # at once, not when its deadline has passed
        assert httpx2.get(f"{it.url}/livez", trust_env=False, verify=PLAIN).status_code == 503
        assert it.ask(long_item("a")).status_code == 503


def test_a_crash_is_500_with_an_id_and_without_its_reason():
    with served() as it:
        it.teacher.vocabulary = "a secret"
        answer = it.ask(long_item("a"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
        assert answer.headers["x-request-id"] == answer.json()["error"]["request_id"]
        assert "secret" not in answer.text
        assert (
            'teacher_requests_total{status="500"} 1.0'
            in httpx2.get(f"{it.url}/metrics", trust_env=False, verify=PLAIN).text
        )


def test_stopping_answers_what_was_accepted():
    with served() as it:
        answer: Any = it.ask_aside(long_item("a"))
    assert statuses(answer()) == [ScoreStatus.OK]


def test_weights_that_change_while_a_pinned_request_waits_are_412_and_not_other_weights_scores():
    with served() as it:
        first = it.ask_aside(long_item("a", 20))
        it.queue.between(lambda: setattr(it.teacher, "identity", replace(IDENTITY, revision="r2")))
        with ThreadPoolExecutor(1) as aside:
            pinned = aside.submit(it.ask, long_item("b", 20), expect_revision=IDENTITY.revision)
            wait_until(lambda: it.queue.tokens == 40)  # admitted while its revision was still right
            it.teacher.gate.release(3)
            assert pinned.result().status_code == 412
        assert decode_response(first().content, SAFETENSORS).identity == IDENTITY
        assert decode_response(it.ask(long_item("b", 20)).content, SAFETENSORS).identity.revision == "r2"


@pytest.mark.parametrize("changes", [{"inflight_requests": 1}, {"inflight_bytes": 2000, "max_body_bytes": 2000}])
def test_requests_and_bytes_in_flight_are_bounded_and_given_back(changes):
    with served(**changes) as it:
        first = it.ask_aside(long_item("a", 20))
        refused = it.ask(long_item("b", 20))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        it.teacher.gate.release(2)
        assert statuses(first()) == statuses(it.ask(long_item("b", 20))) == [ScoreStatus.OK]
        assert metrics(it)["teacher_inflight_requests"] == metrics(it)["teacher_inflight_bytes"] == 0.0


def test_an_answer_that_can_never_fit_is_413_and_not_asked_for_again():
    with served(inflight_bytes=3000, max_body_bytes=3000) as it:
        answer = it.ask(long_item("a", 60), ask=Ask(top_k=16))
        assert (answer.status_code, answer.json()["error"]["retryable"]) == (413, False)


def test_the_metrics_tell_batches_waits_and_refusals_apart():
    with served() as it:
        it.teacher.gate.release(2)
        it.ask(long_item("a", 30), long_item("b", 10))
        it.ask(long_item("c", CAPACITY + 1))
        numbers = metrics(it)
        assert numbers["teacher_batch_jobs_count"] == numbers["teacher_compute_seconds_count"] == 2
        assert numbers["teacher_batch_tokens_sum"] == numbers["teacher_scored_tokens_total"] == 40
        assert numbers["teacher_wait_seconds_count"] == 2
        assert numbers['teacher_refusals_total{code="request_too_large"}'] == 1
        assert numbers["teacher_queue_tokens"] == 0


def metrics(it: Served) -> dict[str, float]:
    lines = httpx2.get(f"{it.url}/metrics", trust_env=False, verify=PLAIN).text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_a_body_that_does_not_arrive_in_time_is_408():
    with served(max_read_s=0.2) as it:
        host, port = it.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=5) as raw:
            raw.sendall(
                f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
                f"Content-Type: {SAFETENSORS}\r\nContent-Length: 100\r\n\r\n".encode()
            )
            assert raw.recv(4096).startswith(b"HTTP/1.1 408")
