"""The client's programs, driven by hand: what they ask for next, given each answer."""

from __future__ import annotations

import json
import pickle
from collections.abc import Generator
from typing import Any

import pytest

from potstill.client import Refused
from potstill.client.answers import as_object, ask, path
from potstill.client.following import FOLLOWING
from potstill.client.patience import Patience, attempts
from potstill.client.results import events, follow_logs
from potstill.client.runs import create_run, delete_run, get_run, resume_run, update_run, wait, watch
from potstill.client.steps import Ask, Give, Hear, Listen, Lost, Message, Pause, Reply, Send, advance
from potstill.errors import ConfigError, ServiceError

PATIENCE = Patience(tries=3, first_s=1.0, longest_s=8.0, draw=lambda: 0.0)
AWAY = Lost(where="http://there", sent=False)
BROKEN = Lost(where="http://there", sent=True)
SSE = {"content-type": "text/event-stream; charset=utf-8"}


def reply(status: int = 200, body: Any = None, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status=status, headers={"content-type": "application/json"} | named, content=json.dumps(body).encode())


def refusal(status: int, code: str, **headers: str) -> Reply:
    return reply(status, {"error": {"message": f"no: {code}", "code": code}}, x_request_id="abc", **headers)


def drive(program: Generator[Any, Any, Any], answers: list[Any]) -> tuple[list[Any], Any]:
    """Give the answers one after another. Returns the steps that were asked for, and what the program returned."""
    steps = []
    given: Any = None
    left = list(answers)
    while True:
        try:
            step = advance(program, given)
        except StopIteration as done:
            assert not left, f"never asked for: {left}"
            return steps, done.value
        steps.append(step)
        given = None if isinstance(step, Pause | Give) else left.pop(0)


def waits(steps: list[Any]) -> list[float]:
    return [step.seconds for step in steps if isinstance(step, Pause)]


def items(steps: list[Any]) -> list[Any]:
    return [step.item for step in steps if isinstance(step, Give)]


def run(status: str, *, step: int = 0) -> dict[str, Any]:
    return {"id": "a", "status": status, "attempt": 1, "progress": {"step": step, "max_steps": 9}}


def event(seq: int, type: str = "step.finished") -> dict[str, Any]:
    return {"object": "run.event", "seq": seq, "type": type, "level": "info", "message": str(seq), "data": {}}


def told(seq: int, type: str = "step.finished") -> Message:
    return Message(event="run.event", data=json.dumps(event(seq, type)))


END = Message(event="end", data='{"status": "succeeded"}')


def test_a_request_without_an_answer_is_sent_again_with_growing_pauses():
    steps, answer = drive(attempts(get_run("a"), PATIENCE), [AWAY, BROKEN, reply(body=run("running"))])
    assert [type(step) for step in steps] == [Send, Pause, Send, Pause, Send]
    assert (waits(steps), answer.status) == ([0.5, 1.0], 200)


def test_a_service_that_stays_away_is_named():
    with pytest.raises(ServiceError, match="http://there does not answer") as raised:
        drive(attempts(get_run("a"), PATIENCE), [AWAY, AWAY, AWAY])
    assert (raised.value.status, raised.value.code) == (None, "unreachable")


@pytest.mark.parametrize("status", [425, 429, 503])
def test_an_overloaded_service_is_waited_for_as_long_as_it_says(status: int):
    busy = refusal(status, "busy", retry_after="7")
    steps, answer = drive(attempts(get_run("a"), PATIENCE), [busy, busy, reply(body={})])
    assert (waits(steps), answer.status) == ([7.0, 7.0], 200)


def test_a_service_that_wants_more_than_two_minutes_is_not_waited_for():
    steps, answer = drive(attempts(get_run("a"), PATIENCE), [refusal(503, "drained", retry_after="121")])
    assert (waits(steps), answer.status) == ([], 503)
    steps, _ = drive(attempts(get_run("a"), PATIENCE), [refusal(503, "drained", retry_after="120"), reply(body={})])
    assert waits(steps) == [120.0]


