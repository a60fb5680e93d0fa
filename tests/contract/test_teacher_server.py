"""The teacher server as its clients meet it: a real process, real HTTP, a real (tiny) model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from potstill.algebra.objective import Tier
from potstill.codec import JSON, SAFETENSORS, encode_request
from potstill.errors import TeacherRefused, TokenizerMismatch
from potstill.probing.probe import probe
from potstill.teachers.server import TeacherClient
from potstill.tokenization import load_tokenizer, render
from potstill.types import Message, ScoreStatus, TeacherIdentity
from potstill.wire import Ask, ScoreItem
from tests.builders_teacher import KEY, ServerProcess, item, request, teacher_server
from tests.endpoints import endpoint
from tests.plain import PLAIN
from tests.tiny_models import VOCABULARY, save_tiny_model

BEARER = {"authorization": f"Bearer {KEY}"}
PADDED = VOCABULARY + 5  # rows of the head; the last five mean nothing
EVERYTHING = Ask(top_k=4, num_ids=6, draws=5, entropy=True, hidden=64)
TOLERANCE = 1e-5  # nats, float32 in batches against float64 one by one
LIMITS = ("--max-items", "8", "--max-tokens", "3000", "--max-top-k", "16", "--queue-tokens", "3000")
SMALL_BODY = 64 * 1024
SIX = [[1, 2, 3, 4, 5, 6]] * 3  # ids of the caller's choice, for a completion of three tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("teacher") / "tiny", seed=3, vocab_size=PADDED)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    with teacher_server(folder, *LIMITS, "--max-body-bytes", str(SMALL_BODY), "--chunk-rows", "16") as running:
        yield running


@pytest.fixture(scope="module")
def exact(folder: Path) -> Any:
    """The same weights in float64: the slow obvious teacher."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def logprobs_after(model: Any, context: list[int], completion: list[int]) -> np.ndarray:
    """[T, V] in float64, from one plain forward pass over context + completion."""
    with torch.inference_mode():
        logits = model(torch.tensor([context + completion])).logits[0]
    return torch.log_softmax(logits, -1)[len(context) - 1 : -1].numpy()


def some_items(number: int, *, seed: int = 0) -> list[ScoreItem]:
    """Items of different lengths, with distinct given ids at each position."""
    random = np.random.default_rng(seed)
    made = []
    for index in range(number):
        length = int(random.integers(1, 40))
        context = random.integers(0, VOCABULARY, int(random.integers(1, 60))).tolist()
        completion = random.integers(0, VOCABULARY, length).tolist()
        given = [random.permutation(VOCABULARY)[:6].tolist() for _ in range(length)]
        made.append(item(f"i{index}", context=context, completion=completion, token_ids=given))
    return made


async def score(server: ServerProcess, items: list[ScoreItem], *, concurrency: int = 1) -> list[Any]:
    async with aclosing(
        TeacherClient(endpoint(server.url, key=KEY, deadline_s=30.0, concurrency=concurrency))
    ) as client:
        return await client.score(items, EVERYTHING, None)


def check_near(actual: Any, wanted: Any, *, nats: float = TOLERANCE) -> None:
    np.testing.assert_allclose(actual, wanted, atol=nats)


def post(server: ServerProcess, body: Any, **headers: str) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": JSON, **BEARER, **headers}
    return httpx2.post(f"{server.url}/v1/score", content=content, headers=headers, trust_env=False, verify=PLAIN)


def plain(**changes: Any) -> dict[str, Any]:
    one = {"id": "a", "context_ids": [1, 2], "completion_ids": [3, 4]}
    body: dict[str, Any] = {"model": "tiny", "items": [dict(one, id="first"), dict(one, id="second")]}
    for name, value in changes.items():
        (body["items"][1] if name.endswith("_ids") or name == "teacher_messages" else body)[name] = value
    return body


# ------------------------------------------------------------------------------------------------------- numbers


