"""The teacher server with vLLM behind it, and its backbone, against a float32 forward pass of transformers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from potstill.algebra.objective import Tier
from potstill.codec import SAFETENSORS
from potstill.errors import ConfigError, WeightsError
from potstill.teachers.server import TeacherClient
from potstill.tokenization import render
from potstill.types import Message, ScoreStatus, TeacherScores
from potstill.wire import Ask, ScoreItem
from teacher_server.__main__ import VLLM_ENVIRONMENT
from teacher_server.batching import Job
from tests.builders_teacher import KEY, ServerProcess, item, teacher_server
from tests.endpoints import Exact, endpoint
from tests.plain import PLAIN
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer

TOLERANCE = 2e-5  # nats, against a float32 forward pass of transformers
BATCH_TOKENS = 128  # of one step of vLLM: most of these texts are read in several
MESSAGES = (Message(role="user", content="12 + 9 = ?"), Message(role="system", content="The answer is 21."))
EVERYTHING = Ask(top_k=5, num_ids=6, entropy=True)
SIZES = ((1, 1), (5, 40), (60, 3), (200, 150), (30, 30))
HIDDEN = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("teacher") / "tiny"
    return save_tiny_model(made, seed=3, vocab_size=VOCABULARY + 5, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def exact(folder: Path) -> Exact:
    return Exact(folder)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    options = ("--engine", "vllm", "--batch-tokens", str(BATCH_TOKENS), "--accept-weights")
    with teacher_server(folder, *options) as running:
        yield running


def some_items() -> list[ScoreItem]:
    """Of many lengths; the last two read a context of the teacher's own."""
    random = np.random.default_rng(0)

    def some(name: str, context: int, completion: int, **more: Any) -> ScoreItem:
        return item(
            name,
            context=random.integers(0, VOCABULARY, context).tolist(),
            completion=random.integers(0, VOCABULARY, completion).tolist(),
            token_ids=[random.permutation(VOCABULARY)[: EVERYTHING.num_ids].tolist() for _ in range(completion)],
            **more,
        )

    items = [some(f"i{index}", *size) for index, size in enumerate(SIZES)]
    items.append(some("ids", 3, 20, teacher_context=random.integers(0, VOCABULARY, 90).tolist()))
    return [*items, some("messages", 3, 20, messages=MESSAGES)]


def context_of(asked: ScoreItem) -> list[int]:
    if asked.teacher_messages is not None:
        return render(tiny_tokenizer(), asked.teacher_messages)
    return (asked.context_ids if asked.teacher_context_ids is None else asked.teacher_context_ids).tolist()


def check_scores(scores: TeacherScores, wanted: np.ndarray, asked: ScoreItem) -> None:
    """Against log-probs [T, V] of a forward pass."""
    assert scores.status == ScoreStatus.OK
    best = np.argsort(-wanted[:, :VOCABULARY], axis=1)[:, : EVERYTHING.top_k]
    np.testing.assert_array_equal(scores.topk_ids, best)
    for found, ids in ((scores.sampled, asked.completion_ids[:, None]), (scores.topk_logprobs, best)):
        at = np.take_along_axis(wanted, ids, 1)
        np.testing.assert_allclose(found.reshape(at.shape), at, atol=TOLERANCE)
    np.testing.assert_allclose(scores.ids_logprobs, np.take_along_axis(wanted, asked.token_ids, 1), atol=TOLERANCE)
    for ids, tail in ((best, scores.topk_tail), (asked.token_ids, scores.ids_tail)):
        left = np.exp(wanted)
        np.put_along_axis(left, ids, 0.0, axis=1)
        np.testing.assert_allclose(tail, np.log(left.sum(axis=1)), atol=TOLERANCE)
    np.testing.assert_allclose(scores.entropy, -(np.exp(wanted) * wanted).sum(axis=1), atol=TOLERANCE)


async def test_the_server_scores_everything_as_a_float32_forward_pass_does(server: ServerProcess, exact: Exact):
    items = some_items()
    async with aclosing(TeacherClient(endpoint(server.url, key=KEY, deadline_s=60.0))) as client:
        able = await client.capabilities()
        assert (able.tier, able.context_length, able.hidden_size) == (Tier.FULL, 512, HIDDEN)
        together = await client.score(items, EVERYTHING, able.identity)
        alone = [(await client.score([one], EVERYTHING, None))[0] for one in reversed(items)]
    for asked, one, other in zip(items, together, reversed(alone), strict=True):
        wanted = exact.logprobs(context_of(asked), asked.completion_ids)
        check_scores(one, wanted, asked)
        check_scores(other, wanted, asked)