def test_a_conflict_is_final_unless_the_same_request_is_still_being_worked_on():
    _, answer = drive(attempts(create_run({}), PATIENCE), [refusal(409, "name_taken", x_should_retry="false")])
    assert answer.status == 409
    in_flight = refusal(409, "in_flight", retry_after="1")
    steps, answer = drive(attempts(create_run({}), PATIENCE), [in_flight, reply(201, {})])
    assert (waits(steps), answer.status) == ([1.0], 201)
    _, answer = drive(attempts(get_run("a"), PATIENCE), [refusal(503, "for_good", x_should_retry="false")])
    assert answer.status == 503


def test_the_last_refusal_is_the_answer_when_patience_ends():
    busy = refusal(429, "too_many")
    _, answer = drive(attempts(get_run("a"), PATIENCE), [busy, busy, busy])
    assert answer is busy


def test_a_request_that_must_not_happen_twice_is_sent_again_only_when_it_cannot_have_arrived():
    _, answer = drive(attempts(resume_run("a"), PATIENCE), [AWAY, reply(202, {})])
    assert answer.status == 202
    with pytest.raises(ServiceError, match="may have been taken") as raised:
        drive(attempts(resume_run("a"), PATIENCE), [BROKEN])
    assert raised.value.code == "answer_lost"


def test_a_removal_whose_answer_was_lost_has_happened_when_nothing_is_there_any_more():
    _, answer = drive(attempts(delete_run("a"), PATIENCE), [BROKEN, refusal(404, "run_not_found")])
    assert answer.status == 204
    _, answer = drive(attempts(delete_run("a"), PATIENCE), [refusal(404, "run_not_found")])
    assert answer.status == 404


def test_a_creation_has_one_name_however_often_it_is_sent():
    steps, _ = drive(attempts(create_run({}), PATIENCE), [AWAY, BROKEN, reply(201, {})])
    keys = [step.call.headers["Idempotency-Key"] for step in steps if isinstance(step, Send)]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert keys[0] != create_run({}).headers["Idempotency-Key"]
    assert create_run({}, idempotency_key="mine").headers["Idempotency-Key"] == "mine"


def test_pauses_are_bounded_and_drawn_between_half_and_whole():
    eager, lazy = (Patience(draw=lambda share=share: share) for share in (0.0, 1.0))
    assert [eager.pause(n) for n in (1, 2, 3, 100)] == [0.125, 0.25, 0.5, 4.0]
    assert [lazy.pause(n) for n in (1, 2, 3, 100)] == [0.25, 0.5, 1.0, 8.0]


def test_a_refusal_carries_the_services_words_and_survives_pickling():
    body = {"error": {"message": "optim.lr: too large", "code": "invalid_config", "details": [{"loc": "/optim/lr"}]}}
    program = wait("a")
    next(program)
    with pytest.raises(Refused) as raised:
        program.send(reply(400, body, x_request_id="abc"))
    error = pickle.loads(pickle.dumps(raised.value))  # noqa: S301 - our own bytes
    assert (str(error), error.status, error.code) == ("optim.lr: too large", 400, "invalid_config")
    assert (error.request_id, error.details) == ("abc", ({"loc": "/optim/lr"},))


@pytest.mark.parametrize("content", [b"<html>", b"{}", b'{"error": "no"}', b'{"error": {"code": 1}}', b"\xff"])
def test_a_strangers_refusal_is_its_bare_status(content: bytes):
    program = ask(get_run("a"))
    next(program)
    with pytest.raises(Refused, match="HTTP 502, and not in a potstill service's words") as raised:
        program.send(Reply(status=502, headers={}, content=content))
    assert (raised.value.status, raised.value.code) == (502, None)


@pytest.mark.parametrize(
    ("headers", "content"),
    [
        ({"content-type": "text/html"}, b"<html>log in first</html>"),
        ({"content-type": "application/json"}, b'["a list"]'),
        ({"content-type": "application/json"}, b"{cut off"),
        ({}, b"{}"),
    ],
)
def test_a_page_that_a_proxy_puts_in_between_is_no_answer(headers: dict[str, str], content: bytes):
    with pytest.raises(ServiceError, match="check the URL"):
        as_object(Reply(status=200, headers=headers, content=content))


