"""The client against a scripted teacher: a real HTTP server on loopback that answers as each test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from potstill.calling.outbound import Endpoint
from potstill.codec import SAFETENSORS, decode_request, encode_response
from potstill.config_teachers import Calling
from potstill.errors import AlignmentError, TeacherRefused, TeacherUnavailable, TokenizerMismatch
from potstill.teachers.opening import open_endpoint
from potstill.teachers.server import TeacherClient
from potstill.types import ScoreStatus, TeacherScores
from potstill.wire import Ask, Capabilities, ScoreRequest, ScoreResponse
from tests.builders_teacher import IDENTITY, item, sound_response

ABLE = Capabilities(
    model=IDENTITY.name,
    revision=IDENTITY.revision,
    tokenizer_fingerprint=IDENTITY.tokenizer_fingerprint,
    tier=3,
    context_length=64,
    vocabulary=8,
    max_items=2,
    max_tokens=1000,
    max_top_k=8,
    max_body_bytes=2**20,
    hidden_size=5,
    head_id="h1",
)
EVERYTHING = Ask(top_k=3, num_ids=2, draws=4, entropy=True, hidden=5)
ITEM = item("a", completion=(3, 4, 5), token_ids=[[3, 0], [1, 2], [5, 6]])

Answer = tuple[int, dict[str, str], bytes]
Script = Callable[[ScoreRequest], Answer]


@dataclass
class ScriptedTeacher:
    """Answers the n-th scoring request with the n-th script, the last one ever after, and keeps what it was asked."""

    scripts: Sequence[Script]
    url: str = ""
    asked: list[ScoreRequest] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


@contextmanager
def scripted(*scripts: Script) -> Iterator[ScriptedTeacher]:
    teacher = ScriptedTeacher(scripts)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {}, ABLE.model_dump_json().encode())

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            with lock:
                teacher.asked.append(decode_request(body, SAFETENSORS))
                teacher.keys.append(self.headers["authorization"])
                script = teacher.scripts[min(len(teacher.asked), len(teacher.scripts)) - 1]
                asked = teacher.asked[-1]
            self._send(*script(asked))

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except ConnectionError:
                self.close_connection = True  # the client hung up on an answer that was too long

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    teacher.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield teacher
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sound(asked: ScoreRequest) -> Answer:
    return 200, {}, encode_response(sound_response(asked), SAFETENSORS)


def says(change: Callable[[ScoreResponse], ScoreResponse]) -> Script:
    return lambda asked: (200, {}, encode_response(change(sound_response(asked)), SAFETENSORS))


def with_scores(**changes: Callable[[TeacherScores], Any]) -> Script:
    """A sound answer in which some fields of every item are replaced."""

    def change(answer: ScoreResponse) -> ScoreResponse:
        new = [replace(one, **{name: make(one) for name, make in changes.items()}) for one in answer.scores]
        return replace(answer, scores=tuple(new))

    return says(change)


def error(status: int, code: str = "nope", **headers: str) -> Script:
    body = json.dumps({"error": {"message": "because", "code": code, "param": "items[0].id"}}).encode()
    return lambda _: (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)


def endpoint(url: str, *, deadline_s: float, concurrency: int) -> Endpoint:
    return open_endpoint(url, "secret", Calling(deadline_s=deadline_s, concurrency=concurrency))


async def ask(
    teacher: ScriptedTeacher, *items: Any, deadline_s: float = 5.0, expect: Any = IDENTITY
) -> list[TeacherScores]:
    async with aclosing(TeacherClient(endpoint(teacher.url, deadline_s=deadline_s, concurrency=2))) as client:
        return await client.score(items or (ITEM,), EVERYTHING, expect)


async def test_a_sound_answer_is_returned_as_it_was_sent():
    with scripted(sound) as teacher:
        (scores,) = await ask(teacher)
    (wanted,) = sound_response(teacher.asked[0]).scores
    for name in TeacherScores.__slots__:
        np.testing.assert_array_equal(getattr(scores, name), getattr(wanted, name), err_msg=name)
    assert teacher.keys == ["Bearer secret"]


async def test_a_large_batch_is_split_under_the_servers_limits_and_put_together_in_order():
    items = [item(str(n), completion=(n % 8,), token_ids=[[1, 2]]) for n in range(5)]
    with scripted(sound) as teacher:
        scores = await ask(teacher, *items)
    asked = sorted([one.id for one in request.items] for request in teacher.asked)
    assert asked == [["0", "1"], ["2", "3"], ["4"]]
    for number, one in enumerate(scores):
        (wanted,) = [
            answer
            for request in teacher.asked
            for part, answer in zip(request.items, sound_response(request).scores, strict=True)
            if part.id == str(number)
        ]
        np.testing.assert_array_equal(one.sampled, wanted.sampled)


async def test_no_items_ask_nothing():
    with scripted(sound) as teacher:
        async with aclosing(TeacherClient(endpoint(teacher.url, deadline_s=5.0, concurrency=1))) as client:
            assert await client.score([], EVERYTHING, None) == []
    assert teacher.asked == []


LIES = {
    "NaN": with_scores(sampled=lambda s: s.sampled * np.float32(np.nan)),
    "minus infinity": with_scores(sampled=lambda s: s.sampled - np.float32(np.inf)),
    "a positive log-prob": with_scores(sampled=lambda s: -s.sampled),
    "a positive given-id log-prob": with_scores(ids_logprobs=lambda s: -s.ids_logprobs),
    "a NaN tail": with_scores(topk_tail=lambda s: s.topk_tail * np.float32(np.nan)),
    "a tail of zero": with_scores(topk_tail=lambda s: s.topk_tail * 0),
    "too little mass": with_scores(ids_tail=lambda s: s.ids_tail - 3),
    "repeated ids": with_scores(topk_ids=lambda s: s.topk_ids[:, [0, 0, 1]]),
    "negative ids": with_scores(topk_ids=lambda s: s.topk_ids * 0 - np.array([1, 2, 3], np.int32)),
    "an unsorted top-k": with_scores(
        topk_ids=lambda s: s.topk_ids[:, ::-1], topk_logprobs=lambda s: s.topk_logprobs[:, ::-1]
    ),
    "a top-k that contradicts sampled": with_scores(sampled=lambda s: np.roll(s.sampled, 1)),
    "given ids in another order": with_scores(ids_logprobs=lambda s: s.ids_logprobs[:, ::-1]),
    "negative entropy": with_scores(entropy=lambda s: -s.entropy),
    "one row too few": with_scores(
        **{
            name: (lambda s, name=name: getattr(s, name)[:-1])
            for name in ("sampled", "topk_ids", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail", "entropy")
        }
    ),
    "a wider top-k": with_scores(
        topk_ids=lambda s: np.hstack([s.topk_ids, s.topk_ids + 90]),
        topk_logprobs=lambda s: np.hstack([s.topk_logprobs, s.topk_logprobs - 99]),
    ),
    "no entropy": with_scores(entropy=lambda s: None),
    "another teacher": says(lambda answer: replace(answer, identity=replace(IDENTITY, revision="r2"))),
    "another item": says(lambda answer: replace(answer, ids=("b",))),
    "half an answer": lambda asked: (200, {}, sound(asked)[2][:-9]),
    "not an answer": lambda asked: (200, {}, b"<html>"),
    "a huge body": lambda asked: (200, {}, bytes(8 * 2**20)),
}


@pytest.mark.parametrize("lie", LIES)
async def test_wrong_numbers_are_never_returned(lie):
    with scripted(LIES[lie]) as teacher, pytest.raises(AlignmentError):
        await ask(teacher)
    assert len(teacher.asked) == 1


async def test_answers_in_another_order_are_refused():
    swapped = says(lambda answer: replace(answer, ids=answer.ids[::-1], scores=answer.scores[::-1]))
    with scripted(swapped) as teacher, pytest.raises(AlignmentError, match="another order"):
        await ask(teacher, item("a", token_ids=[[1, 2]] * 3), item("b", token_ids=[[1, 2]] * 3))


async def test_an_item_that_failed_is_nan_whatever_numbers_came_with_it():
    with scripted(with_scores(status=lambda s: ScoreStatus.FAILED)) as teacher:
        (scores,) = await ask(teacher)
    assert scores.status == ScoreStatus.FAILED
    for name in ("sampled", "topk_logprobs", "topk_tail", "ids_logprobs", "ids_tail", "entropy"):
        assert np.isnan(getattr(scores, name)).all()
    assert (scores.topk_ids == -1).all()


@pytest.mark.parametrize("status", [429, 502, 503])
async def test_a_busy_teacher_is_asked_again_after_the_time_it_named(status):
    with scripted(error(status, Retry_After="1"), sound) as teacher:
        started = time.monotonic()
        (scores,) = await ask(teacher)
    assert scores.status == ScoreStatus.OK
    assert time.monotonic() - started >= 1.0
    assert len(teacher.asked) == 2


async def test_a_dropped_connection_is_tried_again():
    def drop(_: ScoreRequest) -> Answer:
        return 200, {"content-length": "4096", "connection": "close"}, b"half"

    with scripted(drop, sound) as teacher:
        assert len(await ask(teacher)) == 1
    assert len(teacher.asked) == 2


async def test_a_teacher_that_stays_busy_is_unavailable_once_the_deadline_is_out_of_reach():
    with scripted(error(503, Retry_After="60")) as teacher:
        started = time.monotonic()
        with pytest.raises(TeacherUnavailable, match="503: because"):
            await ask(teacher, deadline_s=2.0)
    assert time.monotonic() - started < 1.5
    assert len(teacher.asked) == 1


async def test_a_teacher_that_hangs_is_unavailable_at_the_deadline():
    release = threading.Event()

    def hang(asked: ScoreRequest) -> Answer:
        release.wait(10)
        return sound(asked)

    with scripted(hang) as teacher:
        started = time.monotonic()
        with pytest.raises(TeacherUnavailable):
            await ask(teacher, deadline_s=0.5)
        elapsed = time.monotonic() - started
        release.set()
    assert 0.4 < elapsed < 2.0


async def test_a_teacher_that_is_not_there_is_unavailable():
    async with aclosing(TeacherClient(endpoint("http://127.0.0.1:9", deadline_s=0.6, concurrency=1))) as client:
        with pytest.raises(TeacherUnavailable, match="ConnectError"):
            await client.capabilities()


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (error(400), TeacherRefused),
        (error(401), TeacherRefused),
        (error(412), TeacherRefused),
        (error(413), TeacherRefused),
        (error(422, code="tokenizer_mismatch"), TokenizerMismatch),
        (error(302, Location="http://127.0.0.1:9/"), TeacherRefused),
        (error(500), TeacherUnavailable),
        (error(504), TeacherUnavailable),
    ],
)
async def test_a_refusal_is_not_sent_again_and_says_why(script, kind):
    with scripted(script) as teacher, pytest.raises(kind, match="because") as caught:
        await ask(teacher)
    assert type(caught.value) is kind
    assert "items[0].id" in str(caught.value)
    assert len(teacher.asked) == 1


async def test_the_expected_identity_travels_with_the_request():
    with scripted(sound) as teacher:
        await ask(teacher)
        await ask(teacher, expect=None)
    expected, free = teacher.asked
    assert (expected.expect_revision, expected.expect_tokenizer_fingerprint) == ("r1", "f1")
    assert (free.expect_revision, free.expect_tokenizer_fingerprint) == (None, None)