async def test_its_states_times_the_head_are_the_log_probs(server: ServerProcess, exact: Exact, folder: Path):
    asked = item(context=[7, 8], completion=list(range(40)))
    async with aclosing(TeacherClient(endpoint(server.url, key=KEY, deadline_s=60.0))) as client:
        (scores,) = await client.score([asked], Ask(hidden=HIDDEN), None)
    head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    states = torch.from_numpy(scores.hidden).view(torch.bfloat16).float()
    found = torch.log_softmax(states @ head.T, -1).numpy()
    np.testing.assert_allclose(found, exact.logprobs([7, 8], asked.completion_ids), atol=0.1)  # bfloat16 states


async def test_weights_that_are_pushed_to_the_server_are_scored_by(server: ServerProcess, folder: Path, tmp_path: Path):
    other = save_tiny_model(tmp_path / "other", seed=4, vocab_size=VOCABULARY + 5, tie_word_embeddings=True)
    headers = {"authorization": f"Bearer {KEY}", "content-type": SAFETENSORS}
    async with aclosing(TeacherClient(endpoint(server.url, key=KEY, deadline_s=60.0))) as client:
        for version, model in ((1, other), (2, folder)):
            body = save(load_file(model / "model.safetensors"), {"version": str(version)})
            url = f"{server.url}/v1/weights?version={version}"
            answer = httpx2.post(url, content=body, headers=headers, timeout=30, trust_env=False, verify=PLAIN)
            assert answer.status_code == 200
            asked = some_items()[1]
            (scores,) = await client.score([asked], EVERYTHING, None)
            check_scores(scores, Exact(model).logprobs(context_of(asked), asked.completion_ids), asked)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Any:
    os.environ.update(VLLM_ENVIRONMENT)
    from teacher_server.vllm_backbone import VllmBackbone

    return VllmBackbone(folder, dtype="float32", batch_tokens=BATCH_TOKENS, cache_bytes=1 << 20)


def jobs() -> list[Job]:
    random = np.random.default_rng(1)

    def job(context: int, completion: int) -> Job:
        ids = random.integers(0, VOCABULARY, context + completion).astype(np.int32)
        return Job(input_ids=ids[:-1], completion_ids=ids[context:], token_ids=None, ask=Ask(), seed=0)

    return [job(*size) for size in SIZES]


def check_states(backbone: Any, exact: Exact) -> None:
    for job, states in zip(jobs(), backbone.hidden_states(jobs()), strict=True):
        found = torch.log_softmax((states @ backbone.head.T).double(), -1).numpy()
        context = job.input_ids[: job.context_length].tolist()
        np.testing.assert_allclose(found, exact.logprobs(context, job.completion_ids), atol=TOLERANCE)


def test_new_weights_replace_all_of_the_old_ones(backbone: Any, exact: Exact, folder: Path, tmp_path: Path):
    other = save_tiny_model(tmp_path / "other", seed=4, vocab_size=VOCABULARY + 5, tie_word_embeddings=True)
    check_states(backbone, exact)
    backbone.load_weights(load_file(other / "model.safetensors"))
    check_states(backbone, Exact(other))
    backbone.load_weights(load_file(folder / "model.safetensors"))
    check_states(backbone, exact)


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(backbone: Any, exact: Exact, folder: Path):
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    foreign = {
        "missing": {key: value for key, value in weights.items() if key != name},
        "unknown": weights | {"model.extra": weights[name]},
        "the model's is": weights | {name: weights[name][:-1]},
    }
    for message, offered in foreign.items():
        with pytest.raises(WeightsError, match=message):
            backbone.load_weights(offered)
    check_states(backbone, exact)


class Processor(torch.nn.Module):
    def __init__(self, scale: float, soft_cap: float | None):
        super().__init__()
        self.scale, self.soft_cap = scale, soft_cap


class Model(torch.nn.Module):
    """As vLLM's models are, with something done to logits that is more than a product with the head."""

    def __init__(self, *, scale: float = 1.0, soft_cap: float | None = None, divide: float = 1.0, bias: bool = False):
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)
        self.logits_processor: Any = Processor(scale, soft_cap)
        self.divide = divide
        self.bias = torch.zeros(8) if bias else None

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(None, states / self.divide, self.bias)


@pytest.mark.parametrize("changes", [{"scale": 0.5}, {"soft_cap": 30.0}, {"divide": 2.0}, {"bias": True}])
def test_a_model_whose_logits_are_more_than_the_heads_is_refused(backbone: Any, changes: dict[str, Any]):
    from teacher_server.vllm_backbone import check_head

    check_head(Model())
    with pytest.raises(ConfigError, match="changes its logits before or after the head"):
        check_head(Model(**changes))


def test_a_model_without_a_language_head_is_refused(backbone: Any):
    from teacher_server.vllm_backbone import check_head

    with pytest.raises(ConfigError, match="--engine transformers"):
        check_head(torch.nn.Linear(8, 8))