async def test_scores_equal_a_float64_forward_pass_of_the_same_tokens(server, exact):
    items = some_items(8)
    for asked, scores in zip(items, await score(server, items), strict=True):
        wanted = logprobs_after(exact, asked.context_ids.tolist(), asked.completion_ids.tolist())
        rows = np.arange(len(wanted))
        best = np.argsort(-wanted[:, :VOCABULARY], axis=1)[:, :4]
        check_near(scores.sampled, wanted[rows, asked.completion_ids])
        np.testing.assert_array_equal(scores.topk_ids, best)
        check_near(scores.topk_logprobs, np.take_along_axis(wanted, best, 1))
        check_near(scores.ids_logprobs, np.take_along_axis(wanted, asked.token_ids, 1))
        for ids, tail in ((best, scores.topk_tail), (asked.token_ids, scores.ids_tail)):
            left = 1 - np.take_along_axis(np.exp(wanted), ids, 1).sum(axis=1)
            check_near(tail, np.log(left))
        check_near(scores.entropy, -(np.exp(wanted) * wanted).sum(axis=1))
        check_near(scores.drawn_logprobs, np.take_along_axis(wanted, scores.drawn_ids, 1))
        assert not (scores.drawn_ids[:, :, None] == best[:, None]).any()
        states = torch.from_numpy((scores.hidden.astype(np.uint32) << 16).view(np.float32)).double()
        check_near(exact.get_output_embeddings()(states).log_softmax(-1).detach(), wanted, nats=0.1)


async def test_neither_order_nor_company_changes_a_score(server):
    items = some_items(8, seed=1)
    together = await score(server, items)
    backwards = (await score(server, items[::-1]))[::-1]
    alone = [(await score(server, [one]))[0] for one in items]
    for other in (backwards, alone):
        for left, right in zip(together, other, strict=True):
            check_near(left.sampled, right.sampled)
            check_near(left.ids_tail, right.ids_tail)
            np.testing.assert_array_equal(left.drawn_ids, right.drawn_ids)


async def test_a_batch_larger_than_the_limits_is_split_by_the_client_and_scored_whole(server):
    items = some_items(20, seed=2)
    scores = await score(server, items, concurrency=3)
    assert [len(one.sampled) for one in scores] == [len(one.completion_ids) for one in items]
    assert all(one.status == ScoreStatus.OK for one in scores)


@pytest.mark.parametrize("length", [1, 5, 50])
async def test_a_privileged_context_of_any_length_is_aligned_on_the_completion(server, exact, length):
    own = list(range(100, 100 + length))
    asked = item("a", context=(1, 2, 3), completion=(7, 8, 9), teacher_context=own, token_ids=SIX)
    (scores,) = await score(server, [asked])
    wanted = logprobs_after(exact, own, [7, 8, 9])[np.arange(3), [7, 8, 9]]
    check_near(scores.sampled, wanted)


async def test_teacher_messages_are_rendered_by_the_teachers_own_chat_template(server, exact, folder):
    messages = (Message(role="user", content="12 + 9 = ? Hint: 21"),)
    own = render(load_tokenizer(folder), messages)
    (scores,) = await score(server, [item("a", messages=messages, token_ids=SIX)])
    wanted = logprobs_after(exact, own, [3, 4, 5])[np.arange(3), [3, 4, 5]]
    check_near(scores.sampled, wanted)