def test_what_a_newer_service_adds_to_an_answer_is_kept():
    newer = run("succeeded") | {"carbon_g": 12, "status_detail": {"since": "today"}}
    _, answer = drive(wait("a"), [reply(body=newer)])
    assert answer == newer


def test_an_id_stays_one_part_of_the_path():
    assert path("v1", "runs", "../keys?x#y") == "/v1/runs/..%2Fkeys%3Fx%23y"
    for name in ("", ".", ".."):
        with pytest.raises(ConfigError, match="names nothing"):
            get_run(name)


def test_waiting_asks_until_the_end():
    answers = [reply(body=run(status)) for status in ("queued", "paused", "running", "failed")]
    steps, last = drive(wait("a", poll_s=0.5), answers)
    assert (waits(steps), last["status"]) == ([0.5] * 3, "failed")


def test_watching_tells_only_what_is_new():
    states = [("queued", 0), ("queued", 0), ("running", 0), ("running", 2), ("running", 2), ("succeeded", 9)]
    steps, _ = drive(watch("a"), [reply(body=run(status, step=step)) for status, step in states])
    assert [(item["status"], item["progress"]["step"]) for item in items(steps)] == [
        ("queued", 0),
        ("running", 0),
        ("running", 2),
        ("succeeded", 9),
    ]


def test_an_edit_is_of_the_run_as_it_is_now_and_made_again_when_another_came_between():
    program = update_run("a", notes="mine")
    answers = [
        reply(body=run("running"), etag='"r1"'),
        refusal(412, "old"),
        reply(body={}, etag='"r2"'),
        reply(body={}),
    ]
    steps, _ = drive(program, answers)
    patches = [step.call for step in steps if step.call.method == "PATCH"]
    assert [call.headers["If-Match"] for call in patches] == ['"r1"', '"r2"']
    assert patches[0].body == {"notes": "mine"}


def test_an_edit_of_a_run_as_it_was_read_is_refused_when_it_has_changed():
    with pytest.raises(Refused, match="no: old"):
        drive(update_run("a", priority=3, etag='"r1"'), [refusal(412, "old")])


def stream() -> Reply:
    return Reply(status=200, headers=SSE)


def page(*numbers: int, more: bool = False) -> Reply:
    return reply(body={"data": [event(number) for number in numbers], "has_more": more, "last_id": 0})


def test_a_broken_stream_is_resumed_behind_its_last_event_and_nothing_is_told_twice():
    answers = [
        *(stream(), told(1), told(2), BROKEN),
        *(stream(), told(2), told(3), None),  # what was sent before is sent again; then the service closes
        *(stream(), told(4), END, reply(body=run("succeeded")), page()),
    ]
    steps, _ = drive(events("a"), answers)
    assert [item["seq"] for item in items(steps)] == [1, 2, 3, 4]
    resumed = [step.call.headers["Last-Event-ID"] for step in steps if isinstance(step, Listen)]
    assert resumed == ["0", "2", "3"]


def test_what_a_slow_follower_has_missed_before_the_end_is_read_in_pages():
    answers = [stream(), told(5), END, reply(body=run("succeeded")), page(6, 7, more=True), page(8)]
    steps, _ = drive(events("a", after=4), answers)
    assert [item["seq"] for item in items(steps)] == [5, 6, 7, 8]


@pytest.mark.parametrize("status", [406, 429])
def test_pages_are_read_where_no_stream_can_be_had(status: int):
    no = refusal(status, "no_stream")
    answers = [no, reply(body=run("running")), page(1, 2), no, reply(body=run("failed")), page(3)]
    steps, _ = drive(events("a"), answers)
    assert [item["seq"] for item in items(steps)] == [1, 2, 3]
    asked = [step.call.params.get("after") for step in steps if isinstance(step, Ask)]
    assert asked == [None, 0, None, 2]


def test_a_run_that_is_retried_at_its_end_is_followed_on():
    answers = [stream(), told(1), END, reply(body=run("queued")), page(2)]
    answers += [stream(), told(3), END, reply(body=run("succeeded")), page()]
    steps, _ = drive(events("a"), answers)
    assert [item["seq"] for item in items(steps)] == [1, 2, 3]


