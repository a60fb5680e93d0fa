"""ChatWriter against a scripted endpoint that answers in the JSON of vLLM's chat and completion responses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from potstill.errors import AlignmentError, NoAnswer, TeacherRefused, TeacherUnavailable
from potstill.teachers.writer import ChatWriter, Written, versioned
from potstill.tokenization import render
from potstill.types import FinishReason, Message
from tests.endpoints import Said, Scripted, endpoint, scripted
from tests.tiny_models import save_tiny_model, tiny_tokenizer

MESSAGES = (Message(role="system", content="Be brief."), Message(role="user", content="12 + 9 = ?"))
USAGE = {"prompt_tokens": 17, "total_tokens": 20, "completion_tokens": 3, "prompt_tokens_details": None}


def chat(*, finish_reason: str | None = "stop", usage: Any = USAGE, **message: Any) -> Said:
    said = {"role": "assistant", "content": "21", "refusal": None, "reasoning": None} | message
    choice = {"index": 0, "message": said, "logprobs": None, "finish_reason": finish_reason, "stop_reason": None}
    return 200, {"id": "chatcmpl-1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": usage}


def completion(text: str) -> Said:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    return 200, {"id": "cmpl-1", "object": "text_completion", "model": "m", "choices": [choice], "usage": USAGE}


async def write(answer: Said, tokenizer: Path | None = None) -> tuple[Written, Scripted]:
    with scripted(lambda path, asked: answer) as server:
        writer = ChatWriter(endpoint(f"{server.url}/v1", deadline_s=1.0), model="m", tokenizer=tokenizer)
        try:
            return await writer.write(MESSAGES, max_tokens=50, temperature=0.7, seed=3), server
        finally:
            await writer.aclose()


async def test_a_chat_is_sent_whole_with_every_sampling_parameter():
    written, server = await write(chat())
    assert written == Written(text="21", finish_reason=FinishReason.STOP, tokens_in=17, tokens_out=3)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "12 + 9 = ?"}]
    sent = {
        "model": "m",
        "messages": messages,
        "max_tokens": 50,
        "temperature": 0.7,
        "seed": 3,
        "n": 1,
        "stream": False,
    }
    assert server.asked == [("/v1/chat/completions", sent)]


async def test_with_a_tokenizer_the_prompt_is_rendered_here(tmp_path: Path):
    written, server = await write(completion("21\n"), save_tiny_model(tmp_path / "tiny", seed=0))
    assert (written.text, written.finish_reason) == ("21\n", FinishReason.LENGTH)
    ((path, asked),) = server.asked
    assert path == "/v1/completions"
    assert asked["prompt"] == render(tiny_tokenizer(), MESSAGES)
    assert (asked["max_tokens"], asked["temperature"]) == (50, 0.7)


@pytest.mark.parametrize("usage", [None, {"total_tokens": 20}])
async def test_tokens_that_are_not_counted_are_none(usage: Any):
    written, _ = await write(chat(usage=usage))
    assert (written.tokens_in, written.tokens_out) == (None, None)


async def test_what_is_no_answer_says_what_it_may_charge_for():
    with pytest.raises(NoAnswer) as caught:
        await write(chat(content=""))
    assert caught.value.tokens == (17, 3)
    assert copy.copy(caught.value).tokens == (17, 3)  # Ray copies errors by their args


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chat(finish_reason="content_filter"), "ended with 'content_filter'"),
        (chat(finish_reason="tool_calls", content=None), "ended with 'tool_calls'"),
        (chat(finish_reason=None), "ended with 'None'"),
        (chat(refusal="I cannot help with that.", content=None), "ended with 'refusal'"),
        (chat(content=""), "wrote nothing before it ended with 'stop'"),
        (chat(content=None, finish_reason="length", reasoning="hm"), "raise max_tokens"),
        ((200, {"choices": [], "usage": USAGE}), "gave 0 answers"),
        ((400, {"error": {"message": "filtered", "type": "invalid", "code": "content_filter"}}), "400: filtered"),
        ((401, {"error": {"message": "no such key", "type": "auth", "param": None, "code": 401}}), "401: no such key"),
        ((404, {"detail": "Not Found"}), "404: Not Found"),
    ],
)
async def test_what_is_no_answer_is_a_refusal_that_says_why(answer: Said, message: str):
    with pytest.raises(TeacherRefused, match=message):
        await write(answer)


async def test_tokens_that_the_endpoint_does_not_count_are_unknown_and_not_0():
    written, _ = await write(chat(usage=None))
    assert (written.tokens_in, written.tokens_out) == (None, None)


async def test_a_server_that_breaks_is_unavailable_and_one_that_says_something_else_is_misaligned():
    with pytest.raises(TeacherUnavailable, match="503"):
        await write((503, {"error": {"message": "overloaded"}}))
    with pytest.raises(AlignmentError, match="another shape"):
        await write((200, {"output": "21"}))


async def test_an_answer_far_longer_than_it_was_allowed_is_not_read():
    with pytest.raises(AlignmentError, match="longer than"):
        await write(chat(content="x" * 2_000_000))


@pytest.mark.parametrize(
    ("written", "called"),
    [
        ("https://api.example.com", "https://api.example.com/v1"),
        ("https://api.example.com/", "https://api.example.com/v1"),
        ("https://api.example.com/v1", "https://api.example.com/v1"),
        ("https://api.example.com/v1beta/openai", "https://api.example.com/v1beta/openai"),
        ("https://example.com/very/own", "https://example.com/very/own/v1"),
    ],
)
def test_an_apis_version_is_written_or_left_out(written, called):
    assert versioned(written) == called