def test_plain_json_as_curl_sends_it_gives_plain_json_back(server, exact):
    answer = post(server, plain(top_k=2), **{"x-request-id": "my-id.7"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == answer.json()["request_id"] == "my-id.7"
    first = answer.json()["items"][0]
    wanted = logprobs_after(exact, [1, 2], [3, 4])[[0, 1], [3, 4]]
    assert (first["id"], first["status"]) == ("first", ScoreStatus.OK)
    check_near(first["sampled"], wanted)
    assert len(first["topk_ids"][0]) == 2


async def test_a_probe_finds_what_the_server_can_do(server):
    async with aclosing(TeacherClient(endpoint(server.url, key=KEY))) as client:
        report = await probe(client)
    assert (report.problems, report.notes, report.tier) == ((), (), Tier.FULL)
    assert (report.context_length, report.max_top_k) == (512, 16)
    assert report.identity.name == "tiny"
    assert report.measured["greedy_gap"] < TOLERANCE
    assert report.measured["mass_error"] < 1e-5
    assert max(report.measured["noise"], report.measured["batch_gap"]) < TOLERANCE
    assert report.latency_ms > 0
    assert report.tokens_per_s > 0


async def test_a_probe_reports_why_it_got_nowhere(server):
    async with aclosing(TeacherClient(endpoint("http://127.0.0.1:9", key=KEY, deadline_s=0.5))) as client:
        away = await probe(client)
    async with aclosing(TeacherClient(endpoint(server.url, key="wrong"))) as client:
        locked = await probe(client)
    assert (away.able, away.tier, locked.able, locked.tier) == (None, None, None, None)
    assert "no answer" in away.problems[0]
    assert "401" in locked.problems[0]


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (plain(completion_ids=[]), 400, "invalid_request", "items[1].completion_ids"),
        (plain(completion_ids=[3, VOCABULARY]), 400, "invalid_value", "items[1].completion_ids"),
        (plain(context_ids=[PADDED]), 400, "invalid_value", "items[1].context_ids"),
        (plain(teacher_context_ids=[VOCABULARY]), 400, "invalid_value", "items[1].teacher_context_ids"),
        (plain(context_ids=[1] * 512), 400, "context_length_exceeded", "items[1].completion_ids"),
        (plain(token_ids=[[1], [2]]), 400, "invalid_request", "items[1].token_ids"),
        (plain(top_k=17), 400, "invalid_value", "top_k"),
        (plain(draws=17), 400, "invalid_value", "draws"),
        (plain(hidden=63), 400, "invalid_value", "hidden"),
        (plain(temperature=0.5), 400, "invalid_request", "temperature"),
        (plain(colour="blue"), 400, "invalid_request", "colour"),
        (plain(model="other"), 404, "model_not_found", "model"),
        (plain(expect_revision="r0"), 412, "revision_mismatch", "expect_revision"),
        (plain(expect_tokenizer_fingerprint="f0"), 422, "tokenizer_mismatch", "expect_tokenizer_fingerprint"),
        ({"model": "tiny", "items": []}, 400, "invalid_request", "items"),
        (b"{", 400, "invalid_request", "body"),
    ],
)
def test_a_wrong_request_is_refused_by_the_name_of_the_item_and_the_field(server, body, status, code, param):
    answer = post(server, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert error["request_id"] == answer.headers["x-request-id"]
    assert error["retryable"] is False


def test_too_many_ids_per_position_are_refused(server):
    wide = [list(range(17))] * 2
    body = {"model": "tiny", "num_ids": 17, "items": [dict(plain()["items"][0], token_ids=wide)]}
    answer = post(server, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "num_ids")


def test_too_many_items_and_too_many_tokens_are_413(server):
    many = {"model": "tiny", "items": [dict(plain()["items"][0], id=str(n)) for n in range(9)]}
    items = [{"id": str(n), "context_ids": [1] * 400, "completion_ids": [2]} for n in range(8)]
    long = {"model": "tiny", "items": items}
    for body in (many, long):
        answer = post(server, body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, "items")


def test_a_body_that_announces_too_much_is_refused_before_it_is_sent(server):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as raw:
        raw.sendall(
            f"POST /v1/score HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
            f"Content-Type: {JSON}\r\nContent-Length: {SMALL_BODY + 1}\r\n\r\n".encode()
        )
        assert raw.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_turns_out_too_large_is_refused_while_it_streams(server):
    def chunks() -> Iterator[bytes]:
        for _ in range(9):
            yield b" " * (SMALL_BODY // 8)

    headers = {"content-type": JSON, **BEARER}
    answer = httpx2.post(f"{server.url}/v1/score", content=chunks(), headers=headers, trust_env=False, verify=PLAIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-encoding": "gzip"}])
def test_other_encodings_are_415(server, headers):
    assert post(server, plain(), **headers).status_code == 415


@pytest.mark.parametrize("given", ["", "Bearer wrong", f"bearer {KEY}", f"Basic {KEY}", "Bearer schlüssel"])
@pytest.mark.parametrize(("method", "path"), [("POST", "score"), ("GET", "models"), ("GET", "capabilities")])
def test_every_v1_route_is_401_without_the_key(server, method, path, given):
    headers = {"authorization": given.encode("latin-1")}
    answer = httpx2.request(method, f"{server.url}/v1/{path}", headers=headers, trust_env=False, verify=PLAIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")


def test_an_unknown_route_has_the_same_error_shape(server):
    answer = httpx2.get(f"{server.url}/v2/none", trust_env=False, verify=PLAIN)
    assert answer.status_code == 404
    assert set(answer.json()["error"]) == {"message", "type", "code", "param", "request_id", "retryable"}


def test_a_request_id_that_could_smuggle_anything_is_replaced(server):
    answer = post(server, plain(), **{"x-request-id": "a b/../c"})
    assert answer.headers["x-request-id"] != "a b/../c"
    assert answer.status_code == 200


async def test_the_client_turns_refusals_into_the_right_errors(server):
    async with aclosing(TeacherClient(endpoint(server.url, key=KEY))) as client:
        able = await client.capabilities()
        other = TeacherIdentity(name="tiny", revision=able.revision, tokenizer_fingerprint="another")
        with pytest.raises(TokenizerMismatch):
            await client.score([item()], Ask(), other)
        with pytest.raises(TeacherRefused, match=r"items\[0\].completion_ids"):
            await client.score([item(completion=(VOCABULARY,))], Ask(), able.identity)
    async with aclosing(TeacherClient(endpoint(server.url, key="wrong"))) as client:
        with pytest.raises(TeacherRefused, match="401"):
            await client.capabilities()


# ------------------------------------------------------------------------------------------------- load and life


def heavy() -> bytes:
    """Enough work to be still at it when a signal arrives."""
    items = [item(str(n), context=[n] * 100, completion=[5] * 400) for n in range(64)]
    return encode_request(request(*items, ask=Ask(top_k=16, entropy=True)), JSON)


def test_the_watching_routes_need_no_key_and_count_the_tokens(server):
    before = metric(server, "teacher_scored_tokens_total")
    assert post(server, plain()).status_code == 200
    assert metric(server, "teacher_scored_tokens_total") == before + 4
    assert metric(server, "teacher_score_seconds_count") > 0
    assert metric(server, 'teacher_requests_total{status="401"}') > 0
    assert httpx2.get(f"{server.url}/readyz", trust_env=False, verify=PLAIN).status_code == 200


def metric(server: ServerProcess, name: str) -> float:
    lines = httpx2.get(f"{server.url}/metrics", trust_env=False, verify=PLAIN).text.splitlines()
    (value,) = [line.rsplit(" ", 1)[1] for line in lines if line.rsplit(" ", 1)[0] == name]
    return float(value)


def wait_until(condition: Any, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_sigterm_answers_what_was_accepted_and_leaves_no_process(folder):
    with teacher_server(folder) as running:
        connection = socket.create_connection(running.url.removeprefix("http://").split(":"), timeout=20)
        body = heavy()
        connection.sendall(
            f"POST /v1/score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: {JSON}\r\n"
            f"Accept: {SAFETENSORS}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_until(lambda: metric(running, "teacher_queue_tokens") > 0, seconds=10)
        running.process.send_signal(signal.SIGTERM)
        assert connection.recv(64).startswith(b"HTTP/1.1 200")
        connection.close()
        assert running.process.wait(timeout=20) == 0


def test_the_server_ends_with_the_process_that_started_it(folder):
    launcher = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-m', 'teacher_server', {str(folder)!r}, '--exit-with-parent'],"
        " stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)\n"
        "print(child.stdout.readline(), flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", launcher]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        ready = json.loads(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not is_running(ready["pid"]), seconds=20)
    assert not is_running(ready["pid"])


def is_running(pid: int) -> bool:
    """A process that has ended but was not yet collected by its new parent does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------------ starting badly


def run_server(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, variables = [sys.executable, "-m", "teacher_server", *arguments], {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=variables, check=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--key-env", "NOT_SET_ANYWHERE"], "holds no key"),
        (["--queue-tokens", "10"], "never be admitted"),
        (["--max-items", "0"], "above 0"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(folder, options, words):
    ended = run_server(str(folder), *options)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_missing_model_folder_is_one_line_and_exit_code_2(tmp_path):
    ended = run_server(str(tmp_path / "nowhere"), "--key-env", "TEACHER_KEY", TEACHER_KEY=KEY)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"teacher_server: {tmp_path}/nowhere: no such model folder\n"
