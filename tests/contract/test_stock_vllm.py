"""A stock vLLM server, unchanged, as a teacher that scores and as one that writes. One server for the whole file.

Its folder asks for a temperature of 0.5, which must not touch a score.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from potstill.algebra.objective import Tier
from potstill.errors import TeacherRefused, TokenizerMismatch
from potstill.teachers.echoing import EchoScorer
from potstill.teachers.vllm import VllmScorer
from potstill.teachers.writer import ChatWriter
from potstill.tokenization import load_tokenizer, render
from potstill.types import FinishReason, Message, ScoreStatus, TeacherScores
from potstill.wire import Ask, ScoreItem
from tests.builders_teacher import item
from tests.endpoints import Exact, endpoint
from tests.plain import PLAIN
from tests.ports import free_port
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer

TOLERANCE = 2e-5  # nats, against a float32 forward pass of transformers
MAX_LOGPROBS = 12
CONTEXT = 256
READY_S = 120
MESSAGES = (Message(role="user", content="12 + 9 = ?"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_tiny_model(tmp_path_factory.mktemp("stock") / "tiny", seed=5)
    (made / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.5}))
    return made


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"),
        *("--max-model-len", str(CONTEXT), "--max-logprobs", str(MAX_LOGPROBS), "--enforce-eager"),
        *("--kv-cache-memory-bytes", str(1 << 26), "--max-num-seqs", "16"),
    ]
    quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(command, env={**os.environ, **quiet}, start_new_session=True)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its own session: the server and the processes it made
        process.wait(30)


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "vLLM ended before it was ready"
        try:
            if httpx2.get(f"{url}/health", trust_env=False, verify=PLAIN).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"vLLM was not ready within {READY_S} s")


@pytest.fixture(scope="module")
def exact(folder: Path) -> Exact:
    return Exact(folder)


def vllm_teacher(url: str, folder: Path) -> VllmScorer:
    return VllmScorer(endpoint(url, deadline_s=30.0), model="tiny", revision="r1", tokenizer=folder)


def openai_teacher(url: str, folder: Path) -> EchoScorer:
    return EchoScorer(
        endpoint(url, deadline_s=30.0), model="tiny", revision=None, tokenizer=folder, context_length=CONTEXT
    )


TEACHERS = {"vllm": vllm_teacher, "openai": openai_teacher}


def some_items() -> list[ScoreItem]:
    """Of many lengths; the last two read a context of the teacher's own."""
    random = np.random.default_rng(0)

    def some(length: int) -> list[int]:
        return random.integers(0, VOCABULARY, length).tolist()

    items = [
        item(f"i{n}", context=some(p), completion=some(t)) for n, (p, t) in enumerate(((1, 1), (7, 30), (140, 60)))
    ]
    items.append(item("ids", context=some(3), completion=some(20), teacher_context=some(50)))
    return [*items, item("messages", context=some(3), completion=some(20), messages=MESSAGES)]


def context_of(asked: ScoreItem) -> list[int]:
    if asked.teacher_messages is not None:
        return render(tiny_tokenizer(), asked.teacher_messages)
    return (asked.context_ids if asked.teacher_context_ids is None else asked.teacher_context_ids).tolist()


def check_scores(scores: TeacherScores, wanted: np.ndarray, completion: np.ndarray, top_k: int) -> None:
    """Against log-probs [T, V] of a forward pass."""
    assert scores.status == ScoreStatus.OK
    np.testing.assert_allclose(scores.sampled, wanted[np.arange(len(wanted)), completion], atol=TOLERANCE)
    if top_k:
        best = np.argsort(-wanted, axis=1)[:, :top_k]
        np.testing.assert_array_equal(scores.topk_ids, best)
        np.testing.assert_allclose(scores.topk_logprobs, np.take_along_axis(wanted, best, 1), atol=TOLERANCE)
        left = 1 - np.exp(np.take_along_axis(wanted, best, 1)).sum(axis=1)
        np.testing.assert_allclose(scores.topk_tail, np.log(left), atol=1e-3)


@pytest.mark.parametrize("name", TEACHERS)
@pytest.mark.parametrize("top_k", [0, 1, MAX_LOGPROBS])
async def test_scores_equal_a_float32_forward_pass(name: str, top_k: int, url: str, folder: Path, exact: Exact):
    items, teacher = some_items(), TEACHERS[name](url, folder)
    scores = await teacher.score(items, Ask(top_k=top_k), None)
    await teacher.aclose()
    for asked, one in zip(items, scores, strict=True):
        check_scores(one, exact.logprobs(context_of(asked), asked.completion_ids), asked.completion_ids, top_k)


@pytest.mark.parametrize("name", TEACHERS)
async def test_the_server_says_how_much_it_gives(name: str, url: str, folder: Path):
    teacher = TEACHERS[name](url, folder)
    able = await teacher.capabilities()
    assert (able.tier, able.max_top_k, able.context_length) == (Tier.TOPK, MAX_LOGPROBS, CONTEXT - 1)
    assert able.revision == {"vllm": "r1", "openai": "unversioned"}[name]
    full = item("full", context=[1], completion=[2] * (CONTEXT - 2))
    (scores,) = await teacher.score([full], Ask(), able.identity)
    assert scores.status == ScoreStatus.OK
    with pytest.raises(TeacherRefused, match="256 tokens; tiny reads 255"):
        await teacher.score([item("long", context=[1, 1], completion=[2] * (CONTEXT - 2))], Ask(), None)
    with pytest.raises(TeacherRefused, match="top_k is 13; tiny gives 12"):
        await teacher.score([full], Ask(top_k=MAX_LOGPROBS + 1), None)
    await teacher.aclose()


async def test_ids_of_the_callers_choice_need_another_runner_than_a_cpu_has(url: str, folder: Path):
    teacher = vllm_teacher(url, folder)
    with pytest.raises(TeacherRefused, match="VLLM_USE_V2_MODEL_RUNNER"):
        await teacher.score([item(token_ids=[[1], [2], [3]])], Ask(num_ids=1), None)
    await teacher.aclose()


async def test_a_tokenizer_that_is_not_the_servers_is_found_out(url: str, tmp_path: Path):
    other = tmp_path / "other"
    save_tiny_model(other, seed=5)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert load_tokenizer(other).encode("a") == [vocabulary["a"]]
    teacher = vllm_teacher(url, other)
    with pytest.raises(TokenizerMismatch, match="name a copy of its own tokenizer"):
        await teacher.capabilities()
    await teacher.aclose()


@pytest.mark.parametrize("local", [False, True])
async def test_it_writes_what_it_is_asked_for(local: bool, url: str, folder: Path):
    writer = ChatWriter(endpoint(f"{url}/v1", deadline_s=30.0), model="tiny", tokenizer=folder if local else None)
    first, again, other = [
        await writer.write(MESSAGES, max_tokens=24, temperature=1.0, seed=seed) for seed in (1, 1, 2)
    ]
    await writer.aclose()
    assert first == again
    assert first.text != other.text
    assert first.tokens_in == len(render(tiny_tokenizer(), MESSAGES))
    assert (first.tokens_out == 24) == (first.finish_reason is FinishReason.LENGTH)
