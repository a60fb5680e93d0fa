"""POST /v1/completions as OpenAI's own client meets it, and what of it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from potstill.codec import JSON
from teacher_server.app import create_app
from teacher_server.batching import ScoringQueue
from teacher_server.engine import ScoringTeacher
from teacher_server.limits import Limits
from teacher_server.transformers_backbone import TransformersBackbone
from tests.builders_teacher import KEY
from tests.plain import PLAIN
from tests.served import serving
from tests.tiny_models import VOCABULARY, save_tiny_model, tiny_tokenizer

TOLERANCE = 1e-4  # nats
TEXT = "12 + 9 = 21"
IDS = tiny_tokenizer().encode(TEXT)  # one per byte


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("openai") / "tiny", seed=5)


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    teacher = ScoringTeacher(TransformersBackbone(folder, dtype="float32"), folder, name="tiny")
    queue = ScoringQueue(teacher.score, capacity=10_000, batch_tokens=1000, window_s=0.0)
    limits = Limits(max_items=4, max_tokens=2000, max_top_k=8, queue_tokens=10_000, max_json_numbers=8000)
    with serving(create_app(teacher, queue, limits, KEY)) as served:
        yield served


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def exact(folder: Path) -> np.ndarray:
    """[tokens, vocabulary]: row t is the distribution after TEXT's first t + 1 tokens; float64, no batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([IDS])).logits[0], -1).numpy()


def test_echo_with_logprobs_gives_every_prompt_token_its_own_and_the_best(client, exact):
    answer = client.completions.create(model="tiny", prompt=TEXT, max_tokens=0, echo=True, logprobs=3)
    (choice,) = answer.choices
    assert (choice.index, choice.text, choice.finish_reason) == (0, TEXT, "length")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "tiny"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (11, 0, 11)
    assert choice.logprobs.tokens == list(TEXT)
    assert choice.logprobs.text_offset == list(range(len(TEXT)))
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    wanted = exact[np.arange(len(IDS) - 1), IDS[1:]]
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], wanted, atol=TOLERANCE)
    for place, top in enumerate(choice.logprobs.top_logprobs[1:]):
        assert top[TEXT[place + 1]] == pytest.approx(wanted[place], abs=TOLERANCE)
        assert max(top.values()) == pytest.approx(exact[place].max(), abs=TOLERANCE)
        assert len(top) <= 4


def test_the_one_token_is_the_most_probable_and_its_logprob_is_true(client, exact):
    answer = client.completions.create(model="tiny", prompt=TEXT, max_tokens=1, logprobs=2, temperature=0)
    best = int(exact[-1].argmax())
    (choice,) = answer.choices
    assert choice.text == tiny_tokenizer().decode([best])
    assert choice.logprobs.token_logprobs == [pytest.approx(exact[-1, best], abs=TOLERANCE)]
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (1, 12)


def test_echo_with_one_token_has_the_prompt_and_then_the_token(client, exact):
    answer = client.completions.create(model="tiny", prompt=IDS, max_tokens=1, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == 12
    assert choice.text.startswith(TEXT)
    assert choice.logprobs.token_logprobs[-1] == pytest.approx(exact[-1].max(), abs=TOLERANCE)
    assert all(len(top) == 1 for top in choice.logprobs.top_logprobs[1:])


def test_prompt_logprobs_are_vllms(client, exact):
    extra = {"prompt_logprobs": 2}
    answer = client.completions.create(model="tiny", prompt=IDS, max_tokens=1, extra_body=extra)
    first, *others = answer.choices[0].model_extra["prompt_logprobs"]
    assert first is None
    assert len(others) == len(IDS) - 1
    for row, token, entries in zip(exact, IDS[1:], others, strict=False):
        order = np.argsort(-row).tolist()
        assert set(entries) == {str(token), str(order[0]), str(order[1])}
        assert next(iter(entries)) == str(token)
        for name, entry in entries.items():
            rank = order.index(int(name)) + 1
            assert entry["logprob"] == pytest.approx(row[int(name)], abs=TOLERANCE)
            assert entry["rank"] == (rank if rank <= 2 else None)
            assert entry["decoded_token"] == tiny_tokenizer().decode([int(name)])


@pytest.mark.parametrize(
    ("prompt", "lengths"), [([TEXT, "7"], [11, 1]), ([IDS, IDS[:4], IDS[:1]], [11, 4, 1]), ([1, 2], [2])]
)
def test_several_prompts_are_choices_in_their_order(client, exact, prompt, lengths):
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=0, echo=True, logprobs=1)
    assert [choice.index for choice in answer.choices] == list(range(len(lengths)))
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == lengths
    assert answer.usage.prompt_tokens == sum(lengths)


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


async def test_requests_at_once_are_each_answered_their_own(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as asker:

        async def ask(number: int) -> bool:
            answer = await asker.completions.create(
                model="tiny", prompt=[number] * 5, max_tokens=0, echo=True, logprobs=0
            )
            return answer.choices[0].text == tiny_tokenizer().decode([number] * 5)

        assert all(await asyncio.gather(*(ask(number) for number in range(40, 60))))


# -------------------------------------------------------------------------------------------------------- refusals


def post(url: str, **changes: Any) -> httpx2.Response:
    body = {"model": "tiny", "prompt": [1, 2], "max_tokens": 0} | changes
    headers = {"authorization": f"Bearer {KEY}", "content-type": JSON}
    return httpx2.post(f"{url}/v1/completions", json=body, headers=headers, trust_env=False, verify=PLAIN)


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"max_tokens": 2}, 400, "max_tokens"),
        ({"max_tokens": None}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"stream": True}, 400, "stream"),
        ({"n": 2}, 400, "n"),
        ({"best_of": 3}, 400, "best_of"),
        ({"temperature": 0.7}, 400, "temperature"),
        ({"top_p": 0.9}, 400, "top_p"),
        ({"stop": ["\n"]}, 400, "stop"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
        ({"logit_bias": {"5": -100}}, 400, "logit_bias"),
        ({"guided_json": {}}, 400, "guided_json"),
        ({"logprobs": 9}, 400, "logprobs"),
        ({"logprobs": -1}, 400, "logprobs"),
        ({"prompt_logprobs": 9}, 400, "logprobs"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [[1], []]}, 400, "prompt"),
        ({"prompt": [VOCABULARY]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": [1] * 513}, 400, "prompt"),
        ({"prompt": ["a", 1]}, 400, "prompt"),
        ({"prompt": ["a"] * 5}, 413, "prompt"),
        ({"prompt": [[1] * 400] * 4, "echo": True, "logprobs": 8}, 413, "prompt"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_what_this_server_does_not_do_is_refused_by_name(url, changes, status, param):
    answer = post(url, **changes)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert answer.json()["error"]["retryable"] is False


def test_openais_client_turns_refusals_into_its_own_errors(url, client):
    with pytest.raises(openai.BadRequestError, match="does not write"):
        client.completions.create(model="tiny", prompt=TEXT, max_tokens=16)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt=TEXT, max_tokens=0)
    locked = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        locked.completions.create(model="tiny", prompt=TEXT, max_tokens=0)