def test_only_the_wanted_events_are_told_and_the_others_are_still_behind():
    answers = [stream(), told(1), told(2, "run.status"), told(3), BROKEN]
    answers += [stream(), END, reply(body=run("succeeded")), page()]
    steps, _ = drive(events("a", type="run.status"), answers)
    assert [item["seq"] for item in items(steps)] == [2]
    assert [step.call.headers["Last-Event-ID"] for step in steps if isinstance(step, Listen)] == ["0", "3"]


def test_a_kind_of_message_that_is_not_known_is_passed_over():
    answers = [stream(), Message(event="run.weather", data="sunny"), told(1), END, reply(body=run("failed")), page()]
    steps, _ = drive(events("a"), answers)
    assert [item["seq"] for item in items(steps)] == [1]


def test_a_follower_is_refused_as_anybody_else_and_does_not_wait_for_ever():
    with pytest.raises(Refused, match="no: run_not_found"):
        drive(events("a"), [refusal(404, "run_not_found")])
    with pytest.raises(ServiceError, match="does not answer"):
        drive(events("a"), [AWAY] * FOLLOWING.tries)
    with pytest.raises(Refused, match="no: draining"):
        drive(events("a"), [refusal(503, "draining")] * FOLLOWING.tries)
    restarts = [AWAY] * (FOLLOWING.tries - 1) + [stream(), None]
    steps, _ = drive(events("a"), [*restarts, *restarts, stream(), END, reply(body=run("failed")), page()])
    assert sum(isinstance(step, Hear) for step in steps) == 3
    assert 50 < sum(FOLLOWING.pause(failures) for failures in range(1, FOLLOWING.tries)) < 150


def test_a_service_that_restarts_while_the_last_events_are_read_costs_none_of_them():
    gone = ServiceError("away", None, "unreachable")
    answers = [stream(), told(1), END, reply(body=run("failed")), page(2, more=True), gone, AWAY, refusal(502, "proxy")]
    answers += [stream(), told(3), END, gone, stream(), END, reply(body=run("failed")), page()]
    steps, _ = drive(events("a"), answers)
    assert [item["seq"] for item in items(steps)] == [1, 2, 3]
    resumed = [step.call.headers["Last-Event-ID"] for step in steps if isinstance(step, Listen)]
    assert resumed == ["0", "2", "2", "2", "3"]


@pytest.mark.parametrize("waiting", [wait, watch])
def test_whoever_waits_for_a_run_outlasts_a_restart_of_the_service(waiting: Any):
    gone = ServiceError("away", None, "unreachable")
    steps, _ = drive(
        waiting("a"), [reply(body=run("running")), gone, refusal(503, "draining"), reply(body=run("failed"))]
    )
    assert len(waits(steps)) == 3
    with pytest.raises(ServiceError, match="away"):
        drive(waiting("a"), [gone] * FOLLOWING.tries)
    with pytest.raises(Refused, match="no: run_not_found"):
        drive(waiting("a"), [refusal(404, "run_not_found")])


def test_logs_are_followed_from_where_they_ended():
    def text(words: str, offset: int) -> Reply:
        return Reply(status=200, headers={"x-next-offset": str(offset)}, content=words.encode())

    answers = [
        *(reply(body=run("queued")), refusal(404, "log_not_found")),
        *(reply(body=run("running")), text("é1\n", 4)),
        *(reply(body=run("running")), text("", 4)),
        *(reply(body=run("failed")), text("2\n", 6)),
        *(reply(body=run("failed")), text("", 6)),
    ]
    steps, _ = drive(follow_logs("a", role="learner", tail=5), answers)
    assert items(steps) == ["é1\n", "2\n"]
    asked = [step.call.params for step in steps if isinstance(step, Ask) and step.call.path.endswith("/logs")]
    assert [(params["tail"], params["offset"]) for params in asked] == [
        (5, None),
        (5, None),
        (None, 4),
        (None, 4),
        (None, 6),
    ]


def test_a_log_that_a_run_at_its_end_does_not_have_is_refused():
    with pytest.raises(Refused, match="no: log_not_found"):
        drive(follow_logs("a", role="teacher"), [reply(body=run("failed")), refusal(404, "log_not_found")])
